"""Balancing pairs that Gram matrices of working precision cannot carry.

Their Gram matrices are computed in the widest precision there is, of pairs scaled by powers of two. Where the change of
gauge found from them began too far from balance, the pairs as it leaves them take another pass, near the identity, and
so on until Gram matrices carry it. What no pass can carry is left as it came.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from balora_jax.exponents import at_one_scale, even_exponents, of_unscaled, times_two_to
from balora_jax.gauge import Change, chosen, exact_change, identity_change, refined_inverse, rotation, turned
from balora_jax.linalg import gram, matmul, product, split
from balora_jax.rounding import cancellation, condition, damage, growth

# A Gram matrix carries a change if its rounding errors are enlarged by less than this in the balanced ones, and if
# columns scaled to norm 1 have a condition number below the second; both are larger as far as it is more precise than
# the factors.
MOST_GROWTH = 4.0
MOST_CONDITION = 200.0

_MOST_PASSES = 4


class Repair(NamedTuple):
    """The outcome of `repair` for n pairs.

    Attributes:
        lefts: `(n_i, a_i, r)` each, with the new left factors of the pairs that were found.
        rights: `(n_i, r, b_i)` each.
        change: T, the identity for other pairs.
        cancellation: `(n)`, see `balora_jax.rounding.cancellation`.
        found: `(n)` bool, whether a pair was balanced. The factors of one that was asked for and not found may change.
        nonfinite: `(n)` bool, whether a pair that was asked for holds a NaN or an infinity.
    """

    lefts: list[jax.Array]
    rights: list[jax.Array]
    change: Change
    cancellation: jax.Array
    found: jax.Array
    nonfinite: jax.Array


class _Progress(NamedTuple):
    """What the passes hand on; the change is that of the pairs `(2^-i A, 2^-j B)`, and the Gram matrices too."""

    passes: jax.Array
    going: jax.Array
    carried: jax.Array
    change: Change
    first_grams: tuple[jax.Array, jax.Array]
    lefts: list[jax.Array]
    rights: list[jax.Array]


def repair(
    lefts: list[jax.Array],
    rights: list[jax.Array],
    wanted: jax.Array,
    gauge: str,
    precision: jax.typing.DTypeLike,
    wide: jax.typing.DTypeLike,
) -> Repair:
    """Balances some pairs of each stack.

    Args:
        lefts: `(n_i, a_i, r)`, the left factors.
        rights: `(n_i, r, b_i)`.
        wanted: `(n)` bool over all pairs, those to balance.
        gauge: one of `GAUGES`.
        precision: dtype that the factors come from and go to.
        wide: dtype of the arithmetic.
    """
    sizes = [jnp.concatenate([jnp.abs(x).max((1, 2)) for x in factors]) for factors in (lefts, rights)]
    finite = jnp.isfinite(sizes[0]) & jnp.isfinite(sizes[1])
    i, j = map(even_exponents, sizes)
    mean = (i + j) // 2
    spare = float(jnp.finfo(precision).eps / jnp.finfo(wide).eps)
    nothing = jnp.zeros((len(wanted), *2 * lefts[0].shape[-1:]), wide)
    identity = identity_change(nothing)

    def one_pass(progress):
        passes, going, carried, change, first, lefts, rights = progress
        exponents = jnp.where(passes == 0, i, mean), jnp.where(passes == 0, j, mean)
        now = _grams(lefts, rights, going, *exponents, wide)
        step = exact_change(*now)
        enough = (growth(step, *now) < MOST_GROWTH * spare) & (condition(step, *now) < MOST_CONDITION * spare**0.5)
        going &= step.found
        lefts, rights = _applied(lefts, rights, going, chosen(going, of_unscaled(step, *exponents), identity))
        change = chosen(going, _followed(change, step), change)
        first = tuple(jnp.where(passes == 0, x, y) for x, y in zip(now, first, strict=True))
        return _Progress(passes + 1, going & ~enough, carried | (going & enough), change, first, lefts, rights)

    start = _Progress(
        passes=jnp.zeros((), jnp.int32),
        going=wanted & finite,
        carried=jnp.zeros_like(wanted),
        change=identity,
        first_grams=(nothing, nothing),
        lefts=lefts,
        rights=rights,
    )
    done = lax.while_loop(lambda p: (p.passes < _MOST_PASSES) & p.going.any(), one_pass, start)

    seen, seen_a, seen_b = at_one_scale(done.change, *done.first_grams, i, j)
    turn = rotation(seen, seen_a, seen_b, gauge)
    change = turned(of_unscaled(done.change, i, j), turn)
    eps = float(jnp.finfo(precision).eps)
    size = times_two_to(jnp.sqrt(done.change.values.max(1)), mean)
    found = done.carried & (condition(done.change, *done.first_grams) < 1 / (4 * eps)) & _held(change, size, precision)
    found &= damage(done.change, turn, *done.first_grams) < most_damage(precision, wide)
    lefts, rights = _applied(done.lefts, done.rights, found, chosen(found, turned(identity, turn), identity))
    moved = cancellation(turned(seen, turn), seen_a, seen_b)
    return Repair(lefts, rights, chosen(found, change, identity), moved, found, wanted & ~finite)


def most_damage(precision: jax.typing.DTypeLike, wide: jax.typing.DTypeLike) -> float:
    """Returns how many roundings of the wider dtype a change may cost the product, beyond which pairs are left."""
    if jnp.finfo(precision).eps > jnp.finfo(wide).eps:
        return 1e8
    return 1e6 if wide == jnp.float64 else 1.5


def _grams(lefts, rights, going, i, j, wide):
    """The Gram matrices of the pairs `(2^-i A, 2^-j B)` in the dtype `wide`, of the stacks with a pair that goes on."""

    def of_stack(left, right, i, j):
        left, right = (times_two_to(x.astype(wide), -k[:, None, None]) for x, k in ((left, i), (right, j)))
        return gram(left, 0), gram(right, 1)

    def of_none(left, right, i, j):
        return 2 * (jnp.zeros((len(left), *2 * left.shape[2:]), wide),)

    parts = (split(x, lefts) for x in (going, i, j))
    each = [
        lax.cond(part.any(), of_stack, of_none, *operands)
        for part, *operands in zip(next(parts), lefts, rights, *parts, strict=True)
    ]
    return tuple(jnp.concatenate(side) for side in zip(*each, strict=True))


def _applied(lefts, rights, moved, change):
    """`A T` and `T^-1 B`, in the dtype of T, for the stacks that have a moved pair."""
    parts = (split(x, lefts) for x in (moved, change.forward, change.inverse))
    new = [
        lax.cond(part.any(), _products, lambda left, right, *_: (left, right), *operands)
        for part, *operands in zip(next(parts), lefts, rights, *parts, strict=True)
    ]
    return [left for left, _ in new], [right for _, right in new]


def _products(left, right, forward, inverse):
    """`A T` and `T^-1 B` in the dtype of T, some columns at a time, to spare memory."""
    rank, wide = forward.shape[-1], forward.dtype
    width = -(-rank // 4)
    wide_left, wide_right = left.astype(wide), right.astype(wide)

    def part(i, targets):
        target_a, target_b = targets
        columns, rows = (lax.dynamic_slice_in_dim(x, i * width, width, n) for x, n in ((forward, 2), (inverse, 1)))
        new_a, new_b = (
            product(wide_left, columns).astype(target_a.dtype),
            product(rows, wide_right).astype(target_b.dtype),
        )
        return (
            lax.dynamic_update_slice_in_dim(target_a, new_a.astype(target_a.dtype), i * width, 2),
            lax.dynamic_update_slice_in_dim(target_b, new_b.astype(target_b.dtype), i * width, 1),
        )

    return lax.fori_loop(0, -(-rank // width), part, (left, right))


def _followed(change, step):
    """One change after the other."""
    forward, inverse = matmul(change.forward, step.forward), matmul(step.inverse, change.inverse)
    return step._replace(forward=forward, inverse=refined_inverse(forward, inverse))


def _held(change, size, precision):
    """Whether the precision holds the change and the longest columns `(n)` of the new factors to all their digits."""
    tiny, eps = float(jnp.finfo(precision).tiny), float(jnp.finfo(precision).eps)
    extent = jnp.stack([jnp.abs(change.forward).max(2).min(1), jnp.abs(change.inverse).max(1).min(1), size])
    return ((extent > tiny / eps) & (extent < eps / tiny)).all(0)
