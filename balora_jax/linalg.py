"""Products of stacked matrices, and their decompositions, one after the other.

Two batched LAPACK calls of one program can wait for each other on XLA's CPU backend, for ever; and its GPU backend runs
such a batch one by one anyway.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from balora_jax.platforms import has_one_cpu

matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def over_stack(function: Callable, *stacked: Any) -> Any:
    """Applies a function of matrices to stacked ones: all at once, but on CPUs one after the other.

    There XLA multiplies single matrices several times as fast as stacked ones, and what the function makes of one stays
    in the cache. Where a process has several CPU devices a stack may be sharded, and is not taken apart.

    Args:
        function: of trees of arrays, and to such.
        *stacked: trees of arrays with a leading axis.
    """
    if jax.tree.leaves(stacked)[0].shape[0] == 1:
        out = function(*jax.tree.map(lambda x: lax.squeeze(x, [0]), stacked))
        return jax.tree.map(lambda x: x[None], out)
    together = jax.vmap(function)
    if not has_one_cpu():
        return together(*stacked)
    return lax.platform_dependent(*stacked, cpu=lambda *x: lax.map(lambda x: function(*x), x), default=together)


def product(left: jax.Array, right: jax.Array) -> jax.Array:
    """A stacked matrix product."""
    return over_stack(matmul, left, right)


def gram(factor: jax.Array, side: int) -> jax.Array:
    """The Gram matrix of `lora_a (a, r)` (side 0) or `lora_b (r, b)` (side 1)."""
    return matmul(factor, factor.T) if side else matmul(factor.T, factor)


def split(stacked: jax.Array, stacks: Sequence[Any]) -> list[jax.Array]:
    """An array over all pairs `(N, ...)`, cut into the parts of the stacks, which have shapes."""
    parts, start = [], 0
    for stack in stacks:
        parts.append(stacked[start : start + stack.shape[0]])
        start += stack.shape[0]
    return parts


def orthonormal(matrix: jax.Array) -> jax.Array:
    """Nearly orthonormal columns or rows `(..., m, k)`, orthonormal to rounding: a step of Newton and Schulz."""
    return 1.5 * matrix - 0.5 * matmul(matrix, matmul(matrix.mT, matrix))


def _one_by_one(function):
    """The function over leading axes, one matrix after the other, also under `vmap`."""

    @jax.custom_batching.custom_vmap
    def run(stack):
        return lax.map(function, stack)

    @run.def_vmap
    def _(axis_size, in_batched, stack):
        out = run(lax.collapse(stack, 0, 2))
        out = jax.tree.map(lambda x: x.reshape(axis_size, stack.shape[1], *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    def over_leading(matrix):
        out = run(matrix.reshape(-1, *matrix.shape[-2:]))
        return jax.tree.map(lambda x: x.reshape(*matrix.shape[:-2], *x.shape[1:]), out)

    return over_leading


eigh = _one_by_one(lambda matrix: tuple(jnp.linalg.eigh(matrix)))
"""Eigenvalues `(..., n)`, ascending, and eigenvectors `(..., n, n)` of symmetric matrices."""

svd = _one_by_one(lambda matrix: tuple(jnp.linalg.svd(matrix, full_matrices=False)))
"""The thin singular value decomposition: `(..., m, k)`, `(..., k)` descending, `(..., k, n)`."""

qr = _one_by_one(lambda matrix: tuple(jnp.linalg.qr(matrix)))
"""The thin QR decomposition: `(..., m, k)`, `(..., k, n)`."""
