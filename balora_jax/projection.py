"""Balancing whole trees: the projection of an update, and a tree once for all."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from balora_jax.balance import Balanced, balance_factors, balance_pairs
from balora_jax.factors import working_dtype
from balora_jax.gauge import Gauge, Route
from balora_jax.pairs import Pair, Pairs, find_pairs, read_pairs, write_pairs
from balora_jax.status import Status, is_skipped, status_of_update
from balora_jax.trees import is_masked, leaves_by_path, path_text


class Projected(NamedTuple):
    """The outcome of `project`.

    Attributes:
        updates: the tree of new updates.
        pairs: those that have updates.
        changes: T and T^-1 `(n, r, r)` of each of them, the identity where a pair was skipped.
        status: `(N)` int8 of all pairs, those without updates too, one after the other.
    """

    updates: Any
    pairs: list[Pair]
    changes: list[tuple[jax.Array, jax.Array]]
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
    found = find_pairs(params, pairs)
    return write_pairs(params, found, balance_pairs(read_pairs(params, found), gauge=gauge, route=route))


def project(
    updates: Any, params: Any, pairs: Sequence[Pair], *, gauge: str, route: str, least_ratio: jax.typing.ArrayLike
) -> Projected:
    """Returns updates that lead to the balanced pairs of `params + updates`.

    Args:
        updates: a tree of the structure of `params`; both factors of a pair may be None or masked.
        params: the parameters.
        pairs: from `find_pairs` of the parameters.
        gauge: as for `balance`.
        route: as for `balance`.
        least_ratio: as for `balora_project`.

    Raises:
        ValueError: one factor of a pair has an update and the other has none.
    """
    moving = _with_updates(pairs, updates)
    old, steps = read_pairs(params, moving), read_pairs(updates, moving)
    sums = [tuple(map(_add_wide, factors, step)) for factors, step in zip(old, steps, strict=True)]
    outcomes = balance_factors(sums, gauge=gauge, route=route)
    new_steps, changes, statuses = [], [], {}
    for pair, factors, step, new in zip(moving, old, steps, outcomes, strict=True):
        status = statuses[pair.path_a] = _status(new, factors, step, least_ratio)
        skipped, identity = is_skipped(status)[:, None, None], jnp.eye(new.T.shape[-1], dtype=new.T.dtype)[None]
        news = zip(step, new[:2], factors, strict=True)
        new_steps.append(tuple(jnp.where(skipped, u, (x - p.astype(x.dtype)).astype(u.dtype)) for u, x, p in news))
        changes.append((jnp.where(skipped, identity, new.T), jnp.where(skipped, identity, new.T_inv)))
    sizes = zip(pairs, counts(params, pairs), strict=True)
    every = [statuses.get(pair.path_a, jnp.full(n, Status.NO_UPDATE, jnp.int8)) for pair, n in sizes]
    return Projected(write_pairs(updates, moving, new_steps), moving, changes, jnp.concatenate(every))


def disturbed(params: Any, pairs: Sequence[Pair], balanced: jax.Array) -> jax.Array:
    """Returns which of the pairs `(n)` that were left balanced are not so any more, by the norms of their columns.

    Rounding of the factors to their dtype leaves a gap of some of its precision; the root of it is called unbalanced.

    Args:
        params: the parameters.
        pairs: from `find_pairs` of them.
        balanced: `(n)` bool, the pairs to look at.
    """

    def uneven(lora_a, lora_b):
        wide, precision = working_dtype(lora_a, lora_b), max(_eps(lora_a), _eps(lora_b))
        in_a, in_b = (jnp.square(x.astype(wide)).sum(axis) for x, axis in ((lora_a, 1), (lora_b, 2)))
        return jnp.linalg.norm(in_a - in_b, axis=1) > precision**0.5 * jnp.linalg.norm(in_a + in_b, axis=1)

    return balanced & jnp.concatenate([uneven(*factors) for factors in read_pairs(params, pairs)])


def counts(params: Any, pairs: Sequence[Pair]) -> list[int]:
    """Returns how many pairs each of them stacks."""
    return [lora_a.shape[0] for lora_a, _ in jax.eval_shape(lambda tree: read_pairs(tree, pairs), params)]


def _with_updates(pairs: Sequence[Pair], updates: Any) -> list[Pair]:
    """The pairs whose factors have updates; None and masked nodes stand for parameters that stay as they are."""
    present = {path for path, leaf in leaves_by_path(updates).items() if not is_masked(leaf)}
    for pair in pairs:
        for path, partner in ((pair.path_a, pair.path_b), (pair.path_b, pair.path_a)):
            if path in present and partner not in present:
                raise ValueError(
                    f"updates hold none for {path_text(partner)}, but one for its partner {path_text(path)}: balancing "
                    f"moves both factors of a pair, so both must be trained"
                )
    return [pair for pair in pairs if pair.path_a in present]


def _status(new: Balanced, factors, step, least_ratio: jax.typing.ArrayLike) -> jax.Array:
    """The status of stacked pairs that balancing would take to `new`."""
    moves_a, moves_b, has_a, has_b = ((x != 0).any((1, 2)) for x in (*step, *factors))
    # also where the gradient of a factor is zero because its partner is, or because nothing reaches the pair: a fresh
    # expert without tokens, of which weight decay moves A alone
    one_moves = moves_a != moves_b
    return status_of_update(
        new.status,
        frozen=one_moves & has_a & has_b,
        cancellation=new.cancellation,
        eps=max(map(_eps, factors)),
        ratio=new.ratio,
        one_moves=one_moves,
        least_ratio=least_ratio,
    )


def _add_wide(param, update):
    """`param + update` in float32 or wider."""
    wide = working_dtype(param, update)
    return param.astype(wide) + update.astype(wide)


def _eps(x) -> float:
    return float(jnp.finfo(x.dtype).eps)
