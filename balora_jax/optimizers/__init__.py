"""Optimizers: one file each."""

from balora_jax.optimizers.adamw import OptimizerSettings, adamw, learning_rate_schedule

__all__ = ["OptimizerSettings", "adamw", "learning_rate_schedule"]
