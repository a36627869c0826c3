"""What becomes of each pair: one status, decided here from what balancing and the update have measured."""

import enum
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Status(enum.IntEnum):
    """What became of a pair. All but the first two are *skipped*: they keep the factors with which they came.

    Attributes:
        BALANCED: it was balanced.
        ALREADY_BALANCED: it was in its gauge already, to rounding, and stays as it is.
        NONFINITE: it holds a NaN or an infinity.
        RANK_DEFICIENT: its product has numerical rank below `min(a, r, b)`.
        OUT_OF_RANGE: the balanced factors, or the change of gauge, are too large or too small for their dtype.
        CANCELLING: its factors cancel so far in the product that balancing would cost digits of it.
        FAR: it is so far from balance that an update, which is added to the parameters in their dtype, could not carry
            it there without losing a third of the product's digits.
        WAITING: one factor is still too small beside the other, or has no update because it or its partner is zero.
        FROZEN: one factor has no update, though neither is zero: it is taken to be frozen.
        NO_UPDATE: neither factor has an update, or nothing was projected yet.
    """

    BALANCED = 0
    ALREADY_BALANCED = 1
    NONFINITE = 2
    RANK_DEFICIENT = 3
    OUT_OF_RANGE = 4
    CANCELLING = 5
    FAR = 6
    WAITING = 7
    FROZEN = 8
    NO_UPDATE = 9


COUNTED = tuple(status for status in Status if status not in (Status.BALANCED, Status.NO_UPDATE))
"""What metrics count."""


class Evidence(NamedTuple):
    """What balancing has measured of n pairs, `(n)` each.

    Attributes:
        finite: bool, whether all entries of the factors are finite.
        solved: bool, whether a change of gauge was found from Gram matrices that carry it.
        condition: of the factors once their columns have norm 1, see `balora_jax.rounding.condition`.
        smallest: the least of the sizes that the new dtype must hold, of new columns and of the change of gauge.
        largest: the largest of them.
        held: bool, whether the dtypes of the factors, where they are narrower than the arithmetic, hold the new ones.
        damage: roundings that balancing costs the product, see `balora_jax.rounding.damage`.
        in_gauge: bool, whether the pair is in its gauge already, to rounding.
    """

    finite: jax.Array
    solved: jax.Array
    condition: jax.Array
    smallest: jax.Array
    largest: jax.Array
    held: jax.Array
    damage: jax.Array
    in_gauge: jax.Array


def status_of_balancing(evidence: Evidence, precision: jax.typing.DTypeLike, wide: jax.typing.DTypeLike) -> jax.Array:
    """Returns the status `(n)` int8 of pairs from what balancing has measured: the first that holds.

    Args:
        evidence: what was measured; a NaN passes no test.
        precision: dtype that the factors come from and go to.
        wide: dtype of the arithmetic.
    """
    eps, tiny = float(jnp.finfo(precision).eps), float(jnp.finfo(precision).tiny)
    in_range = (evidence.smallest > tiny / eps) & (evidence.largest < eps / tiny) & evidence.held
    return _first(
        [
            (~evidence.finite, Status.NONFINITE),
            (~(evidence.solved & (evidence.condition < 1 / (4 * eps))), Status.RANK_DEFICIENT),
            (~in_range, Status.OUT_OF_RANGE),
            (~(evidence.damage < _most_damage(precision, wide)), Status.CANCELLING),
            (evidence.in_gauge, Status.ALREADY_BALANCED),
        ],
        jnp.full(evidence.finite.shape, Status.BALANCED, jnp.int8),
    )


def status_of_update(
    status: jax.Array,
    *,
    frozen: jax.Array,
    cancellation: jax.Array,
    eps: np.ndarray,
    ratio: jax.Array,
    one_moves: jax.Array,
    least_ratio: jax.typing.ArrayLike,
) -> jax.Array:
    """Returns the status `(n)` int8 of pairs that an update shall carry to balance: the first that holds.

    Args:
        status: `(n)` int8, from `status_of_balancing`.
        frozen: `(n)` bool, whether one factor has no update though neither is zero.
        cancellation: `(n)`, see `balora_jax.rounding.cancellation`.
        eps: `(n)`, rounding of the parameters' dtypes.
        ratio: `(n)`, the norm of the smaller factor over that of the larger one.
        one_moves: `(n)` bool, whether one factor alone has an update.
        least_ratio: pairs with a smaller ratio wait, and those of which one factor alone has an update; 0 for no wait.
    """
    return _first(
        [
            (status == Status.NONFINITE, Status.NONFINITE),
            (frozen, Status.FROZEN),
            (is_skipped(status), status),
            (~(cancellation < 0.4 * eps ** (-1 / 3)), Status.FAR),  # the product to 3e-6 in float32
            ((one_moves & (jnp.asarray(least_ratio) > 0)) | (ratio < least_ratio), Status.WAITING),
        ],
        status,
    )


def is_skipped(status: jax.Array) -> jax.Array:
    """Whether a pair of this status `(...)` keeps the factors with which it came."""
    return status > Status.ALREADY_BALANCED


def is_untouched(status: jax.Array) -> jax.Array:
    """Whether a pair of this status `(...)` is finite, and was skipped though it has an update."""
    return is_skipped(status) & (status != Status.NONFINITE) & (status != Status.NO_UPDATE)


def _most_damage(precision: jax.typing.DTypeLike, wide: jax.typing.DTypeLike) -> float:
    """How many roundings of the wider dtype balancing may cost the product."""
    if jnp.finfo(precision).eps > jnp.finfo(wide).eps:
        return 1e8
    return 1e6 if wide == jnp.float64 else 1.5


def _first(rules: Sequence[tuple[jax.Array, Status | jax.Array]], otherwise: jax.Array) -> jax.Array:
    """The status of the first rule that holds."""
    status = otherwise
    for condition, given in reversed(rules):
        holds = condition.astype(status.dtype)  # in a sum, as a select would ask for statuses of one sharding
        status = holds * jnp.asarray(given, status.dtype) + (1 - holds) * status
    return status
