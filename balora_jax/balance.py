"""Balancing of LoRA pairs: the mathematics of the factors, batched over leading axes; it knows no parameter trees.

A pair is `lora_a (..., a, r)` and `lora_b (..., r, b)`; the adapter is the product `lora_a @ lora_b`. For every
invertible `R` the pair `(A R, R^-1 B)` is the same adapter. The pair is *balanced* when `A^T A = B B^T`; among all
pairs of one product the balanced ones are the best conditioned (arXiv 2605.31484).

All pairs of one rank go through together, see `balora_jax.stacks`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from balora_jax.exponents import exponents, times_two_to
from balora_jax.gauge import Gauge, Route, check_gauge, check_route
from balora_jax.linalg import matmul, split
from balora_jax.stacks import balance_stacks, in_place


class Balanced(NamedTuple):
    """The outcome of `balance_pair`.

    Attributes:
        lora_a: `(..., a, r)`, the new left factor.
        lora_b: `(..., r, b)`, the new right factor.
        change: `(..., r, r)`, the change of gauge T: the new left factor is `lora_a @ T`.
        inverse_change: `(..., r, r)`, its inverse: the new right factor is `T^-1 @ lora_b`. The identity, like
            `change`, where the pair was skipped. With `r > m = min(a, b)` both have rank m, and their product projects.
        untouched: `(...)` bool, the pair was skipped: its product has numerical rank below `min(a, r, b)`, its
            factors cancel so far that balancing would cost digits of the product, or the balanced factors or the change
            of gauge are too large or too small for their dtype.
        nonfinite: `(...)` bool, the pair holds a NaN or an infinity; it was skipped.
        cancellation: `(...)` float32, by how many roundings of the old factors the product would move if the new ones
            were written as sums with them, `A + (A' - A)`, as optax does. About 1 near balance; without meaning where
            the pair was skipped.
    """

    lora_a: jax.Array
    lora_b: jax.Array
    change: jax.Array
    inverse_change: jax.Array
    untouched: jax.Array
    nonfinite: jax.Array
    cancellation: jax.Array


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

            * `"exact"`: Cholesky factorizations and an SVD in float64 (float32 on TPUs), pair after pair.
            * `"iterative"`: matrix products in the working precision, all pairs at once; a pair for which they do not
              converge, far from hyper-balanced as it then is, goes the exact route. The gauge `"svd"` only; inside a
              group of nearly equal singular values columns stay closest to the incoming ones.
            * `"auto"`: iterative on accelerators, whose batched factorizations are slow, where the gauge is `"svd"`;
              else exact.

    Returns:
        The two factors in the shapes and dtypes of the inputs. A pair whose product has numerical rank below
        `min(a, r, b)` (a fresh adapter with `B = 0`, say) has no balanced form that keeps every direction trainable and
        is returned unchanged; so is a pair with a NaN or an infinity, one whose factors cancel beyond what the
        arithmetic can resolve, or one whose balanced factors their dtype cannot hold. `balance_pair` tells which. With
        `r > min(a, b)` the gauges `"svd"` and `"raw_svd"` leave `r - min(a, b)` columns of zeros, which the product
        does not need.

    Raises:
        TypeError: a factor is not a floating-point array, the gauge or route is not a string, or the call is
            differentiated: the projection is a step of an optimizer and has no derivative rule.
        ValueError: the shapes do not form pairs, the gauge or route is unknown, or the route cannot give the gauge.

    Notes:
        Costs O((a + b) r^2) per pair, almost all of it in four matrix products. Factors are read and written in float32
        or wider; half-precision ones lose about three digits of balance when the result is rounded back. On CPUs and
        GPUs a float32 pair keeps its product to about 3e-7, and its balancing gap is as small, at scales from 1e-20 to
        1e18 and up to condition numbers of both factors of 1e6, in every gauge; where float32 cannot give this, the
        work on these factors is done in float64. TPUs lack float64: products and gaps are nearly as small there (5e-7
        and 3e-6), but pairs that float32 cannot carry are skipped: those whose columns nearly depend on each other, or
        whose terms cancel in `A T` or in the product.

    Source: arXiv 2605.31484 (the projection onto the hyper-balanced set).

    Examples:
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
    """As `balance`, and tells the change of gauge, and which pairs were skipped and why.

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
    pairs = [_checked(lora_a, lora_b) for lora_a, lora_b in pairs]
    if not pairs:
        return []
    outcomes = changed_pairs(pairs, gauge=gauge, route=route)
    left = [outcome.untouched | outcome.nonfinite for outcome in outcomes]

    def restored(factors):
        return [
            tuple(jnp.where(keep[..., None, None], old, new) for old, new in zip(pair, news, strict=True))
            for keep, pair, news in zip(left, pairs, factors, strict=True)
        ]

    any_left = jnp.concatenate([keep.ravel() for keep in left]).any()
    factors = in_place(any_left, restored, [outcome[:2] for outcome in outcomes])
    return [outcome._replace(lora_a=a, lora_b=b) for outcome, (a, b) in zip(outcomes, factors, strict=True)]


def changed_pairs(pairs: Sequence[tuple[jax.Array, jax.Array]], *, gauge: str, route: str) -> list[Balanced]:
    """As `balance_pairs` of checked arguments, but the factors of pairs that are left need not be as they came.

    Args:
        pairs: `(lora_a (..., a, r), lora_b (..., r, b))` each.
        gauge: as for `balance`.
        route: as for `balance`.
    """
    pairs = _without_derivative(list(pairs))
    groups: dict[tuple, list[int]] = {}
    results: list[Balanced | None] = [None] * len(pairs)
    for i, (lora_a, lora_b) in enumerate(pairs):
        rank, wide = lora_a.shape[-1], jnp.dtype(working_dtype(lora_a, lora_b))
        alone = i if rank > min(lora_a.shape[-2], lora_b.shape[-1]) else None
        groups.setdefault((rank, wide, alone), []).append(i)
    for (_, wide, _), members in groups.items():
        lefts = [pairs[i][0].reshape(-1, *pairs[i][0].shape[-2:]).astype(wide) for i in members]
        rights = [pairs[i][1].reshape(-1, *pairs[i][1].shape[-2:]).astype(wide) for i in members]
        new_lefts, new_rights, *over_pairs = balance_stacks(lefts, rights, gauge, route)
        for i, *new in zip(members, new_lefts, new_rights, *(split(x, lefts) for x in over_pairs), strict=True):
            results[i] = _rounded(pairs[i], Balanced(*new))
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

    Examples:
        >>> float(balancing_gap(jnp.ones((3, 1)), jnp.zeros((1, 5))))
        1.0
    """
    lora_a, lora_b = _checked(lora_a, lora_b)
    wide = working_dtype(lora_a, lora_b)
    lora_a, lora_b = lora_a.astype(wide), lora_b.astype(wide)
    largest = jnp.maximum(jnp.abs(lora_a).max((-2, -1)), jnp.abs(lora_b).max((-2, -1)))
    exponent = exponents(largest)
    lora_a, lora_b = (times_two_to(x, -exponent[..., None, None]) for x in (lora_a, lora_b))
    gram_a = matmul(lora_a.mT, lora_a)
    gram_b = matmul(lora_b, lora_b.mT)
    gap = jnp.linalg.norm(gram_a - gram_b, axis=(-2, -1))
    size = jnp.linalg.norm(gram_a, axis=(-2, -1)) + jnp.linalg.norm(gram_b, axis=(-2, -1))
    if relative:
        return jnp.where(size == 0, 0, gap / jnp.where(size == 0, 1, size))
    return times_two_to(gap, 2 * exponent)


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


@jax.custom_jvp
def _without_derivative(pairs):
    """The pairs, and an error that says so where they are differentiated."""
    return pairs


@_without_derivative.defjvp
def _(primals, tangents):
    raise TypeError(
        "balance has no derivative: it is meant for after the update, not for inside the loss; "
        "to treat its result as constant, apply jax.lax.stop_gradient to the factors first"
    )


def _rounded(pair, balanced):
    """The outcome for flattened pairs in the shapes and dtypes of the incoming ones."""
    lora_a, lora_b = pair
    leading = lora_a.shape[:-2]
    new_a, new_b = balanced.lora_a.astype(lora_a.dtype), balanced.lora_b.astype(lora_b.dtype)
    untouched = balanced.untouched
    change, inverse = balanced.change, balanced.inverse_change
    if any(jnp.finfo(new.dtype).max < jnp.finfo(change.dtype).max for new in (new_a, new_b)):
        unheld = jnp.zeros(untouched.shape, bool)
        for new in (new_a, new_b):
            largest = jnp.abs(new).max((-2, -1))
            unheld |= ~jnp.isfinite(largest) | (largest < jnp.finfo(new.dtype).tiny)
        unheld &= ~(untouched | balanced.nonfinite)
        keep, identity = unheld[:, None, None], jnp.eye(change.shape[-1], dtype=change.dtype)[None]
        new_a = jnp.where(keep, lora_a.reshape(new_a.shape), new_a)
        new_b = jnp.where(keep, lora_b.reshape(new_b.shape), new_b)
        change, inverse = jnp.where(keep, identity, change), jnp.where(keep, identity, inverse)
        untouched = untouched | unheld
    return Balanced(
        new_a.reshape(lora_a.shape),
        new_b.reshape(lora_b.shape),
        change.reshape(*leading, *change.shape[1:]),
        inverse.reshape(*leading, *inverse.shape[1:]),
        untouched.reshape(leading),
        balanced.nonfinite.reshape(leading),
        balanced.cancellation.reshape(leading),
    )
