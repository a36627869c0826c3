"""The manifold of a x b matrices of rank r under the Bures metric, in balanced factors.

A point X is a balanced pair `(A, B)`, `X = A B`, `A^T A = B B^T`, so that `A A^T = (X X^T)^1/2` and
`B^T B = (X^T X)^1/2`; pairs `(A O, O^T B)` with O orthogonal are the same point. A tangent vector xi is its horizontal
lift `(dA, dB)`, `xi = dA B + A dB` with `A^T dA = dB B^T`, and the metric is the Euclidean product of lifts. A matrix W
gives the lift `(W B^T, A^T W)`, of `xi = H_X[W] = A A^T W + W B^T B`. Nothing of size a x b is formed unless the caller
brings it. Source: arXiv 2605.31484 (the Riemannian view of the balanced iteration).

Shapes below may have leading axes, shared by all arguments. Factors are float32 or float64; the latter needs
`jax_enable_x64`. A `TypeError` tells of other dtypes, a `ValueError` of shapes that do not fit.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from balora_jax.balance import balancing_gap
from balora_jax.bures.matrix_functions import balanced, core_singular_values, polar, solve, sylvester, truncated
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


def inner_product(point: Point, first: Tangent, second: Tangent) -> jax.Array:
    """The metric `<xi, eta>_X`, the Euclidean product of the horizontal lifts; `(...)`."""
    _check_direction(point, first)
    _check_direction(point, second)
    (a, b), (c, d) = first, second
    return (a * c).sum((-2, -1)) + (b * d).sum((-2, -1))


def norm(point: Point, tangent: Tangent) -> jax.Array:
    """The length of a tangent vector, `(...)`; its derivative at 0 is 0."""
    return _root(inner_product(point, tangent, tangent))


def projection(point: Point, direction: Tangent | Ambient) -> Tangent:
    """The tangent vector of a direction.

    Args:
        point: X.
        direction: either a direction of the factors, a `Tangent`, of which what does not change the product to first
            order, `(A M, -M B)`, is taken out: the orthogonal projection onto the horizontal space. Or a direction of
            the matrix, an `Ambient`, which is projected orthogonally onto the tangent space, and lifted.

    Raises:
        TypeError: the direction is neither.
        ValueError: the shapes do not fit the point.
    """
    a, b = _checked_point(point)
    gram_a, gram_b = matmul(a.mT, a), matmul(b, b.mT)
    if isinstance(direction, Tangent):
        _check_direction(point, direction)
        passes = 2  # the second for what an ill-conditioned equation left
    else:
        direction = _lifted(point, direction, gram_a, gram_b)
        passes = 1  # for what the inverses of an ill-conditioned point left
    for _ in range(passes):
        step_a, step_b = direction
        vertical = sylvester(gram_a, gram_b, matmul(a.mT, step_a) - matmul(step_b, b.mT))
        direction = Tangent(step_a - matmul(a, vertical), step_b + matmul(vertical, b))
    return direction


def _lifted(point: Point, direction: Ambient, gram_a: jax.Array, gram_b: jax.Array) -> Tangent:
    """The horizontal lift of the orthogonal projection of a direction of the matrix onto the tangent space."""
    a, b = point
    forth, back = _times(point, direction)
    core = matmul(a.mT, forth)
    # A^T xi B^T = P K + K Q for K = A^T dA = dB B^T
    lifted = sylvester(gram_a, gram_b, core)
    right = _divided(gram_b, core)
    return Tangent(
        _divided(gram_b, forth) + matmul(a, solve(gram_a, lifted - right)),
        solve(gram_a, back) + matmul(_divided(gram_b, lifted - solve(gram_a, core)), b),
    )


def riemannian_gradient(point: Point, gradient: Ambient) -> Tangent:
    """The Riemannian gradient, `H_X[G]`: its lift is `(G B^T, A^T G)`, the gradients of the factors themselves.

    Args:
        point: X.
        gradient: G, the Euclidean gradient of the function of matrices at X.

    Raises:
        TypeError: the gradient is not an `Ambient`.
        ValueError: the shapes do not fit the point.
    """
    _checked_point(point)
    return Tangent(*_times(point, gradient))


def riemannian_hessian(point: Point, gradient: Ambient, hessian_product: Ambient, tangent: Tangent) -> Tangent:
    """The Riemannian Hessian applied to a tangent vector.

    The balanced pairs are a submanifold of Euclidean space on which rotations act by isometries, and the manifold is
    its quotient; so the covariant derivative of a field is the horizontal part of the derivative of its lift, here of
    `(G B^T, A^T G)`.

    Args:
        point: X.
        gradient: G, the Euclidean gradient at X.
        hessian_product: the derivative of G along the tangent vector, the Euclidean Hessian times `dA B + A dB`.
        tangent: `(dA, dB)`.

    Raises:
        TypeError: the gradient or the product is not an `Ambient`.
        ValueError: the shapes do not fit the point.
    """
    _check_direction(point, tangent)
    moved_a, moved_b = riemannian_gradient(point, hessian_product)
    bent_a, bent_b = riemannian_gradient(Point(*tangent), gradient)
    return projection(point, Tangent(moved_a + bent_a, moved_b + bent_b))


def retraction(point: Point, tangent: Tangent, *, kind: str = "balanced") -> Point:
    """A point near `X + xi`, equal to it to first order.

    Args:
        point: X.
        tangent: xi.
        kind: `"balanced"`, the pair `(A + dA, B + dB)` balanced: `X + xi + W X^T W`, the retraction of the paper, by
            which a step along the negative gradient is a gradient step of the factors and the balanced projection. Or
            `"truncated"`, the matrix of rank r nearest to `X + xi` in the Frobenius norm.

    Returns:
        The balanced pair in a gauge near that of the point: `(A + dA) T` with T symmetric, or turned to be nearest.

    Raises:
        ValueError: the shapes do not fit the point, or the kind is unknown.

    Notes:
        Derivatives are of every order for `"balanced"`, of first order for `"truncated"`.
    """
    _check_direction(point, tangent)
    (a, b), (step_a, step_b) = point, tangent
    if kind == "balanced":
        return Point(*balanced(a + step_a, b + step_b))
    if kind != "truncated":
        raise ValueError(f"kind must be 'balanced' or 'truncated', got {kind!r}")
    left, right = jnp.concatenate([a, step_a], -1), jnp.concatenate([b + step_b, b], -2)
    new = Point(*truncated(left, right, jnp.zeros(a.shape[-1])))
    return _turned(new, _rotation(new, point))


def transport(point: Point, other: Point, tangent: Tangent) -> Tangent:
    """Carries a tangent vector from one point to another: its lift, turned to the other pair, made horizontal there.

    Args:
        point: X.
        other: Y.
        tangent: a tangent vector at X.

    Raises:
        ValueError: the shapes do not fit.
    """
    _check_direction(point, tangent)
    _check_direction(point, other, "other")
    return projection(other, _turned(Tangent(*tangent), _rotation(point, other)))


def distance(point: Point, other: Point) -> jax.Array:
    """The distance of two balanced pairs modulo rotations, `min_O ||(A1, B1) . O - (A2, B2)||_F`; `(...)`.

    It is the Bures-Wasserstein distance of the lifts `L L^T`, `L = [A; B^T]`, and a lower bound of the geodesic
    distance, to which it is equal to first order. Computed from the difference of the turned pairs, it loses no digits
    for near points. It has no derivative at distance 0.

    Args:
        point: X.
        other: Y, of the same shapes.

    Raises:
        ValueError: the shapes do not fit.
    """
    _check_direction(point, other, "other")
    turned = _turned(Point(*point), _rotation(point, other))
    return _root(sum(((x - y) ** 2).sum((-2, -1)) for x, y in zip(turned, other, strict=True)))


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
    *leading, rows, columns = _checked_shape(shape, rank)
    key_a, key_b = jax.random.split(key)
    dtype = dtype or jnp.zeros(()).dtype
    a = jax.random.normal(key_a, (*leading, rows, rank), dtype)
    b = jax.random.normal(key_b, (*leading, rank, columns), dtype)
    return Point(*balanced(a, b))


def random_tangent_vector(key: jax.Array, point: Point) -> Tangent:
    """A tangent vector of length 1, its direction uniform.

    Args:
        key: a key of `jax.random`.
        point: X.
    """
    keys = jax.random.split(key)
    normal = Tangent(*(jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, point, strict=True)))
    tangent = projection(point, normal)
    length = norm(point, tangent)[..., None, None]
    return Tangent(*(x / length for x in tangent))


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
    rows, columns = _checked_shape(matrix.shape, rank)[-2:]
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
    return core_singular_values(*_checked_point(point))


def check_point(point: Point, *, tolerance: float | None = None) -> None:
    """Raises a `ValueError` that says why something is not a point; for values, not inside jit.

    Args:
        point: what is checked.
        tolerance: the largest relative balancing gap, and the least `sigma_r / sigma_1`; 100 times the rounding of
            the dtype if None.
    """
    a, b = (np.asarray(x, float) for x in _checked_point(point))
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
    _check_direction(point, tangent)
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


def _checked_shape(shape, rank):
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"shape must be (..., a, b) of positive numbers, got {tuple(shape)}")
    if not 1 <= rank <= min(shape[-2:]):
        raise ValueError(f"rank must be from 1 to min(a, b) = {min(shape[-2:])}, got {rank}")
    return shape


def _checked_point(point):
    """The factors, after their shapes were checked."""
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


def _check_direction(point, tangent, name="the tangent vector"):
    shapes, expected = tuple(x.shape for x in tangent), tuple(x.shape for x in _checked_point(point))
    if shapes != expected:
        raise ValueError(f"{name} must have the shapes of the point, {expected[0]} and {expected[1]}, got {shapes}")


def _times(point, matrix):
    """`Z B^T` and `A^T Z`."""
    a, b = point
    rows, columns = a.shape[-2], b.shape[-1]
    if isinstance(matrix, LowRank):
        shape = (*matrix.left.shape[:-1], matrix.right.shape[-1])
        _check_ambient(shape, (*a.shape[:-1], columns))
        left, right = matrix
        if left.shape[-1] != right.shape[-2]:
            raise ValueError(
                f"a LowRank must be (..., a, k) and (..., k, b), got shapes {left.shape} and {right.shape}"
            )
        return matmul(left, matmul(right, b.mT)), matmul(matmul(a.mT, left), right)
    if callable(matrix):
        forth, transposed = matrix(b.mT), jax.linear_transpose(matrix, jax.ShapeDtypeStruct(b.mT.shape, b.dtype))
        _check_ambient(forth.shape, a.shape, "the function's result")
        return forth, transposed(a)[0].mT
    if not hasattr(matrix, "shape"):
        raise TypeError(
            f"a direction must be a Tangent, or a matrix as an array, a LowRank or a function x -> Z x; "
            f"got {type(matrix).__name__}"
        )
    _check_ambient(matrix.shape, (*a.shape[:-2], rows, columns))
    return matmul(matrix, b.mT), matmul(a.mT, matrix)


def _check_ambient(shape, expected, name="the matrix"):
    if tuple(shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {tuple(expected)}, got {tuple(shape)}")


def _divided(gram, matrix):
    """`M Q^-1` for symmetric Q."""
    return solve(gram, matrix.mT).mT


def _rotation(pair, other):
    """The rotation that turns a pair towards another."""
    return polar(matmul(pair[0].mT, other[0]) + matmul(pair[1], other[1].mT))


def _turned(pair, rotation):
    return type(pair)(matmul(pair[0], rotation), matmul(rotation.mT, pair[1]))


def _root(square):
    """The square root, with derivative 0 at 0."""
    zero = square == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))
