"""The numbers of a run as arrays, and the optimizer that is made of them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optax

from balora_jax.adapters import adapter_scale
from balora_jax.methods import get_method
from balora_jax.settings import Config
from balora_jax.training.config import NUMERIC_FIELDS
from balora_jax.training.fields import get_field

Numbers = Mapping[str, Any]
"""The numeric fields of a config by their dotted names, as arrays of one run, or of a population."""

Optimizer = Callable[[Numbers], optax.GradientTransformation]
"""Makes the optimizer of a run from its numbers."""


def stacked_numbers(members: Sequence[Config]) -> dict[str, np.ndarray]:
    """Returns the numbers of a population, `(members,)` each: float32, and uint32 for the seed.

    Args:
        members: the configs.
    """
    return {
        name: np.asarray([get_field(m, name) for m in members], np.uint32 if name == "seed" else np.float32)
        for name in NUMERIC_FIELDS
    }


def optimizer_of(config: Config) -> Optimizer:
    """Returns the factory of the optimizers of all runs that share everything but their numbers.

    Args:
        config: of any of them.
    """
    method = get_method(config.method)

    def optimizer(numbers: Numbers) -> optax.GradientTransformation:
        return method.transformation(
            dataclasses.replace(config.optimizer, **_part(numbers, "optimizer")),
            dataclasses.replace(config.balance, **_part(numbers, "balance")),
            steps=config.training.steps,
            scale=adapter_scale(numbers["adapter.alpha"], config.adapter.rank, method.scaling),
            options=config.options,
        )

    return optimizer


def _part(numbers: Numbers, name: str) -> dict[str, Any]:
    """The numbers of one part of the settings, by the names that they have there."""
    parts = ((field.split("."), number) for field, number in numbers.items())
    return {field[1]: number for field, number in parts if field[0] == name}
