"""Does more rank help? Six methods at ranks 16 to 128, a grid of learning rates each, three seeds.

Command:   balora-jax run configs/rank_ablation.py
           a part of it: add --adapter.rank 64, --method dora, --optimizer.learning-rate 0.001, --seed 2
Time:      about two hours on two CPU cores
Rank 8:    the same runs, with five seeds, are part of compare_methods.py
Model:     school-math, as in quickstart.py; its layers are 160 and 480 wide, so rank 128 is nearly full
Data:      the five modules of quickstart.py; members of one seed see the same rows in the same order
Item:      figure 5 and table 7 of arXiv 2605.31484, there Qwen2.5-3B on a billion tokens of DeepMind Mathematics: LoRA
           goes from 1.035 at rank 8 to 1.030 at rank 128, BaLoRA from 1.026 to 1.014
Expected:  experiments/comparison has the recorded outcome.
Differs:   model, data and length of training are smaller by orders of magnitude; the scale is 2 at every rank
"""

from balora_jax.training import AdapterSettings, Config, DataSettings, TrainingSettings

config = Config(
    name="rank_ablation",
    adapter=AdapterSettings(rank=16, alpha=32.0),
    data=DataSettings(
        modules=(
            "algebra__linear_2d",
            "arithmetic__add_or_sub_in_base",
            "calculus__differentiate",
            "polynomials__add",
            "polynomials__expand",
        ),
        difficulty=(1, 2),
        train_examples=20_000,
        eval_examples=100,
        length=128,
    ),
    training=TrainingSettings(
        steps=100,
        batch_size=4,
        eval_every=50,
        checkpoint_every=100,
        members_at_once=1,
    ),
)

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
LOWER_FROM = {"olora": (1, 1), "lora_rite": (32, 64)}
"""Ranks from which on the four rates of a method begin half a decade lower than at 0.001; 64 for all others."""


def rates(method: str, rank: int) -> tuple[float, ...]:
    """Four learning rates, half a decade apart."""
    first = RATES.index(1e-3) - sum(rank >= lower for lower in LOWER_FROM.get(method, (64,)))
    return RATES[first : first + 4]


# The scale alpha / rank is 2 at every rank; RefLoRA's plain first steps are 10 of 100, not 100.
sweep = [
    {
        "adapter.rank": (rank,),
        "adapter.alpha": (2.0 * rank,),
        "method": (method,),
        "options": ({"warmup_steps": 10.0} if method == "reflora" else {},),
        "optimizer.learning_rate": rates(method, rank),
        "seed": (0, 1, 2),
    }
    for rank in (128, 32, 16, 64)
    for method in ("lora", "balora", "dora", "olora", "reflora", "lora_rite")
]
