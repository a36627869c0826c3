"""Stacks of the factors of pairs, as they are or moved by an update, and their products with r x r matrices."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from balora_jax.gauge import Change
from balora_jax.linalg import gram, matmul, over_stack, split

Arrays = TypeVar("Arrays")


class Moved(NamedTuple):
    """The factors `start + step`. The sum is formed where it is used, so that it need not be held.

    Attributes:
        start: the parameters, of any shape.
        step: their update, of the same shape.
    """

    start: jax.Array
    step: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the sum."""
        return self.start.shape


Factor = jax.Array | Moved


class Stacks(NamedTuple):
    """Stacks of pairs of one rank, N pairs in all.

    Attributes:
        lora_a: `(n_i, a_i, r)` each, arrays or `Moved`.
        lora_b: `(n_i, r, b_i)` each.
    """

    lora_a: Sequence[Any]
    lora_b: Sequence[Any]

    @property
    def rank(self) -> int:
        """The columns r of A."""
        return self.lora_a[0].shape[2]

    @property
    def is_redundant(self) -> bool:
        """Whether the pairs of the first stack have `r > min(a, b)`."""
        return self.rank > min(self.lora_a[0].shape[1], self.lora_b[0].shape[2])


class Grams(NamedTuple):
    """The Gram matrices of N pairs.

    Attributes:
        gram_a: `(N, r, r)`, `P = A^T A`.
        gram_b: `(N, r, r)`, `Q = B B^T`.
    """

    gram_a: jax.Array
    gram_b: jax.Array


def working_dtype(*arrays: Any) -> jax.typing.DTypeLike:
    """Returns the dtype of the arithmetic on arrays, or trees of them: float64 if one of them is, else float32."""
    return jnp.float64 if any(array.dtype == jnp.float64 for array in jax.tree.leaves(arrays)) else jnp.float32


def cast(arrays: Arrays, dtype: jax.typing.DTypeLike) -> Arrays:
    """Returns a structure of arrays with all of them in one dtype."""
    return jax.tree.map(lambda x: x.astype(dtype), arrays)


def value(factor: Factor) -> jax.Array:
    """Returns factors in float32 or wider."""
    wide = working_dtype(factor)
    if isinstance(factor, Moved):
        return factor.start.astype(wide) + factor.step.astype(wide)
    return factor.astype(wide)


def written(new: jax.Array, factor: Factor) -> jax.Array:
    """Returns new factors as their users want them: in the dtype of the old ones, or as the update that leads there."""
    if isinstance(factor, Moved):
        return (new - factor.start.astype(new.dtype)).astype(factor.step.dtype)
    return new.astype(factor.dtype)


def over_factors(function: Callable[..., jax.Array], stacks: Stacks, *others: Stacks) -> Stacks:
    """Returns what a function makes of each stack of factors, and of those in the same place of other stacks."""
    sides = (zip(*side, strict=True) for side in zip(stacks, *others, strict=True))
    return Stacks(*([function(*factors) for factors in side] for side in sides))


def gram_products(stacks: Stacks) -> Grams:
    """Returns the Gram matrices of all pairs, in float32 or wider."""

    def of_side(factors, side):
        return jnp.concatenate([over_stack(lambda x: gram(value(x), side), factor) for factor in factors])

    return Grams(of_side(stacks.lora_a, 0), of_side(stacks.lora_b, 1))


def apply(change: Change, stacks: Stacks) -> Stacks:
    """Returns the pairs `(A T, T^-1 B)`, as `written`."""
    dtype = working_dtype(stacks)
    T, T_inv = (split(x.astype(dtype), stacks.lora_a) for x in (change.T, change.T_inv))
    return Stacks(
        [over_stack(lambda a, t: written(matmul(value(a), t), a), *x) for x in zip(stacks.lora_a, T, strict=True)],
        [over_stack(lambda b, t: written(matmul(t, value(b)), b), *x) for x in zip(stacks.lora_b, T_inv, strict=True)],
    )
