"""Which step a run ends with: the best adapters so far, and when there is no more to wait for."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx


class Selection(NamedTuple):
    """What the evaluations have shown so far, of one member, or of a population along a leading axis.

    Attributes:
        adapters: the adapters of the lowest evaluation loss; empty where those of the last step are taken.
        loss: float32, that loss; infinite before the first evaluation.
        step: int32, where it was reached.
        waited: int32, evaluations since.
        stopped_at: int32, the step at which patience ran out, or -1. From then on nothing changes.
    """

    adapters: nnx.State
    loss: jax.Array
    step: jax.Array
    waited: jax.Array
    stopped_at: jax.Array


def nothing_seen(adapters: nnx.State, *, keep: bool) -> Selection:
    """Returns the selection of a member before its first evaluation.

    Args:
        adapters: that it starts with.
        keep: whether the best adapters are kept.
    """
    kept = jax.tree.map(jnp.copy, adapters) if keep else nnx.State({})
    return Selection(kept, jnp.float32(jnp.inf), jnp.int32(0), jnp.int32(0), jnp.int32(-1))


def seen(
    selection: Selection, adapters: nnx.State, *, loss: jax.Array, step: jax.Array, patience: int | None
) -> Selection:
    """Returns the selection of a member after one more evaluation.

    Args:
        selection: before.
        adapters: that were evaluated.
        loss: their evaluation loss; one that is not finite is never the lowest.
        step: the steps that were done.
        patience: evaluations in a row without a lower loss after which the member stops; None for never.
    """
    lower = loss < selection.loss
    waited = jnp.where(lower, 0, selection.waited + 1)
    kept = selection.adapters
    if jax.tree.leaves(kept):
        kept = jax.tree.map(lambda new, old: jnp.where(lower, new, old), adapters, kept)
    stopped_at = selection.stopped_at
    if patience is not None:
        stopped_at = jnp.where((stopped_at < 0) & (waited >= patience), step, stopped_at)
    return Selection(
        kept,
        jnp.where(lower, loss, selection.loss).astype(jnp.float32),
        jnp.where(lower, step, selection.step),
        waited,
        stopped_at,
    )
