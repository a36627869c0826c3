"""The methods: each is an adapter layer with a start, a scaling and an optimizer, under its name in one table.

Adding a method is adding a row (and a file for its layer or its optimizer, if it has one of its own).
"""

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import jax
import optax

from balora_jax.adapters import LORA, OLORA, PISSA, DoRALinear, Initialisation, LoRALinear
from balora_jax.adapters.lora import Scaling
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
        optimizer: called with the settings and the number of steps, returns the optax transformation. If it has the
            keyword `scale` it is given s; its other keyword-only parameters are the options of the method.
        layer: the adapter layer that wraps a linear layer.
        initialisation: where the adapters start.
        scaling: how the scale follows from `alpha` and the rank.
        balanced: whether the adapters are balanced after the optimizer's steps.
    """

    summary: str
    optimizer: Callable[..., optax.GradientTransformation] = adamw
    layer: type[LoRALinear] = LoRALinear
    initialisation: Initialisation = LORA
    scaling: Scaling = "lora"
    balanced: bool = False

    @property
    def options(self) -> dict[str, float]:
        """The numbers that are this method's own, with their defaults."""
        parameters = inspect.signature(self.optimizer).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "scale"}

    def transformation(
        self,
        settings: OptimizerSettings,
        balance: BalanceSettings,
        *,
        steps: int,
        scale: jax.typing.ArrayLike,
        options: Mapping[str, float] = MappingProxyType({}),
    ) -> optax.GradientTransformation:
        """Returns the optax transformation of a run.

        Args:
            settings: of the optimizer; the numbers may be traced arrays.
            balance: used by balanced methods.
            steps: number of updates of the whole run.
            scale: the factor s of the adapters; may be traced.
            options: the method's own numbers, where they differ from their defaults.

        Raises:
            ValueError: the method has no such option.
        """
        self.check_options(options)
        takes_scale = "scale" in inspect.signature(self.optimizer).parameters
        optimizer = self.optimizer(settings, steps, **({"scale": scale} if takes_scale else {}), **options)
        return balora(optimizer, **dataclasses.asdict(balance)) if self.balanced else optimizer

    def check_options(self, options: Mapping[str, float]) -> None:
        """Raises `ValueError` if the method lacks one of the options."""
        for name in options:
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                raise ValueError(f"options must be among those of the method ({known}), got {name!r}")


METHODS = MappingProxyType(
    {
        "lora": Method("low-rank update of frozen weights (arXiv 2106.09685)"),
        "rslora": Method("LoRA with scale alpha / sqrt(rank) (arXiv 2312.03732)", scaling="rslora"),
        "dora": Method("direction by LoRA, magnitude trained by itself (arXiv 2402.09353)", layer=DoRALinear),
        "olora": Method("LoRA from a QR decomposition of the weight (arXiv 2406.01775)", initialisation=OLORA),
        "pissa": Method(
            "LoRA from the leading singular triplets of the weight (arXiv 2404.02948)", initialisation=PISSA
        ),
        "balora": Method("LoRA balanced after every step (arXiv 2605.31484)", balanced=True),
        "balora_rslora": Method("rsLoRA, balanced", scaling="rslora", balanced=True),
        "balora_dora": Method("DoRA, balanced, which does not change its output", layer=DoRALinear, balanced=True),
        "balora_olora": Method("balanced from OLoRA's start", initialisation=OLORA, balanced=True),
        "balora_pissa": Method("balanced from PiSSA's start", initialisation=PISSA, balanced=True),
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
