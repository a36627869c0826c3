"""The names by which the factors of LoRA pairs are known, and what a name says of their shapes.

| convention | names | shapes |
|---|---|---|
| this package, `flax.nnx.LoRA` | `lora_a`, `lora_b` | `(..., in, r)`, `(..., r, out)` |
| qwix | `<weight>_lora_a`, `<weight>_lora_b` | `(..., contracted axes, r)`, `(..., r, remaining axes)` |
| Keras | `lora_kernel_a`, `lora_embeddings_a`, ... | likewise |
| gemma | `lora/a`, `lora/b` | likewise |
| PEFT | `lora_A`, `lora_B` (`.weight`), `lora_embedding_A`, `lora_embedding_B` | `(..., r, in)`, `(..., out, r)` |
| layers of equinox in the place of factors | `lora_a/weight`, `lora_b/weight` | likewise |
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from balora_jax.trees import KeyPath, is_masked, path_text

NAMES = "lora_a/lora_b, <weight>_lora_a, lora_kernel_a, lora/a, lora_A/lora_B"

_FACTOR = re.compile(
    r"(?:(?<=[./_])|^)"
    r"(?P<token>lora_|lora_kernel_|lora_embeddings_|lora_embedding_(?=[AB])|lora[./](?=[ab]))"
    r"(?P<side>[abAB])(?=[./]|$)"
)


class Convention(NamedTuple):
    """What the name of a pair says of the shapes of its leaves.

    Attributes:
        named: whether there is a name at all.
        transposed: whether the leaves hold `(..., r, in)` and `(..., out, r)`.
        matrices: whether each factor is a matrix, so that axes in front of it stack pairs.
    """

    named: bool = False
    transposed: bool = False
    matrices: bool = False


class NamedPair(NamedTuple):
    """The paths of two partners and the convention of their names."""

    path_a: KeyPath
    path_b: KeyPath
    convention: Convention


class _Factor(NamedTuple):
    """A factor's name in three pieces."""

    before: str
    side: str
    after: str
    convention: Convention

    @property
    def partner(self) -> str:
        other = {"a": "b", "b": "a", "A": "B", "B": "A"}[self.side]
        return f"{self.before}{other}{self.after}"


def pair_up(tree: Any, leaves: Mapping[Any, Any]) -> list[NamedPair]:
    """Pairs the leaves whose names differ in the factor's side alone, in the order of their `lora_a`.

    Args:
        tree: the parameters.
        leaves: its leaves by path.

    Raises:
        ValueError: a factor has no partner, or two leaves have one name.
    """
    names = {path: _name(tree, path, leaf) for path, leaf in leaves.items()}
    sides: dict[tuple, dict[str, tuple[KeyPath, _Factor]]] = {}
    for path, name in names.items():
        factor = _factor(name)
        if factor is None or is_masked(leaves[path]):
            continue
        # different paths may have one text; the lengths of their keys tell them apart
        form = tuple((type(key), len(path_text((key,)))) for key in path if not isinstance(key, int))
        pair = sides.setdefault((form, factor.before, factor.side.isupper(), factor.after), {})
        if factor.side.lower() in pair:
            raise ValueError(f"two leaves are called {name}: name the pairs by their paths, with pairs=")
        pair[factor.side.lower()] = path, factor
    for pair in sides.values():
        if len(pair) == 1:
            ((_, factor),) = pair.values()
            raise _unpaired(factor, names, leaves)
    found = {pair["a"][0]: pair for pair in sides.values()}
    return [NamedPair(path, found[path]["b"][0], found[path]["a"][1].convention) for path in leaves if path in found]


def _name(tree: Any, path: KeyPath, leaf: Any) -> str:
    """What a leaf is called: its path as text, or what a variable of Keras or a flat state of flax tells instead."""
    own = getattr(leaf, "path", None)
    if isinstance(own, str):
        return own
    flat = getattr(tree, "paths", None)
    return path_text(flat[path[0]] if flat is not None and len(path) == 1 else path)


def _factor(name: str) -> _Factor | None:
    matches = list(_FACTOR.finditer(name))
    if not matches or re.search(r"[./]bias$", name):
        return None
    match = matches[-1]
    side, after = match["side"], name[match.end() :]
    alone = match.start() == 0 or name[match.start() - 1] in "./"  # not the end of a longer word, as qwix's
    convention = Convention(
        named=True,
        transposed=side.isupper() or after.endswith("weight"),
        matrices=alone and match["token"] in ("lora_", "lora_embedding_"),
    )
    return _Factor(name[: match.end() - 1], side, after, convention)


def _unpaired(factor: _Factor, names: Mapping[Any, str], leaves: Mapping[Any, Any]) -> ValueError:
    name, partner = f"{factor.before}{factor.side}{factor.after}", factor.partner
    if any(is_masked(leaf) and names[path] == partner for path, leaf in leaves.items()):
        return ValueError(
            f"the factor {name} is separated by a mask from its partner {partner}; both factors of a pair must reach "
            f"this transformation, so put it outside the mask or partition that splits them"
        )
    return ValueError(
        f"the factor {name} has no partner: params hold no {partner}. Balancing moves both factors of a pair, and "
        f"both must be trained; a pair of which one is frozen cannot be balanced"
    )
