"""Training: configs, the step of a population, evaluation, checkpoints, and whole runs."""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from balora_jax.errors import ConfigError, RunError
from balora_jax.settings import (
    AdapterSettings,
    BalanceSettings,
    Config,
    DataSettings,
    EvaluationSettings,
    ModelSettings,
    OptimizerSettings,
    ParallelSettings,
    TrainingSettings,
)
from balora_jax.training.config import load_config

if TYPE_CHECKING:
    from balora_jax.training.run import run

__all__ = [
    "AdapterSettings",
    "BalanceSettings",
    "Config",
    "ConfigError",
    "DataSettings",
    "EvaluationSettings",
    "ModelSettings",
    "OptimizerSettings",
    "ParallelSettings",
    "RunError",
    "TrainingSettings",
    "load_config",
    "run",
]


class _Package(types.ModuleType):
    """Imports JAX when `run` is asked for, so that a config file is read, and its mistakes are told, before."""

    def __getattr__(self, name: str) -> Any:
        if name != "run":
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        vars(self)["run"] = importlib.import_module(f"{self.__name__}.run").run
        return vars(self)["run"]

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "run":  # a function here, and no import puts the module of this name in its place
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
