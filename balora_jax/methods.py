"""The methods: each is an adapter layer with a scaling and an optimizer, under its name in one table.

Adding a method is adding a row (and a file for its layer or its optimizer, if it has one of its own).
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import optax

from balora_jax.adapters.lora import LoRALinear, Scaling
from balora_jax.optimizers import OptimizerSettings, adamw
from balora_jax.transform import balora_project


@dataclass(frozen=True)
class Method:
    """A way of fine-tuning with adapters.

    Attributes:
        summary: what it does and where it comes from, in a line.
        optimizer: from the settings and the number of steps to the optax transformation.
        layer: the adapter layer that wraps a linear layer.
        scaling: how the scale follows from `alpha` and the rank.
    """

    summary: str
    optimizer: Callable[[OptimizerSettings, int], optax.GradientTransformation] = adamw
    layer: type[LoRALinear] = LoRALinear
    scaling: Scaling = "lora"


def _balora(settings: OptimizerSettings, steps: int) -> optax.GradientTransformation:
    return optax.chain(adamw(settings, steps), balora_project())


METHODS = MappingProxyType(
    {
        "lora": Method("low-rank update of frozen weights (arXiv 2106.09685)"),
        "rslora": Method("LoRA with scale alpha / sqrt(rank) (arXiv 2312.03732)", scaling="rslora"),
        "balora": Method("LoRA balanced after every step (arXiv 2605.31484)", optimizer=_balora),
    }
)


def get_method(name: str) -> Method:
    """Returns the method of a name.

    Raises:
        ValueError: there is none; the message suggests the nearest.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(str(name), METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}{hint}")
    return METHODS[name]
