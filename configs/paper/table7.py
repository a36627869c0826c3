"""Does more rank help? Six methods at ranks 8 to 128, Qwen2.5-3B on DeepMind Mathematics.

Command:   balora-jax run configs/paper/table7.py
           a part of it: add --adapter.rank 64, --method dora, --optimizer.learning-rate 2.154e-5
           the figure: python experiments/comparison/ranks.py runs/table7 --output FOLDER
           our BaLoRA: --method balora --balance.gauge svd --balance.transport
Item:      table 7 and figure 5 of arXiv 2605.31484
Model:     Qwen/Qwen2.5-3B from the hub, or --model.path FOLDER
Data:      DeepMind Mathematics, the published text files (mathematics_dataset-v1.0.tar.gz, unpacked here, or
           --data.path FOLDER): train-easy, train-medium and train-hard; 1,000 questions of interpolate
Expected:  evaluation loss in the paper, by rank:
               8      16     32     64     128
    lora       1.035  1.032  1.031  1.030  1.030
    dora       1.035  1.032  1.031  1.030  1.030
    lora_rite  1.047  1.045  1.046  1.052  1.069
    olora      1.039  1.037  1.036  1.036  1.036
    reflora_drawn
               1.027  1.023  1.024  1.027  1.032
    balora     1.026  1.020  1.017  1.015  1.014
Hardware:  one GPU of 80 GB; `balora-jax estimate` prints the memory. Not run here
Time:      reckoned, for an H100 at 40 % of its peak and six operations a parameter and token: 13 hours a run
Chosen:    of these runs the paper gives a billion tokens, no cells, and the authors' configs are lost. Three learning
           rates around each method's best cell on the instruction sets, two seeds; packed rows, so that a billion
           tokens are 30,517 steps; 25 million questions, about as many tokens: an hour on two cores to tokenize, once,
           and 6 GB of the host's memory (--data.train-examples for fewer, which are then repeated). LoRA-RITE and
           RefLoRA as in table1.py
Differs:   the base is bfloat16. The scale is A_scaling squared at every rank; the authors' code has 8 / rank of it.
           BaLoRA is theirs: raw SVD factors, Adam's moments as they are
"""

from balora_jax.training import AdapterSettings, BalanceSettings, Config, DataSettings, ModelSettings, TrainingSettings

config = Config(
    name="table7",
    model=ModelSettings(path="Qwen/Qwen2.5-3B", dtype="bfloat16", param_dtype="bfloat16", remat=True),
    adapter=AdapterSettings(rank=8),
    balance=BalanceSettings(gauge="raw_svd", transport=False, least_ratio=0.0),
    data=DataSettings(
        recipe="dm_mathematics",
        path="mathematics_dataset-v1.0",
        train_examples=25_000_000,
        eval_examples=1000,
        length=1024,
    ),
    training=TrainingSettings(
        steps=10**9 // (8 * 4 * 1024),
        batch_size=8,
        accumulate=4,
        eval_every=1000,
        eval_batch_size=8,
        checkpoint_every=1000,
        keep_checkpoints=1,
        members_at_once=1,
    ),
)

# Learning rates and A_scaling; the scale of the adapters is A_scaling squared.
CELLS = {
    "lora": ((7.743e-6, 2.154e-5, 5.995e-5), 4.642),
    "dora": ((7.743e-6, 2.154e-5, 5.995e-5), 4.642),
    "lora_rite": ((1.668e-4, 4.642e-4, 1.292e-3), 1.0),
    "olora": ((1.668e-4, 4.642e-4, 1.292e-3), 0.2154),
    "reflora_drawn": ((5.995e-5, 1.668e-4, 4.642e-4), 1.0),
    "balora": ((2.783e-6, 7.743e-6, 2.154e-5), 35.94),
}

AS_RUN: dict[str, dict] = {  # by the trainer's defaults: no decay, and clipping at 1 before the optimizer
    "lora_rite": {"optimizer.weight_decay": (0.0,), "options": ({"clip_first": 1.0},)},
    "reflora_drawn": {"optimizer.weight_decay": (0.0,)},
}

sweep = [
    {
        "adapter.rank": (rank,),
        "adapter.alpha": (rank * a_scaling**2,),
        "method": (method,),
        "optimizer.learning_rate": rates,
        **AS_RUN.get(method, {}),
        "seed": (0, 1),
    }
    for rank in (8, 16, 32, 64, 128)
    for method, (rates, a_scaling) in CELLS.items()
]
