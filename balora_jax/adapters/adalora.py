"""AdaLoRA: a low-rank update in the form of a singular value decomposition, whose rank is decided in training."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from balora_jax.adapters.initialisation import Factors, Initialisation
from balora_jax.adapters.lora import LoRALinear

_DEVIATION = 0.02


def _normal(key, weight, rank, scale) -> Factors:
    """Both factors normal with standard deviation 0.02."""
    *leading, rows, columns = weight.shape
    key_a, key_b = jax.random.split(key)
    lora_a = _DEVIATION * jax.random.normal(key_a, (*leading, rows, rank), jnp.float32)
    return lora_a, _DEVIATION * jax.random.normal(key_b, (*leading, rank, columns), jnp.float32)


ADALORA = Initialisation(_normal, offset=False)
"""`P, Q ~ N(0, 0.02^2)`; the product is zero by the zeros between them."""


class AdaLoRALinear(LoRALinear):
    """A linear layer with an update of variable rank: `y = base(x) + s (dropout(x) P) diag(E) Q`.

    P is `lora_a`, Q is `lora_b`, and E starts at zero, so that a fresh adapter changes nothing. The scale is
    `s = alpha / r` with the rank r of the start, also when `balora_jax.optimizers.adalora` has set entries of E to
    zero: so it is in the authors' code while it trains. PEFT adds 1e-5 to r.

    Attributes:
        lora_e: `(..., r)` float32, one of each rank-1 part; trained. Other attributes as in `LoRALinear`.

    Source: arXiv 2303.10512.
    """

    def __init__(self, base: Any, *, initialisation: Initialisation = ADALORA, **options):
        """Wraps a layer; the arguments are those of `LoRALinear`.

        Raises:
            ValueError: the initialisation has a product to take out of the base, which is zero here for any factors.
        """
        if initialisation.offset:
            raise ValueError("initialisation must be one without an offset: AdaLoRA's update starts at zero by itself")
        super().__init__(base, initialisation=initialisation, **options)
        batch = len(self.lora_b.shape) - 1 - len(self.contraction.remaining)
        self.lora_e = nnx.LoRAParam(jnp.zeros(self.lora_b.shape[: batch + 1], jnp.float32))

    def update_factors(self) -> Factors:
        """Returns `P diag(E)` and Q."""
        values = self.lora_e[...]
        between = (1,) * len(self.contraction.contracted)
        return self.lora_a[...] * values.reshape(*values.shape[:-1], *between, -1), self.lora_b[...]
