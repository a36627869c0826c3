"""What all adapters have in common: a layer in the place of a frozen linear layer, and merging into it."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from balora_jax.adapters.contraction import contraction_of
from balora_jax.casting import first_lost, too_large


class MergeError(ValueError):
    """A weight that would not be finite after merging.

    Attributes:
        index: of its first such entry, in the base's kernel.
        reason: what is wrong with it, and what to do.
    """

    def __init__(self, index: tuple[int, ...], reason: str):
        super().__init__(f"the merged kernel {reason}")
        self.index, self.reason = index, reason


class UnmergedKernel(nnx.Variable):
    """The base weight as it was before an adapter was merged into it."""


class Adapter(nnx.Module):
    """A layer that applies a frozen linear layer with another weight: what is trained are its `nnx.LoRAParam`s.

    Subclasses define `__call__`, which gives the output of `base` alone once the adapter is merged, and
    `weight_update`.

    Attributes:
        base: the frozen layer.
        contraction: how it contracts its input with its kernel.
        merged: whether the update has been added to the base's kernel.
    """

    def __init__(self, base: Any):
        """Wraps a layer.

        Args:
            base: an `nnx.Linear`, `nnx.LinearGeneral` or `nnx.Einsum`.

        Raises:
            ValueError: the layer is not one that an update of its kernel can follow.
            TypeError: the layer is of another kind.
        """
        self.contraction = contraction_of(base)
        self.base = base
        self.merged = False
        self.unmerged_kernel: UnmergedKernel | None = nnx.data(None)

    def weight_update(self) -> jax.Array:
        """Returns what the adapter adds to the base's kernel, in float32, in its layout."""
        raise NotImplementedError

    def merge(self) -> None:
        """Adds the update to the base's kernel; keeps the kernel so that `unmerge` is exact in every dtype.

        Raises:
            MergeError: an entry would not be finite (not seen under `jit`). The kernel is then as it was.
        """
        if not self.merged:
            kernel, wide = self.base.kernel[...], self._merged_kernel()
            merged = wide.astype(kernel.dtype)
            if not isinstance(merged, jax.core.Tracer):
                _check_finite(kernel, wide, merged)
            self.unmerged_kernel = UnmergedKernel(kernel)
            self.base.kernel[...] = merged
            self.merged = True

    def unmerge(self) -> None:
        """Puts the base's kernel back as it was before `merge`, bit for bit."""
        if self.merged:
            assert self.unmerged_kernel is not None
            self.base.kernel[...] = self.unmerged_kernel[...]
            self.unmerged_kernel = nnx.data(None)
            self.merged = False

    def _merged_kernel(self) -> jax.Array:
        """The kernel after merging, in float32."""
        return self.base.kernel[...].astype(jnp.float32) + self.weight_update()


def _check_finite(kernel: jax.Array, wide: jax.Array, merged: jax.Array) -> None:
    """Raises if an entry of a merged kernel is not finite that was so before; `wide` is the sum before its cast."""
    index = first_lost(kernel, merged)
    if index is not None:
        if jnp.isfinite(wide[index]):
            raise MergeError(index, too_large(wide[index], merged.dtype))
        raise MergeError(index, "is not finite: its update is beyond float32; the factors or alpha are too large")
