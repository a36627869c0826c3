"""Full fine-tuning in the form of an adapter: the trained weight is the layer's own."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from balora_jax.adapters.adapter import Adapter
from balora_jax.adapters.initialisation import LORA, Initialisation
from balora_jax.adapters.lora import Scaling


class FullLinear(Adapter):
    """A linear layer whose whole kernel is trained: `y = base(x)` with the trained kernel in the place of its own.

    The kernel starts as a copy of the base's, in float32 whatever the dtype of the base, and is cast to that dtype for
    the product: a master copy, as in training in mixed precision. What an optimizer does to it, weight decay included,
    it does to the weight itself, and merging puts it into the base. The base stays as it was, so that many runs can
    share it. Its bias is not trained, as under the other adapters.

    Attributes:
        kernel: float32, of the base kernel's shape; trained. Other attributes as in `Adapter`.

    Notes:
        Takes the memory of a float32 copy of the weight for each run, beside the shared base.
    """

    def __init__(
        self,
        base: Any,
        *,
        rank: int | None = None,
        alpha: jax.typing.ArrayLike | None = None,
        scaling: Scaling = "lora",
        dropout: float = 0.0,
        initialisation: Initialisation = LORA,
        rngs: nnx.Rngs | None = None,
    ):
        """Wraps a layer; nothing is drawn, and of the arguments of `LoRALinear` all but these mean nothing here.

        Args:
            base: an `nnx.Linear`, `nnx.LinearGeneral` or `nnx.Einsum`.
            rank: not used, as `alpha`, `scaling`, `initialisation` and `rngs` are not.
            alpha: not used.
            scaling: not used.
            dropout: must be 0: there is no adapter whose input it could drop.
            initialisation: not used.
            rngs: not used.

        Raises:
            ValueError: the dropout is not 0.
            TypeError: the layer is of another kind.
        """
        super().__init__(base)
        if dropout:
            raise ValueError(f"dropout must be 0 where the weight itself is trained, got {dropout}")
        self.kernel = nnx.LoRAParam(base.kernel[...].astype(jnp.float32, copy=True))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer with the trained kernel."""
        if self.merged:
            return self.base(x)
        layer = nnx.clone(self.base)
        layer.kernel[...] = self.kernel[...].astype(self.base.kernel.dtype)
        return layer(x)

    def weight_update(self) -> jax.Array:
        """Returns what training has added to the base's kernel, in float32."""
        return self.kernel[...] - self.base.kernel[...].astype(jnp.float32)

    def _merged_kernel(self) -> jax.Array:
        return self.kernel[...]
