"""DoRA: a low-rank update of the direction of every column of a weight, and a trained magnitude."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from balora_jax.adapters.lora import LoRALinear
from balora_jax.linalg import matmul
from balora_jax.rematerialisation import keep


class DoRALinear(LoRALinear):
    """A linear layer with weight-decomposed adaptation: column j is `m_j V_j / ||V_j||`, `V = W0 + s A B`.

    The magnitude m starts as the norms of the columns of V, so that a fresh adapter changes nothing. Norms are not
    differentiated, as the authors recommend (section 4.3), and the bias is not scaled. With dropout, the adapter's
    share of the output sees the dropped input and the base's does not.

    Attributes:
        magnitude: `(..., out)` float32, one for every output unit; trained. Other attributes as in `LoRALinear`.

    Notes:
        Norms come from `||W_j||^2 + 2 s (W^T A)_j B_j + s^2 B_j^T A^T A B_j`: O(in out r) for each call, and nothing of
        the size of the weight. Balancing A and B changes neither V nor the output.

    Source: arXiv 2402.09353.
    """

    def __init__(self, base: Any, **options):
        """Wraps a layer; the arguments are those of `LoRALinear`."""
        super().__init__(base, **options)
        self.magnitude = nnx.LoRAParam(self._column_norms())

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer and its adapter."""
        y = self.base(x)
        if self.merged:
            return y
        factor = self._factors()
        bias = getattr(self.base, "bias", None)
        direction = y if bias is None else y - bias[...].astype(y.dtype)
        update = self.contraction.scaled_outputs(self._low_rank(x, y.dtype), factor.astype(y.dtype))
        # in this form nothing is lost where the factor is 1
        return y + self.contraction.scaled_outputs(direction, (factor - 1).astype(y.dtype)) + update

    def weight_update(self) -> jax.Array:
        """Returns what the adapter adds to the base's kernel, in float32, in its layout."""
        kernel = self.base.kernel[...].astype(jnp.float32)
        return self.contraction.scaled_kernel(kernel + super().weight_update(), self._factors()) - kernel

    def _factors(self) -> jax.Array:
        """`m_j / ||V_j||`; 1 for a column that is zero."""
        norms = keep(jax.lax.stop_gradient(self._column_norms()))
        return jnp.where(norms > 0, self.magnitude[...] / jnp.where(norms > 0, norms, 1), 1)

    def _column_norms(self) -> jax.Array:
        """`||V_j||` of every output unit, `(stacked, shared, remaining axes)`."""
        kernel = self.base.kernel[...]
        weights = self.contraction.matrices(kernel).astype(jnp.float32)
        batch = weights.shape[:-2]
        lora_a, lora_b = self.lora_a[...].reshape(*weights.shape[:-1], -1), self.lora_b[...]
        lora_b = lora_b.reshape(*batch, -1, weights.shape[-1])
        if self.offset_a is not None and self.offset_b is not None:
            offset_a, offset_b = self.offset_a[...].reshape(lora_a.shape), self.offset_b[...].reshape(lora_b.shape)
            lora_a, lora_b = jnp.concatenate([lora_a, offset_a], -1), jnp.concatenate([lora_b, -offset_b], -2)
        scale = self.scale[...]
        scaled_b = scale.reshape(scale.shape + (1,) * (lora_b.ndim - scale.ndim)) * lora_b
        crossed = 2 * matmul(weights.mT, lora_a).mT + matmul(matmul(lora_a.mT, lora_a), scaled_b)
        squares = (weights**2).sum(-2) + (crossed * scaled_b).sum(-2)
        shape = self.contraction.factor_shapes(kernel.shape, 1)[1]
        rank_axis = len(batch)
        return jnp.sqrt(jnp.maximum(squares, 0)).reshape(*shape[:rank_axis], *shape[rank_axis + 1 :])
