from balora_jax.data.recipes import DataSettings
from balora_jax.training import AdapterSettings, Config, TrainingSettings

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
        eval_examples=250,
        length=128,
    ),
    training=TrainingSettings(steps=150, batch_size=8, eval_every=25, checkpoint_every=50),
)

sweep = {
    "method": ("lora", "balora"),
    "optimizer.learning_rate": (1e-3, 3e-3, 1e-2, 3e-2),
    "seed": (0, 1),
}
