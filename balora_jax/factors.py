"""Stacks of the factors of pairs, and their products with r x r matrices."""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from balora_jax.gauge import Change
from balora_jax.linalg import gram, product, split

Arrays = TypeVar("Arrays")


class Stacks(NamedTuple):
    """Stacks of pairs of one rank, N pairs in all.

    Attributes:
        lora_a: `(n_i, a_i, r)` each.
        lora_b: `(n_i, r, b_i)` each.
    """

    lora_a: list[jax.Array]
    lora_b: list[jax.Array]


class Grams(NamedTuple):
    """The Gram matrices of N pairs.

    Attributes:
        gram_a: `(N, r, r)`, `P = A^T A`.
        gram_b: `(N, r, r)`, `Q = B B^T`.
    """

    gram_a: jax.Array
    gram_b: jax.Array


def working_dtype(*arrays: jax.Array) -> jax.typing.DTypeLike:
    """Returns the dtype of the arithmetic on some arrays: float64 if one of them is, else float32."""
    return jnp.float64 if any(array.dtype == jnp.float64 for array in arrays) else jnp.float32


def cast(arrays: Arrays, dtype: jax.typing.DTypeLike) -> Arrays:
    """Returns a structure of arrays with all of them in one dtype."""
    return jax.tree.map(lambda x: x.astype(dtype), arrays)


def gram_products(stacks: Stacks) -> Grams:
    """Returns the Gram matrices of all pairs, in the dtype of the factors."""
    return Grams(
        jnp.concatenate([gram(a, 0) for a in stacks.lora_a]), jnp.concatenate([gram(b, 1) for b in stacks.lora_b])
    )


def apply(change: Change, stacks: Stacks) -> Stacks:
    """Returns the pairs `(A T, T^-1 B)`, in the dtype of the factors."""
    T, T_inv = (split(x.astype(stacks.lora_a[0].dtype), stacks.lora_a) for x in (change.T, change.T_inv))
    return Stacks(
        [product(a, t) for a, t in zip(stacks.lora_a, T, strict=True)],
        [product(t, b) for t, b in zip(T_inv, stacks.lora_b, strict=True)],
    )
