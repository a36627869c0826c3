"""What a change of gauge does to rounding errors, from Gram matrices alone, stacked over pairs.

All sums of squares are first-order estimates for independent errors; 1 stands for errors that stay as they are.
"""

import jax
import jax.numpy as jnp

from balora_jax.gauge import Change, column_norms
from balora_jax.linalg import matmul

# A Gram matrix carries a change if its rounding errors are enlarged by less than this in the balanced ones, and if
# columns scaled to norm 1 have a condition number below the second.
_MOST_GROWTH = 4.0
MOST_CONDITION = 200.0


def carries(
    change: Change, gram_a: jax.Array, gram_b: jax.Array, *, most_condition: float = MOST_CONDITION, spare: float = 1.0
) -> jax.Array:
    """Returns whether Gram matrices are precise enough for the change that was found from them, `(n)`.

    Args:
        change: from the pairs to hyper-balanced ones.
        gram_a: `(n, r, r)`, P.
        gram_b: `(n, r, r)`, Q.
        most_condition: the largest condition number of factors that they carry.
        spare: by how much they are more precise than the factors.
    """
    grown = growth(change, gram_a, gram_b) < _MOST_GROWTH * spare
    return grown & (condition(change, gram_a, gram_b) < most_condition * spare**0.5)


@jax.jit
def growth(change: Change, gram_a: jax.Array, gram_b: jax.Array) -> jax.Array:
    """Returns by how much errors of P and Q, relative to their columns' norms, are enlarged in the balanced ones `(n)`.

    Args:
        change: from the pairs to hyper-balanced ones.
        gram_a: `(n, r, r)`, P.
        gram_b: `(n, r, r)`, Q.
    """
    share_a, share_b = _shares(change, gram_a, gram_b)
    return (share_a.sum((1, 2)) + share_b.sum((1, 2))) / (2 * change.values.sum(1))


@jax.jit
def condition(change: Change, gram_a: jax.Array, gram_b: jax.Array) -> jax.Array:
    """Returns the larger norm of the pseudo-inverses of A with unit columns and of B with unit rows, `(n)`.

    In the Frobenius norm, at least sqrt(r): it is large where columns nearly depend on each other.

    Args:
        change: from the pairs to hyper-balanced ones.
        gram_a: `(n, r, r)`, P.
        gram_b: `(n, r, r)`, Q.
    """
    share_a, share_b = _shares(change, gram_a, gram_b)
    inverse_a = (share_a / change.values[:, None, :]).sum((1, 2))
    inverse_b = (share_b / change.values[:, :, None]).sum((1, 2))
    return jnp.sqrt(jnp.maximum(inverse_a, inverse_b))


@jax.jit
def damage(change: Change, turn: jax.Array, gram_a: jax.Array, gram_b: jax.Array) -> jax.Array:
    """Returns by how much errors of `A T` and `T^-1 B`, relative to what is summed there, are enlarged in the product.

    `(n)`, large where terms cancel.

    Args:
        change: from the pairs to hyper-balanced ones.
        turn: `(n, r, r)`, the rotation that follows it.
        gram_a: `(n, r, r)`, P.
        gram_b: `(n, r, r)`, Q.
    """
    share_a, share_b = _shares(
        change._replace(T=matmul(change.T, turn), T_inv=matmul(turn.mT, change.T_inv)), gram_a, gram_b
    )
    scale = change.values.max(1)
    share = change.values / scale[:, None]
    partner = (turn**2 * share[:, :, None]).sum(1)  # squared norms of the new columns
    worst = jnp.maximum((share_a.sum(1) * partner).sum(1), (share_b.sum(2) * partner).sum(1))
    return jnp.sqrt(worst / scale) / jnp.linalg.norm(share, axis=1)


@jax.jit
def cancellation(change: Change, gram_a: jax.Array, gram_b: jax.Array) -> jax.Array:
    """Returns by how many roundings of the old factors the product moves if the new ones are sums with them, `(n)`.

    `A + (A' - A)` carries an error of the size of a rounding of A, which counts where A' is far smaller.

    Args:
        change: from the pairs to balanced ones.
        gram_a: `(n, r, r)`, P.
        gram_b: `(n, r, r)`, Q.
    """
    new_a = (matmul(gram_a, change.T) * change.T).sum(1)  # squared norms of the new columns
    new_b = (matmul(change.T_inv, gram_b) * change.T_inv).sum(2)
    moved = (column_norms(gram_a) ** 2 * new_b + column_norms(gram_b) ** 2 * new_a).sum(1)
    return jnp.sqrt(moved / 2) / jnp.linalg.norm(change.values, axis=1)


def _shares(change, gram_a, gram_b):
    """The squares of the terms of `A T` and of `T^-1 B`, each summed over a column of A or a row of B, `(n, r, r)`."""
    share_a = (column_norms(gram_a)[:, :, None] * change.T) ** 2
    share_b = (change.T_inv * column_norms(gram_b)[:, None, :]) ** 2
    return share_a, share_b
