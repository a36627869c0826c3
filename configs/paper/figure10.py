"""How much do learning rate and scale matter on Alpaca? Five methods, Qwen2.5-3B, rank 8, on a grid of both.

Command:   balora-jax run configs/paper/figure10.py
           the heat maps: python experiments/comparison/sensitivity.py runs/figure10 --output FOLDER
           a part of it: add --method balora, --optimizer.learning-rate 1e-4 (and --data.path COPY)
           our BaLoRA: --method balora --balance.gauge svd --balance.transport
Item:      figure 10 of arXiv 2605.31484
Model:     Qwen/Qwen2.5-3B from the hub, or --model.path FOLDER; the tokenizer is the instruct model's, as the authors',
           or --data.tokenizer FOLDER
Data:      Alpaca; 1,000 of its 52,002 rows are held out
Expected:  BaLoRA is good on a wider range of cells; its best loss is 1.350, LoRA's 1.352 at (3.594e-3, 0.0278)
Hardware:  one GPU of 80 GB; `balora-jax estimate` prints the memory: the 100 runs of a method are trained together, one
           after the other at each step, and each adds its state, 0.14 GB. Not run here
Time:      reckoned, for an H100 at 40 % of its peak and six operations a parameter and token: at most 0.7
           hours a run
Chosen:    one epoch, counted in rows; one seed; the grid is that of table 5, on which the best cells of table 1 lie
Differs:   as in table1.py: the base's dtype. BaLoRA is the authors': raw SVD factors, Adam's moments
           as they are
"""

import numpy as np

from balora_jax.training import AdapterSettings, BalanceSettings, Config, DataSettings, ModelSettings, TrainingSettings

config = Config(
    name="figure10",
    model=ModelSettings(path="Qwen/Qwen2.5-3B", dtype="bfloat16", param_dtype="bfloat16", remat=True),
    adapter=AdapterSettings(rank=8, alpha=8.0),
    balance=BalanceSettings(gauge="raw_svd", transport=False, least_ratio=0.0),
    data=DataSettings(
        recipe="alpaca",
        tokenizer="Qwen/Qwen2.5-3B-Instruct",
        train_examples=None,
        eval_examples=1000,
        length=1024,
        packing=False,
    ),
    training=TrainingSettings(
        steps=51_002 // 32,
        batch_size=8,
        accumulate=4,
        eval_every=500,
        eval_batch_size=8,
        checkpoint_every=500,
        keep_checkpoints=1,
        members_at_once=1,
    ),
)

METHODS = ("lora", "balora", "dora", "olora", "lora_ga")
RATES = tuple(float(f"{rate:.4g}") for rate in np.logspace(-6, -2, 10))
A_SCALINGS = tuple(float(f"{a:.4g}") for a in np.logspace(-2, 2, 10))  # the scale of the adapters is A_scaling squared


def scales(method: str) -> dict:
    """The grid of A_scaling; LoRA-GA scales its start by it, not its adapters."""
    if method.endswith("_ga"):
        return {"options": tuple({"gamma": a**-2} for a in A_SCALINGS)}
    return {"adapter.alpha": tuple(config.adapter.rank * a**2 for a in A_SCALINGS)}


sweep = [{"method": (method,), **scales(method), "optimizer.learning_rate": RATES, "seed": (0,)} for method in METHODS]
