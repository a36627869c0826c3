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
from balora_jax.factors import Factor, Stacks, working_dtype
from balora_jax.gauge import Gauge, Route, check_gauge, check_route
from balora_jax.in_place import update_if
from balora_jax.linalg import matmul, split
from balora_jax.stacks import balance_stacks
from balora_jax.status import Status, is_skipped, is_untouched


class Balanced(NamedTuple):
    """The outcome of `balance_pair`.

    Attributes:
        lora_a: `(..., a, r)`, the new A.
        lora_b: `(..., r, b)`, the new B.
        T: `(..., r, r)`, the change of gauge: the new A is `lora_a @ T`.
        T_inv: `(..., r, r)`, its inverse: the new B is `T_inv @ lora_b`. Both are the identity where the pair was
            skipped. With `r > m = min(a, b)` both have rank m, and their product projects.
        status: `(...)` int8, what became of the pair: a `Status`.
        cancellation: `(...)` float32, by how many roundings of the old factors the product would move if the new ones
            were written as sums with them, `A + (A' - A)`, as optax does. About 1 near balance; without meaning where
            the pair was skipped.
        ratio: `(...)` float32, the Frobenius norm of the smaller factor over that of the larger one, as they came.
    """

    lora_a: jax.Array
    lora_b: jax.Array
    T: jax.Array
    T_inv: jax.Array
    status: jax.Array
    cancellation: jax.Array
    ratio: jax.Array

    @property
    def untouched(self) -> jax.Array:
        """`(...)` bool, the pair was skipped though it is finite."""
        return is_untouched(self.status)

    @property
    def nonfinite(self) -> jax.Array:
        """`(...)` bool, the pair was skipped because it holds a NaN or an infinity."""
        return self.status == Status.NONFINITE

    @property
    def change(self) -> jax.Array:
        """T, by its former name."""
        return self.T

    @property
    def inverse_change(self) -> jax.Array:
        """T_inv, by its former name."""
        return self.T_inv


def balance(
    lora_a: jax.Array, lora_b: jax.Array, *, gauge: Gauge = "svd", route: Route = "auto"
) -> tuple[jax.Array, jax.Array]:
    """Returns the balanced pair with the same product: `A'^T A' = B' B'^T`, `A' B' = A B`.

    With the SVD `A B = U S V^T`, the pair `(U S^1/2, S^1/2 V^T)` is balanced with diagonal Gram matrices
    (hyper-balanced). It is found as a change of gauge `(A T, T^-1 B)` from the Gram matrices `A^T A` and `B B^T`. Every
    other balanced pair differs from it by one r x r rotation, which the gauge chooses.

    Args:
        lora_a: `(..., a, r)`, floating point.
        lora_b: `(..., r, b)` with the same leading axes.
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
        lora_a: `(..., a, r)`, floating point.
        lora_b: `(..., r, b)` with the same leading axes.
        gauge: as for `balance`.
        route: as for `balance`.

    Returns:
        A `Balanced`.

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
    stacked = [(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])) for a, b in pairs]
    outcomes = balance_factors(stacked, gauge=gauge, route=route)
    skipped = [is_skipped(outcome.status) for outcome in outcomes]

    def as_they_came(factors):
        return [
            tuple(jnp.where(stays[:, None, None], x, y) for x, y in zip(old, new, strict=True))
            for stays, old, new in zip(skipped, stacked, factors, strict=True)
        ]

    factors = update_if(jnp.concatenate(skipped).any(), as_they_came, [outcome[:2] for outcome in outcomes])
    results = []
    for (lora_a, _), outcome, new in zip(pairs, outcomes, factors, strict=True):
        leading = lora_a.shape[:-2]
        results.append(Balanced(*(x.reshape(*leading, *x.shape[1:]) for x in (*new, *outcome[2:]))))
    return results


def balance_factors(pairs: Sequence[tuple[Factor, Factor]], *, gauge: str, route: str) -> list[Balanced]:
    """As `balance_pairs` of factors `(n, a, r)` and `(n, r, b)`, but those of skipped pairs may be anything.

    Args:
        pairs: `(lora_a (n, a, r), lora_b (n, r, b))` each, floating point. Of `Moved` ones the results hold the updates
            that lead to the new factors.
        gauge: as for `balance`, checked.
        route: as for `balance`, checked.
    """
    pairs = _without_derivative(list(pairs))
    groups: dict[tuple, list[int]] = {}
    for i, (lora_a, lora_b) in enumerate(pairs):
        rank = lora_a.shape[2]
        alone = i if rank > min(lora_a.shape[1], lora_b.shape[2]) else None
        groups.setdefault((rank, jnp.dtype(working_dtype(lora_a, lora_b)), alone), []).append(i)
    results: dict[int, Balanced] = {}
    for members in groups.values():
        stacks = Stacks([pairs[i][0] for i in members], [pairs[i][1] for i in members])
        (new_a, new_b), *over_pairs = balance_stacks(stacks, gauge, route)
        parts = (split(x, stacks.lora_a) for x in over_pairs)
        results |= {i: Balanced(*new) for i, *new in zip(members, new_a, new_b, *parts, strict=True)}
    return [results[i] for i in range(len(pairs))]


def balancing_gap(lora_a: jax.Array, lora_b: jax.Array, *, relative: bool = True) -> jax.Array:
    """Returns how far a pair is from balance: `||A^T A - B B^T||_F / (||A^T A||_F + ||B B^T||_F)`.

    Args:
        lora_a: `(..., a, r)`, floating point.
        lora_b: `(..., r, b)` with the same leading axes.
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
