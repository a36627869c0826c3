"""Balancing whole trees: the projection of an update, and a tree once for all."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from balora_jax.balance import balance_factors, balance_pairs
from balora_jax.factors import Moved, working_dtype
from balora_jax.gauge import Gauge, Route
from balora_jax.in_place import update_if
from balora_jax.linalg import split
from balora_jax.pairs import Pairs, TreePairs
from balora_jax.status import Status, is_skipped, status_of_update
from balora_jax.trees import path_text


class Projected(NamedTuple):
    """The outcome of `project`.

    Attributes:
        updates: the tree of new updates.
        changes: T and T^-1 `(n, r, r)` of each pair, the identity where it was skipped; None without updates.
        status: `(N)` int8 of all stacked pairs, one after the other.
    """

    updates: Any
    changes: list[tuple[jax.Array, jax.Array] | None]
    status: jax.Array


def balance_tree(params: Any, *, pairs: Pairs | None = None, gauge: Gauge = "svd", route: Route = "auto") -> Any:
    """Returns a parameter tree with every LoRA pair balanced, however far from balance it was; products stay.

    Args:
        params: any pytree, see `find_pairs`. Leaves that belong to no pair stay as they are.
        pairs: names the pairs if their leaves have other names than `find_pairs` knows; see there.
        gauge: as for `balance`.
        route: as for `balance`.

    Returns:
        The tree. A pair that has no balanced form, a fresh one with `B = 0` say, stays as it is, see `balance`.

    Raises:
        ValueError: as `find_pairs` and `balance`.
        TypeError: as `find_pairs` and `balance`.

    Notes:
        For parameters before training, or after it. In training `balora_project` and `balora` do this to each update.

    Source: arXiv 2605.31484 (the projection onto the hyper-balanced set).

    Examples:
        >>> import jax.numpy as jnp
        >>> from balora_jax import balancing_gap
        >>> params = {"up": {"lora_a": jnp.eye(6, 2), "lora_b": 3.0 * jnp.eye(2, 5), "bias": jnp.ones(5)}}
        >>> up = balance_tree(params)["up"]
        >>> bool(balancing_gap(up["lora_a"], up["lora_b"]) < 1e-6)
        True
    """
    found = TreePairs.of(params, pairs)
    return found.write(params, balance_pairs(found.read(params), gauge=gauge, route=route))


def project(
    updates: Any, params: Any, pairs: TreePairs, *, gauge: str, route: str, least_ratio: jax.typing.ArrayLike
) -> Projected:
    """Returns updates that lead to the balanced pairs of `params + updates`.

    Args:
        updates: a tree of the structure of `params`; both factors of a pair may be None or masked.
        params: the parameters.
        pairs: those of the parameters.
        gauge: as for `balance`.
        route: as for `balance`.
        least_ratio: as for `balora_project`.

    Raises:
        ValueError: one factor of a pair has an update and the other has none.
    """
    moving = _with_updates(pairs, updates)
    trained = pairs.only(moving)
    old, steps = trained.read(params), trained.read(updates)
    moved = [(Moved(a, u), Moved(b, v)) for (a, b), (u, v) in zip(old, steps, strict=True)]
    outcomes = balance_factors(moved, gauge=gauge, route=route)
    status = _status(outcomes, moved, least_ratio)
    statuses = split(status, [lora_a for lora_a, _ in old])

    def as_they_came(new_steps):
        return [
            tuple(jnp.where(is_skipped(status)[:, None, None], u, x) for u, x in zip(step, new, strict=True))
            for status, step, new in zip(statuses, steps, new_steps, strict=True)
        ]

    new_steps = update_if(is_skipped(status).any(), as_they_came, [outcome[:2] for outcome in outcomes])
    changes = [
        tuple(jnp.where(is_skipped(status)[:, None, None], jnp.eye(x.shape[-1], dtype=x.dtype)[None], x) for x in both)
        for status, both in zip(statuses, ((outcome.T, outcome.T_inv) for outcome in outcomes), strict=True)
    ]
    rest = [jnp.full(n, Status.NO_UPDATE, jnp.int8) for n in pairs.counts(params)]
    every = _in_places(statuses, moving, rest)
    return Projected(
        trained.write(updates, new_steps), _in_places(changes, moving, len(moving) * [None]), jnp.concatenate(every)
    )


def disturbed(params: Any, pairs: TreePairs, balanced: jax.Array) -> jax.Array:
    """Returns which of the pairs `(n)` that were balanced are not so any more, by the norms of their columns.

    Rounding of the factors to their dtype leaves a gap of some of its precision; the root of it is called unbalanced.

    Args:
        params: the parameters.
        pairs: those of the parameters.
        balanced: `(n)` bool, the pairs to look at.
    """

    def uneven(lora_a, lora_b):
        wide, precision = working_dtype(lora_a, lora_b), max(_eps(lora_a), _eps(lora_b))
        in_a, in_b = (jnp.square(x.astype(wide)).sum(axis) for x, axis in ((lora_a, 1), (lora_b, 2)))
        return jnp.linalg.norm(in_a - in_b, axis=1) > precision**0.5 * jnp.linalg.norm(in_a + in_b, axis=1)

    return balanced & jnp.concatenate([uneven(*factors) for factors in pairs.read(params)])


def _with_updates(pairs: TreePairs, updates: Any) -> list[bool]:
    """Which pairs have updates; None and masked nodes stand for parameters that stay as they are."""
    moving = []
    for pair, (step_a, step_b) in zip(pairs.pairs, pairs.leaves(updates), strict=True):
        if (step_a is None) != (step_b is None):
            path, partner = (pair.path_a, pair.path_b)[:: 1 if step_b is None else -1]
            raise ValueError(
                f"updates hold none for {path_text(partner)}, but one for its partner {path_text(path)}: balancing "
                f"moves both factors of a pair, so both must be trained"
            )
        moving.append(step_a is not None)
    return moving


def _in_places(some: Sequence[Any], places: Sequence[bool], others: Sequence[Any]) -> list[Any]:
    """What belongs to some pairs at their places among all, and other things at the other places."""
    remaining = iter(some)
    return [next(remaining) if here else other for here, other in zip(places, others, strict=True)]


def _status(outcomes, moved, least_ratio: jax.typing.ArrayLike) -> jax.Array:
    """The status `(N)` of pairs that balancing would take to these outcomes."""

    def over_pairs(values):
        return jnp.concatenate(list(values))

    def has_entries(arrays):
        # the largest entry, as XLA:CPU takes three times as long for any(); true for a NaN
        return over_pairs(jnp.abs(x).max((1, 2)) != 0 for x in arrays)

    def frozen(one_moves):
        has_a, has_b = (has_entries(factor.start for factor in side) for side in zip(*moved, strict=True))
        return one_moves & has_a & has_b

    # also where the gradient of a factor is zero because its partner is, or because nothing reaches the pair: a fresh
    # expert without tokens, of which weight decay moves A alone
    moves_a, moves_b = (has_entries(factor.step for factor in side) for side in zip(*moved, strict=True))
    one_moves = moves_a != moves_b
    eps = [len(a.start) * [max(_eps(a.start), _eps(b.start))] for a, b in moved]
    return status_of_update(
        over_pairs(outcome.status for outcome in outcomes),
        frozen=update_if(one_moves.any(), frozen, one_moves),
        cancellation=over_pairs(outcome.cancellation for outcome in outcomes),
        eps=np.concatenate(eps).astype(np.float32),
        ratio=over_pairs(outcome.ratio for outcome in outcomes),
        one_moves=one_moves,
        least_ratio=least_ratio,
    )


def _eps(x) -> float:
    return float(jnp.finfo(x.dtype).eps)
