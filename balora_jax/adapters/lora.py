"""LoRA over a frozen linear layer of Flax NNX."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from balora_jax.adapters.adapter import Adapter
from balora_jax.adapters.initialisation import LORA, Factors, Initialisation

Scaling = Literal["lora", "rslora"]


class AdapterScale(nnx.Variable):
    """The factor `s` of the update `s A B`: a number of the adapter that is set, not trained."""


class AdapterOffset(nnx.Variable):
    """A factor of the product that an adapter started with, where that is not zero: frozen."""


def adapter_scale(alpha: jax.typing.ArrayLike, rank: int, scaling: Scaling = "lora") -> jax.typing.ArrayLike:
    """Returns `alpha / rank` (LoRA, arXiv 2106.09685) or `alpha / sqrt(rank)` (rsLoRA, arXiv 2312.03732).

    Args:
        alpha: the numerator.
        rank: rank of the adapter.
        scaling: which of the two.

    Raises:
        ValueError: the scaling is unknown.
    """
    if scaling == "lora":
        return alpha / rank
    if scaling == "rslora":
        return alpha / math.sqrt(rank)
    raise ValueError(f"scaling must be 'lora' or 'rslora', got {scaling!r}")


class LoRALinear(Adapter):
    """A linear layer with a low-rank update: `y = base(x) + s (dropout(x) A) B`.

    The factors are `nnx.LoRAParam`s in float32 whatever the dtype of the base; they are cast to the dtype of the base's
    output for the products, so that the layer's output keeps its dtype. A fresh adapter changes nothing: `B` is zero,
    or, for initializations that start elsewhere, the product they start with is subtracted,
    `y = base(x) + s (dropout(x) A B - x A0 B0)`. That is the published `W0 <- W0 - s A0 B0`, but exact in every dtype
    of the base, which stays shared and untouched; it costs a second low-rank product.

    A base whose kernel carries extra leading axes (layers stacked for `nnx.scan` or `nnx.vmap`) gets factors with the
    same leading axes; inside the scan or vmap both are sliced together.

    Attributes:
        lora_a: `(..., in, r)`; `in` is several axes if the layer contracts several.
        lora_b: `(..., r, out)`; likewise.
        offset_a: `A0`, like `lora_a`, or None.
        offset_b: `B0`, like `lora_b`, or None.
        scale: `(...)` float32, the factor `s`.
        rank: `r`. Other attributes as in `Adapter`.

    Source: arXiv 2106.09685.
    """

    def __init__(
        self,
        base: Any,
        *,
        rank: int,
        alpha: jax.typing.ArrayLike | None = None,
        scaling: Scaling = "lora",
        dropout: float = 0.0,
        initialisation: Initialisation = LORA,
        rngs: nnx.Rngs,
    ):
        """Wraps a layer.

        Args:
            base: an `nnx.Linear`, `nnx.LinearGeneral` or `nnx.Einsum`.
            rank: from 1 to the smaller side of the weight.
            alpha: numerator of the scale; default the rank.
            scaling: `"lora"` for `alpha / rank`, `"rslora"` for `alpha / sqrt(rank)`.
            dropout: probability of dropping an entry of the adapter's input in training.
            initialisation: where the factors start.
            rngs: source of the random numbers: stream `params` for the factors, `dropout` for the dropout.

        Raises:
            ValueError: the rank does not fit the weight, or the dropout is not a probability.
            TypeError: the layer is of another kind, or the rank is not an integer.
        """
        super().__init__(base)
        kernel_shape = base.kernel.shape
        shape_a, shape_b = self.contraction.factor_shapes(kernel_shape, 1)
        stacked = kernel_shape[: len(kernel_shape) - len(self.contraction.kernel)]
        batch = len(stacked) + len(self.contraction.shared)
        fan_in, fan_out = math.prod(shape_a[batch:]), math.prod(shape_b[batch:])
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise TypeError(f"rank must be an integer, got {rank!r}")
        if not 1 <= rank <= min(fan_in, fan_out):
            raise ValueError(
                f"rank must be from 1 to {min(fan_in, fan_out)} for a weight {fan_in} x {fan_out}, got {rank}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        shape_a, shape_b = self.contraction.factor_shapes(kernel_shape, rank)
        self.rank = rank
        scale = adapter_scale(rank if alpha is None else alpha, rank, scaling)
        self.scale = AdapterScale(jnp.full(stacked, scale, jnp.float32))
        weights = self.contraction.matrices(base.kernel[...])
        lora_a, lora_b = initialisation.factors(rngs.params(), weights, rank, scale)
        lora_a, lora_b = lora_a.reshape(shape_a), lora_b.reshape(shape_b)
        self.lora_a, self.lora_b = nnx.LoRAParam(lora_a), nnx.LoRAParam(lora_b)
        # copies: the factors' own arrays are given away by a step that reuses their memory
        self.offset_a = nnx.data(AdapterOffset(lora_a.copy()) if initialisation.offset else None)
        self.offset_b = nnx.data(AdapterOffset(lora_b.copy()) if initialisation.offset else None)
        self.dropout = nnx.data(_dropout(dropout, stacked, rngs) if dropout else None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer and its adapter."""
        y = self.base(x)
        return y if self.merged else y + self._low_rank(x, y.dtype)

    def _low_rank(self, x: jax.Array, dtype) -> jax.Array:
        """What the adapter adds to the output of the base, in the dtype given."""
        dropped = x if self.dropout is None else self.dropout(x)
        update = self._product_with(dropped, *self.update_factors(), dtype)
        if self.offset_a is not None and self.offset_b is not None:
            update = update - self._product_with(x, self.offset_a[...], self.offset_b[...], dtype)
        return update

    def _product_with(self, x, lora_a, lora_b, dtype):
        # scaling the factor, and not the output, spares a pass over the output in each direction
        lora_b = self.scale[...] * lora_b
        return self.contraction.low_rank(x.astype(dtype), lora_a.astype(dtype), lora_b.astype(dtype))

    def update_factors(self) -> Factors:
        """Returns the two factors whose product, less that of the start, is scaled to the update."""
        return self.lora_a[...], self.lora_b[...]

    def weight_update(self) -> jax.Array:
        """Returns `s A B`, less `s A0 B0` if there is an offset, in float32, in the layout of the base's kernel."""
        product = self.contraction.product(*self.update_factors())
        if self.offset_a is not None and self.offset_b is not None:
            product = product - self.contraction.product(self.offset_a[...], self.offset_b[...])
        scale = self.scale[...]
        return scale.reshape(scale.shape + (1,) * (product.ndim - scale.ndim)) * product


def _dropout(rate: float, stacked: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Dropout:
    """A dropout layer; for stacked layers one with a random stream each."""

    def make(rngs):
        return nnx.Dropout(rate, rngs=rngs)

    for size in reversed(stacked):
        make = nnx.split_rngs(splits=size)(nnx.vmap(make))
    return make(rngs)
