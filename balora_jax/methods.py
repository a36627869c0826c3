"""The methods: each is an adapter layer with a scaling and an optimizer, under its name in one table.

Adding a method is adding a row (and a file for its layer or its optimizer, if it has one of its own).
"""

import dataclasses
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import optax

from balora_jax.adapters.lora import LoRALinear, Scaling
from balora_jax.gauge import Gauge
from balora_jax.optimizers import OptimizerSettings, adamw
from balora_jax.transform import balora


@dataclass(frozen=True)
class BalanceSettings:
    """How the methods that balance their adapters do it; see `balora_jax.balora`.

    Attributes:
        gauge: which balanced pair.
        transport: whether the optimizer's moments are carried along; the paper leaves them as they are, but on language
            models it pays (experiments/gauges).
        every: steps between projections.
        start_step: number of first steps without.
    """

    gauge: Gauge = "svd"
    transport: bool = True
    every: int = 1
    start_step: int = 0


@dataclass(frozen=True)
class Method:
    """A way of fine-tuning with adapters.

    Attributes:
        summary: what it does and where it comes from, in a line.
        optimizer: from the settings and the number of steps to the optax transformation.
        layer: the adapter layer that wraps a linear layer.
        scaling: how the scale follows from `alpha` and the rank.
        balanced: whether the adapters are balanced after the optimizer's steps.
    """

    summary: str
    optimizer: Callable[[OptimizerSettings, int], optax.GradientTransformation] = adamw
    layer: type[LoRALinear] = LoRALinear
    scaling: Scaling = "lora"
    balanced: bool = False

    def transformation(
        self, settings: OptimizerSettings, balance: BalanceSettings, steps: int
    ) -> optax.GradientTransformation:
        """Returns the optax transformation of a run.

        Args:
            settings: of the optimizer; the numbers may be traced arrays.
            balance: used by balanced methods.
            steps: number of updates of the whole run.
        """
        optimizer = self.optimizer(settings, steps)
        return balora(optimizer, **dataclasses.asdict(balance)) if self.balanced else optimizer


METHODS = MappingProxyType(
    {
        "lora": Method("low-rank update of frozen weights (arXiv 2106.09685)"),
        "rslora": Method("LoRA with scale alpha / sqrt(rank) (arXiv 2312.03732)", scaling="rslora"),
        "balora": Method("LoRA balanced after every step (arXiv 2605.31484)", balanced=True),
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
