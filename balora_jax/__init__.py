"""Balanced LoRA and its Riemannian geometry in JAX.

The core works on plain arrays and parameter trees and needs jax and optax alone. The layers, models, data and
training of the experiments live in the subpackages `adapters`, `models`, `data` and `training`.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from balora_jax.balance import Balanced, balance, balance_pair, balance_pairs, balancing_gap
    from balora_jax.gauge import GAUGES, ROUTES
    from balora_jax.pairs import Pair, find_pairs, read_pairs, write_pairs
    from balora_jax.projection import balance_tree
    from balora_jax.status import Status
    from balora_jax.transform import (
        BaloraProjectState,
        BaloraState,
        balora,
        balora_project,
        check_projection,
        pair_statuses,
    )

    __version__: str

__all__ = [
    "GAUGES",
    "ROUTES",
    "Balanced",
    "BaloraProjectState",
    "BaloraState",
    "Pair",
    "Status",
    "balance",
    "balance_pair",
    "balance_pairs",
    "balance_tree",
    "balancing_gap",
    "balora",
    "balora_project",
    "check_projection",
    "find_pairs",
    "pair_statuses",
    "read_pairs",
    "write_pairs",
]


_HOMES = ("gauge", "status", "balance", "pairs", "projection", "transform")


class _Package(types.ModuleType):
    """Imports JAX when the first public name is asked for, so that the command line can be stopped from the start."""

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import PackageNotFoundError, version

            try:
                return version("balora-jax")
            except PackageNotFoundError:
                raise AttributeError(f"{self.__name__} is not installed, and has no __version__") from None
        if name not in __all__:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        homes = [importlib.import_module(f"{self.__name__}.{home}") for home in _HOMES]
        vars(self).update((public, vars(home)[public]) for home in homes for public in __all__ if public in vars(home))
        return vars(self)[name]

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in __all__:  # `balance` is a function here, and no import puts the module of this name in its place
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
