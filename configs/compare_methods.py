"""Every method on the shipped model, rank 8: a grid of four learning rates each, five seeds.

Command:   balora-jax run configs/compare_methods.py
           one method or one cell: add --method olora, --optimizer.learning-rate 0.001, --seed 3
Time:      about two hours on two CPU cores
Model:     school-math, as in quickstart.py
Data:      the five modules of quickstart.py; members of one seed see the same rows in the same order
Expected:  experiments/comparison has the recorded outcome.
"""

from balora_jax.data.recipes import DataSettings
from balora_jax.training import AdapterSettings, Config, TrainingSettings

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
