"""Fine-tunes Qwen2.5-0.5B on Alpaca with BaLoRA, on one GPU: the shortest way to an adapter of one's own.

Command:   balora-jax run configs/alpaca_qwen.py
           other models and data: --model.path FOLDER, --data.recipe openhermes, --data.path FILE
           the adapter for vLLM, transformers, ...: balora-jax export runs/alpaca_qwen adapter
Model:     Qwen/Qwen2.5-0.5B from the hub, with the tokenizer of its instruct model, whose end token ends a turn
Data:      Alpaca, 500 of its 52,002 rows held out; several conversations share a row of 1,024 tokens
Expected:  the evaluation loss falls below the base's within the first hundred steps; not run here
Hardware:  one GPU with 4 GB free; `balora-jax estimate configs/alpaca_qwen.py` prints the memory before anything is
           downloaded but config.json
Time:      reckoned, for an H100 at 40 % of its peak and six operations a parameter and token: two minutes and the
           compiling
Chosen:    1,000 steps of 16 rows, about two epochs of some eight million tokens
"""

from balora_jax.training import (
    AdapterSettings,
    Config,
    DataSettings,
    ModelSettings,
    OptimizerSettings,
    TrainingSettings,
)

config = Config(
    name="alpaca_qwen",
    method="balora",
    model=ModelSettings(path="Qwen/Qwen2.5-0.5B", dtype="bfloat16", param_dtype="bfloat16", remat=True),
    adapter=AdapterSettings(rank=16, alpha=32.0),
    optimizer=OptimizerSettings(learning_rate=3e-4, schedule="cosine"),
    data=DataSettings(
        recipe="alpaca", tokenizer="Qwen/Qwen2.5-0.5B-Instruct", train_examples=None, eval_examples=500, length=1024
    ),
    training=TrainingSettings(steps=1000, batch_size=8, accumulate=2, eval_every=100, eval_batch_size=16),
)
