"""Balancing stacks of pairs of one rank: products with the factors around the r x r work of `balora_jax.gauge`.

All pairs go through together: one Gram product of each factor, one stacked batch of r x r work, one product that
applies the change of gauge to each factor. Where Gram matrices of working precision cannot carry this (ill-conditioned
factors, extreme scales, lacking rank), the Gram matrices of these stacks are computed once more in float64.
"""

from functools import cache

import jax
import jax.numpy as jnp
from jax import lax

from balora_jax.gauge import (
    chosen,
    column_norms,
    exact_change,
    identity_change,
    iterative_change,
    matching,
    matmul,
    polar,
    rotation,
    turned,
)
from balora_jax.sharding import sharded_like

# Float32 Gram matrices are trusted if the change found from them enlarges their rounding errors by less than this, and
# if the factors with their columns scaled to norm 1 have a condition number below this.
_TRUSTED_GROWTH = 4.0
_TRUSTED_CONDITION = 200.0
# Gram matrices of columns within these norms neither overflow in float32 nor lose digits to underflow.
_SAFE_NORMS = (1e-13, 1e13)
# Gauges whose pairs are not hyper-balanced, and the condition number up to which float32 Gram matrices do for them.
_ROTATED = ("nearest", "symmetric")
_ROTATED_CONDITION = 20.0


def _product(left, right):
    """A stacked matrix product; one matrix is multiplied as such, which XLA's CPU backend does several times faster."""
    if left.shape[0] > 1:
        return matmul(left, right)
    return matmul(lax.squeeze(left, [0]), lax.squeeze(right, [0]))[None]


def _gram(factor, side):
    """The stacked Gram matrices of left factors (side 0) or of right ones (side 1)."""
    if factor.shape[0] == 1:
        matrix = lax.squeeze(factor, [0])
        return (matmul(matrix, matrix.T) if side else matmul(matrix.T, matrix))[None]
    return matmul(factor, factor.mT) if side else matmul(factor.mT, factor)


def split(stacked, stacks):
    """An array over all pairs `(N, ...)`, cut into the parts of the stacks."""
    parts, start = [], 0
    for stack in stacks:
        parts.append(stacked[start : start + stack.shape[0]])
        start += stack.shape[0]
    return parts


def in_place(condition, body, value):
    """`body(value)` where the condition holds, else `value`: unlike `lax.cond`, a loop need not copy what it keeps."""
    return lax.while_loop(lambda c: c[0], lambda c: (jnp.zeros((), bool), body(c[1])), (condition, value))[1]


def balance_stacks(lefts, rights, gauge: str, route: str, *, overwrite: bool = False):
    """The projection of stacks of pairs of one rank and one dtype; a stack with `r > min(a, b)` comes alone.

    Args:
        lefts: list of `(n_i, a_i, r)`, the left factors.
        rights: list of `(n_i, r, b_i)`.
        gauge: one of `GAUGES`.
        route: one of `ROUTES`.
        overwrite: whether the factors are temporary to the caller's program, which then needs less memory.

    Returns:
        The factors after the projection, in two lists; then, over all N pairs, the change of gauge and its inverse
        `(N, r, r)`, whether a pair was left for lack of rank, or for a NaN or infinity, and its cancellation, see
        `_cancellation`. Left pairs have the identity for a change; products with it spread a NaN in its factor.
    """
    return sharded_like((lefts, rights), _compiled(gauge, route, overwrite), lefts, rights, replicated=5)


@cache
def _compiled(gauge: str, route: str, overwrite: bool):
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
            return _balanced(lefts, rights, gauge, route, wide, lefts[0].dtype, overwrite=overwrite)

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


def _balanced(lefts, rights, gauge, route, wide, precision, *, overwrite=False, last=False):
    """Balances stacks of pairs of one rank; see `balance_stacks`.

    The r x r work is done in the dtype `wide`; `precision` is the dtype that the factors come from and will go to.
    Factors in float64, which have no wider dtype, take a second pass where the first began far from balance, unless
    this is the last.
    """
    dtype = lefts[0].dtype
    gram_a = jnp.concatenate([_gram(a, 0) for a in lefts]).astype(wide)
    gram_b = jnp.concatenate([_gram(b, 1) for b in rights]).astype(wide)
    safe = _safe(gram_a) & _safe(gram_b)
    gram_a, gram_b = _at_one_scale(gram_a, gram_b)
    change, trusted = _trusted_change(gram_a, gram_b, safe, gauge, route, dtype)
    cancellation = _cancellation(change, gram_a, gram_b)
    if gauge != "raw_svd":
        settled = _settled(gram_a, gram_b, gauge, float(jnp.finfo(precision).eps))
        change = chosen(settled, identity_change(gram_a), change)
    change, cancellation, deficient, nonfinite, rough = in_place(
        (~trusted).any(),
        lambda old: _careful_change(lefts, rights, trusted, old[0], old[1], gauge, precision),
        (change, cancellation, *(jnp.zeros(trusted.shape, bool) for _ in range(3))),
    )
    new_lefts, new_rights = _applied(lefts, rights, change, rough, overwrite)
    forward, inverse = change.forward.astype(dtype), change.inverse.astype(dtype)
    if dtype == jnp.float64 and not last:

        def refined(outcome):
            lefts, rights, forward, inverse = outcome
            lefts, rights, forth, back, *_ = _balanced(lefts, rights, gauge, "exact", wide, precision, last=True)
            return lefts, rights, matmul(forward, forth), matmul(back, inverse)

        far = ~(trusted | deficient | nonfinite)
        outcome = new_lefts, new_rights, forward, inverse
        new_lefts, new_rights, forward, inverse = in_place(far.any(), refined, outcome)
    return new_lefts, new_rights, forward, inverse, deficient, nonfinite, cancellation.astype(jnp.float32)


def _applied(lefts, rights, change, rough, overwrite):
    """`A T` and `T^-1 B`; in the dtype of the change for the stacks that have a rough pair."""
    dtype, wide = lefts[0].dtype, change.forward.dtype
    forths, backs, roughs = (split(x, lefts) for x in (change.forward, change.inverse, rough))

    def with_rough(targets, lefts, rights):
        each = zip(roughs, *targets, lefts, rights, forths, backs, strict=True)
        new = [lax.cond(part.any(), _wide_products, lambda *x: x[:2], *operands) for part, *operands in each]
        return [left for left, _ in new], [right for _, right in new]

    narrow = [[x.astype(dtype) for x in side] for side in (forths, backs)]
    if dtype != wide and overwrite:  # the factors become the targets, to which the identity is left to apply
        lefts, rights = in_place(rough.any(), lambda factors: with_rough(factors, *factors), (lefts, rights))
        identity = jnp.eye(lefts[0].shape[-1], dtype=dtype)[None]
        narrow = [[jnp.where(p.any(), identity, t) for p, t in zip(roughs, side, strict=True)] for side in narrow]
    new_lefts = [_product(a, t) for a, t in zip(lefts, narrow[0], strict=True)]
    new_rights = [_product(t, b) for b, t in zip(rights, narrow[1], strict=True)]
    if dtype != wide and not overwrite:
        return in_place(rough.any(), lambda new: with_rough(new, lefts, rights), (new_lefts, new_rights))
    return new_lefts, new_rights


def _wide_products(target_a, target_b, left, right, forward, inverse):
    """`A T` and `T^-1 B` in the dtype of T, written over the targets some columns at a time, to spare memory."""
    rank, wide = forward.shape[-1], forward.dtype
    width = -(-rank // 4)
    left, right = left.astype(wide), right.astype(wide)

    def part(i, targets):
        target_a, target_b = targets
        columns, rows = (lax.dynamic_slice_in_dim(x, i * width, width, n) for x, n in ((forward, 2), (inverse, 1)))
        new_a, new_b = _product(left, columns).astype(target_a.dtype), _product(rows, right).astype(target_b.dtype)
        return (
            lax.dynamic_update_slice_in_dim(target_a, new_a, i * width, 2),
            lax.dynamic_update_slice_in_dim(target_b, new_b, i * width, 1),
        )

    return lax.fori_loop(0, -(-rank // width), part, (target_a, target_b))


def _trusted_change(gram_a, gram_b, safe, gauge, route, dtype):
    """The change of gauge from Gram matrices of the precision `dtype`, and for which pairs these were good enough."""

    def judged(change, gram_a, gram_b, safe):
        growth, condition, _ = _errors(change, gram_a, gram_b)
        most = _ROTATED_CONDITION if gauge in _ROTATED else _TRUSTED_CONDITION
        return change.found & (growth < _TRUSTED_GROWTH) & (condition < most) & safe

    def exact(gram_a, gram_b, safe):
        change = exact_change(gram_a, gram_b)
        trusted = judged(change, gram_a, gram_b, safe)
        return turned(change, rotation(change, gram_a, gram_b, gauge)), trusted

    def iterative(gram_a, gram_b, safe):
        scaled, powers = _near_one(gram_a, gram_b)
        change = iterative_change(*(gram.astype(dtype) for gram in scaled))
        change = jax.tree.map(lambda x: x if x.dtype == bool else x.astype(gram_a.dtype), change)
        change = _of_unscaled(change, powers)

        def one_exactly(carry):
            todo, *outcome = carry
            i = jnp.where(todo, jnp.arange(todo.shape[0]), todo.shape[0]).min()  # the first one left
            one = exact(*(lax.dynamic_slice_in_dim(x, i, 1) for x in (gram_a, gram_b, safe)))
            outcome = jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y, i, 0), tuple(outcome), one)
            return todo.at[i].set(False), *outcome

        trusted = judged(change, gram_a, gram_b, safe)
        return lax.while_loop(lambda carry: carry[0].any(), one_exactly, (~trusted, change, trusted))[1:]

    if route == "exact" or gauge != "svd":
        return exact(gram_a, gram_b, safe)
    if route == "iterative":
        return iterative(gram_a, gram_b, safe)
    return lax.platform_dependent(gram_a, gram_b, safe, cpu=exact, default=iterative)


def _near_one(gram_a, gram_b):
    """The Gram matrices of pairs `(2^-i A, 2^-j B)` whose longest columns are about 1, and the exponents i and j.

    Squares of the entries of these neither overflow nor underflow. The exponents are both even, so that half of their
    difference is exact.
    """
    powers = []
    for gram in (gram_a, gram_b):
        longest = column_norms(gram).max(1)
        usable = jnp.isfinite(longest) & (longest > 0)
        powers.append(2 * (jnp.frexp(jnp.where(usable, longest, 1))[1] // 2))
    scaled = [jnp.ldexp(gram, -2 * power[:, None, None]) for gram, power in zip((gram_a, gram_b), powers, strict=True)]
    return scaled, powers


def _of_unscaled(change, powers):
    """The change of gauge for pairs, from the one for the pairs that `_near_one` made of them."""
    i, j = powers
    half = ((j - i) // 2)[:, None, None]
    forward, inverse = jnp.ldexp(change.forward, half), jnp.ldexp(change.inverse, -half)
    return change._replace(forward=forward, inverse=inverse, values=jnp.ldexp(change.values, (i + j)[:, None]))


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


def _careful_change(lefts, rights, trusted, change, cancellation, gauge, precision):
    """The change of gauge from Gram matrices of wider precision, where those of working precision were not trusted.

    Their squares neither overflow nor underflow the wider range, and condition numbers may be the square root of its
    precision.

    Returns:
        The change, the identity where a pair is left, and its cancellation; which pairs lack rank, which hold a NaN or
        infinity, and for which ones the change should be applied in wider precision.
    """
    wide = change.forward.dtype
    eps, tiny = float(jnp.finfo(precision).eps), float(jnp.finfo(precision).tiny)

    def grams(left, right):
        left, right, power = _at_scale_one(left.astype(wide), right.astype(wide))
        return _gram(left, 0), _gram(right, 1), power

    def nothing(left, _):
        rank = left.shape[-1]
        identity = jnp.broadcast_to(jnp.eye(rank, dtype=wide)[None], (left.shape[0], rank, rank))
        return identity, identity, jnp.zeros(left.shape[0], wide)

    parts = [
        lax.cond(part.all(), nothing, grams, left, right)
        for part, left, right in zip(split(trusted, lefts), lefts, rights, strict=True)
    ]
    gram_a, gram_b, power = (jnp.concatenate(part) for part in zip(*parts, strict=True))
    nonfinite = ~trusted & ~jnp.isfinite(power)
    careful = exact_change(gram_a, gram_b)
    _, condition, damage = _errors(careful, gram_a, gram_b)
    # numbers that the precision can hold to all their digits
    extent = jnp.stack(
        [
            jnp.abs(careful.forward).max(2).min(1),
            jnp.abs(careful.inverse).max(1).min(1),
            jnp.ldexp(jnp.sqrt(careful.values.max(1)), jnp.where(nonfinite, 0, power).astype(jnp.int32)),
        ]
    )
    held = ((extent > tiny / eps) & (extent < eps / tiny)).all(0)
    found = careful.found & (condition < 1 / (4 * eps)) & (damage < _most_damage(precision, wide)) & held
    careful = turned(careful, rotation(careful, gram_a, gram_b, gauge))
    cancellation = jnp.where(trusted, cancellation, _cancellation(careful, gram_a, gram_b))
    careful = chosen(found, careful, identity_change(gram_a))
    rough = ~trusted & found  # large terms may cancel in `A T`, and more so where T is rotated
    return chosen(trusted, change, careful), cancellation, ~(trusted | found | nonfinite), nonfinite, rough


def _at_scale_one(left, right):
    """Pairs `(2^-k A, 2^-k B)` with largest entries around 1, which have the same change of gauge, and k `(n)`.

    k is an infinity where a pair holds a NaN or an infinity.
    """
    largest_a, largest_b = (jnp.abs(x).max((1, 2)) for x in (left, right))
    finite = jnp.isfinite(largest_a) & jnp.isfinite(largest_b)
    power = _mean_exponent(jnp.where(finite, largest_a, 1), jnp.where(finite, largest_b, 1))
    left, right = (jnp.ldexp(x, -power[:, None, None]) for x in (left, right))
    return left, right, jnp.where(finite, power.astype(left.dtype), jnp.inf)


def _at_one_scale(gram_a, gram_b):
    """The Gram matrices of pairs `(c A, c B)` with columns of norms around 1, which have the same change of gauge."""
    power = _mean_exponent(*(_diagonal_of(gram).max(1) for gram in (gram_a, gram_b)))[:, None, None]
    return jnp.ldexp(gram_a, -power), jnp.ldexp(gram_b, -power)


def _mean_exponent(x, y):
    """The exponent of two in between those of two numbers; 0 for what is no positive finite number."""
    exponents = [jnp.frexp(jnp.where((z > 0) & jnp.isfinite(z), z, 1))[1] for z in (x, y)]
    return (exponents[0] + exponents[1]) // 2


def _most_damage(precision, wide):
    """Pairs whose product a change would cost more than so many roundings of the wider dtype are left."""
    if jnp.finfo(precision).eps > jnp.finfo(wide).eps:
        return 1e8
    return 1e6 if wide == jnp.float64 else 16.0


def _errors(change, gram_a, gram_b):
    """What a change to hyper-balanced pairs does to rounding errors, three numbers `(N)`.

    Returns:
        growth: how much errors of P and Q relative to the norms of the columns are enlarged in the balanced Gram
            matrices, about 1 at best.
        condition: the larger Frobenius norm of the pseudo-inverses of A with unit columns and of B with unit rows, at
            least sqrt(r).
        damage: how much errors of `A T` and `T^-1 B`, relative to the sizes of what is summed, are enlarged in the
            product, about 1 at best; it is large where A and B cancel.
    """
    values = change.values
    share_a = (column_norms(gram_a)[:, :, None] * change.forward) ** 2
    share_b = (change.inverse * column_norms(gram_b)[:, None, :]) ** 2
    growth = (share_a.sum((1, 2)) + share_b.sum((1, 2))) / (2 * values.sum(1))
    inverse_a = (share_a / values[:, None, :]).sum((1, 2))
    inverse_b = (share_b / values[:, :, None]).sum((1, 2))
    worst = jnp.maximum((share_a.sum(1) * values).sum(1), (share_b.sum(2) * values).sum(1))
    scale = values.max(1)
    damage = jnp.sqrt(worst / scale) / jnp.sqrt((values * (values / scale[:, None])).sum(1))
    return growth, jnp.sqrt(jnp.maximum(inverse_a, inverse_b)), damage


def _cancellation(change, gram_a, gram_b):
    """By how many roundings of the old factors the product moves if the new ones are written as sums with them, `(N)`.

    `A + (A' - A)` carries an error of the size of a rounding of A, which counts where A' is far smaller.
    """
    new_a = (matmul(gram_a, change.forward) * change.forward).sum(1)  # squared norms of the new columns
    new_b = (matmul(change.inverse, gram_b) * change.inverse).sum(2)
    moved = (_diagonal_of(gram_a) * new_b + _diagonal_of(gram_b) * new_a).sum(1)
    return jnp.sqrt(moved / 2) / jnp.linalg.norm(change.values, axis=1)


def _diagonal_of(gram):
    return column_norms(gram) ** 2


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
    basis = lax.map(lambda matrix: jnp.linalg.qr(matrix)[0], thin)
    # in the wider dtype, or what A and B do not share would cancel in the precision of the factors
    old_a, old_b, precision = left, right, left.dtype
    left, right = left.astype(wide), right.astype(wide)
    inner = _balanced([matmul(left, basis)], [matmul(basis.mT, right)], "raw_svd", "exact", wide, precision)
    (small_a,), (small_b,), change, inverse, deficient, nonfinite, _ = inner
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
    kept, identity = (deficient | nonfinite)[:, None, None], jnp.eye(rank, dtype=wide)[None]
    new = matmul(small_a, turn), matmul(turn.mT, small_b), matmul(change, turn), matmul(turn.mT, inverse)
    squares_a, squares_b = (jnp.square(x).sum(1) for x in (left, right.mT))
    moved = (squares_a * jnp.square(new[1]).sum(2) + squares_b * jnp.square(new[0]).sum(1)).sum(1)
    cancellation = jnp.sqrt(moved / 2) / jnp.linalg.norm(jnp.square(small_a).sum(1), axis=1)
    new_a, new_b, change, inverse = (
        jnp.where(kept, old, x.astype(precision))
        for x, old in zip(new, (old_a, old_b, identity.astype(precision), identity.astype(precision)), strict=True)
    )
    return [new_a], [new_b], change, inverse, deficient, nonfinite, cancellation.astype(jnp.float32)
