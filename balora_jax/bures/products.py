"""Products of manifolds: points and tangent vectors as lists of pairs, from any tree whose nodes are `Point`s."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from balora_jax.bures.manifold import projection
from balora_jax.bures.matrix_functions import balanced
from balora_jax.bures.points import Point, Tangent, balanced_point

Points = Sequence[Point]
Tangents = Sequence[Tangent]


def flattened(points: Any) -> tuple[list[Point], Callable[[Points], Any]]:
    """The points of a tree, and the function that puts such into the tree.

    Args:
        points: a `Point`, or a tree of them; each may have leading axes.

    Raises:
        TypeError: the tree holds something else, or points of several dtypes.
        ValueError: it holds none, or one that is not balanced.
    """
    leaves, tree = jax.tree_util.tree_flatten(points, is_leaf=lambda node: isinstance(node, Point))
    if not leaves:
        raise ValueError("the tree must hold at least one Point, got none")
    for leaf in leaves:
        if not isinstance(leaf, Point):
            raise TypeError(f"the leaves of the tree must be Points, got {type(leaf).__name__}")
    found = [Point(*balanced_point(leaf)) for leaf in leaves]
    dtypes = {x.dtype.name for pair in found for x in pair}
    if len(dtypes) > 1:
        raise TypeError(f"the points must have one dtype, got {' and '.join(sorted(dtypes))}")
    return found, lambda pairs: jax.tree.unflatten(tree, pairs)


def dot(first: Tangents, second: Tangents) -> jax.Array:
    """The inner product in the product of the manifolds."""
    pairs = zip(first, second, strict=True)
    return jnp.stack([(x * y).sum() for u, v in pairs for x, y in zip(u, v, strict=True)]).sum()


def combined(scale: Any, first: Tangents, other: Any, second: Tangents) -> list[Tangent]:
    """`scale first + other second`."""
    return [
        Tangent(*(scale * x + other * y for x, y in zip(u, v, strict=True))) for u, v in zip(first, second, strict=True)
    ]


def times(scale: Any, vectors: Tangents) -> list[Tangent]:
    """`scale vectors`."""
    return [Tangent(*(scale * x for x in v)) for v in vectors]


def added(points: Points, size: Any, vectors: Tangents) -> list[Point]:
    """The pairs plus a step; their products are those of the retraction."""
    return [Point(*(x + size * y for x, y in zip(p, v, strict=True))) for p, v in zip(points, vectors, strict=True)]


def retracted(points: Points, size: Any, vectors: Tangents) -> list[Point]:
    """The retraction of a step."""
    return [Point(*balanced(*pair)) for pair in added(points, size, vectors)]


def projected(points: Points, vectors: Any) -> list[Tangent]:
    """The horizontal parts of directions; of tangent vectors at near points, their transport."""
    return [projection(p, Tangent(*v)) for p, v in zip(points, vectors, strict=True)]


def chosen(condition: jax.Array, first: Any, second: Any) -> Any:
    """One tree of arrays where a condition holds, another elsewhere."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), first, second)


def lengths(points: Points) -> jax.Array:
    """The norm of all factors: the distance from 0, an upper bound of that from matrices of lower rank."""
    return jnp.sqrt(sum((x**2).sum() for pair in points for x in pair))
