"""Balancing stacks of pairs in four stages: Gram products, the change of gauge, repair in wider precision, application.

All pairs go through together: one Gram product of each factor, one stacked batch of r x r work, one product that
applies the change of gauge to each factor. Pairs whose Gram matrices of working precision cannot carry this
(ill-conditioned factors, extreme scales, lacking rank) go through `balora_jax.repair` between.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from balora_jax.exponents import near_one, of_unscaled, times_two_to
from balora_jax.factors import Grams, Stacks, apply, cast, gram_products, over_factors, value, working_dtype, written
from balora_jax.gauge import (
    Change,
    column_norms,
    exact_change,
    identity_change,
    iterative_change,
    rotation,
    select,
    turned,
)
from balora_jax.in_place import SELDOM, update_if
from balora_jax.linalg import split
from balora_jax.repair import repair
from balora_jax.rounding import MOST_CONDITION, cancellation, carries, condition
from balora_jax.status import Evidence

# Gram matrices of columns within these norms neither overflow in float32 nor lose digits to underflow.
_SAFE_NORMS = (1e-13, 1e13)
# Gauges whose pairs are not hyper-balanced, and the condition number up to which float32 Gram matrices do for them.
_ROTATED = ("nearest", "symmetric")
_ROTATED_CONDITION = 20.0


class Outcome(NamedTuple):
    """What the stages make of N pairs.

    Attributes:
        stacks: the pairs `(A T, T^-1 B)`, as `balora_jax.factors.written`; those that the evidence speaks against may
            be anything.
        change: T; likewise.
        evidence: from which their status follows.
        cancellation: `(N)`, see `balora_jax.rounding.cancellation`.
        ratio: `(N)`, the norm of the smaller factor over that of the larger one, as they came.
    """

    stacks: Stacks
    change: Change
    evidence: Evidence
    cancellation: jax.Array
    ratio: jax.Array


class Solution(NamedTuple):
    """The change of gauge of N pairs as their Gram matrices of working precision give it.

    Attributes:
        change: T.
        condition: `(N)`, see `balora_jax.rounding.condition`.
        sufficient: `(N)` bool, whether these Gram matrices carry the change. If not, T is of no use.
    """

    change: Change
    condition: jax.Array
    sufficient: jax.Array


def balance_in_stages(
    stacks: Stacks, gauge: str, route: str, precision: jax.typing.DTypeLike, wide: jax.typing.DTypeLike
) -> Outcome:
    """Balances pairs with `r <= min(a, b)`.

    Args:
        stacks: the pairs.
        gauge: one of `GAUGES`.
        route: one of `ROUTES`.
        precision: float32 or wider, the dtype that the factors come from and go to.
        wide: dtype of the r x r work, and of the repair.
    """
    eps, dtype = float(jnp.finfo(precision).eps), working_dtype(stacks)
    grams = cast(gram_products(stacks), wide)
    ratio = ratio_of_norms(*(jnp.trace(x, axis1=1, axis2=2) for x in grams))
    in_range = _in_range(grams.gram_a) & _in_range(grams.gram_b)
    grams = _scaled_alike(grams)
    solution = solve(grams, in_range, gauge, route, dtype)
    sufficient, lost_digits = solution.sufficient, cancellation(solution.change, *grams)
    in_gauge = sufficient & _in_gauge(grams, gauge, eps)
    change = select(in_gauge, identity_change(grams.gram_a), solution.change)
    evidence = _of_sufficient(solution.condition, in_gauge)

    new = apply(select(sufficient, change, identity_change(grams.gram_a)), stacks)

    def repaired(carry):
        new, change, evidence, lost_digits = carry
        # in the place of the new factors, of which nothing is needed of these pairs
        parts = Stacks(*2 * (split(sufficient, stacks.lora_a),))
        mixed = over_factors(lambda x, old, done: _where(done, x.astype(dtype), value(old)), new, stacks, parts)
        wider = repair(mixed, ~sufficient, gauge, precision, wide)
        new = over_factors(
            lambda x, old, done: _where(done, x.astype(written(x, old).dtype), written(x, old)),
            wider.stacks,
            stacks,
            parts,
        )
        return new, *jax.tree.map(
            partial(_where, sufficient),
            (change, evidence, lost_digits),
            (wider.change, wider.evidence, wider.cancellation),
        )

    new, change, evidence, lost_digits = update_if((~sufficient).any(), repaired, (new, change, evidence, lost_digits))
    return Outcome(new, change, evidence, lost_digits, ratio)


def solve(grams: Grams, usable: jax.Array, gauge: str, route: str, precision: jax.typing.DTypeLike) -> Solution:
    """Returns the change of gauge from Gram matrices, and for which pairs they were good enough.

    Args:
        grams: of products in the dtype `precision`, here in the dtype of the arithmetic.
        usable: `(N)` bool, pairs whose Gram matrices did not leave the range of `precision`.
        gauge: one of `GAUGES`.
        route: one of `ROUTES`.
        precision: dtype of the iterative route.
    """

    def judged(change, gram_a, gram_b, usable):
        most = _ROTATED_CONDITION if gauge in _ROTATED else MOST_CONDITION
        carried = carries(change, gram_a, gram_b, most_condition=most)
        return Solution(change, condition(change, gram_a, gram_b), change.found & carried & usable)

    def exact(gram_a, gram_b, usable):
        solution = judged(exact_change(gram_a, gram_b), gram_a, gram_b, usable)
        turn = rotation(solution.change, gram_a, gram_b, gauge)
        return solution._replace(change=turned(solution.change, turn))

    def iterative(gram_a, gram_b, usable):
        near_a, near_b, i, j = near_one(gram_a, gram_b)
        change = iterative_change(near_a.astype(precision), near_b.astype(precision))
        change = jax.tree.map(lambda x: x if x.dtype == bool else x.astype(gram_a.dtype), change)
        solution = judged(of_unscaled(change, i, j), gram_a, gram_b, usable)

        def one_exactly(carry):
            todo, solution = carry
            first = jnp.where(todo, jnp.arange(todo.shape[0]), todo.shape[0]).min()
            one = exact(*(lax.dynamic_slice_in_dim(x, first, 1) for x in (gram_a, gram_b, usable)))
            solution = jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y, first, 0), solution, one)
            return todo.at[first].set(False), solution

        with jax.named_scope(SELDOM):
            return lax.while_loop(lambda carry: carry[0].any(), one_exactly, (~solution.sufficient, solution))[1]

    if route == "exact" or gauge != "svd":
        return exact(*grams, usable)
    if route == "iterative":
        return iterative(*grams, usable)
    return lax.platform_dependent(*grams, usable, cpu=exact, default=iterative)


def ratio_of_norms(square_a: jax.Array, square_b: jax.Array) -> jax.Array:
    """Returns the smaller of two norms over the larger one, 1 for two zeros, given their squares of any shape."""
    largest = jnp.maximum(square_a, square_b)
    return jnp.sqrt(jnp.where(largest == 0, 1, jnp.minimum(square_a, square_b) / jnp.where(largest == 0, 1, largest)))


def _where(condition, x, y):
    """Parts of stacked arrays where a condition `(n)` holds, those of others elsewhere."""
    return jnp.where(condition.reshape(-1, *(x.ndim - 1) * (1,)), x, y)


def _scaled_alike(grams):
    """The Gram matrices of the pairs `(c A, c B)` with a power of two c that brings their products near 1."""
    *_, i, j = near_one(*grams)
    return Grams(*(times_two_to(gram, -(i + j)[:, None, None]) for gram in grams))


def _of_sufficient(condition, in_gauge):
    """What is known of pairs whose Gram matrices of working precision carry the change; of others it is put later."""
    yes, one = jnp.ones_like(in_gauge), jnp.ones_like(condition)
    return Evidence(yes, yes, condition, smallest=one, largest=one, held=yes, damage=one, in_gauge=in_gauge)


def _in_gauge(grams, gauge, eps):
    """Whether a pair lies in its gauge already, to rounding: it stays then, so that many projections do not drift."""
    gram_a, gram_b = grams
    if gauge == "raw_svd":
        return jnp.zeros(len(gram_a), bool)
    norm_a, norm_b = column_norms(gram_a), column_norms(gram_b)
    mean = norm_a * norm_b
    unit = jnp.sqrt(mean[:, :, None] * mean[:, None, :])
    gap = gram_a - gram_b
    size = jnp.linalg.norm(gram_a, axis=(1, 2)) + jnp.linalg.norm(gram_b, axis=(1, 2))
    balanced = (jnp.abs(gap) <= 8 * eps * unit).all((1, 2)) & (jnp.linalg.norm(gap, axis=(1, 2)) <= 2 * eps * size)
    if gauge != "svd":
        return balanced
    tilt = jnp.where(jnp.eye(gap.shape[-1], dtype=bool)[None], 0, gram_a + gram_b)
    return balanced & (jnp.abs(tilt) <= 8 * eps * unit).all((1, 2))


def _in_range(gram):
    """Whether all columns have norms within `_SAFE_NORMS`."""
    norms, (least, most) = column_norms(gram), _SAFE_NORMS
    return ((norms > least) & (norms < most)).all(1)
