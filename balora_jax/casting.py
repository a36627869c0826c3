"""Casts of weights, and what they would make infinite."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

WRITABLE = ("float32", "bfloat16", "float16")
"""The dtypes in which weights are written."""


def first_lost(before: Any, after: Any) -> tuple[int, ...] | None:
    """Returns the index of the first entry that is finite before and not after; None if there is none.

    Args:
        before: an array of floating-point numbers, of NumPy or JAX.
        after: one of the same shape.
    """
    arrays = jnp if isinstance(before, jax.Array) else np
    lost = arrays.isfinite(before) & ~arrays.isfinite(after)
    return tuple(map(int, np.argwhere(lost)[0])) if lost.any() else None


def too_large(number: Any, dtype: Any) -> str:
    """Says that a dtype cannot hold a number, and which can."""
    number = float(number)
    wider = [name for name in WRITABLE if abs(number) <= largest(name)]
    remedy = f"; choose the dtype {' or '.join(wider)}" if wider else ""
    return f"holds {number:g}, beyond the largest number of {jnp.dtype(dtype)}, {largest(dtype):g}{remedy}"


def check_cast(name: str, before: Any, after: Any) -> None:
    """Raises if an entry was finite before a cast and is not after it.

    Args:
        name: what the arrays are, for the message.
        before: an array of floating-point numbers, of NumPy or JAX.
        after: the same array in another dtype.

    Raises:
        ValueError: the dtype cannot hold an entry.
    """
    if largest(after.dtype) >= largest(before.dtype):
        return
    index = first_lost(before, after)
    if index is not None:
        raise ValueError(f"{name} {too_large(before[index], after.dtype)}")


def largest(dtype: Any) -> float:
    """Returns the largest number of a floating-point dtype."""
    return float(jnp.finfo(dtype).max)
