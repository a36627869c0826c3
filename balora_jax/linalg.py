"""Decompositions of stacked matrices, one after the other.

Two batched LAPACK calls of one program can wait for each other on XLA's CPU backend, for ever; and its GPU backend runs
such a batch one by one anyway.
"""

import jax
import jax.numpy as jnp
from jax import lax


def _one_by_one(function):
    """The function over leading axes, one matrix after the other, also under `vmap`."""

    @jax.custom_batching.custom_vmap
    def run(stack):
        return lax.map(function, stack)

    @run.def_vmap
    def _(axis_size, in_batched, stack):
        out = run(stack.reshape(-1, *stack.shape[2:]))
        out = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), out)
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
