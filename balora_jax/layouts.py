"""The ways in which the shapes of two leaves can be read as LoRA pairs, and which of them is meant.

A reading says which axes stack independent pairs and which axis of each leaf is the rank; all other axes of a leaf
belong to its one long side. Shapes often allow several readings, and a pair that is read wrongly is destroyed by
balancing. So what the names say is held against every other reading, and where another one is as good, none is taken.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from balora_jax.naming import Convention

Shape = tuple[int, ...]
BatchAxes = int | tuple[int, ...]


@dataclass(frozen=True)
class Reading:
    """One way to read two leaves as pairs.

    Attributes:
        shape_a: of the leaf of A.
        shape_b: of the leaf of B.
        stacked: the axes, the same in both leaves, that stack pairs.
        rank_axes: the axes of the rank, in the leaf of A and in that of B.
        transposed: whether the rank comes before the long side in the leaf of A, and after it in that of B.
    """

    shape_a: Shape
    shape_b: Shape
    stacked: tuple[int, ...]
    rank_axes: tuple[int, int]
    transposed: bool

    @property
    def count(self) -> int:
        """Number of stacked pairs."""
        return prod(self.shape_a[i] for i in self.stacked)

    @property
    def rank(self) -> int:
        """The rank."""
        return self.shape_a[self.rank_axes[0]]

    @property
    def sides(self) -> tuple[int, int]:
        """The sizes of each product."""
        (a, b), skipped = self.rank_axes, set(self.stacked)
        return (
            prod(n for i, n in enumerate(self.shape_a) if i not in skipped | {a}),
            prod(n for i, n in enumerate(self.shape_b) if i not in skipped | {b}),
        )

    @property
    def plausible(self) -> bool:
        """Whether the rank is no larger than that of any matrix of the product's sizes."""
        return self.rank <= min(self.sides)

    @property
    def meaning(self) -> tuple:
        """The same for readings with the same products: axes of size 1 make no difference."""
        stacked = tuple(i for i in self.stacked if self.shape_a[i] > 1)
        return stacked, self.rank_axes if self.rank > 1 else self.sides

    @property
    def batch_axes(self) -> BatchAxes:
        """The stacking axes as a pair names them: their number if they are the leading ones."""
        return len(self.stacked) if self.stacked == _axes(len(self.stacked)) else self.stacked

    def __str__(self) -> str:
        each = "{} x {} of rank {}".format(*self.sides, self.rank)
        shown = f"{self.count} pairs, {each} each" if self.stacked else f"one pair, {each}"
        return f"{shown} (transposed={self.transposed}, batch_axes={self.batch_axes})"


def readings(shape_a: Shape, shape_b: Shape, *, transposed: bool) -> list[Reading]:
    """Returns the readings of two shapes in one layout that differ in meaning.

    Args:
        shape_a: of the leaf of A: `(..., in, r)`, or `(..., r, in)` if transposed.
        shape_b: of the leaf of B: `(..., r, out)`, or `(..., out, r)`. In the place of `in` and `out` there may be
            several axes, and axes of size 1 beside the rank, as in the factors of a convolution: `(3, 3, in, r)` and
            `(1, 1, r, out)`, or `(r, in, 3, 3)` and `(out, r, 1, 1)`.
        transposed: which layout.
    """
    found: dict[tuple, Reading] = {}
    for stacked in _stackings(shape_a, shape_b):
        reading = read_as(shape_a, shape_b, stacked, transposed=transposed)
        if reading is not None:
            found.setdefault(reading.meaning, reading)
    return list(found.values())


def read_as(shape_a: Shape, shape_b: Shape, batch_axes: BatchAxes, *, transposed: bool) -> Reading | None:
    """Returns the reading of two shapes with given stacking axes, or None if they do not fit; see `readings`."""
    stacked = _axes(batch_axes)
    if any(i >= min(len(shape_a), len(shape_b)) or shape_a[i] != shape_b[i] for i in stacked):
        return None
    rest_a, rest_b = ([i for i in range(len(shape)) if i not in stacked] for shape in (shape_a, shape_b))
    if min(len(rest_a), len(rest_b)) < 2 or (transposed and len(rest_a) != len(rest_b)):
        return None
    axis_a = rest_a[0] if transposed else rest_a[-1]
    if transposed:  # the rank is the second axis, then there are only axes of size 1
        candidates = rest_b[1:2] if all(shape_b[i] == 1 for i in rest_b[2:]) else []
    else:  # the rank comes first, or after axes of size 1 alone
        candidates = [i for i in rest_b[:-1] if all(shape_b[j] == 1 for j in rest_b if j < i)]
    axis_b = next((i for i in candidates if shape_b[i] == shape_a[axis_a]), None)
    return None if axis_b is None else Reading(shape_a, shape_b, stacked, (axis_a, axis_b), transposed)


def the_reading(
    shape_a: Shape,
    shape_b: Shape,
    convention: Convention,
    *,
    transposed: bool | None,
    batch_axes: BatchAxes | None,
    preferred: BatchAxes | None = None,
) -> Reading:
    """Returns the one reading that is meant.

    Args:
        shape_a: of the leaf of A.
        shape_b: of the leaf of B.
        convention: what the names say, if nothing else is said.
        transposed: the layout, or None.
        batch_axes: the stacking axes, or None.
        preferred: the stacking axes to take where there is a choice, or None.

    Raises:
        ValueError: the shapes do not fit, or several readings with different products are as good.
    """
    layout = convention.transposed if transposed is None else transposed
    if batch_axes is None:
        own = _likeliest(readings(shape_a, shape_b, transposed=layout), convention, preferred)
    else:
        one = read_as(shape_a, shape_b, batch_axes, transposed=layout)
        own = [] if one is None else [one]
    if not own:
        raise _unfitting(shape_a, shape_b, layout, batch_axes)
    rivals: list[Reading | str] = []
    if transposed is None and not (convention.named and own[0].plausible):
        others = readings(shape_a, shape_b, transposed=not layout)
        rivals += [other for other in others if other.plausible and other.meaning != own[0].meaning]
    if convention.matrices and batch_axes is None and preferred is None and _may_share_a(shape_a, shape_b):
        rivals += [f"{shape_b[0]} factors B that share one A, which cannot be balanced"]
    if len(own) > 1 or rivals:
        raise ValueError(
            f"can be read in several ways that give different products, got {shape_a} and {shape_b}: "
            f"{'; or '.join(map(str, [*own, *rivals]))}"
        )
    return own[0]


def _axes(batch_axes: BatchAxes) -> tuple[int, ...]:
    return tuple(range(batch_axes)) if isinstance(batch_axes, int) else tuple(batch_axes)


def _stackings(shape_a: Shape, shape_b: Shape) -> Iterator[tuple[int, ...]]:
    """The stacking axes that are tried: leading ones, as many as possible first; then one other axis."""
    shared = min(len(shape_a), len(shape_b))
    yield from (_axes(n) for n in reversed(range(shared)))
    yield from ((axis,) for axis in range(1, shared))


def _likeliest(found: Sequence[Reading], convention: Convention, preferred: BatchAxes | None) -> list[Reading]:
    """Of several readings of one layout, those that remain after each reason to choose; all if none remains."""
    likely = list(found)
    if len(likely) > 1 and preferred is not None:
        likely = [r for r in likely if r.stacked == _axes(preferred)] or likely
    if len(likely) > 1 and convention.matrices:
        matrices = [r for r in likely if len(r.shape_a) == len(r.shape_b) == len(r.stacked) + 2]
        likely = [r for r in matrices if isinstance(r.batch_axes, int)] or likely
    return likely


def _may_share_a(shape_a: Shape, shape_b: Shape) -> bool:
    """Whether a matrix could be the A of each matrix of a stack, and not of what the stack is read as."""
    return len(shape_a) == 2 and len(shape_b) == 3 and shape_b[0] == shape_b[1] == shape_a[1] > 1


def _unfitting(shape_a: Shape, shape_b: Shape, transposed: bool, batch_axes: BatchAxes | None) -> ValueError:
    layouts = {False: "(..., in, r) and (..., r, out)", True: "(..., r, in) and (..., out, r)"}
    stacked = "" if batch_axes is None else f" with batch_axes={batch_axes}"
    fitting = readings(shape_a, shape_b, transposed=not transposed)
    hint = f"; with transposed={not transposed} they would be {fitting[0]}" if fitting else ""
    return ValueError(f"must have shapes {layouts[transposed]} of one rank{stacked}, got {shape_a} and {shape_b}{hint}")
