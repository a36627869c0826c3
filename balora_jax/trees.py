"""Parameter trees as leaves by their key paths.

A key path is the tuple of the keys, indices and attribute names that lead to a leaf, `("layers", 0, "lora_a")` say. Its
text, `layers/0/lora_a`, is for messages and for users to write; two paths may have the same text.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import optax

KeyPath = tuple[Hashable, ...]


def leaves_by_path(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[Any, Any]:
    """Returns the leaves of a tree by their paths, optax's masked nodes among them.

    Args:
        tree: any pytree. What a flax Variable adds to a path is left out.
        is_leaf: what else to take for a leaf.
    """
    paths, leaves, _ = flatten(tree, is_leaf)
    return dict(zip(paths, leaves, strict=True))


def flatten(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[Any], list[Any], jax.tree_util.PyTreeDef]:
    """Returns the paths of a tree, its leaves, optax's masked nodes among them, and its structure.

    Args:
        tree: as for `leaves_by_path`.
        is_leaf: likewise.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: is_masked(node) or (is_leaf is not None and is_leaf(node))
    )
    return [_keys(path) for path, _ in flat], [leaf for _, leaf in flat], structure


def with_leaves(tree: Any, new: Mapping[Any, Any]) -> Any:
    """Returns the tree with other leaves at some paths.

    Args:
        tree: any pytree.
        new: the leaves to put there, by their paths.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: new.get(_keys(path), leaf), tree, is_leaf=is_masked)


def only_leaves(tree: Any, new: Mapping[Any, Any]) -> Any:
    """Returns a tree of the same structure that has these leaves at their paths, and masked nodes everywhere else.

    Args:
        tree: any pytree.
        new: the leaves, by their paths.
    """
    return with_leaves(jax.tree.map(lambda _: optax.MaskedNode(), tree), new)


def is_masked(node: Any) -> bool:
    """Whether a node stands where optax masked a leaf out."""
    return isinstance(node, optax.MaskedNode)


def path_text(path: KeyPath | str) -> str:
    """Returns the keys of a path joined by `/`; a key that is a tuple, as in flax's flat dicts, is joined too."""
    return (
        path
        if isinstance(path, str)
        else "/".join(path_text(key) if isinstance(key, tuple) else str(key) for key in path)
    )


def _keys(path) -> KeyPath:
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name in ("value", "raw_value"):
        path = path[:-1]  # of a flax Variable
    return tuple(_key(entry) for entry in path)


def _key(entry) -> Hashable:
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    return entry
