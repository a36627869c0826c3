"""Finding the LoRA pairs of any parameter tree, reading them in one layout, and writing them back.

Transformations find them once for an update: a `TreePairs` reads and writes them in all trees of one structure.

Which names are known says `balora_jax.naming`, how shapes are read `balora_jax.layouts`.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from balora_jax.layouts import BatchAxes, readings, the_reading
from balora_jax.naming import NAMES, Convention, pair_up
from balora_jax.trees import KeyPath, flatten, is_masked, leaves_by_path, path_text


@dataclass(frozen=True)
class Pair:
    """Where the two factors of one adapter (or of a stack of them) stand in a tree, and how to read them.

    Attributes:
        path_a: key path of `lora_a`, a tuple such as `("layers", 0, "lora_a")`. Where there is only one leaf of this
            text, it may also be written with `/`: `"layers/0/lora_a"`. `find_pairs` returns tuples.
        path_b: key path of `lora_b`.
        transposed: whether the leaves hold `A^T (r, a)` and `B^T (b, r)`, as PEFT's do; None to go by names and shapes.
        batch_axes: which axes, the same in both leaves, stack independent pairs: the number of leading ones, or a tuple
            of axes, `(1,)` for layers that `nn.scan` stacked along axis 1; None to go by names and shapes.
        rank_axes: the axes of the rank in the two leaves, counted from their ends, as `find_pairs` found them.
    """

    path_a: str | KeyPath
    path_b: str | KeyPath
    transposed: bool | None = None
    batch_axes: BatchAxes | None = None
    rank_axes: tuple[int, int] | None = field(default=None, compare=False, repr=False)

    def canonical_a(self, leaf: jax.Array) -> jax.Array:
        """Returns the leaf of A as `(n, a, r)`."""
        batch, long, rank = self._axes(leaf, 0)
        leaf = leaf.transpose((*batch, *long, rank))
        return leaf.reshape(prod(leaf.shape[: len(batch)]), -1, leaf.shape[-1])

    def canonical_b(self, leaf: jax.Array) -> jax.Array:
        """Returns the leaf of B as `(n, r, b)`."""
        batch, long, rank = self._axes(leaf, 1)
        leaf = leaf.transpose((*batch, rank, *long))
        return leaf.reshape(prod(leaf.shape[: len(batch)]), leaf.shape[len(batch)], -1)

    def restored_a(self, factor: jax.Array, leaf: jax.Array) -> jax.Array:
        """Returns `lora_a (n, a, r)` in the layout of its leaf."""
        batch, long, rank = self._axes(leaf, 0)
        return _in_layout(factor, (*batch, *long, rank), leaf.shape)

    def restored_b(self, factor: jax.Array, leaf: jax.Array) -> jax.Array:
        """Returns `lora_b (n, r, b)` in the layout of its leaf."""
        batch, long, rank = self._axes(leaf, 1)
        return _in_layout(factor, (*batch, rank, *long), leaf.shape)

    def count(self, leaf_a: jax.Array) -> int:
        """Returns the number of pairs that two leaves stack, n, given that of A."""
        return prod(leaf_a.shape[i] for i in self._axes(leaf_a, 0)[0])

    def _axes(self, leaf, side: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """The axes of a leaf that stack pairs, those of its long side, and that of the rank."""
        if self.rank_axes is None or self.batch_axes is None:
            raise ValueError(f"{self} is not from find_pairs, which says how it is to be read")
        batch = tuple(range(self.batch_axes)) if isinstance(self.batch_axes, int) else self.batch_axes
        rank = leaf.ndim + self.rank_axes[side]
        return batch, tuple(i for i in range(leaf.ndim) if i not in (*batch, rank)), rank


ArrayPair = tuple[jax.Array, jax.Array]
PairSpec = Pair | tuple[str | KeyPath, str | KeyPath]
Pairs = Sequence[PairSpec] | Callable[[Any], Iterable[PairSpec]]


def find_pairs(
    params: Any,
    pairs: Pairs | None = None,
    *,
    transposed: bool | None = None,
    batch_axes: BatchAxes | None = None,
) -> tuple[Pair, ...]:
    """Finds the LoRA pairs of a parameter tree.

    Args:
        params: any pytree: nested or flat dicts, `nnx.State`, Linen variables, lists, equinox modules. Leaves are
            arrays, shapes (`jax.ShapeDtypeStruct`) or variables of Keras. Leaves that are no factors are passed over.
        pairs: names the pairs instead of searching for them: a sequence of `Pair` or `(path_a, path_b)`, or a callable
            that returns one when it is given `params`. Paths are tuples of keys, or their text joined by `/`.
        transposed: the layout of all pairs that do not say their own, as in `Pair`.
        batch_axes: the stacking axes, as in `Pair`, of all pairs whose shapes leave a choice.

    Returns:
        The pairs, in the order of their `lora_a` in the tree, with everything that was inferred.

    Raises:
        ValueError: a factor has no partner; the shapes of two partners do not fit, or can be read in several ways that
            give different products; a named path does not exist; there is no pair at all. The message names the path
            and says what to do.
        TypeError: a factor is not a floating-point array.

    Examples:
        >>> [p.path_a for p in find_pairs({"mlp": {"lora_a": jnp.ones((8, 2)), "lora_b": jnp.ones((2, 4))}})]
        [('mlp', 'lora_a')]
    """
    return _found(params, leaves_by_path(params), pairs, transposed, batch_axes)


def _found(
    params: Any,
    leaves: Mapping[Any, Any],
    pairs: Pairs | None,
    transposed: bool | None = None,
    batch_axes: BatchAxes | None = None,
) -> tuple[Pair, ...]:
    """As `find_pairs`, given the leaves by their paths too."""
    found: list[tuple[Pair, Convention]]
    if pairs is None:
        found = [(Pair(a, b), convention) for a, b, convention in pair_up(params, leaves)]
        if not found:
            raise _nothing_found(leaves)
    else:
        specs = [
            spec if isinstance(spec, Pair) else Pair(*spec) for spec in (pairs(params) if callable(pairs) else pairs)
        ]
        if not specs:
            raise ValueError("pairs must name at least one pair, got none")
        found = [(pair, Convention()) for pair in _located(specs, leaves)]
    return tuple(_resolved(pair, convention, leaves, transposed, batch_axes) for pair, convention in found)


def read_pairs(tree: Any, pairs: Sequence[Pair]) -> list[tuple[jax.Array, jax.Array]]:
    """Returns the factors of each pair as `lora_a (n, a, r)`, `lora_b (n, r, b)`.

    Args:
        tree: a tree of the structure in which the pairs were found (parameters, updates, moments).
        pairs: from `find_pairs`.
    """
    return TreePairs(pairs).read(tree)


def write_pairs(tree: Any, pairs: Sequence[Pair], factors: Sequence[tuple[jax.Array, ...]]) -> Any:
    """Returns the tree with new factors, given as `read_pairs` returns them; the other leaves stay as they are.

    Args:
        tree: a tree of the structure in which the pairs were found.
        pairs: from `find_pairs`.
        factors: one `(lora_a, lora_b, ...)` per pair, as `read_pairs` or `balance_pairs` returns them; what follows the
            two is not written.
    """
    return TreePairs(pairs).write(tree, factors)


class TreePairs:
    """The pairs of a tree, read and written in all trees of its structure: parameters, updates, moments.

    Where their leaves are is looked up once for each structure.

    Attributes:
        pairs: in the order in which their factors are read.
    """

    def __init__(self, pairs: Sequence[Pair]):
        self.pairs = tuple(pairs)
        self._positions: list[tuple[jax.tree_util.PyTreeDef, list[tuple[int | None, int | None]]]] = []

    @classmethod
    def of(cls, params: Any, pairs: Pairs | None = None) -> "TreePairs":
        """Finds the pairs of a tree; see `find_pairs`."""
        paths, leaves, structure = flatten(params)
        found = cls(_found(params, dict(zip(paths, leaves, strict=True)), pairs))
        found._look_up(paths, structure)
        return found

    def leaves(self, tree: Any) -> list[tuple[Any, Any]]:
        """Returns the two leaves of each pair, None in the place of one that is masked or not there."""
        leaves, structure = jax.tree.flatten(tree, is_leaf=is_masked)
        found = [tuple(None if i is None else leaves[i] for i in places) for places in self._places(tree, structure)]
        return [(None if is_masked(a) else a, None if is_masked(b) else b) for a, b in found]

    def with_leaves(self, tree: Any, new: Sequence[tuple[Any, Any]]) -> Any:
        """Returns the tree with new leaves for each pair; None keeps one as it is."""
        leaves, structure = jax.tree.flatten(tree, is_leaf=is_masked)
        for places, pair in zip(self._places(tree, structure), new, strict=True):
            for i, leaf in zip(places, pair, strict=True):
                if i is not None and leaf is not None:
                    leaves[i] = leaf
        return jax.tree.unflatten(structure, leaves)

    def read(self, tree: Any) -> list[ArrayPair]:
        """Returns the factors of each pair as `lora_a (n, a, r)`, `lora_b (n, r, b)`."""
        leaves = zip(self.pairs, self.leaves(tree), strict=True)
        return [(pair.canonical_a(_array(a)), pair.canonical_b(_array(b))) for pair, (a, b) in leaves]

    def write(self, tree: Any, factors: Sequence[tuple[jax.Array, ...]]) -> Any:
        """Returns the tree with new factors, as `read` returns them; what follows the two is not written."""
        leaves = zip(self.pairs, self.leaves(tree), factors, strict=True)
        new = [(pair.restored_a(a, old_a), pair.restored_b(b, old_b)) for pair, (old_a, old_b), (a, b, *_) in leaves]
        return self.with_leaves(tree, new)

    def counts(self, tree: Any) -> list[int]:
        """Returns how many pairs each of them stacks."""
        return [pair.count(leaf_a) for pair, (leaf_a, _) in zip(self.pairs, self.leaves(tree), strict=True)]

    def only(self, kept: Sequence[bool]) -> "TreePairs":
        """Returns some of the pairs."""
        return TreePairs([pair for pair, keep in zip(self.pairs, kept, strict=True) if keep])

    def _places(self, tree, structure) -> list[tuple[int | None, int | None]]:
        """The positions of each pair's leaves among those of a tree."""
        for known, places in self._positions:
            if known == structure:
                return places
        return self._look_up(flatten(tree)[0], structure)

    def _look_up(self, paths, structure) -> list[tuple[int | None, int | None]]:
        positions = {path: i for i, path in enumerate(paths)}
        places = [(positions.get(pair.path_a), positions.get(pair.path_b)) for pair in self.pairs]
        self._positions.append((structure, places))
        return places


@dataclass(frozen=True)
class PairSearch:
    """The option `pairs=` of a transformation, and how it finds the pairs of its parameters.

    Attributes:
        pairs: as for `find_pairs`.
    """

    pairs: Pairs | None = None

    def __post_init__(self):
        if self.pairs is not None and not callable(self.pairs):
            object.__setattr__(self, "pairs", tuple(self.pairs))

    def __call__(self, params: Any) -> TreePairs:
        """Finds the pairs, once for an update."""
        return TreePairs.of(params, self.pairs)

    def at_init(self, params: Any) -> TreePairs:
        """Finds the pairs, none in the empty placeholder with which optax initializes too."""
        return self(params) if jax.tree.leaves(params) else TreePairs(())


def _in_layout(factor, axes: tuple[int, ...], shape: tuple[int, ...]):
    """A factor whose axes, once it has the sizes of its leaf's, are these ones of the leaf."""
    return factor.reshape([shape[i] for i in axes]).transpose([axes.index(i) for i in range(len(axes))])


def _array(leaf):
    """A leaf as an array, where it is a variable of Keras."""
    return leaf if hasattr(leaf, "transpose") else jnp.asarray(leaf)


def _nothing_found(leaves: Mapping[Any, Any]) -> ValueError:
    shown = ", ".join(map(path_text, list(leaves)[:5])) or "none"
    alike = _alike(leaves)
    hint = "other names can be given with pairs="
    if alike:
        hint = f"some leaves look like factors; if they are, give pairs=[{', '.join(map(str, alike))}]"
    return ValueError(
        f"params must hold at least one LoRA pair ({NAMES}), found none among {len(leaves)} leaves "
        f"({shown}{', ...' if len(leaves) > 5 else ''}); {hint}"
    )


def _alike(leaves: Mapping[Any, Any]) -> list[tuple[str, str]]:
    """Leaves that stand near each other and could be the factors of a matrix of at least twice their rank."""
    rest = [path for path, leaf in leaves.items() if len(getattr(leaf, "shape", ())) >= 2]
    found: list[tuple[str, str]] = []
    while rest:
        first, *rest = rest
        for second in rest[:3]:
            fitting = _thin(first, second, leaves)
            if fitting and first[:-1] == second[:-1]:
                found.append((path_text(fitting[0][0]), path_text(fitting[0][1])))
                rest.remove(second)
                break
    return found


def _thin(first: KeyPath, second: KeyPath, leaves: Mapping[Any, Any]) -> list[tuple[KeyPath, KeyPath]]:
    """The orders in which two leaves fit as the factors of a matrix of at least twice their rank."""
    return [
        (a, b)
        for a, b in ((first, second), (second, first))
        for way in readings(tuple(leaves[a].shape), tuple(leaves[b].shape), transposed=False)
        if 2 * way.rank <= min(way.sides)
    ]


def _located(pairs: Sequence[Pair], leaves: Mapping[Any, Any]) -> list[Pair]:
    """Pairs that the user names, with their paths as the tree has them."""
    found = [replace(p, path_a=_location(p.path_a, leaves), path_b=_location(p.path_b, leaves)) for p in pairs]
    used: set = set()
    for path in (path for pair in found for path in (pair.path_a, pair.path_b)):
        if path in used:
            raise ValueError(f"pairs names the path {path_text(path)!r} twice; a factor belongs to one pair")
        used.add(path)
    return found


def _location(path: str | KeyPath, leaves: Mapping[Any, Any]) -> KeyPath:
    matches = [known for known in leaves if path in (known, path_text(known))]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ValueError(f"pairs names the path {path!r}, which is all of {matches}; name it by its tuple of keys")
    near = difflib.get_close_matches(path_text(path), map(path_text, leaves), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"pairs names the path {path_text(path)!r}, which is not in params{hint}")


def _resolved(
    pair: Pair,
    convention: Convention,
    leaves: Mapping[Any, Any],
    transposed: bool | None,
    batch_axes: BatchAxes | None,
) -> Pair:
    """The pair with the axes of its leaves, after their shapes and dtypes were checked."""
    texts, found = [path_text(path) for path in (pair.path_a, pair.path_b)], [leaves[pair.path_a], leaves[pair.path_b]]
    for text, leaf in zip(texts, found, strict=True):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"{text} must be a floating-point array, got {dtype or type(leaf).__name__}")
    try:
        reading = the_reading(
            tuple(found[0].shape),
            tuple(found[1].shape),
            convention,
            transposed=transposed if pair.transposed is None else pair.transposed,
            batch_axes=pair.batch_axes,
            preferred=batch_axes,
        )
    except ValueError as error:
        example = f"Pair({texts[0]!r}, {texts[1]!r}, transposed=..., batch_axes=...)"
        raise ValueError(
            f"{texts[0]} and {texts[1]} {error}. To say how they are to be read give pairs=[{example}, ...], or for "
            f"all pairs at once pairs=lambda params: find_pairs(params, transposed=..., batch_axes=...)"
        ) from None
    rank_a, rank_b = (axis - len(leaf.shape) for axis, leaf in zip(reading.rank_axes, found, strict=True))
    return replace(pair, transposed=reading.transposed, batch_axes=reading.batch_axes, rank_axes=(rank_a, rank_b))
