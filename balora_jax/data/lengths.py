"""Batches of examples of about the same length, in few different shapes, as every shape is compiled."""

from collections.abc import Sequence

import numpy as np

_SHORTEST = 64
"""Below this length padding costs little."""

_SHAPES = 4
"""The longest length, its half, and so on."""

_FEWEST = 4
"""Batches for which a shorter shape pays for its compilation."""


def batches_by_length(lengths: Sequence[int] | np.ndarray, *, batch_size: int) -> list[tuple[np.ndarray, int]]:
    """Sorts examples by their length into batches.

    Args:
        lengths: `(n,)` of the examples.
        batch_size: rows of a batch; n if that is smaller.

    Returns:
        For each batch its rows `(batch_size,)`, the shortest first, and the length of the batch, which is one of at
        most four: that of the longest example, or about a half, a quarter or an eighth of it. Together the batches hold
        every example; the last is filled up with some of its own once more.
    """
    lengths = np.asarray(lengths)
    order = np.argsort(lengths, kind="stable")
    size = min(batch_size, len(order))
    batches = [np.resize(order[start : start + size], size) for start in range(0, len(order), size)]
    longest = [lengths[rows].max() for rows in batches]
    found: list[int] = []
    for shape in _shapes(int(lengths.max())):
        fitting = sum(length <= shape for length in longest[len(found) :])
        if fitting >= _FEWEST or shape == lengths.max():
            found += [shape] * fitting
    return list(zip(batches, found, strict=True))


def _shapes(longest: int) -> list[int]:
    """Lengths of batches, the shortest first; shorter ones than the longest in multiples of 8, which devices like."""
    halves = (-(-longest // 2**k // 8) * 8 for k in range(1, _SHAPES))
    return sorted({longest, *(half for half in halves if _SHORTEST <= half < longest)})
