"""Balancing of LoRA pairs: the mathematics of the factors, batched over leading axes; it knows no parameter trees.

A pair is `lora_a (..., a, r)` and `lora_b (..., r, b)`; the adapter is the product `lora_a @ lora_b`. For every
invertible `R` the pair `(A R, R^-1 B)` is the same adapter. The pair is *balanced* when `A^T A = B B^T`; among all
pairs of one product the balanced ones are the best conditioned (arXiv 2605.31484).

All pairs of one rank go through together: one Gram product of each factor, one stacked batch of r x r work
(`balora_jax.gauge`), one product that applies the change of gauge to each factor. Where float32 Gram matrices cannot
carry this (ill-conditioned factors, extreme scales, lacking rank), further passes follow until they can.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from balora_jax.gauge import (
    Change,
    Gauge,
    Route,
    check_gauge,
    check_route,
    column_norms,
    exact_change,
    iterative_change,
    matching,
    matmul,
    polar,
    rotation,
)

# A pass is trusted if it enlarges the rounding errors of the Gram matrices by less than this, and if the factors with
# their columns scaled to norm 1 have a condition number below this.
_MOST_GROWTH = 4.0
_MOST_CONDITION = 200.0
_MOST_PASSES = 6
# Gram matrices of columns within these norms neither overflow in float32 nor lose digits to underflow.
_SAFE_NORMS = (1e-13, 1e13)
# Where the passes work with relative powers of two, none is below this.
_LEAST_EXPONENT = -400


class Balanced(NamedTuple):
    """The outcome of `balance_pair`.

    Attributes:
        lora_a: `(..., a, r)`, the new left factor.
        lora_b: `(..., r, b)`, the new right factor.
        change: `(..., r, r)`, the change of gauge T: the new left factor is `lora_a @ T`.
        inverse_change: `(..., r, r)`, its inverse: the new right factor is `T^-1 @ lora_b`. The identity, like
            `change`, where the pair was left. With `r > m = min(a, b)` both have rank m, and their product projects.
        untouched: `(...)` bool, the pair was left as it came: its product has numerical rank below `min(a, r, b)`, or
            the balanced factors are too large for their dtype.
        nonfinite: `(...)` bool, the pair holds a NaN or an infinity; it was left as it came.
    """

    lora_a: jax.Array
    lora_b: jax.Array
    change: jax.Array
    inverse_change: jax.Array
    untouched: jax.Array
    nonfinite: jax.Array


def balance(
    lora_a: jax.Array, lora_b: jax.Array, *, gauge: Gauge = "svd", route: Route = "auto"
) -> tuple[jax.Array, jax.Array]:
    """Returns the balanced pair with the same product: `A'^T A' = B' B'^T`, `A' B' = A B`.

    With the SVD `A B = U S V^T`, the pair `(U S^1/2, S^1/2 V^T)` is balanced with diagonal Gram matrices
    (hyper-balanced). It is found as a change of gauge `(A T, T^-1 B)` from the Gram matrices `A^T A` and `B B^T`. Every
    other balanced pair differs from it by one r x r rotation, which the gauge chooses.

    Args:
        lora_a: `(..., a, r)` left factor, floating point.
        lora_b: `(..., r, b)` right factor with the same leading axes.
        gauge: which of the balanced pairs to return.

            * `"svd"`: diagonal Gram matrices; columns ordered and signed as those of the incoming pair, so that an
              optimizer's per-entry state keeps its meaning.
            * `"raw_svd"`: diagonal Gram matrices; singular values descend, signs as the backend returns them, which
              flips columns from step to step. The paper's three SVDs flip more of them; kept for comparison.
            * `"nearest"`: the balanced pair closest to the incoming one in the Frobenius norm.
            * `"symmetric"`: `(A T, T^-1 B)` with `T` symmetric positive definite, the square root of the
              optimal-transport map between the Gaussians with covariances `A^T A` and `B B^T`.
        route: how the r x r work is done.

            * `"exact"`: Cholesky factorisations and an SVD in float64 (float32 on TPUs), pair after pair.
            * `"iterative"`: matrix products in the working precision, all pairs at once; a pair for which they do not
              converge, far from hyper-balanced as it then is, goes the exact route. The gauge `"svd"` only; inside a
              group of nearly equal singular values columns stay closest to the incoming ones.
            * `"auto"`: iterative on accelerators, whose batched factorisations are slow, where the gauge is `"svd"`;
              else exact.

    Returns:
        The two factors in the shapes and dtypes of the inputs. A pair whose product has numerical rank below
        `min(a, r, b)` (a fresh adapter with `B = 0`, say) has no balanced form that keeps every direction trainable and
        is returned unchanged; so is a pair with a NaN or an infinity, or one whose balanced factors overflow their
        dtype. `balance_pair` tells which. With `r > min(a, b)` the gauges `"svd"` and `"raw_svd"` leave
        `r - min(a, b)` columns of zeros, which the product does not need.

    Raises:
        TypeError: a factor is not a floating-point array, or the gauge or route is not a string.
        ValueError: the shapes do not form pairs, the gauge or route is unknown, or the route cannot give the gauge.

    Notes:
        Costs O((a + b) r^2) per pair, almost all of it in four matrix products. Factors are read and written in float32
        or wider; half-precision ones lose about three digits of balance when the result is rounded back. A float32
        pair keeps its product to about 3e-7, and a balancing gap of as much, up to condition numbers of each factor of
        1e6; where one pass over the Gram matrices cannot give this, further passes follow.

    Source: arXiv 2605.31484 (the projection onto the hyper-balanced set).

    >>> import jax, jax.numpy as jnp
    >>> key_a, key_b = jax.random.split(jax.random.key(0))
    >>> a, b = jax.random.normal(key_a, (64, 4)), 0.01 * jax.random.normal(key_b, (4, 32))
    >>> new_a, new_b = balance(a, b)
    >>> bool(jnp.allclose(new_a @ new_b, a @ b, atol=1e-5)), float(balancing_gap(new_a, new_b)) < 1e-5
    (True, True)
    """
    balanced = balance_pair(lora_a, lora_b, gauge=gauge, route=route)
    return balanced.lora_a, balanced.lora_b


def balance_pair(lora_a: jax.Array, lora_b: jax.Array, *, gauge: Gauge = "svd", route: Route = "auto") -> Balanced:
    """As `balance`, and tells the change of gauge, and which pairs were left untouched and why.

    Args:
        lora_a: `(..., a, r)` left factor, floating point.
        lora_b: `(..., r, b)` right factor with the same leading axes.
        gauge: as for `balance`.
        route: as for `balance`.

    Returns:
        A `Balanced` with flags of the leading shape.

    Raises:
        TypeError: as for `balance`.
        ValueError: as for `balance`.
    """
    (balanced,) = balance_pairs([(lora_a, lora_b)], gauge=gauge, route=route)
    return balanced


def balance_pairs(
    pairs: Sequence[tuple[jax.Array, jax.Array]], *, gauge: Gauge = "svd", route: Route = "auto"
) -> list[Balanced]:
    """As `balance_pair` for pairs of any shapes, with all r x r work of one rank in one stacked batch.

    Args:
        pairs: `(lora_a (..., a, r), lora_b (..., r, b))` each.
        gauge: as for `balance`.
        route: as for `balance`.

    Returns:
        One `Balanced` per pair.

    Raises:
        TypeError: as for `balance`.
        ValueError: as for `balance`.
    """
    check_gauge(gauge)
    check_route(route, gauge)
    checked = [_checked(lora_a, lora_b) for lora_a, lora_b in pairs]
    groups: dict[tuple, list[int]] = {}
    results: list[Balanced | None] = [None] * len(checked)
    for i, (lora_a, lora_b) in enumerate(checked):
        rank, wide = lora_a.shape[-1], jnp.dtype(working_dtype(lora_a, lora_b))
        alone = i if rank > min(lora_a.shape[-2], lora_b.shape[-1]) else None
        groups.setdefault((rank, wide, alone), []).append(i)
    for (_, wide, _), members in groups.items():
        lefts = [checked[i][0].reshape(-1, *checked[i][0].shape[-2:]).astype(wide) for i in members]
        rights = [checked[i][1].reshape(-1, *checked[i][1].shape[-2:]).astype(wide) for i in members]
        new_lefts, new_rights, *over_pairs = _balance_stacks(gauge, route)(lefts, rights)
        for i, *new in zip(members, new_lefts, new_rights, *(_split(x, lefts) for x in over_pairs), strict=True):
            results[i] = _rounded(*checked[i], Balanced(*new))
    return results  # type: ignore[return-value]


def balancing_gap(lora_a: jax.Array, lora_b: jax.Array, *, relative: bool = True) -> jax.Array:
    """Returns how far a pair is from balance: `||A^T A - B B^T||_F / (||A^T A||_F + ||B B^T||_F)`.

    Args:
        lora_a: `(..., a, r)` left factor, floating point.
        lora_b: `(..., r, b)` right factor with the same leading axes.
        relative: whether to divide by the size of the Gram matrices, which gives a number between 0 (balanced) and 1
            (one factor vanishes against the other).

    Returns:
        `(...)` in float32 or wider. The relative gap of a pair of zeros is 0.

    Raises:
        TypeError: a factor is not a floating-point array.
        ValueError: the shapes do not form pairs.

    >>> float(balancing_gap(jnp.ones((3, 1)), jnp.zeros((1, 5))))
    1.0
    """
    lora_a, lora_b = _checked(lora_a, lora_b)
    wide = working_dtype(lora_a, lora_b)
    lora_a, lora_b = lora_a.astype(wide), lora_b.astype(wide)
    largest = jnp.maximum(_largest(lora_a, (-2, -1)), _largest(lora_b, (-2, -1)))
    exponent = _exponent(largest)
    lora_a, lora_b = (jnp.ldexp(x, -exponent[..., None, None]) for x in (lora_a, lora_b))
    gram_a = matmul(lora_a.mT, lora_a)
    gram_b = matmul(lora_b, lora_b.mT)
    gap = jnp.linalg.norm(gram_a - gram_b, axis=(-2, -1))
    size = jnp.linalg.norm(gram_a, axis=(-2, -1)) + jnp.linalg.norm(gram_b, axis=(-2, -1))
    if relative:
        return jnp.where(size == 0, 0, gap / jnp.where(size == 0, 1, size))
    return jnp.ldexp(gap, 2 * exponent)


def working_dtype(*arrays: jax.Array) -> jax.typing.DTypeLike:
    """Returns the dtype of the arithmetic on some arrays: float64 if one of them is, else float32."""
    return jnp.float64 if any(array.dtype == jnp.float64 for array in arrays) else jnp.float32


def _checked(lora_a, lora_b) -> tuple[jax.Array, jax.Array]:
    """The factors as arrays, after their shapes and dtypes were checked."""
    factors = {"lora_a": jnp.asarray(lora_a), "lora_b": jnp.asarray(lora_b)}
    for name, factor in factors.items():
        if not jnp.issubdtype(factor.dtype, jnp.floating):
            raise TypeError(f"`{name}` must be a floating-point array, got dtype {factor.dtype}")
        if factor.ndim < 2:
            raise ValueError(f"`{name}` must have at least two axes, got shape {factor.shape}")
    shape_a, shape_b = factors["lora_a"].shape, factors["lora_b"].shape
    if shape_a[:-2] != shape_b[:-2] or shape_a[-1] != shape_b[-2]:
        raise ValueError(
            f"`lora_a` (..., a, r) and `lora_b` (..., r, b) must share the leading axes and the rank r, "
            f"got shapes {shape_a} and {shape_b}"
        )
    if 0 in shape_a + shape_b:
        raise ValueError(f"`lora_a` and `lora_b` must not be empty, got shapes {shape_a} and {shape_b}")
    return factors["lora_a"], factors["lora_b"]


def _rounded(lora_a, lora_b, balanced):
    """The outcome for flattened pairs in the shapes and dtypes of the incoming ones."""
    leading = lora_a.shape[:-2]
    new_a, new_b = balanced.lora_a.astype(lora_a.dtype), balanced.lora_b.astype(lora_b.dtype)
    untouched = balanced.untouched
    change, inverse = balanced.change, balanced.inverse_change
    if any(jnp.finfo(new.dtype).max < jnp.finfo(change.dtype).max for new in (new_a, new_b)):  # it may overflow
        overflow = ~(jnp.isfinite(new_a).all((-2, -1)) & jnp.isfinite(new_b).all((-2, -1))) & ~balanced.nonfinite
        keep, identity = overflow[:, None, None], jnp.eye(change.shape[-1], dtype=change.dtype)[None]
        new_a = jnp.where(keep, lora_a.reshape(new_a.shape), new_a)
        new_b = jnp.where(keep, lora_b.reshape(new_b.shape), new_b)
        change, inverse = jnp.where(keep, identity, change), jnp.where(keep, identity, inverse)
        untouched = untouched | overflow
    return Balanced(
        new_a.reshape(lora_a.shape),
        new_b.reshape(lora_b.shape),
        change.reshape(*leading, *change.shape[1:]),
        inverse.reshape(*leading, *inverse.shape[1:]),
        untouched.reshape(leading),
        balanced.nonfinite.reshape(leading),
    )


def _largest(factor: jax.Array, axis) -> jax.Array:
    """The largest absolute entries along an axis; NaN where there is one."""
    return jnp.abs(factor).max(axis)


def _exponent(number: jax.Array) -> jax.Array:
    """The power of two above a number, int32; 0 for zero."""
    return jnp.frexp(number)[1].astype(jnp.int32)


def _each_product(lefts, rights):
    """Matrix products of stacks `(n, ...)`, a single matrix as such: XLA's CPU backend runs it several times faster."""
    return [
        matmul(left[0], right[0])[None] if left.shape[0] == 1 else matmul(left, right)
        for left, right in zip(lefts, rights, strict=True)
    ]


def _grams(lefts, rights):
    """The stacked Gram matrices `(N, r, r)` of all factors."""
    return (
        jnp.concatenate(_each_product([a.mT for a in lefts], lefts)),
        jnp.concatenate(_each_product(rights, [b.mT for b in rights])),
    )


def _applied(lefts, rights, change, inverse):
    """All factors after a change of gauge."""
    return _each_product(lefts, _split(change, lefts)), _each_product(_split(inverse, rights), rights)


def _split(stacked, stacks):
    """An array over all pairs `(N, ...)`, cut into the parts of the stacks."""
    ends, parts = 0, []
    for stack in stacks:
        parts.append(stacked[ends : ends + stack.shape[0]])
        ends += stack.shape[0]
    return parts


def _in_place(condition, body, value):
    """`body(value)` where the condition holds, else `value`: unlike `lax.cond`, a loop need not copy what it keeps."""
    return lax.while_loop(lambda c: c[0], lambda c: (jnp.zeros((), bool), body(c[1])), (condition, value))[1]


@cache
def _balance_stacks(gauge: str, route: str):
    """The compiled projection of stacks of pairs of one rank and one dtype; a stack with `r > min(a, b)` comes alone.

    It takes and returns lists of `(n_i, a_i, r)` and of `(n_i, r, b_i)`; besides, over all N pairs, the change of gauge
    and its inverse, and whether a pair was left for lack of rank, or for a NaN or infinity.

    A `vmap` outside would make both branches of every condition run, and batch calls of LAPACK; so it is turned into
    longer stacks instead. The r x r work is done in float64 whatever the user's setting, except on TPUs, which lack it.
    """

    @jax.custom_batching.custom_vmap
    def run(lefts, rights):
        wide = _wide_dtype()
        with jax.enable_x64(wide == jnp.float64):
            return _balanced(lefts, rights, gauge, route, wide)

    @run.def_vmap
    def _(axis_size, in_batched, lefts, rights):
        def flat(x, batched):
            x = x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        def unflat(x):
            return x.reshape(axis_size, -1, *x.shape[1:])

        lefts, rights = jax.tree.map(flat, (lefts, rights), tuple(in_batched))
        new_lefts, new_rights, *over_pairs = run(lefts, rights)
        parts = [[p.reshape(axis_size, -1, *p.shape[1:]) for p in _split(x, lefts)] for x in over_pairs]
        out = (*jax.tree.map(unflat, (new_lefts, new_rights)), *(jnp.concatenate(p, axis=1) for p in parts))
        return out, jax.tree.map(lambda _: True, out)

    return jax.jit(run)


def _wide_dtype():
    """The dtype of the r x r work."""
    return jnp.float32 if jax.default_backend() == "tpu" else jnp.float64


class _Passes(NamedTuple):
    """Where the further passes stand.

    Attributes:
        count: int32, passes done.
        again: `(N)` bool, pairs that need another pass.
        deficient: `(N)` bool, pairs found to lack rank.
        lefts: list of `(n_i, a_i, r)`, factors so far.
        rights: list of `(n_i, r, b_i)`.
        change: `(N, r, r)`, change of gauge from the incoming pairs to these factors.
        inverse: `(N, r, r)`.
        first: what the first pass saw of the incoming pairs: both Gram matrices `(N, r, r)` of the factors divided by
            powers of two, and these powers `(N)`.
    """

    count: jax.Array  # type: ignore[assignment]
    again: jax.Array
    deficient: jax.Array
    lefts: list[jax.Array]
    rights: list[jax.Array]
    change: jax.Array
    inverse: jax.Array
    first: tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def _balanced(lefts, rights, gauge, route, wide):
    """Balances stacks of pairs of one rank, with r x r work in the dtype `wide`; see `_balance_stacks`."""
    dtype = lefts[0].dtype
    if lefts[0].shape[2] > min(lefts[0].shape[1], rights[0].shape[2]):
        return _balanced_redundant(lefts[0], rights[0], gauge, wide)
    gram_a, gram_b = _grams(lefts, rights)
    change, inverse, trusted = _first_change(gram_a, gram_b, gauge, route, wide)
    trusted = trusted & _safe(gram_a) & _safe(gram_b)
    identity = jnp.eye(gram_a.shape[-1], dtype=wide)[None]
    change, inverse = (jnp.where(trusted[:, None, None], x, identity) for x in (change, inverse))
    new_lefts, new_rights = _applied(lefts, rights, change.astype(dtype), inverse.astype(dtype))

    def look():
        return (
            jnp.concatenate([_largest(a, 1) for a in lefts]),
            jnp.concatenate([_largest(b, 2) for b in rights]),
        )

    # zeros and infinities are told from extreme scales by another look at the factors
    nothing = jnp.ones(gram_a.shape[:2], dtype)
    largest_a, largest_b = lax.cond((~trusted).any(), look, lambda: (nothing, nothing))
    nonfinite = ~(jnp.isfinite(largest_a) & jnp.isfinite(largest_b)).all(1)
    deficient = ~nonfinite & ((largest_a == 0) | (largest_b == 0)).any(1)
    exponent = jnp.zeros(trusted.shape, jnp.int32)
    passes = _Passes(
        jnp.zeros((), jnp.int32),
        ~(trusted | nonfinite | deficient),
        deficient,
        new_lefts,
        new_rights,
        change,
        inverse,
        (jnp.zeros_like(change), jnp.zeros_like(change), exponent, exponent),
    )
    passes = lax.while_loop(lambda passes: passes.again.any(), lambda passes: _further_pass(passes, gauge), passes)
    left = nonfinite | passes.deficient

    def restore(factors):
        return jax.tree.map(
            lambda old, new, left: jnp.where(left[:, None, None], old, new),
            (lefts, rights),
            factors,
            (_split(left, lefts), _split(left, rights)),
        )

    new_lefts, new_rights = _in_place(left.any(), restore, (passes.lefts, passes.rights))
    change, inverse = (
        jnp.where(left[:, None, None], identity, x).astype(dtype) for x in (passes.change, passes.inverse)
    )
    return new_lefts, new_rights, change, inverse, passes.deficient, nonfinite


def _first_change(gram_a, gram_b, gauge, route, wide):
    """The change of gauge from the Gram matrices of the incoming factors, its inverse, and which pairs it suits."""

    def rotated(change, gram_a, gram_b):
        turn = rotation(change, gram_a, gram_b, gauge)
        return change._replace(forward=matmul(change.forward, turn), inverse=matmul(turn.mT, change.inverse))

    def exact(gram_a, gram_b):
        change, _ = exact_change(gram_a, gram_b)
        trusted = _trusted(change, gram_a, gram_b)
        return *rotated(change, gram_a, gram_b)[:2], trusted

    def iterative(gram_a, gram_b):
        change = iterative_change(gram_a.astype(dtype), gram_b.astype(dtype))
        change = Change(*(x.astype(wide) for x in change[:3]), change.found)
        trusted = _trusted(change, gram_a, gram_b)

        def unfinished(carry):
            return carry[0].any()

        def one_exactly(carry):
            todo, forward, inverse, trusted = carry
            i = jnp.where(todo, jnp.arange(todo.shape[0]), todo.shape[0]).min()  # the first one left
            one = exact(*(lax.dynamic_slice_in_dim(x, i, 1) for x in (gram_a, gram_b)))
            forward, inverse, trusted = (
                lax.dynamic_update_slice_in_dim(x, y, i, 0)
                for x, y in zip((forward, inverse, trusted), one, strict=True)
            )
            return todo.at[i].set(False), forward, inverse, trusted

        start = (~trusted, change.forward, change.inverse, trusted)
        return lax.while_loop(unfinished, one_exactly, start)[1:]

    dtype = gram_a.dtype
    gram_a, gram_b = gram_a.astype(wide), gram_b.astype(wide)
    if route == "exact" or gauge != "svd":
        return exact(gram_a, gram_b)
    if route == "iterative":
        return iterative(gram_a, gram_b)
    return lax.platform_dependent(gram_a, gram_b, cpu=exact, default=iterative)


def _spread(change, norm_a, norm_b):
    """How the squared norms of the incoming columns of A and rows of B enter the new ones, `(N, r, r)` each."""
    return (norm_a[:, :, None] * change.forward) ** 2, (change.inverse * norm_b[:, None, :]) ** 2


def _trusted(change, gram_a, gram_b):
    """Whether Gram matrices of working precision were good enough to find this change, to hyper-balanced pairs."""
    norm_a, norm_b = column_norms(gram_a), column_norms(gram_b)
    spread_a, spread_b = _spread(change, norm_a, norm_b)
    growth = (spread_a.sum((1, 2)) + spread_b.sum((1, 2))) / (2 * change.values.sum(1))
    condition_a, condition_b = _squared_conditions(change, norm_a, norm_b)
    limit = _MOST_CONDITION**2
    return change.found & (growth < _MOST_GROWTH) & (condition_a < limit) & (condition_b < limit)


def _safe(gram):
    """Whether all columns have norms within `_SAFE_NORMS`."""
    norms, (least, most) = column_norms(gram), _SAFE_NORMS
    return ((norms > least) & (norms < most)).all(1)


def _squared_conditions(change, norm_a, norm_b):
    """Squared condition numbers of A with unit columns and of B with unit rows: `||D_A T S^-1/2||_F^2`, at least r."""
    spread_a, spread_b = _spread(change, norm_a, norm_b)
    return (spread_a / change.values[:, None, :]).sum((1, 2)), (spread_b / change.values[:, :, None]).sum((1, 2))


def _further_pass(passes, gauge):
    """Balances the factors so far once more, from Gram matrices of columns that powers of two bring to size 1.

    Cholesky factors of shifted Gram matrices improve the condition number of a factor by three digits a pass (shifted
    CholeskyQR, Fukaya et al., arXiv 1809.11085) until the Gram matrices hold all there is.
    """
    again, dtype, wide = passes.again, passes.lefts[0].dtype, passes.change.dtype
    rank = passes.change.shape[-1]
    exponents_a = _exponent(jnp.concatenate([_largest(a, 1) for a in passes.lefts]))
    exponents_b = _exponent(jnp.concatenate([_largest(b, 2) for b in passes.rights]))
    exponents_a, exponents_b = (jnp.where(again[:, None], e, 0) for e in (exponents_a, exponents_b))
    top_a, top_b = exponents_a.max(1), exponents_b.max(1)
    top_a = top_a + (top_a + top_b) % 2  # so that halves of their sum and difference are whole
    lefts = [jnp.ldexp(a, -e[:, None, :]) for a, e in zip(passes.lefts, _split(exponents_a, passes.lefts), strict=True)]
    rights = [
        jnp.ldexp(b, -e[:, :, None]) for b, e in zip(passes.rights, _split(exponents_b, passes.rights), strict=True)
    ]
    weights_a, weights_b = (
        jnp.ldexp(jnp.ones((), wide), jnp.maximum(e - top[:, None], _LEAST_EXPONENT))
        for e, top in ((exponents_a, top_a), (exponents_b, top_b))
    )
    gram_a, gram_b = _grams(lefts, rights)
    gram_a = gram_a.astype(wide) * weights_a[:, :, None] * weights_a[:, None, :]
    gram_b = gram_b.astype(wide) * weights_b[:, :, None] * weights_b[:, None, :]
    step, shifted = exact_change(gram_a, gram_b, shift=2 * rank * float(jnp.finfo(dtype).eps))
    trusted = _trusted(step, gram_a, gram_b) & ~shifted

    # From the incoming pairs, in the units of the first pass.
    seen = (gram_a, gram_b, top_a, top_b)
    first = jax.tree.map(lambda new, old: jnp.where(passes.count == 0, new, old), seen, passes.first)
    first_a, first_b, first_top_a, first_top_b = first
    half = (top_b - top_a) // 2
    offset = half - (first_top_b - first_top_a) // 2
    whole = Change(
        jnp.ldexp(matmul(passes.change, step.forward), offset[:, None, None]),
        jnp.ldexp(matmul(step.inverse, passes.inverse), -offset[:, None, None]),
        jnp.ldexp(step.values, (top_a + top_b - first_top_a - first_top_b)[:, None]),
        step.found,
    )
    turn = rotation(whole, first_a, first_b, gauge)
    condition_a, condition_b = _squared_conditions(whole, column_norms(first_a), column_norms(first_b))
    full_rank = jnp.maximum(condition_a, condition_b) < (4 * float(jnp.finfo(dtype).eps)) ** -2

    found = step.found & again
    turned = matmul(step.forward, turn), matmul(turn.mT, step.inverse)
    identity = jnp.eye(rank, dtype=wide)[None]
    applied_a, applied_b = (jnp.where(found[:, None, None], x, identity) for x in turned)
    lefts, rights = _applied(
        lefts,
        rights,
        (weights_a[:, :, None] * applied_a).astype(dtype),
        (applied_b * weights_b[:, None, :]).astype(dtype),
    )
    size = (top_a + top_b) // 2
    lefts, rights = (
        [jnp.ldexp(x, e[:, None, None]) for x, e in zip(xs, _split(size, xs), strict=True)] for xs in (lefts, rights)
    )
    count = passes.count + 1
    more = found & ~trusted & (count < _MOST_PASSES)
    return _Passes(
        count,
        more,
        passes.deficient | (again & ~more & ~(found & trusted & full_rank)),
        lefts,
        rights,
        matmul(passes.change, jnp.ldexp(applied_a, half[:, None, None])),
        matmul(jnp.ldexp(applied_b, -half[:, None, None]), passes.inverse),
        first,
    )


def _balanced_redundant(left, right, gauge, wide):
    """Balances one stack of pairs with `r > m = min(a, b)`; as `_balanced`.

    With the orthonormal basis `Y (r, m)` of the rows of A, or of the columns of B, whichever factor has m of them, the
    pair `(A Y, Y^T B)` has the same product and the rank m.
    """
    thin = left.mT if left.shape[1] <= right.shape[2] else right
    thin = jnp.where(jnp.isfinite(thin).all((1, 2), keepdims=True), thin, 0).astype(wide)
    basis = lax.map(lambda matrix: jnp.linalg.qr(matrix)[0], thin)
    small_a, small_b = matmul(left, basis.astype(left.dtype)), matmul(basis.mT.astype(right.dtype), right)
    inner = _balanced([small_a], [small_b], "raw_svd", "exact", wide)
    (small_a,), (small_b,), change, inverse, deficient, nonfinite = inner
    change, inverse = matmul(basis, change.astype(wide)), matmul(inverse.astype(wide), basis.mT)
    rank, least = left.shape[-1], small_a.shape[-1]
    if gauge == "raw_svd":
        turn = jnp.broadcast_to(jnp.eye(least, rank, dtype=wide), inverse.shape)
    elif gauge == "symmetric":
        turn = polar(change.mT)
    else:
        overlap_a = matmul(small_a.mT.astype(wide), left.astype(wide))
        overlap_b = matmul(small_b.astype(wide), right.mT.astype(wide))
        if gauge == "nearest":
            turn = polar(overlap_a + overlap_b)
        else:
            values = jnp.square(small_a.astype(wide)).sum(1)
            norms = jnp.linalg.norm(left.astype(wide), axis=1), jnp.linalg.norm(right.astype(wide), axis=2)
            turn = matching(overlap_a, overlap_b, values, *norms)
    new_a = matmul(small_a, turn.astype(left.dtype))
    new_b = matmul(turn.mT.astype(right.dtype), small_b)
    kept = (deficient | nonfinite)[:, None, None]
    identity = jnp.eye(rank, dtype=left.dtype)[None]
    return (
        [jnp.where(kept, left, new_a)],
        [jnp.where(kept, right, new_b)],
        jnp.where(kept, identity, matmul(change, turn).astype(left.dtype)),
        jnp.where(kept, identity, matmul(turn.mT, inverse).astype(left.dtype)),
        deficient,
        nonfinite,
    )
