"""Optimizers of LoRA pairs, and GaLore of whole weights: optax transformations, each usable alone."""

from balora_jax.optimizers.adalora import adalora
from balora_jax.optimizers.adamw import adamw, clipped, learning_rate_schedule
from balora_jax.optimizers.galore import galore
from balora_jax.optimizers.lora_plus import lora_plus
from balora_jax.optimizers.lora_pro import lora_pro, precondition_by_lora_pro
from balora_jax.optimizers.lora_rite import lora_rite
from balora_jax.optimizers.loro import loro
from balora_jax.optimizers.reflora import precondition_by_reflora, reflora, reflora_s
from balora_jax.optimizers.scaled import precondition_by_grams, scaled_adamw, scaled_gd
from balora_jax.settings import OptimizerSettings

__all__ = [
    "OptimizerSettings",
    "adalora",
    "adamw",
    "clipped",
    "galore",
    "learning_rate_schedule",
    "lora_plus",
    "lora_pro",
    "lora_rite",
    "loro",
    "precondition_by_grams",
    "precondition_by_lora_pro",
    "precondition_by_reflora",
    "reflora",
    "reflora_s",
    "scaled_adamw",
    "scaled_gd",
]
