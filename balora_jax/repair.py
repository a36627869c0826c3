"""Balancing pairs that Gram matrices of working precision cannot carry.

Their Gram matrices are computed in the widest precision there is, of pairs scaled by powers of two. Where the change of
gauge found from them began too far from balance, the pairs as it leaves them take another pass, near the identity, and
so on until Gram matrices carry it. What no pass can carry is skipped.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from balora_jax.exponents import at_one_scale, even_exponents, of_unscaled, times_two_to
from balora_jax.factors import Grams, Stacks
from balora_jax.gauge import Change, exact_change, identity_change, refined_inverse, rotation, select, turned
from balora_jax.linalg import gram, matmul, over_stack, product, split
from balora_jax.rounding import cancellation, carries, condition, damage
from balora_jax.status import Evidence

_MOST_PASSES = 4


class Repair(NamedTuple):
    """The outcome of `repair` for n pairs.

    Attributes:
        stacks: the new factors of pairs that were asked for. Those that the evidence speaks against may be anything.
        change: T of pairs that were asked for; likewise.
        cancellation: `(n)`, see `balora_jax.rounding.cancellation`.
        evidence: from which the status follows of pairs that were asked for.
    """

    stacks: Stacks
    change: Change
    cancellation: jax.Array
    evidence: Evidence


class _Progress(NamedTuple):
    """What the passes hand on; the change is that of the pairs `(2^-i A, 2^-j B)`, and the Gram matrices too."""

    passes: jax.Array
    going: jax.Array
    solved: jax.Array
    change: Change
    first_grams: Grams
    stacks: Stacks


def repair(
    stacks: Stacks,
    wanted: jax.Array,
    gauge: str,
    precision: jax.typing.DTypeLike,
    wide: jax.typing.DTypeLike,
) -> Repair:
    """Balances some pairs of each stack.

    Args:
        stacks: the pairs, in float32 or wider.
        wanted: `(n)` bool over all pairs, those to balance.
        gauge: one of `GAUGES`.
        precision: dtype that the factors come from and go to.
        wide: dtype of the arithmetic.
    """
    size_a, size_b = (jnp.concatenate([jnp.abs(x).max((1, 2)) for x in factors]) for factors in stacks)
    finite = jnp.isfinite(size_a) & jnp.isfinite(size_b)
    i, j = even_exponents(size_a), even_exponents(size_b)
    mean = (i + j) // 2
    spare = float(jnp.finfo(precision).eps / jnp.finfo(wide).eps)
    nothing = jnp.zeros((len(wanted), *2 * stacks.lora_a[0].shape[-1:]), wide)
    identity = identity_change(nothing)

    def one_pass(progress):
        passes, going, solved, change, first, stacks = progress
        exponents = jnp.where(passes == 0, i, mean), jnp.where(passes == 0, j, mean)
        now = _grams(stacks, going, *exponents, wide)
        step = exact_change(*now)
        enough = carries(step, *now, spare=spare)
        going &= step.found
        stacks = _applied(stacks, going, select(going, of_unscaled(step, *exponents), identity))
        change = select(going, _followed(change, step), change)
        first = Grams(*(jnp.where(passes == 0, x, y) for x, y in zip(now, first, strict=True)))
        return _Progress(passes + 1, going & ~enough, solved | (going & enough), change, first, stacks)

    start = _Progress(
        passes=jnp.zeros((), jnp.int32),
        going=wanted & finite,
        solved=jnp.zeros_like(wanted),
        change=identity,
        first_grams=Grams(nothing, nothing),
        stacks=stacks,
    )
    done = lax.while_loop(lambda p: (p.passes < _MOST_PASSES) & p.going.any(), one_pass, start)

    seen, seen_a, seen_b = at_one_scale(done.change, *done.first_grams, i, j)
    turn = rotation(seen, seen_a, seen_b, gauge)
    change = turned(of_unscaled(done.change, i, j), turn)
    longest = times_two_to(jnp.sqrt(done.change.values.max(1)), mean)
    sizes = jnp.stack([jnp.abs(change.T).max(2).min(1), jnp.abs(change.T_inv).max(1).min(1), longest])
    evidence = Evidence(
        finite=finite,
        solved=done.solved,
        condition=condition(done.change, *done.first_grams),
        smallest=sizes.min(0),
        largest=sizes.max(0),
        held=jnp.ones_like(wanted),
        damage=damage(done.change, turn, *done.first_grams),
        in_gauge=jnp.zeros_like(wanted),
    )
    stacks = _applied(done.stacks, done.solved, select(done.solved, turned(identity, turn), identity))
    return Repair(stacks, change, cancellation(turned(seen, turn), seen_a, seen_b), evidence)


def _grams(stacks, going, i, j, wide):
    """The Gram matrices of the pairs `(2^-i A, 2^-j B)` in the dtype `wide`, of the stacks with a pair that goes on."""

    def of_pair(lora_a, lora_b, i, j):
        return gram(times_two_to(lora_a.astype(wide), -i), 0), gram(times_two_to(lora_b.astype(wide), -j), 1)

    def of_none(lora_a, lora_b, i, j):
        return 2 * (jnp.zeros((len(lora_a), *2 * lora_a.shape[2:]), wide),)

    parts = (split(x, stacks.lora_a) for x in (going, i, j))
    each = [
        lax.cond(part.any(), partial(over_stack, of_pair), of_none, *operands)
        for part, *operands in zip(next(parts), *stacks, *parts, strict=True)
    ]
    return Grams(*(jnp.concatenate(side) for side in zip(*each, strict=True)))


def _applied(stacks, which, change):
    """`(A T, T^-1 B)` of the stacks that have one of these pairs `(n)`, and the others as they are."""
    parts = (split(x, stacks.lora_a) for x in (which, change.T, change.T_inv))
    new = [
        lax.cond(part.any(), _products, lambda lora_a, lora_b, *_: (lora_a, lora_b), *operands)
        for part, *operands in zip(next(parts), *stacks, *parts, strict=True)
    ]
    return Stacks([lora_a for lora_a, _ in new], [lora_b for _, lora_b in new])


def _products(lora_a, lora_b, T, T_inv):
    """`A T` and `T^-1 B`, summed in the dtype of T, some columns at a time, to spare memory."""
    rank, wide = T.shape[-1], T.dtype
    width = -(-rank // 4)
    wide_a, wide_b = lora_a.astype(wide), lora_b.astype(wide)

    def part(i, targets):
        target_a, target_b = targets
        columns, rows = (lax.dynamic_slice_in_dim(x, i * width, width, n) for x, n in ((T, 2), (T_inv, 1)))
        new_a, new_b = product(wide_a, columns).astype(lora_a.dtype), product(rows, wide_b).astype(lora_b.dtype)
        return (
            lax.dynamic_update_slice_in_dim(target_a, new_a, i * width, 2),
            lax.dynamic_update_slice_in_dim(target_b, new_b, i * width, 1),
        )

    return lax.fori_loop(0, -(-rank // width), part, (lora_a, lora_b))


def _followed(change, step):
    """One change after the other."""
    T, T_inv = matmul(change.T, step.T), matmul(step.T_inv, change.T_inv)
    return step._replace(T=T, T_inv=refined_inverse(T, T_inv))
