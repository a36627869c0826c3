"""How much memory does a step need? Five methods, Llama-3.2-3B, rank 8, batches of 8 x 128 tokens.

Command:   balora-jax estimate configs/paper/table6.py
           what a device really holds at its peak: python benchmarks/published_shapes.py, on a GPU
Item:      table 6 of arXiv 2605.31484
Model:     the config.json of meta-llama/Llama-3.2-3B, or of --model.path FOLDER; no weights are read. Of GPT-2, which
           the authors' script takes by default, there is no decoder here
Data:      GSM8K, as in table3.py; none is read for an estimate
Expected:  BaLoRA needs what LoRA needs: the projection adds r x r matrices alone. The paper's numbers are not at hand
Hardware:  any; the estimate is the compiler's for the device at hand
Time:      some seconds of compiling for each method
Chosen:    batch and length are those of the authors' script, without accumulation
Differs:   the base is bfloat16 with rematerialisation, theirs float32 without: --model.dtype float32
           --model.param-dtype float32 --model.no-remat. The start of LoRA-GA, before the first step, is not estimated
"""

from balora_jax.training import AdapterSettings, BalanceSettings, Config, DataSettings, ModelSettings, TrainingSettings

config = Config(
    name="table6",
    model=ModelSettings(path="meta-llama/Llama-3.2-3B", dtype="bfloat16", param_dtype="bfloat16", remat=True),
    adapter=AdapterSettings(rank=8, alpha=16.0),
    balance=BalanceSettings(gauge="raw_svd", transport=False, least_ratio=0.0),
    data=DataSettings(recipe="gsm8k", train_examples=None, eval_examples=None, length=128, packing=False),
    training=TrainingSettings(steps=10, batch_size=8, eval_every=10, eval_batch_size=8),
)

sweep = {"method": ("lora", "balora", "dora", "olora", "lora_ga")}
