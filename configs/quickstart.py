"""LoRA and BaLoRA on school mathematics that the shipped base has never seen: the first thing to run.

Command:   balora-jax run configs/quickstart.py        (or: make quickstart)
Time:      about 2 minutes on two CPU cores
Model:     school-math, which ships with the package: 0.9 M parameters, pre-trained on 20 easy modules of arithmetic,
           numbers, comparison, measurement, algebra and polynomials
Data:      five modules that were not among them
Expected:  evaluation loss from 3.4 to below 0.9 for both methods, with no clear difference between them; BaLoRA's
           relative balancing gap at rounding, LoRA's at some tenths. experiments/quickstart has the recorded outcome.
"""

from balora_jax.training import AdapterSettings, Config, DataSettings, TrainingSettings

config = Config(
    name="quickstart",
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
        eval_examples=120,
        length=128,
    ),
    training=TrainingSettings(
        steps=100,
        batch_size=8,
        eval_every=25,
        checkpoint_every=50,
        members_at_once=1,  # on a CPU the runs are faster one after the other: 45 against 70 ms a step
    ),
)

sweep = {
    "method": ("lora", "balora"),
    "optimizer.learning_rate": (2e-3, 5e-3, 1.25e-2),
    "seed": (0, 1),
}
