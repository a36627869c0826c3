"""Training: configs, the step of a population, evaluation, checkpoints, and whole runs."""

from balora_jax.methods import BalanceSettings
from balora_jax.training.config import (
    AdapterSettings,
    Config,
    ConfigError,
    ModelSettings,
    TrainingSettings,
    load_config,
)
from balora_jax.training.records import RunError
from balora_jax.training.run import run

__all__ = [
    "AdapterSettings",
    "BalanceSettings",
    "Config",
    "ConfigError",
    "ModelSettings",
    "RunError",
    "TrainingSettings",
    "load_config",
    "run",
]
