"""Adapters for Flax NNX: layers, and putting them on a model."""

from balora_jax.adapters.dora import DoRALinear
from balora_jax.adapters.initialisation import LORA, OLORA, PISSA, XAVIER, Initialisation
from balora_jax.adapters.lora import AdapterOffset, AdapterScale, LoRALinear, adapter_scale
from balora_jax.adapters.model import (
    add_adapters,
    iter_adapters,
    merge_adapters,
    remove_adapters,
    unmerge_adapters,
)

__all__ = [
    "LORA",
    "OLORA",
    "PISSA",
    "XAVIER",
    "AdapterOffset",
    "AdapterScale",
    "DoRALinear",
    "Initialisation",
    "LoRALinear",
    "adapter_scale",
    "add_adapters",
    "iter_adapters",
    "merge_adapters",
    "remove_adapters",
    "unmerge_adapters",
]
