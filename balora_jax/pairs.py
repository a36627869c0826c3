"""Finding the LoRA pairs of any parameter tree, reading them in one layout, and writing them back.

A pair is found by the names of its two factors, which differ in one token of the path:

| convention | names | shapes |
|---|---|---|
| this package, `flax.nnx.LoRA` | `lora_a`, `lora_b` | `(..., in, r)`, `(..., r, out)` |
| qwix | `<weight>_lora_a`, `<weight>_lora_b` | `(..., contracted axes, r)`, `(..., r, remaining axes)` |
| PEFT | `lora_A`, `lora_B` (`.weight`), `lora_embedding_A`, `lora_embedding_B` | `(..., r, in)`, `(..., out, r)` |
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import optax

_FACTOR = re.compile(r"(?:(?<=[./_])|^)lora_(?:[ab]|(?:embedding_)?[AB])(?=[./]|$)")


@dataclass(frozen=True)
class Pair:
    """Where the two factors of one adapter (or of a stack of them) stand in a tree, and how to read them.

    Attributes:
        path_a: path of the left factor, keys joined by `/`.
        path_b: path of the right factor.
        transposed: whether the leaves hold `A^T (r, a)` and `B^T (b, r)`, as PEFT's do.
        batch_axes: number of leading axes that stack independent pairs; None to infer it from the shapes.
    """

    path_a: str
    path_b: str
    transposed: bool = False
    batch_axes: int | None = None

    def canonical_a(self, leaf: jax.Array) -> jax.Array:
        """Returns the left leaf as `(n, a, r)`."""
        leaf = leaf.mT if self.transposed else leaf
        return leaf.reshape(prod(leaf.shape[: self.batch_axes or 0]), -1, leaf.shape[-1])

    def canonical_b(self, leaf: jax.Array) -> jax.Array:
        """Returns the right leaf as `(n, r, b)`."""
        leaf, n = leaf.mT if self.transposed else leaf, self.batch_axes or 0
        return leaf.reshape(prod(leaf.shape[:n]), leaf.shape[n], -1)

    def restored(self, factor: jax.Array, leaf: jax.Array) -> jax.Array:
        """Returns a canonical factor in the layout of its leaf."""
        return (factor.mT if self.transposed else factor).reshape(leaf.shape)


PairSpec = Pair | tuple[str, str]
Pairs = Sequence[PairSpec] | Callable[[Any], Iterable[PairSpec]]


def find_pairs(params: Any, pairs: Pairs | None = None) -> tuple[Pair, ...]:
    """Finds the LoRA pairs of a parameter tree.

    Args:
        params: any pytree: nested dicts, `nnx.State`, Linen variables, a flat dict with dotted keys. Leaves are arrays
            or shapes (`jax.ShapeDtypeStruct`). Leaves that are no factors are passed over.
        pairs: names the pairs instead of searching for them: a sequence of `Pair` or `(path_a, path_b)`, or a callable
            that returns one when it is given `params`. Paths are keys joined by `/`, as in `Pair.path_a`.

    Returns:
        The pairs, in the order of their left factors in the tree, with `batch_axes` resolved. If the shapes can be read
        in two ways (a stack of as many layers as the rank), leading axes are taken for stacked pairs.

    Raises:
        ValueError: a factor has no partner, the shapes of two partners do not fit, a named path does not exist, or
            there is no pair at all. The message names the path.
        TypeError: a factor is not a floating-point array.

    >>> [p.path_a for p in find_pairs({"mlp": {"lora_a": jnp.ones((8, 2)), "lora_b": jnp.ones((2, 4))}})]
    ['mlp/lora_a']
    """
    leaves = leaves_by_path(params)
    if pairs is None:
        found = _search(leaves)
        if not found:
            shown = ", ".join(list(leaves)[:5]) or "none"
            raise ValueError(
                f"params must hold at least one LoRA pair (lora_a/lora_b, <weight>_lora_a/<weight>_lora_b, "
                f"lora_A/lora_B), found none among {len(leaves)} leaves ({shown}{', ...' if len(leaves) > 5 else ''}); "
                f"other names can be given with pairs="
            )
    else:
        named = pairs(params) if callable(pairs) else pairs
        found = [p if isinstance(p, Pair) else Pair(*p) for p in named]
        if not found:
            raise ValueError("pairs must name at least one pair, got none")
        used: set[str] = set()
        for path in (path for pair in found for path in (pair.path_a, pair.path_b)):
            if path not in leaves:
                raise ValueError(f"pairs names the path {path!r}, which is not in params")
            if path in used:
                raise ValueError(f"pairs names the path {path!r} twice; a factor belongs to one pair")
            used.add(path)
    return tuple(_resolved(pair, leaves[pair.path_a], leaves[pair.path_b]) for pair in found)


def read_pairs(tree: Any, pairs: Sequence[Pair]) -> list[tuple[jax.Array, jax.Array]]:
    """Returns the factors of each pair as `lora_a (n, a, r)`, `lora_b (n, r, b)`.

    Args:
        tree: a tree of the structure in which the pairs were found (parameters, updates, moments).
        pairs: from `find_pairs`.
    """
    leaves = leaves_by_path(tree)
    return [(pair.canonical_a(leaves[pair.path_a]), pair.canonical_b(leaves[pair.path_b])) for pair in pairs]


def write_pairs(tree: Any, pairs: Sequence[Pair], factors: Sequence[tuple[jax.Array, jax.Array]]) -> Any:
    """Returns the tree with new factors, given as `read_pairs` returns them; the other leaves stay as they are.

    Args:
        tree: a tree of the structure in which the pairs were found.
        pairs: from `find_pairs`.
        factors: one `(lora_a, lora_b)` per pair.
    """
    leaves, new = leaves_by_path(tree), {}
    for pair, (lora_a, lora_b) in zip(pairs, factors, strict=True):
        new[pair.path_a] = pair.restored(lora_a, leaves[pair.path_a])
        new[pair.path_b] = pair.restored(lora_b, leaves[pair.path_b])
    return with_leaves(tree, new)


def leaves_by_path(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Returns the leaves of a tree by their paths, optax's masked nodes among them.

    Args:
        tree: any pytree.
        is_leaf: what else to take for a leaf.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: _is_masked(node) or (is_leaf is not None and is_leaf(node))
    )
    return {_name(path): leaf for path, leaf in flat}


def with_leaves(tree: Any, new: dict[str, Any]) -> Any:
    """Returns the tree with other leaves at some paths.

    Args:
        tree: any pytree.
        new: the leaves to put there, by their paths.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: new.get(_name(path), leaf), tree, is_leaf=_is_masked)


def _name(path) -> str:
    """A key path as text: keys joined by `/`, without the `value` that a flax Variable adds."""
    parts = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    if parts and isinstance(path[-1], jax.tree_util.GetAttrKey) and parts[-1] in ("value", "raw_value"):
        parts = parts[:-1]
    return "/".join(parts)


def _is_masked(node) -> bool:
    return isinstance(node, optax.MaskedNode)


def _factor(path: str) -> tuple[str, str, str] | None:
    """Splits a factor's path into what comes before its side, the side (`a`, `b`, `A` or `B`), and the rest."""
    matches = list(_FACTOR.finditer(path))
    if not matches or re.search(r"[./]bias$", path):
        return None
    match = matches[-1]
    return path[: match.end() - 1], path[match.end() - 1], path[match.end() :]


def _search(leaves: dict[str, Any]) -> list[Pair]:
    """Pairs the leaves whose paths differ in the factor's side alone."""
    factors: dict[tuple[str, bool, str], dict[str, str]] = {}
    for path, leaf in leaves.items():
        if (parts := _factor(path)) and not _is_masked(leaf):
            before, side, rest = parts
            factors.setdefault((before, side.isupper(), rest), {})[side.lower()] = path
    for (before, transposed, rest), sides in factors.items():
        if len(sides) == 1:
            ((side, path),) = sides.items()
            other = "b" if side == "a" else "a"
            raise _unpaired(path, f"{before}{other.upper() if transposed else other}{rest}", leaves)
    found = {sides["a"]: Pair(sides["a"], sides["b"], transposed) for (_, transposed, _), sides in factors.items()}
    return [found[path] for path in leaves if path in found]


def _unpaired(path: str, partner: str, leaves: dict[str, Any]) -> ValueError:
    if _is_masked(leaves.get(partner)):
        return ValueError(
            f"the factor {path} is separated by a mask from its partner {partner}; both factors of a pair must reach "
            f"this transformation, so put it outside the mask or partition that splits them"
        )
    return ValueError(f"the factor {path} has no partner: params hold no {partner}")


def _resolved(pair: Pair, leaf_a, leaf_b) -> Pair:
    """The pair with its number of stacking axes, after its shapes and dtypes were checked."""
    for path, leaf in ((pair.path_a, leaf_a), (pair.path_b, leaf_b)):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"{path} must be a floating-point array, got {dtype or type(leaf).__name__}")
    shape_a, shape_b = tuple(leaf_a.shape), tuple(leaf_b.shape)
    if pair.transposed:
        candidates = range(max(len(shape_a) - 2, 0), len(shape_a) - 1)
        shape_a, shape_b = _swapped(shape_a), _swapped(shape_b)
    else:
        candidates = range(min(len(shape_a), len(shape_b)) - 1)
    fitting = [
        n for n in candidates if len(shape_b) > n + 1 and shape_a[:n] == shape_b[:n] and shape_a[-1] == shape_b[n]
    ]
    if pair.transposed and len(shape_a) != len(shape_b):
        fitting = []
    if not fitting or (pair.batch_axes is not None and pair.batch_axes not in fitting):
        layout = "(..., r, in) and (..., out, r)" if pair.transposed else "(..., in, r) and (..., r, out)"
        stacked = "" if pair.batch_axes is None else f" with {pair.batch_axes} stacking axes"
        raise ValueError(
            f"{pair.path_a} and {pair.path_b} must have shapes {layout} of one rank{stacked}, "
            f"got {tuple(leaf_a.shape)} and {tuple(leaf_b.shape)}"
        )
    return pair if pair.batch_axes is not None else replace(pair, batch_axes=max(fitting))


def _swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2]) if len(shape) >= 2 else shape
