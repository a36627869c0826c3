"""Which balanced pair, and are Adam's moments carried along? Gauge x transport x rank against LoRA.

Command:   balora-jax run configs/gauges.py
Time:      about an hour and a half on two CPU cores
Model:     school-math, as in quickstart.py
Data:      the five modules of quickstart.py
Expected:  experiments/gauges has the recorded outcome and what follows from it.
"""

from balora_jax.training import AdapterSettings, Config, DataSettings, TrainingSettings

config = Config(
    name="gauges",
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
        steps=150,
        batch_size=8,
        eval_every=75,
        checkpoint_every=150,
        members_at_once=1,
    ),
)

runs = {"optimizer.learning_rate": (1e-3, 3e-3, 1e-2, 3e-2), "seed": (0, 1, 2, 3, 4)}
balanced = {"method": ("balora",), "balance.gauge": ("svd", "nearest", "symmetric"), "balance.transport": (False, True)}
raw = {"method": ("balora",), "balance.gauge": ("raw_svd",), "balance.transport": (False,)}

# The scale alpha / rank is 2 at every rank.
sweep = [
    {**{"adapter.rank": (rank,), "adapter.alpha": (2.0 * rank,)}, **methods, **runs}
    for rank in (8, 128, 32)
    for methods in ({"method": ("lora",)}, balanced, raw)
]
