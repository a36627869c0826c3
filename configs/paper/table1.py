"""Seven methods and LoRA-GA on five instruction sets, Qwen2.5-3B, rank 8, at the paper's best cells.

Command:   balora-jax run configs/paper/table1.py
           a part of it: add --data.recipe alpaca, --method balora, --seed 0 (and --data.path COPY of that data set)
           our BaLoRA: --method balora --balance.gauge svd --balance.transport
Item:      table 1 of arXiv 2605.31484
Model:     Qwen/Qwen2.5-3B from the hub, or --model.path FOLDER; the tokenizer is the instruct model's, as the authors',
           or --data.tokenizer FOLDER
Data:      Alpaca, CodeFeedback, OpenHermes, OpenOrca (400,000 rows), WizardLM; 1,000 rows of each are held out
Expected:  evaluation loss in the paper:
               Alpaca  CodeFeedback  OpenHermes  OpenOrca  WizardLM
    lora       1.352   0.638         0.707       0.774     0.663
    dora       1.352   0.639         0.707       0.776     0.662
    lora_rite  1.353   0.639         0.707       0.776     0.663
    loro       1.504   0.669         0.750       0.859     0.689
    olora      1.360   0.641         0.712       0.782     0.666
    reflora_drawn
               1.350   0.638         0.706       0.773     0.661
    balora     1.350   0.638         0.707       0.773     0.662
Hardware:  one GPU; `balora-jax estimate` of the same command prints the memory (about 11 GiB). Not run here: the
           authors gave each run two H100 and at most 20 hours
Time:      reckoned, for an H100 at 40 % of its peak and six operations a parameter and token: at most 0.7
           hours a run on Alpaca, 0.9 on WizardLM, 2.1 on CodeFeedback, 3.2 on OpenHermes, 5.3 on OpenOrca
Chosen:    lora_rite, loro and reflora_drawn: their cells are not known, so four rates are tried at A_scaling 1. One
           epoch, counted in rows, as in the authors' configs. LoRA-RITE and RefLoRA as the authors' script has them:
           without weight decay; LoRA-RITE behind clipping at 1; RefLoRA with both factors drawn, their product taken
           out of the weight, and 100 plain steps first
Differs:   the base is bfloat16, the authors load it in float32 (--model.dtype float32 --model.param-dtype float32); the
           held-out rows are the same for all seeds. BaLoRA is theirs: raw SVD factors, Adam's moments as they are.
           Rows are not packed, so that a step has 32 examples as theirs; --data.packing with fewer steps is faster
"""

from balora_jax.training import AdapterSettings, BalanceSettings, Config, DataSettings, ModelSettings, TrainingSettings

config = Config(
    name="table1",
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
        batch_size=8,
        accumulate=4,
        eval_every=500,
        eval_batch_size=8,
        checkpoint_every=500,
        members_at_once=1,
    ),
)

# Rows for training: those published without the 1,000 that are held out.
ROWS = {"alpaca": 51_002, "codefeedback": 155_526, "openhermes": 241_831, "openorca": 400_000, "wizardlm": 69_000}

# Learning rates and A_scaling; the scale of the adapters is A_scaling squared.
CELLS = {
    "lora": ((2.154e-5,), 4.642),
    "dora": ((2.154e-5,), 4.642),
    "lora_rite": ((5.995e-5, 1.668e-4, 4.642e-4, 1.292e-3), 1.0),
    "loro": ((5.995e-5, 1.668e-4, 4.642e-4, 1.292e-3), 1.0),
    "olora": ((4.642e-4,), 0.2154),
    "reflora_drawn": ((5.995e-5, 1.668e-4, 4.642e-4, 1.292e-3), 1.0),
    "balora": ((7.743e-6,), 35.94),
    "lora_ga": ((1.668e-4,), 0.01),
}
LORA_ON_ALPACA = ((3.594e-3,), 0.0278)

AS_RUN: dict[str, dict] = {  # by the trainer's defaults: no decay, and clipping at 1 before the optimizer
    "lora_rite": {"optimizer.weight_decay": (0.0,), "options": ({"clip_first": 1.0},)},
    "reflora_drawn": {"optimizer.weight_decay": (0.0,)},
}


def cell(recipe: str, method: str) -> dict:
    """The learning rates and the scale of a method on a data set."""
    rates, a_scaling = LORA_ON_ALPACA if (recipe, method) == ("alpaca", "lora") else CELLS[method]
    if method == "lora_ga":  # scales its start, not its adapters
        return {"optimizer.learning_rate": rates, "options": ({"gamma": a_scaling**-2},)}
    return {"optimizer.learning_rate": rates, "adapter.alpha": (config.adapter.rank * a_scaling**2,)}


sweep = [
    {
        "data.recipe": (recipe,),
        "data.train_examples": (rows if recipe == "openorca" else None,),
        "training.steps": (rows // 32,),
        "method": (method,),
        **cell(recipe, method),
        **AS_RUN.get(method, {}),
        "seed": (0, 1, 2),
    }
    for recipe, rows in ROWS.items()
    for method in CELLS
]
