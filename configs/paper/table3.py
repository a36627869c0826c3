"""Nine methods on GSM8K, Llama-3.2-3B, rank 8: the grid of learning rates and scales, three seeds.

Command:   balora-jax run configs/paper/table3.py
           a part of it: add --method balora, --optimizer.learning-rate 1e-4, --seed 0 (and --data.path COPY)
           our BaLoRA: --method balora --balance.gauge svd --balance.transport
Item:      table 3 and figure 9 of arXiv 2605.31484; the right panel of the run's figure is the loss over time
Model:     meta-llama/Llama-3.2-3B from the hub (its licence must be accepted there), or --model.path FOLDER
Data:      GSM8K, `main`: 7,473 questions to train on, the 1,319 of `test` to evaluate
Expected:  BaLoRA's evaluation loss is 0.493 in the paper; its other numbers are not at hand. Runs here also report
           how many answers are right
Hardware:  one GPU; `balora-jax estimate` prints the memory: the 150 runs of a method are trained together, one after
           the other at each step, and each adds its state, 0.1 GB. Not run here: the authors gave each run an A100
Time:      reckoned, for an H100 at 40 % of its peak and six operations a parameter and token: at most 0.3
           hours a run (BaLoRA 0.5), as no row is longer than its longest example
Chosen:    lora_rite, reflora_drawn, loro and balora_ga, of which the authors have no runs on GSM8K: the grid of the
           others, LoRA-RITE and RefLoRA as in table1.py. Three seeds of all; the authors have them of LoRA and BaLoRA
           alone. As they ran them: BaLoRA for five epochs, the others for three, counted in rows (for three of BaLoRA:
           --method balora --training.steps 700 --output ANOTHER); LoRA-GA with scales from 1e-5 to 0.1
Differs:   the base is bfloat16, the authors load it in float32 (--model.dtype float32 --model.param-dtype float32); an
           answer ends with the end token, theirs does not. BaLoRA is theirs: raw SVD factors, Adam's moments as they
           are. Rows are not packed, so that a step has 32 examples as theirs; --data.packing with fewer steps is faster
"""

import numpy as np

from balora_jax.training import AdapterSettings, BalanceSettings, Config, DataSettings, ModelSettings, TrainingSettings

config = Config(
    name="table3",
    model=ModelSettings(path="meta-llama/Llama-3.2-3B", dtype="bfloat16", param_dtype="bfloat16", remat=True),
    adapter=AdapterSettings(rank=8, alpha=8.0),
    balance=BalanceSettings(gauge="raw_svd", transport=False, least_ratio=0.0),
    data=DataSettings(recipe="gsm8k", train_examples=None, eval_examples=None, length=1024, packing=False),
    training=TrainingSettings(
        steps=3 * 7_473 // 32,
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
EPOCHS = {"balora": 5}  # and 3 of the others, as the authors ran them
RATES = tuple(float(f"{rate:.4g}") for rate in np.logspace(-5, -2, 10))
A_SCALINGS = (0.01, 0.1, 1.0, 10.0, 100.0)  # the scale of the adapters is A_scaling squared


AS_RUN: dict[str, dict] = {  # by the trainer's defaults: no decay, and clipping at 1 before the optimizer
    "lora_rite": {"optimizer.weight_decay": (0.0,), "options": ({"clip_first": 1.0},)},
    "reflora_drawn": {"optimizer.weight_decay": (0.0,)},
}


def scales(method: str) -> dict:
    """The grid of A_scaling; LoRA-GA scales its start by it, not its adapters."""
    if method.endswith("_ga"):
        return {"options": tuple({"gamma": (1e-3 * a) ** -2} for a in A_SCALINGS)}
    return {"adapter.alpha": tuple(config.adapter.rank * a**2 for a in A_SCALINGS)}


sweep = [
    {
        "method": (method,),
        **scales(method),
        **AS_RUN.get(method, {}),
        "training.steps": (EPOCHS.get(method, 3) * 7_473 // 32,),
        "optimizer.learning_rate": RATES,
        "seed": (0, 1, 2),
    }
    for method in METHODS
]
