"""Adapters for Flax NNX: layers, and putting them on a model."""

from balora_jax.adapters.lora import AdapterScale, LoRALinear, adapter_scale
from balora_jax.adapters.model import (
    add_adapters,
    iter_adapters,
    merge_adapters,
    remove_adapters,
    unmerge_adapters,
)

__all__ = [
    "AdapterScale",
    "LoRALinear",
    "adapter_scale",
    "add_adapters",
    "iter_adapters",
    "merge_adapters",
    "remove_adapters",
    "unmerge_adapters",
]
