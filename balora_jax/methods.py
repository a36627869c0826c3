"""The methods: each is a layer with a start, a scaling and an optimizer, under its name in one table.

Adding a method is adding a row (and a file for its layer or its optimizer, if it has one of its own).
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

import jax
import jax.numpy as jnp
import optax

from balora_jax.adapters import (
    ADALORA,
    KAIMING,
    LORA,
    LORA_GA,
    OLORA,
    PISSA,
    XAVIER,
    AdaLoRALinear,
    Adapter,
    DoRALinear,
    FullLinear,
    Initialisation,
    LoRALinear,
)
from balora_jax.adapters.lora import Scaling
from balora_jax.errors import not_among
from balora_jax.optimizers import (
    adalora,
    adamw,
    clipped,
    galore,
    learning_rate_schedule,
    lora_plus,
    lora_pro,
    lora_rite,
    loro,
    reflora,
    reflora_s,
    scaled_adamw,
    scaled_gd,
)
from balora_jax.settings import BalanceSettings, OptimizerSettings, Option
from balora_jax.transform import balora


@dataclass(frozen=True)
class Method:
    """A way of fine-tuning.

    Attributes:
        summary: what it does and where it comes from, in a line.
        optimizer: called with the settings, the number of steps and, by their names, the method's own options; returns
            the optax transformation.
        options: numbers of the method's own, beside those of the initialisation.
        scaled: whether the optimizer is given s too, as `adapter_scale`.
        layer: the layer that wraps a linear layer.
        initialisation: where the adapters start.
        scaling: how the scale follows from `alpha` and the rank.
        balanced: whether the adapters are balanced after the optimizer's steps.
        phased: whether its phases are shares of the whole run, so that the first steps depend on the number of all.
    """

    summary: str
    optimizer: Callable[..., optax.GradientTransformation] = adamw
    options: Mapping[str, Option] = field(default_factory=dict)
    scaled: bool = False
    layer: type[Adapter] = LoRALinear
    initialisation: Initialisation = LORA
    scaling: Scaling = "lora"
    balanced: bool = False
    phased: bool = False

    @property
    def all_options(self) -> dict[str, Option]:
        """The numbers of the method's own, those of its initialisation among them."""
        return {**self.options, **self.initialisation.options}

    @property
    def defaults(self) -> dict[str, float]:
        """The defaults of `all_options`."""
        return {name: option.default for name, option in self.all_options.items()}

    @cached_property
    def unused_settings(self) -> tuple[str, ...]:
        """The settings that the optimizer does not read, and that so play no part in this method."""
        read: set[str] = set()

        class Noted(OptimizerSettings):
            def __getattribute__(self, name):
                read.add(name)
                return super().__getattribute__(name)

        noted = Noted()
        jax.eval_shape(learning_rate_schedule(noted, 100), jax.ShapeDtypeStruct((), jnp.int32))
        self._built(noted, 100, 1.0, self.defaults)
        return tuple(field.name for field in dataclasses.fields(OptimizerSettings) if field.name not in read)

    @property
    def has_pairs(self) -> bool:
        """Whether what is trained holds LoRA pairs."""
        return issubclass(self.layer, LoRALinear)

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
            ValueError: the method has no such option, or a value is out of its range.
        """
        optimizer = self._built(settings, steps, scale, self.resolved(options))
        return balora(optimizer, **dataclasses.asdict(balance)) if self.balanced else optimizer

    def resolved(self, options: Mapping[str, float]) -> dict[str, float]:
        """Returns all options with the given values in the place of defaults, in the defaults' types.

        Raises:
            ValueError: the method has no such option, or one that must be an integer is none.
        """
        defaults, values = self.defaults, {}
        for name, value in options.items():
            if name not in defaults:
                known = ", ".join(defaults) or "none"
                raise ValueError(f"options must be among those of the method ({known}), got {name!r}")
            if isinstance(defaults[name], int):
                if not float(value).is_integer():
                    raise ValueError(f"options: {name} must be an integer, got {value!r}")
                value = int(value)
            values[name] = value
        return defaults | values

    def _built(self, settings, steps, scale, options) -> optax.GradientTransformation:
        own = {name: options[name] for name in self.options}
        return self.optimizer(settings, steps, **own, **({"adapter_scale": scale} if self.scaled else {}))


def _sgd(settings, steps):
    return clipped(settings, optax.sgd(learning_rate_schedule(settings, steps)))


def _lora_plus(settings, steps, *, ratio):
    return lora_plus(adamw(settings, steps), ratio=ratio)


def _lora_rite(settings, steps, *, eps, skip, clip_norm, clip_first):
    """Skipping, clipping and eps are the method's own."""
    rate, shared = learning_rate_schedule(settings, steps), _shared(settings)
    rite = lora_rite(rate, **shared, eps=eps, skip=skip, clip_norm=clip_norm)
    return optax.chain(optax.clip_by_global_norm(clip_first), rite) if clip_first else rite


def _reflora(settings, steps, *, warmup_steps):
    rate, shared = learning_rate_schedule(settings, steps), _shared(settings)
    return clipped(settings, reflora(rate, **shared, eps=settings.eps, warmup_steps=warmup_steps))


def _reflora_s(settings, steps, *, warmup_steps):
    rate, shared = learning_rate_schedule(settings, steps), _shared(settings)
    return clipped(settings, reflora_s(rate, **shared, eps=settings.eps, warmup_steps=warmup_steps))


def _loro(settings, steps, *, eps, period):
    rate, shared = learning_rate_schedule(settings, steps), _shared(settings)
    return clipped(settings, loro(rate, **shared, eps=eps, period=period))


def _scaled_gd(settings, steps, *, damping):
    return clipped(settings, scaled_gd(learning_rate_schedule(settings, steps), damping=damping))


def _scaled_adamw(settings, steps, *, eps, damping):
    rate, shared = learning_rate_schedule(settings, steps), _shared(settings)
    return clipped(settings, scaled_adamw(rate, **shared, eps=eps, damping=damping))


def _lora_pro(settings, steps, *, adapter_scale, damping):
    rate, shared = learning_rate_schedule(settings, steps), _shared(settings)
    return clipped(settings, lora_pro(rate, **shared, eps=settings.eps, scale=adapter_scale, damping=damping))


def _adalora(
    settings,
    steps,
    *,
    target_share,
    initial_share,
    final_share,
    interval,
    b1,
    b2,
    regularisation,
):
    """The phases are shares of the run, near those of the authors' runs on GLUE."""
    for name, share in (("initial_share", initial_share), ("final_share", final_share)):
        if not 0 <= share < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {share}")
    if not initial_share + final_share < 1:
        raise ValueError(
            f"initial_share and final_share must be below 1 together, got {initial_share} and {final_share}"
        )
    return adalora(
        adamw(settings, steps),
        total_steps=steps,
        initial_steps=int(initial_share * steps),
        final_steps=int(final_share * steps),
        interval=interval,
        target_share=target_share,
        b1=b1,
        b2=b2,
        regularisation=regularisation,
    )


def _galore(settings, steps, *, rank, update_interval, scale, eps):
    rate, own = learning_rate_schedule(settings, steps), {"rank": rank, "update_interval": update_interval}
    return clipped(settings, galore(rate, **_shared(settings), **own, scale=scale, eps=eps))


def _shared(settings):
    return {"b1": settings.b1, "b2": settings.b2, "weight_decay": settings.weight_decay}


_RATIO = {"ratio": Option(16.0, "learning rate of B over that of A")}
_WARMUP = {"warmup_steps": Option(100, "first updates with plain gradients")}
_DAMPING = "added to the diagonals of Gram matrices"
_EPS = Option(1e-6, "added to the root of the second moment")

METHODS = MappingProxyType(
    {
        "full": Method("the targeted weights themselves, by AdamW", layer=FullLinear),
        "galore": Method(
            "full, moments of low rank (arXiv 2403.03507)",
            layer=FullLinear,
            optimizer=_galore,
            options={
                "rank": Option(128, "rank of the gradient's projection"),
                "update_interval": Option(200, "steps between new projections"),
                "scale": Option(0.25, "factor of the update"),
                "eps": _EPS,
            },
        ),
        "lora": Method("low-rank update of frozen weights (arXiv 2106.09685)"),
        "rslora": Method("LoRA with scale alpha / sqrt(rank) (arXiv 2312.03732)", scaling="rslora"),
        "lora_plus": Method("B learns faster than A (arXiv 2402.12354)", optimizer=_lora_plus, options=_RATIO),
        "dora": Method("direction by LoRA, magnitude trained by itself (arXiv 2402.09353)", layer=DoRALinear),
        "olora": Method("LoRA from a QR decomposition of the weight (arXiv 2406.01775)", initialisation=OLORA),
        "pissa": Method("LoRA from the leading singular triplets of a weight (arXiv 2404.02948)", initialisation=PISSA),
        "lora_ga": Method("LoRA along the gradient of the weights (arXiv 2407.05000)", initialisation=LORA_GA),
        "lora_rite": Method(
            "adaptive steps that do not see the gauge (arXiv 2410.20625)",
            optimizer=_lora_rite,
            options={
                "eps": _EPS,
                "skip": Option(1.0, "gradients of a larger root mean square are left out"),
                "clip_norm": Option(1.0, "most that the norm of all pairs' gradients may be"),
                "clip_first": Option(0.0, "the same of the factors' gradients, before all else; 0 for not at all"),
            },
        ),
        "reflora": Method(
            "AdamW of gradients as from the balanced pair (arXiv 2505.18877)", optimizer=_reflora, options=_WARMUP
        ),
        "reflora_drawn": Method(
            "RefLoRA from two random factors (arXiv 2505.18877)",
            optimizer=_reflora,
            initialisation=KAIMING,
            options=_WARMUP,
        ),
        "reflora_s": Method(
            "AdamW, both factors of one norm (arXiv 2505.18877)",
            optimizer=_reflora_s,
            options={"warmup_steps": Option(100, "the update that the first rescaling follows")},
        ),
        "loro": Method(
            "Adam with exact Riemannian steps (ICLR 2025)",
            optimizer=_loro,
            initialisation=XAVIER,
            options={"eps": _EPS, "period": Option(100, "steps between refactorisations")},
        ),
        "scaled_gd": Method(
            "gradients scaled by Gram matrices (arXiv 2005.08898)",
            optimizer=_scaled_gd,
            options={"damping": Option(1e-6, _DAMPING)},
        ),
        "scaled_adamw": Method(
            "AdamW of scaled gradients (arXiv 2402.02347)",
            optimizer=_scaled_adamw,
            options={"eps": _EPS, "damping": Option(1e-6, _DAMPING)},
        ),
        "lora_pro": Method(
            "AdamW of the projected full gradient (arXiv 2407.18242)",
            optimizer=_lora_pro,
            options={"damping": Option(1e-8, _DAMPING)},
            scaled=True,
        ),
        "adalora": Method(
            "LoRA whose ranks share a shrinking budget (arXiv 2303.10512)",
            layer=AdaLoRALinear,
            initialisation=ADALORA,
            optimizer=_adalora,
            phased=True,
            options={
                "target_share": Option(0.5, "share of the ranks that are left at the end"),
                "initial_share": Option(0.1, "share of the steps before the budget shrinks"),
                "final_share": Option(0.5, "share of the steps after it has shrunk"),
                "interval": Option(10, "steps between budgets"),
                "b1": Option(0.85, "decay of the importance"),
                "b2": Option(0.85, "decay of its uncertainty"),
                "regularisation": Option(0.5, "weight of the penalty on factors that are not orthogonal"),
            },
        ),
        "balora": Method("LoRA balanced after every step (arXiv 2605.31484)", balanced=True),
        "balora_ga": Method("BaLoRA from LoRA-GA's start (arXiv 2605.31484)", initialisation=LORA_GA, balanced=True),
        "balora_gd": Method("gradient descent, balanced: Riemannian (arXiv 2605.31484)", optimizer=_sgd, balanced=True),
        "balora_plus": Method("LoRA+, balanced", optimizer=_lora_plus, options=_RATIO, balanced=True),
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
        raise ValueError(not_among("method", name, METHODS))
    return METHODS[name]
