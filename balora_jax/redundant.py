"""Balancing pairs with more columns than their product can have rank, `r > min(a, b)`."""

import jax
import jax.numpy as jnp
from jax import lax

from balora_jax.exponents import even_exponents, times_two_to
from balora_jax.factors import Stacks, over_factors, value, written
from balora_jax.gauge import Change, matching, orthogonal_factor
from balora_jax.linalg import matmul, orthonormal
from balora_jax.stages import Outcome, balance_in_stages, ratio_of_norms


def balance_redundant(
    stacks: Stacks, gauge: str, precision: jax.typing.DTypeLike, wide: jax.typing.DTypeLike
) -> Outcome:
    """Balances pairs with `r > m = min(a, b)` within the rank m, which is all that there is.

    With the orthonormal basis `Y (r, m)` of the rows of A, or of the columns of B, whichever factor has m of them, the
    pair `(A Y, Y^T B)` has the same product and the rank m.

    Args:
        stacks: one stack of pairs.
        gauge: one of `GAUGES`.
        precision: dtype that the factors come from and go to.
        wide: dtype of the arithmetic.
    """
    (lora_a,), (lora_b,) = over_factors(value, stacks)
    thin = lora_a.mT if lora_a.shape[1] <= lora_b.shape[2] else lora_b
    thin = jnp.where(jnp.isfinite(thin).all((1, 2), keepdims=True), thin, 0).astype(wide)
    basis = orthonormal(lax.map(lambda matrix: jnp.linalg.qr(matrix)[0], thin))
    # in the wider dtype, or what A and B do not share would cancel in the precision of the factors
    lora_a, lora_b = lora_a.astype(wide), lora_b.astype(wide)
    reduced = Stacks([matmul(lora_a, basis)], [matmul(basis.mT, lora_b)])
    inner = balance_in_stages(reduced, "raw_svd", "exact", precision, wide)
    (small_a,), (small_b,) = inner.stacks
    T, T_inv = matmul(basis, inner.change.T), matmul(inner.change.T_inv, basis.mT)
    turn = _turn((lora_a, lora_b), (small_a, small_b), T, gauge)
    new_a, new_b = matmul(small_a, turn), matmul(turn.mT, small_b)
    shared = _cancellation_of_product(lora_a, lora_b, small_a) / lora_a.shape[2] ** 0.5
    squares_a, squares_b = (jnp.square(x).sum(1) for x in (lora_a, lora_b.mT))
    lost = (squares_a * jnp.square(new_b).sum(2) + squares_b * jnp.square(new_a).sum(1)).sum(1)
    return Outcome(
        over_factors(written, Stacks([new_a], [new_b]), stacks),
        Change(matmul(T, turn), matmul(turn.mT, T_inv), inner.change.values, inner.change.found),
        inner.evidence._replace(damage=jnp.maximum(inner.evidence.damage, shared)),
        jnp.sqrt(lost / 2) / jnp.linalg.norm(jnp.square(small_a).sum(1), axis=1),
        ratio_of_norms(squares_a.sum(1), squares_b.sum(1)),
    )


def _turn(old, small, T, gauge):
    """The rows `(n, m, r)`, orthonormal, that take pairs of m columns into the gauge with r of them."""
    (lora_a, lora_b), (small_a, small_b) = old, small
    rank, least = lora_a.shape[-1], small_a.shape[-1]
    if gauge == "raw_svd":
        return jnp.broadcast_to(jnp.eye(least, rank, dtype=T.dtype), T.mT.shape)
    if gauge == "symmetric":
        return orthogonal_factor(T.mT)
    overlap_a, overlap_b = matmul(small_a.mT, lora_a), matmul(small_b, lora_b.mT)
    if gauge == "nearest":
        return orthogonal_factor(overlap_a + overlap_b)
    norms = jnp.linalg.norm(lora_a, axis=1), jnp.linalg.norm(lora_b, axis=2)
    return matching(overlap_a, overlap_b, jnp.square(small_a).sum(1), *norms)


def _cancellation_of_product(lora_a, lora_b, small_a):
    """How far the factors cancel in the product, `|A| |B| / |A B|` in Frobenius norms, `(n)`."""
    sizes = []
    for factor in (lora_a, lora_b, small_a):
        exponent = even_exponents(jnp.abs(factor).max((1, 2)))
        sizes.append((times_two_to(factor, -exponent[:, None, None]), exponent))
    (lora_a, i), (lora_b, j), (small_a, k) = sizes
    norms = [jnp.linalg.norm(factor, axis=(1, 2)) for factor in (lora_a, lora_b)]
    product_norm = jnp.linalg.norm(jnp.square(small_a).sum(1), axis=1)  # small_a is hyper-balanced
    return times_two_to(norms[0] * norms[1] / product_norm, i + j - 2 * k)
