"""Products of stacked matrices, and their decompositions, one after the other.

Two batched LAPACK calls of one program can wait for each other on XLA's CPU backend, for ever; and its GPU backend runs
such a batch one by one anyway.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def product(left: jax.Array, right: jax.Array) -> jax.Array:
    """A stacked matrix product; one matrix is multiplied as such, which XLA's CPU backend does several times faster."""
    if left.shape[0] > 1:
        return matmul(left, right)
    return matmul(lax.squeeze(left, [0]), lax.squeeze(right, [0]))[None]


def gram(factor: jax.Array, side: int) -> jax.Array:
    """The stacked Gram matrices of stacked `lora_a (n, a, r)` (side 0) or `lora_b (n, r, b)` (side 1)."""
    if factor.shape[0] == 1:
        matrix = lax.squeeze(factor, [0])
        return (matmul(matrix, matrix.T) if side else matmul(matrix.T, matrix))[None]
    return matmul(factor, factor.mT) if side else matmul(factor.mT, factor)


def split(stacked: jax.Array, stacks: list[jax.Array]) -> list[jax.Array]:
    """An array over all pairs `(N, ...)`, cut into the parts of the stacks."""
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
