"""Every method on the shipped model, rank 8: a grid of four learning rates each, five seeds.

Command:   balora-jax run configs/compare_methods.py
           one method or one cell: add --method olora, --optimizer.learning-rate 0.001, --seed 3
Time:      about an hour and a half on two CPU cores
Model:     school-math, as in quickstart.py
Data:      the five modules of quickstart.py; members of one seed see the same rows in the same order
Expected:  experiments/comparison has the recorded outcome.
Differs:   from the methods' defaults: RefLoRA's plain first steps are 10 of 100, not 100; LORO is exact every 20th step
"""

from balora_jax.methods import METHODS
from balora_jax.training import AdapterSettings, Config, DataSettings, TrainingSettings

config = Config(
    name="compare_methods",
    adapter=AdapterSettings(rank=8, alpha=16.0),
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
        eval_every=20,
        checkpoint_every=100,
        members_at_once=1,
    ),
)

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)
LEAST_RATES = {
    "full": 3e-4,
    "olora": 1e-4,
    "balora_olora": 3e-4,
    "rslora": 3e-4,
    "lora_plus": 3e-4,
    "pissa": 3e-4,
    "lora_ga": 3e-4,
    "balora_rslora": 3e-4,
    "balora_plus": 3e-4,
    "balora_pissa": 3e-4,
    "balora_ga": 3e-4,
    "adalora": 3e-3,
    "balora_gd": 1e-1,
    "scaled_gd": 3e-1,
}
"""Where a method's four rates begin, if not at 0.001: found with short runs of one seed."""

OPTIONS = {
    "reflora": {"warmup_steps": 10.0},
    "reflora_s": {"warmup_steps": 10.0},
    "loro": {"period": 20.0},
}


def rates(method: str) -> tuple[float, ...]:
    """Four learning rates from the method's least one on."""
    first = RATES.index(LEAST_RATES.get(method, 1e-3))
    return RATES[first : first + 4]


sweep = [
    {
        "method": (method,),
        "options": (OPTIONS.get(method, {}),),
        "optimizer.learning_rate": rates(method),
        "seed": (0, 1, 2, 3, 4),
    }
    for method in METHODS
    if method != "reflora_drawn"  # of the paper's configs
]
