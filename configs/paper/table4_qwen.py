"""Five methods on 10,000 lines of Wikitext-2, Qwen2.5-3B, rank 8: a small grid of learning rates and scales, one seed.

Command:   balora-jax run configs/paper/table4_qwen.py
           a part of it: add --method balora, --optimizer.learning-rate 1e-4 (and --data.path COPY)
           our BaLoRA: --method balora --balance.gauge svd --balance.transport
Item:      table 4 of arXiv 2605.31484, the half of Qwen; that of Llama is in table4.py
Model:     Qwen/Qwen2.5-3B from the hub, or --model.path FOLDER
Data:      10,000 lines of Wikitext-2 raw, one epoch; evaluation on 1,000 lines of `test`
Expected:  the paper's numbers of this half are not at hand
Hardware:  one GPU; `balora-jax estimate` prints the memory: the 9 runs of a method are trained together. Not run here
Time:      reckoned, for an H100 at 40 % of its peak and six operations a parameter and token: at most 0.2 hours a run
Chosen:    nothing: the authors' configs have this grid, LoRA-GA's rates a tenth of the others'
Differs:   as table4.py; so the lines are 10,000 that are not empty, theirs the first 10,000
"""

import dataclasses
from pathlib import Path

import numpy as np

from balora_jax.training import load_config

llama, _ = load_config(Path(__file__).with_name("table4.py"))
config = dataclasses.replace(
    llama,
    name="table4_qwen",
    model=dataclasses.replace(llama.model, path="Qwen/Qwen2.5-3B"),
    data=dataclasses.replace(llama.data, train_examples=10_000, eval_examples=1000),
    training=dataclasses.replace(llama.training, steps=10_000 // 32),
)

RATES = tuple(float(f"{rate:.4g}") for rate in np.logspace(-5, -4, 3))
A_SCALINGS = (0.1, 1.0, 10.0)  # the scale of the adapters is A_scaling squared
alphas = tuple(config.adapter.rank * a**2 for a in A_SCALINGS)

sweep = [
    {"method": ("lora", "balora", "dora", "olora"), "adapter.alpha": alphas, "optimizer.learning_rate": RATES},
    {
        "method": ("lora_ga",),
        "options": tuple({"gamma": a**-2} for a in A_SCALINGS),
        "optimizer.learning_rate": tuple(float(f"{rate / 10:.4g}") for rate in RATES),
    },
]
