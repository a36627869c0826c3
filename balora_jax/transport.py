"""Carrying an optimizer's state through a change of gauge.

When a pair `(A, B)` becomes `(A T, T^-1 B)`, its gradients become `(g_A T^-T, T^T g_B)`. What is linear in past
gradients follows exactly: `m_A <- m_A T^-T`, `m_B <- T^T m_B`. Entrywise second moments have no image that is entrywise
again; their part that ignores correlations between columns follows the squared entries:
`v_A <- v_A (T^-T)^{o2}`, `v_B <- (T^T)^{o2} v_B`. For signed permutations this is exact too.
"""

from collections.abc import Sequence
from typing import Any

import jax
import optax

from balora_jax.linalg import matmul
from balora_jax.pairs import TreePairs
from balora_jax.sharding import sharded_like
from balora_jax.trees import leaves_by_path, path_text

# Which fields of optax's states are moments of past gradients, and of which order. Centered second moments are not
# here: less the square of a mean that is carried exactly, they could become negative.
_MOMENTS: dict[type, dict[str, int]] = {
    optax.ScaleByAdamState: {"mu": 1, "nu": 2},
    optax.ScaleByAmsgradState: {"mu": 1, "nu": 2, "nu_max": 2},
    optax.ScaleByBeliefState: {"mu": 1, "nu": 2},
    optax.ScaleByLionState: {"mu": 1},
    optax.TraceState: {"trace": 1},
    optax.ScaleByRmsState: {"nu": 2},
    optax.ScaleByRssState: {"sum_of_squares": 2},
    optax.MultiStepsState: {"acc_grads": 1},
    type(jax.eval_shape(optax.scale_by_rms(bias_correction=True).init, {})): {"nu": 2},  # has no public name
}


def check_movable(state: Any, pairs: TreePairs) -> None:
    """Raises if an optimizer state holds something for a factor that no rule tells how to move.

    Args:
        state: of an optax transformation.
        pairs: those of its parameters.

    Raises:
        ValueError: it does; the message names the place in the state.
    """
    factors = {path for pair in pairs.pairs for path in (pair.path_a, pair.path_b)}
    known = ", ".join(sorted(kind.__name__ for kind in _MOMENTS))
    for path, node in leaves_by_path(state, is_leaf=_holds_moments).items():
        if isinstance(node, optax.MultiStepsState):
            check_movable(node.inner_opt_state, pairs)
        if not _holds_moments(node) and not factors.isdisjoint(path[i:] for i in range(len(path))):
            raise ValueError(
                f"the inner optimizer keeps {path_text(path)} in its state, and there is no rule to carry it through a "
                f"change of gauge (there is one for {known}); use balora(..., transport=False), or chain the optimizer "
                f"with balora_project(), to leave the state as it is"
            )
        for name in _MOMENTS.get(type(node), ()):
            missing = factors - leaves_by_path(getattr(node, name)).keys()
            if missing:
                raise ValueError(
                    f"the inner optimizer keeps {name} of {type(node).__name__} at "
                    f"{path_text(path) or 'the top of its state'} in another structure than the parameters (no "
                    f"{min(map(path_text, missing))}), and it cannot be carried through a change of gauge; take out "
                    f"what flattens the parameters, or use balora(..., transport=False)"
                )


def move_state(state: Any, pairs: TreePairs, changes: Sequence[tuple[jax.Array, jax.Array] | None]) -> Any:
    """Returns an optimizer state with the moments of all pairs carried through their changes of gauge.

    Args:
        state: an optax state that `check_movable` accepts.
        pairs: those of the parameters.
        changes: T and T^-1 `(n, r, r)` of each pair; None leaves its moments as they are.
    """

    def carried(node):
        if not _holds_moments(node):
            return node
        if isinstance(node, optax.MultiStepsState):
            node = node._replace(inner_opt_state=move_state(node.inner_opt_state, pairs, changes))
        fields = _MOMENTS[type(node)].items()
        return node._replace(**{name: _carried(getattr(node, name), pairs, changes, order) for name, order in fields})

    return jax.tree.map(carried, state, is_leaf=_holds_moments)


def _holds_moments(node) -> bool:
    return type(node) in _MOMENTS


def _carried(moment, pairs, changes, order):
    """The moment of some order after the changes; leaves that a mask took out stay out."""
    new = []
    for pair, change, (leaf_a, leaf_b) in zip(pairs.pairs, changes, pairs.leaves(moment), strict=True):
        new_a = new_b = None
        if change is not None and leaf_a is not None:
            moment_a = pair.canonical_a(leaf_a).astype(change[1].dtype)
            moment_a = sharded_like(moment_a, matmul, moment_a, change[1].mT ** order)
            new_a = pair.restored_a(moment_a.astype(leaf_a.dtype), leaf_a)
        if change is not None and leaf_b is not None:
            moment_b = pair.canonical_b(leaf_b).astype(change[0].dtype)
            moment_b = sharded_like(moment_b, matmul, change[0].mT ** order, moment_b)
            new_b = pair.restored_b(moment_b.astype(leaf_b.dtype), leaf_b)
        new.append((new_a, new_b))
    return pairs.with_leaves(moment, new)
