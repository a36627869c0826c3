"""Adapters for Flax NNX: layers, and putting them on a model."""

from balora_jax.adapters.adalora import ADALORA, AdaLoRALinear
from balora_jax.adapters.adapter import Adapter, MergeError
from balora_jax.adapters.dora import DoRALinear
from balora_jax.adapters.full import FullLinear
from balora_jax.adapters.initialisation import KAIMING, LORA, OLORA, PISSA, XAVIER, Initialisation
from balora_jax.adapters.interpolation import interpolate_adapters
from balora_jax.adapters.lora import AdapterOffset, AdapterScale, LoRALinear, adapter_scale
from balora_jax.adapters.lora_ga import LORA_GA, gradient_triplets, lora_ga_start, start_at
from balora_jax.adapters.model import (
    add_adapters,
    iter_adapters,
    merge_adapters,
    remove_adapters,
    unmerge_adapters,
)
from balora_jax.adapters.peft import PeftAdapter, PeftModule
from balora_jax.adapters.peft_files import read_peft, write_peft
from balora_jax.adapters.peft_model import export_adapters, load_adapters

__all__ = [
    "ADALORA",
    "KAIMING",
    "LORA",
    "LORA_GA",
    "OLORA",
    "PISSA",
    "XAVIER",
    "AdaLoRALinear",
    "Adapter",
    "AdapterOffset",
    "AdapterScale",
    "DoRALinear",
    "FullLinear",
    "Initialisation",
    "LoRALinear",
    "MergeError",
    "PeftAdapter",
    "PeftModule",
    "adapter_scale",
    "add_adapters",
    "export_adapters",
    "gradient_triplets",
    "interpolate_adapters",
    "iter_adapters",
    "load_adapters",
    "lora_ga_start",
    "merge_adapters",
    "read_peft",
    "remove_adapters",
    "start_at",
    "unmerge_adapters",
    "write_peft",
]
