"""How much do learning rate and scale matter? Five methods on a grid of both.

Command:   balora-jax run configs/sensitivity.py
           a part of it: add --method dora, --adapter.alpha 16, --optimizer.learning-rate 0.001
Time:      about half an hour on two CPU cores
Model:     school-math, as in quickstart.py
Data:      the five modules of quickstart.py
Item:      figures 4, 8 and 10 of arXiv 2605.31484, there Llama-3.2-3B on Wikitext, learning rates from 1e-5 to 1e-2 and
           the root of the scale from 0.01 to 100
Expected:  experiments/comparison has the recorded outcome.
Differs:   model and data are smaller by orders of magnitude; one seed a cell
"""

from balora_jax.training import AdapterSettings, Config, DataSettings, TrainingSettings

config = Config(
    name="sensitivity",
    adapter=AdapterSettings(rank=8),
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
        eval_every=100,
        checkpoint_every=100,
        members_at_once=1,
    ),
)

SCALES = (0.25, 1.0, 4.0, 16.0)

sweep = {
    "method": ("lora", "balora", "olora", "lora_ga", "dora"),
    "adapter.alpha": tuple(config.adapter.rank * scale for scale in SCALES),
    "optimizer.learning_rate": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "seed": (0,),
}
