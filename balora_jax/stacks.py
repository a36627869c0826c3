"""Balancing stacks of pairs of one rank: products with the factors around the r x r work of `balora_jax.gauge`.

All pairs go through together: one Gram product of each factor, one stacked batch of r x r work, one product that
applies the change of gauge to each factor. Where Gram matrices of working precision cannot carry this (ill-conditioned
factors, extreme scales, lacking rank), these pairs go through `balora_jax.repair`.
"""

from functools import cache

import jax
import jax.numpy as jnp
from jax import lax

from balora_jax.exponents import even_exponents, near_one, of_unscaled, times_two_to
from balora_jax.gauge import (
    chosen,
    column_norms,
    exact_change,
    identity_change,
    iterative_change,
    matching,
    polar,
    rotation,
    turned,
)
from balora_jax.linalg import gram, matmul, orthonormal, product, split
from balora_jax.repair import MOST_CONDITION, MOST_GROWTH, most_damage, repair
from balora_jax.rounding import cancellation, condition, growth
from balora_jax.sharding import sharded_like

# Gram matrices of columns within these norms neither overflow in float32 nor lose digits to underflow.
_SAFE_NORMS = (1e-13, 1e13)
# Gauges whose pairs are not hyper-balanced, and the condition number up to which float32 Gram matrices do for them.
_ROTATED = ("nearest", "symmetric")
_ROTATED_CONDITION = 20.0


def in_place(condition, body, value):
    """`body(value)` where the condition holds, else `value`: unlike `lax.cond`, a loop need not copy what it keeps."""
    return lax.while_loop(lambda c: c[0], lambda c: (jnp.zeros((), bool), body(c[1])), (condition, value))[1]


def balance_stacks(lefts, rights, gauge: str, route: str):
    """The projection of stacks of pairs of one rank and one dtype; a stack with `r > min(a, b)` comes alone.

    Args:
        lefts: list of `(n_i, a_i, r)`, the left factors.
        rights: list of `(n_i, r, b_i)`.
        gauge: one of `GAUGES`.
        route: one of `ROUTES`.

    Returns:
        The factors after the projection, in two lists; then, over all N pairs, the change of gauge and its inverse
        `(N, r, r)`, whether a pair was left for lack of rank, or for a NaN or infinity, and its cancellation, see
        `balora_jax.rounding`. Left pairs have the identity for a change; products with it spread a NaN in its factor.
    """
    return sharded_like((lefts, rights), _compiled(gauge, route), lefts, rights, replicated=5)


@cache
def _compiled(gauge: str, route: str):
    """The compiled function behind `balance_stacks`.

    A `vmap` outside would make both branches of every condition run, and batch calls of LAPACK; so it is turned into
    longer stacks instead. The r x r work is done in float64 whatever the user's setting, except on TPUs, which lack it.
    """

    @jax.custom_batching.custom_vmap
    def run(lefts, rights):
        wide = jnp.float32 if jax.default_backend() == "tpu" else jnp.float64
        with jax.enable_x64(wide == jnp.float64):
            if lefts[0].shape[2] > min(lefts[0].shape[1], rights[0].shape[2]):
                return _balanced_redundant(lefts[0], rights[0], gauge, wide)
            return _balanced(lefts, rights, gauge, route, wide, lefts[0].dtype)

    @run.def_vmap
    def _(axis_size, in_batched, lefts, rights):
        def flat(x, batched):
            x = x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        def unflat(x):
            return x.reshape(axis_size, -1, *x.shape[1:])

        lefts, rights = jax.tree.map(flat, (lefts, rights), tuple(in_batched))
        new_lefts, new_rights, *over_pairs = run(lefts, rights)
        parts = [[unflat(part) for part in split(x, lefts)] for x in over_pairs]
        out = (*jax.tree.map(unflat, (new_lefts, new_rights)), *(jnp.concatenate(p, axis=1) for p in parts))
        return out, jax.tree.map(lambda _: True, out)

    return jax.jit(run)


def _balanced(lefts, rights, gauge, route, wide, precision):
    """Balances stacks of pairs of one rank; see `balance_stacks`.

    The r x r work is done in the dtype `wide`; `precision` is the dtype that the factors come from and will go to.
    """
    dtype = lefts[0].dtype
    gram_a = jnp.concatenate([gram(a, 0) for a in lefts]).astype(wide)
    gram_b = jnp.concatenate([gram(b, 1) for b in rights]).astype(wide)
    safe = _safe(gram_a) & _safe(gram_b)
    *_, i, j = near_one(gram_a, gram_b)
    gram_a, gram_b = (times_two_to(x, -(i + j)[:, None, None]) for x in (gram_a, gram_b))
    change, trusted = _trusted_change(gram_a, gram_b, safe, gauge, route, dtype)
    moved = cancellation(change, gram_a, gram_b)
    if gauge != "raw_svd":
        settled = _settled(gram_a, gram_b, gauge, float(jnp.finfo(precision).eps))
        change = chosen(settled, identity_change(gram_a), change)

    def repaired(old):
        lefts, rights, change, moved, *_ = old
        repaired = repair(lefts, rights, ~trusted, gauge, precision, wide)
        moved = jnp.where(trusted, moved, repaired.cancellation)
        lost = ~(trusted | repaired.found | repaired.nonfinite)
        change = chosen(trusted, change, repaired.change)
        return repaired.lefts, repaired.rights, change, moved, lost, repaired.nonfinite

    nowhere = jnp.zeros(trusted.shape, bool)
    lefts, rights, change, moved, lost, nonfinite = in_place(
        (~trusted).any(), repaired, (lefts, rights, change, moved, nowhere, nowhere)
    )
    to_apply = chosen(trusted, change, identity_change(gram_a))
    forwards, inverses = (split(x.astype(dtype), lefts) for x in (to_apply.forward, to_apply.inverse))
    new_lefts = [product(a, t) for a, t in zip(lefts, forwards, strict=True)]
    new_rights = [product(t, b) for b, t in zip(rights, inverses, strict=True)]
    forward, inverse = change.forward.astype(dtype), change.inverse.astype(dtype)
    return new_lefts, new_rights, forward, inverse, lost, nonfinite, moved.astype(jnp.float32)


def _trusted_change(gram_a, gram_b, safe, gauge, route, dtype):
    """The change of gauge from Gram matrices of the precision `dtype`, and for which pairs these were good enough."""

    def judged(change, gram_a, gram_b, safe):
        most = _ROTATED_CONDITION if gauge in _ROTATED else MOST_CONDITION
        carried = (growth(change, gram_a, gram_b) < MOST_GROWTH) & (condition(change, gram_a, gram_b) < most)
        return change.found & carried & safe

    def exact(gram_a, gram_b, safe):
        change = exact_change(gram_a, gram_b)
        trusted = judged(change, gram_a, gram_b, safe)
        return turned(change, rotation(change, gram_a, gram_b, gauge)), trusted

    def iterative(gram_a, gram_b, safe):
        near_a, near_b, i, j = near_one(gram_a, gram_b)
        change = iterative_change(near_a.astype(dtype), near_b.astype(dtype))
        change = jax.tree.map(lambda x: x if x.dtype == bool else x.astype(gram_a.dtype), change)
        change = of_unscaled(change, i, j)

        def one_exactly(carry):
            todo, *outcome = carry
            first = jnp.where(todo, jnp.arange(todo.shape[0]), todo.shape[0]).min()
            one = exact(*(lax.dynamic_slice_in_dim(x, first, 1) for x in (gram_a, gram_b, safe)))
            outcome = jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y, first, 0), tuple(outcome), one)
            return todo.at[first].set(False), *outcome

        trusted = judged(change, gram_a, gram_b, safe)
        return lax.while_loop(lambda carry: carry[0].any(), one_exactly, (~trusted, change, trusted))[1:]

    if route == "exact" or gauge != "svd":
        return exact(gram_a, gram_b, safe)
    if route == "iterative":
        return iterative(gram_a, gram_b, safe)
    return lax.platform_dependent(gram_a, gram_b, safe, cpu=exact, default=iterative)


def _settled(gram_a, gram_b, gauge, eps):
    """Whether a pair lies in its gauge already, to rounding: it is left then, so that many projections do not drift."""
    norm_a, norm_b = column_norms(gram_a), column_norms(gram_b)
    mean = norm_a * norm_b
    unit = jnp.sqrt(mean[:, :, None] * mean[:, None, :])
    gap = gram_a - gram_b
    size = jnp.linalg.norm(gram_a, axis=(1, 2)) + jnp.linalg.norm(gram_b, axis=(1, 2))
    settled = (jnp.abs(gap) <= 8 * eps * unit).all((1, 2)) & (jnp.linalg.norm(gap, axis=(1, 2)) <= 2 * eps * size)
    if gauge != "svd":
        return settled
    tilt = jnp.where(jnp.eye(gap.shape[-1], dtype=bool)[None], 0, gram_a + gram_b)
    return settled & (jnp.abs(tilt) <= 8 * eps * unit).all((1, 2))


def _safe(gram):
    """Whether all columns have norms within `_SAFE_NORMS`."""
    norms, (least, most) = column_norms(gram), _SAFE_NORMS
    return ((norms > least) & (norms < most)).all(1)


def _balanced_redundant(left, right, gauge, wide):
    """Balances one stack of pairs with `r > m = min(a, b)`; as `_balanced`.

    With the orthonormal basis `Y (r, m)` of the rows of A, or of the columns of B, whichever factor has m of them, the
    pair `(A Y, Y^T B)` has the same product and the rank m.
    """
    thin = left.mT if left.shape[1] <= right.shape[2] else right
    thin = jnp.where(jnp.isfinite(thin).all((1, 2), keepdims=True), thin, 0).astype(wide)
    basis = orthonormal(lax.map(lambda matrix: jnp.linalg.qr(matrix)[0], thin))
    # in the wider dtype, or what A and B do not share would cancel in the precision of the factors
    old_a, old_b, precision = left, right, left.dtype
    left, right = left.astype(wide), right.astype(wide)
    inner = _balanced([matmul(left, basis)], [matmul(basis.mT, right)], "raw_svd", "exact", wide, precision)
    (small_a,), (small_b,), change, inverse, lost, nonfinite, _ = inner
    lost |= ~nonfinite & ~(_shared_part(left, right, small_a) < most_damage(precision, wide) * left.shape[2] ** 0.5)
    change, inverse = matmul(basis, change), matmul(inverse, basis.mT)
    rank, least = left.shape[-1], small_a.shape[-1]
    if gauge == "raw_svd":
        turn = jnp.broadcast_to(jnp.eye(least, rank, dtype=wide), inverse.shape)
    elif gauge == "symmetric":
        turn = polar(change.mT)
    else:
        overlap_a, overlap_b = matmul(small_a.mT, left), matmul(small_b, right.mT)
        if gauge == "nearest":
            turn = polar(overlap_a + overlap_b)
        else:
            norms = jnp.linalg.norm(left, axis=1), jnp.linalg.norm(right, axis=2)
            turn = matching(overlap_a, overlap_b, jnp.square(small_a).sum(1), *norms)
    kept, identity = (lost | nonfinite)[:, None, None], jnp.eye(rank, dtype=wide)[None]
    new = matmul(small_a, turn), matmul(turn.mT, small_b), matmul(change, turn), matmul(turn.mT, inverse)
    squares_a, squares_b = (jnp.square(x).sum(1) for x in (left, right.mT))
    moved = (squares_a * jnp.square(new[1]).sum(2) + squares_b * jnp.square(new[0]).sum(1)).sum(1)
    cancellation = jnp.sqrt(moved / 2) / jnp.linalg.norm(jnp.square(small_a).sum(1), axis=1)
    new_a, new_b, change, inverse = (
        jnp.where(kept, old, x.astype(precision))
        for x, old in zip(new, (old_a, old_b, identity.astype(precision), identity.astype(precision)), strict=True)
    )
    return [new_a], [new_b], change, inverse, lost, nonfinite, cancellation.astype(jnp.float32)


def _shared_part(left, right, small_a):
    """How far the factors cancel in the product, `|A| |B| / |A B|` in Frobenius norms, `(n)`."""
    sizes = []
    for factor in (left, right, small_a):
        exponent = even_exponents(jnp.abs(factor).max((1, 2)))
        sizes.append((times_two_to(factor, -exponent[:, None, None]), exponent))
    (left, i), (right, j), (small_a, k) = sizes
    norms = [jnp.linalg.norm(factor, axis=(1, 2)) for factor in (left, right)]
    product_norm = jnp.linalg.norm(jnp.square(small_a).sum(1), axis=1)  # small_a is hyper-balanced
    return times_two_to(norms[0] * norms[1] / product_norm, i + j - 2 * k)
