"""Nine methods on MetaMathQA, Qwen2.5-3B, rank 8: the grid of learning rates and scales.

Command:   balora-jax run configs/paper/table5.py --method balora
           the other methods: without --method; a part of it: add --optimizer.learning-rate 1e-4, --seed 0 (and
           --data.path COPY)
           our BaLoRA: --method balora --balance.gauge svd --balance.transport
Item:      table 5 of arXiv 2605.31484
Model:     Qwen/Qwen2.5-3B from the hub, or --model.path FOLDER
Data:      MetaMathQA, 100,000 questions of 395,000; 1,000 others are held out
Expected:  BaLoRA's evaluation loss is 0.144 in the paper; its other numbers are not at hand. Runs here also report
           how many answers are right
Hardware:  one GPU of 80 GB; `balora-jax estimate` prints the memory: the 100 runs of a method are trained together, one
           after the other at each step, and each adds its state, 0.14 GB. Not run here: the authors gave each run two
           H100 and at most 20 hours
Time:      reckoned, for an H100 at 40 % of its peak and six operations a parameter and token: at most 1.3
           hours a run
Chosen:    one epoch, counted in rows; one seed (--seed 1 --output ANOTHER for more). LoRA-RITE and
           RefLoRA as in table1.py
Differs:   the base is bfloat16, the authors load it in float32 (--model.dtype float32 --model.param-dtype float32).
           BaLoRA is theirs: raw SVD factors, Adam's moments as they are. Rows are not packed, so that a step has 32
           examples as theirs; --data.packing with fewer steps is faster
"""

import numpy as np

from balora_jax.training import AdapterSettings, BalanceSettings, Config, DataSettings, ModelSettings, TrainingSettings

config = Config(
    name="table5",
    model=ModelSettings(path="Qwen/Qwen2.5-3B", dtype="bfloat16", param_dtype="bfloat16", remat=True),
    adapter=AdapterSettings(rank=8, alpha=8.0),
    balance=BalanceSettings(gauge="raw_svd", transport=False, least_ratio=0.0),
    data=DataSettings(recipe="metamathqa", train_examples=100_000, eval_examples=1000, length=1024, packing=False),
    training=TrainingSettings(
        steps=100_000 // 32,
        batch_size=8,
        accumulate=4,
        eval_every=500,
        eval_batch_size=8,
        checkpoint_every=500,
        keep_checkpoints=1,
        members_at_once=1,
    ),
)

METHODS = ("lora", "balora", "dora", "olora", "lora_rite", "reflora_drawn", "loro", "lora_ga", "balora_ga")
RATES = tuple(float(f"{rate:.4g}") for rate in np.logspace(-6, -2, 10))
A_SCALINGS = tuple(float(f"{a:.4g}") for a in np.logspace(-2, 2, 10))  # the scale of the adapters is A_scaling squared


AS_RUN: dict[str, dict] = {  # by the trainer's defaults: no decay, and clipping at 1 before the optimizer
    "lora_rite": {"optimizer.weight_decay": (0.0,), "options": ({"clip_first": 1.0},)},
    "reflora_drawn": {"optimizer.weight_decay": (0.0,)},
}


def scales(method: str) -> dict:
    """The grid of A_scaling; LoRA-GA scales its start by it, not its adapters."""
    if method.endswith("_ga"):
        return {"options": tuple({"gamma": a**-2} for a in A_SCALINGS)}
    return {"adapter.alpha": tuple(config.adapter.rank * a**2 for a in A_SCALINGS)}


sweep = [
    {"method": (method,), **scales(method), "optimizer.learning_rate": RATES, "seed": (0,)} | AS_RUN.get(method, {})
    for method in METHODS
]
