"""Points and tangent vectors of the manifold as arrays: what they are, and whether something is one.

Shapes may have leading axes, shared by all arguments. Factors are float32 or float64; the latter needs
`jax_enable_x64`. A `TypeError` tells of other dtypes, a `ValueError` of shapes that do not fit.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from balora_jax.balance import balancing_gap
from balora_jax.bures.matrix_functions import balanced, core_singular_values, truncated
from balora_jax.linalg import matmul


class Point(NamedTuple):
    """A balanced pair: `lora_a (..., a, r)`, `lora_b (..., r, b)`."""

    lora_a: jax.Array
    lora_b: jax.Array


class Tangent(NamedTuple):
    """A direction of the factors of a point, horizontal if it is a tangent vector: `(..., a, r)`, `(..., r, b)`."""

    lora_a: jax.Array
    lora_b: jax.Array


class LowRank(NamedTuple):
    """The matrix `left @ right`: `(..., a, k)`, `(..., k, b)`."""

    left: jax.Array
    right: jax.Array


Ambient = jax.Array | LowRank | Callable[[jax.Array], jax.Array]
"""An a x b matrix Z: as an array, as a `LowRank`, or as the function `x (..., b, k) -> Z x`, linear in x."""


def random_point(
    key: jax.Array, shape: tuple[int, ...], rank: int, *, dtype: jax.typing.DTypeLike | None = None
) -> Point:
    """The balanced pair of the product of two matrices of standard normal entries.

    Args:
        key: a key of `jax.random`.
        shape: `(..., a, b)` of the matrix.
        rank: r, at most `min(a, b)`.
        dtype: of the factors; JAX's default floating dtype if None.

    Raises:
        ValueError: the shape or the rank is out of range.
    """
    *leading, rows, columns = checked_shape(shape, rank)
    key_a, key_b = jax.random.split(key)
    dtype = dtype or jnp.zeros(()).dtype
    a = jax.random.normal(key_a, (*leading, rows, rank), dtype)
    b = jax.random.normal(key_b, (*leading, rank, columns), dtype)
    return Point(*balanced(a, b))


def from_matrix(matrix: jax.Array, rank: int) -> Point:
    """The hyper-balanced pair of the best approximation of rank r in the Frobenius norm.

    Derivatives are horizontal: right for all that a rotation of the pair does not change, of first order, and finite
    where singular values are equal; the r-th must be above the next.

    Args:
        matrix: `(..., a, b)`.
        rank: r, at most `min(a, b)`.

    Raises:
        ValueError: the rank is out of range.
    """
    matrix = jnp.asarray(matrix)
    rows, columns = checked_shape(matrix.shape, rank)[-2:]
    identity = jnp.broadcast_to(
        jnp.eye(min(rows, columns), dtype=matrix.dtype), (*matrix.shape[:-2],) + 2 * (min(rows, columns),)
    )
    left, right = (matrix, identity) if columns <= rows else (identity, matrix)
    return Point(*truncated(left, right, jnp.zeros(rank)))


def to_matrix(point: Point, tangent: Tangent | None = None) -> jax.Array:
    """The a x b matrix of a point, `A B`, or of a tangent vector there, `dA B + A dB`; `(..., a, b)`."""
    a, b = point
    if tangent is None:
        return matmul(a, b)
    return matmul(tangent[0], b) + matmul(a, tangent[1])


def singular_values(point: Point) -> jax.Array:
    """The singular values of the matrix, descending, `(..., r)`; of equal ones only the sum has a derivative."""
    return core_singular_values(*checked_point(point))


def check_point(point: Point, *, tolerance: float | None = None) -> None:
    """Raises a `ValueError` that says why something is not a point; for values, not inside jit.

    Args:
        point: what is checked.
        tolerance: the largest relative balancing gap, and the least `sigma_r / sigma_1`; 100 times the rounding of
            the dtype if None.
    """
    a, b = (np.asarray(x, float) for x in checked_point(point))
    tolerance = 100 * float(jnp.finfo(point[0].dtype).eps) if tolerance is None else tolerance
    for name, factor in (("lora_a", a), ("lora_b", b)):
        if not np.isfinite(factor).all():
            raise ValueError(
                f"{name} must be finite, got {factor.size - np.isfinite(factor).sum()} entries that are not"
            )
    gap = float(np.max(balancing_gap(*point)))
    if not gap <= tolerance:
        raise ValueError(
            f"the pair must be balanced to {tolerance:.1e}, got a relative gap of {gap:.1e}; see `balance`"
        )
    for name, factor in (("lora_a", a), ("lora_b", b)):
        values = np.linalg.svd(factor, compute_uv=False)
        ratio = float(np.min(values[..., -1] ** 2 / np.maximum(values[..., 0] ** 2, np.finfo(float).tiny)))
        if not ratio > tolerance:
            raise ValueError(
                f"{name} must have full rank {factor.shape[-1 if name == 'lora_a' else -2]}, "
                f"got sigma_r / sigma_1 = {ratio:.1e} for the matrix"
            )


def check_tangent(point: Point, tangent: Tangent, *, tolerance: float | None = None) -> None:
    """Raises a `ValueError` that says why a direction is not a tangent vector; for values, not inside jit.

    Args:
        point: X.
        tangent: what is checked.
        tolerance: the largest `||A^T dA - dB B^T||` relative to `||(A, B)|| ||(dA, dB)||`; 100 times the rounding of
            the dtype if None.
    """
    check_direction(point, tangent)
    tolerance = 100 * float(jnp.finfo(point[0].dtype).eps) if tolerance is None else tolerance
    for name, factor in zip(Tangent._fields, tangent, strict=True):
        if not np.isfinite(np.asarray(factor)).all():
            raise ValueError(f"{name} of the tangent vector must be finite")
    (a, b), (step_a, step_b) = (tuple(np.asarray(x, float) for x in pair) for pair in (point, tangent))
    slope = np.linalg.norm(a.mT @ step_a - step_b @ b.mT, axis=(-2, -1))
    sizes = [np.sqrt((x**2).sum((-2, -1)) + (y**2).sum((-2, -1))) for x, y in ((a, b), (step_a, step_b))]
    part = float(np.max(slope / np.maximum(sizes[0] * sizes[1], np.finfo(float).tiny)))
    if not part <= tolerance:
        raise ValueError(
            f"the direction must be horizontal, A^T dA = dB B^T, to {tolerance:.1e}, got {part:.1e}; see `projection`"
        )


def checked_shape(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """The shape, after it and the rank were checked."""
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"shape must be (..., a, b) of positive numbers, got {tuple(shape)}")
    if not 1 <= rank <= min(shape[-2:]):
        raise ValueError(f"rank must be from 1 to min(a, b) = {min(shape[-2:])}, got {rank}")
    return shape


def checked_point(point: Point) -> tuple[jax.Array, jax.Array]:
    """The factors, after their dtypes and shapes were checked."""
    a, b = (jnp.asarray(x) for x in point)
    for name, factor in (("lora_a", a), ("lora_b", b)):
        if factor.dtype not in (jnp.float32, jnp.float64):
            raise TypeError(f"{name} of a point must be float32 or float64, got {factor.dtype}")
    if a.ndim < 2 or b.ndim < 2 or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise ValueError(
            f"a point must be lora_a (..., a, r) and lora_b (..., r, b), got shapes {a.shape} and {b.shape}"
        )
    if a.shape[-1] > min(a.shape[-2], b.shape[-1]):
        raise ValueError(f"r must be at most min(a, b), got shapes {a.shape} and {b.shape}")
    return a, b


def balanced_point(point: Point, name: str = "the point") -> tuple[jax.Array, jax.Array]:
    """The factors, after their shapes were checked, and if they are not traced their balance.

    Args:
        point: what is checked.
        name: what the message calls it.

    Raises:
        TypeError: the dtype is none of the manifold's.
        ValueError: the shapes do not form a pair, or its relative balancing gap is above the square root of rounding.
    """
    a, b = checked_point(point)
    if not any(isinstance(x, jax.core.Tracer) for x in (a, b)):
        (x, y), tolerance = (np.asarray(factor, float) for factor in (a, b)), float(jnp.finfo(a.dtype).eps) ** 0.5
        p, q = x.mT @ x, y @ y.mT
        size = np.linalg.norm(p, axis=(-2, -1)) + np.linalg.norm(q, axis=(-2, -1))
        gap = np.max(np.linalg.norm(p - q, axis=(-2, -1)) / np.where(size == 0, 1, size), initial=0)
        if gap > tolerance:
            raise ValueError(
                f"{name} must be a balanced pair, A^T A = B B^T, got a relative gap of {gap:.1e}; "
                f"balora_jax.balance makes it one of the same product"
            )
    return a, b


def check_direction(point: Point, tangent, name: str = "the tangent vector") -> None:
    """Raises a `ValueError` if the shapes of a pair of arrays are not those of the point."""
    shapes, expected = tuple(x.shape for x in tangent), tuple(x.shape for x in checked_point(point))
    if shapes != expected:
        raise ValueError(f"{name} must have the shapes of the point, {expected[0]} and {expected[1]}, got {shapes}")
