"""Nine methods on Wikitext-2, Llama-3.2-3B, rank 8: the grid of learning rates and scales, three seeds.

Command:   balora-jax run configs/paper/table4.py
           a part of it: add --method balora, --optimizer.learning-rate 1e-4, --seed 0 (and --data.path COPY)
           the other half of table 4: configs/paper/table4_qwen.py
           our BaLoRA: --method balora --balance.gauge svd --balance.transport
Item:      table 4, and figures 4 and 8 of arXiv 2605.31484 (heat maps: python experiments/comparison/sensitivity.py
           runs/table4 --output FOLDER) and 7 (the right panel of the run's figure is the loss over time)
Model:     meta-llama/Llama-3.2-3B from the hub (its licence must be accepted there), or --model.path FOLDER
Data:      Wikitext-2 raw, line by line: 23,767 lines that are not empty; evaluation on `test`
Expected:  BaLoRA's evaluation loss is 2.251 in the paper; its other numbers are not at hand
Hardware:  one GPU; `balora-jax estimate` prints the memory: the 150 runs of a method are trained together, one after
           the other at each step, and each adds its state, 0.1 GB. Not run here: the authors gave each run an A100
Time:      reckoned, for an H100 at 40 % of its peak and six operations a parameter and token: at most 0.7
           hours a run of two epochs, as no row is longer than the longest line
Chosen:    loro and balora_ga, of which the authors have no runs: the grid of the others, two epochs. Three seeds of
           all; the authors have them of LoRA, BaLoRA and DoRA alone. As they ran them: LoRA-GA for five epochs,
           LoRA-RITE and RefLoRA for one, the others for two, counted in lines (for two of LoRA-GA: --method lora_ga
           --training.steps 1485 --output ANOTHER). LoRA-RITE and RefLoRA otherwise as in table1.py
Differs:   the base is bfloat16, the authors load it in float32 (--model.dtype float32 --model.param-dtype float32);
           they have empty lines among the rows of a step, and no end token behind a line. BaLoRA is theirs: raw SVD
           factors, Adam's moments as they are. Lines are not packed, so that a step has 32 of them; --data.packing
           with fewer steps is faster
"""

import numpy as np

from balora_jax.training import AdapterSettings, BalanceSettings, Config, DataSettings, ModelSettings, TrainingSettings

config = Config(
    name="table4",
    model=ModelSettings(path="meta-llama/Llama-3.2-3B", dtype="bfloat16", param_dtype="bfloat16", remat=True),
    adapter=AdapterSettings(rank=8, alpha=8.0),
    balance=BalanceSettings(gauge="raw_svd", transport=False, least_ratio=0.0),
    data=DataSettings(
        recipe="wikitext", train_examples=None, eval_examples=None, eval_split="test", length=1024, packing=False
    ),
    training=TrainingSettings(
        steps=2 * 23_767 // 32,
        batch_size=8,
        accumulate=4,
        eval_every=100,
        eval_batch_size=8,
        checkpoint_every=100,
        keep_checkpoints=1,
        members_at_once=1,
    ),
)

METHODS = ("lora", "balora", "dora", "olora", "lora_rite", "reflora_drawn", "loro", "lora_ga", "balora_ga")
EPOCHS = {"lora_ga": 5, "lora_rite": 1, "reflora_drawn": 1}  # and 2 of the others, as the authors ran them
RATES = tuple(float(f"{rate:.4g}") for rate in np.logspace(-5, -2, 10))
A_SCALINGS = (0.01, 0.1, 1.0, 10.0, 100.0)  # the scale of the adapters is A_scaling squared


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
    {
        "method": (method,),
        **scales(method),
        **AS_RUN.get(method, {}),
        "training.steps": (EPOCHS.get(method, 2) * 23_767 // 32,),
        "optimizer.learning_rate": RATES,
        "seed": (0, 1, 2),
    }
    for method in METHODS
]
