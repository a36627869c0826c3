"""The manifold of a x b matrices of rank r under the Bures metric, in balanced factors.

A point X is a balanced pair `(A, B)`, `X = A B`, `A^T A = B B^T`, so that `A A^T = (X X^T)^1/2` and
`B^T B = (X^T X)^1/2`; pairs `(A O, O^T B)` with O orthogonal are the same point. A tangent vector xi is its horizontal
lift `(dA, dB)`, `xi = dA B + A dB` with `A^T dA = dB B^T`, and the metric is the Euclidean product of lifts. A matrix W
gives the lift `(W B^T, A^T W)`, of `xi = H_X[W] = A A^T W + W B^T B`. Nothing of size a x b is formed unless the caller
brings it. Source: arXiv 2605.31484 (the Riemannian view of the balanced iteration).

Functions that need a balanced pair raise a `ValueError` where it is not one, to the square root of rounding. Traced
values, as inside `jax.jit`, are taken on trust: `check_point` tells before. Shapes may have leading axes, shared by all
arguments, see `balora_jax.bures.points`.
"""

import jax
import jax.numpy as jnp

from balora_jax.bures.matrix_functions import (
    balanced,
    divide,
    orthogonal_triangular,
    polar,
    sylvester,
    sylvester_of_roots,
    truncated,
)
from balora_jax.bures.points import (
    Ambient,
    LowRank,
    Point,
    Tangent,
    balanced_point,
    check_direction,
    checked_point,
)
from balora_jax.linalg import matmul


def inner_product(point: Point, first: Tangent, second: Tangent) -> jax.Array:
    """The metric `<xi, eta>_X`, the Euclidean product of the horizontal lifts; `(...)`."""
    balanced_point(point)
    check_direction(point, first)
    check_direction(point, second)
    (a, b), (c, d) = first, second
    return (a * c).sum((-2, -1)) + (b * d).sum((-2, -1))


def norm(point: Point, tangent: Tangent) -> jax.Array:
    """The length of a tangent vector, `(...)`; its derivative at 0 is 0."""
    return root(inner_product(point, tangent, tangent))


def projection(point: Point, direction: Tangent | Ambient) -> Tangent:
    """The tangent vector of a direction.

    Args:
        point: X.
        direction: either a direction of the factors, a `Tangent`, of which what does not change the product to first
            order, `(A M, -M B)`, is taken out: the orthogonal projection onto the horizontal space. Or a direction of
            the matrix, an `Ambient`, which is projected orthogonally onto the tangent space, and lifted.

    Returns:
        The tangent vector. Of a pair that is not balanced it is the same, with horizontal for orthogonal to its orbit.

    Raises:
        TypeError: the direction is neither.
        ValueError: the shapes do not fit the point.
    """
    a, b = checked_point(point)
    if isinstance(direction, Tangent):
        check_direction(point, direction)
    else:
        direction = _lifted(point, direction)
    gram_a, gram_b = matmul(a.mT, a), matmul(b, b.mT)
    for _ in range(2):  # the second for what an ill-conditioned equation left
        step_a, step_b = direction
        vertical = sylvester(gram_a, gram_b, matmul(a.mT, step_a) - matmul(step_b, b.mT))
        direction = Tangent(step_a - matmul(a, vertical), step_b + matmul(vertical, b))
    return direction


def _lifted(point: Point, direction: Ambient) -> Tangent:
    """The horizontal lift of the orthogonal projection of a direction of the matrix onto the tangent space.

    With `A = Q_A R_A` and `B^T = Q_B R_B` it is `(Q_A W R_B + F R_B^-T, R_A^T W Q_B^T + R_A^-1 E)`, where F and E are
    the parts of `Z Q_B` and `Q_A^T Z` outside of the spans of A and B, and `R_A R_A^T W + W R_B R_B^T = Q_A^T Z Q_B`.
    What is divided by are singular values of factors, never of Gram matrices, whose small ones are lost sooner.
    """
    (left, root_a), (right, root_b) = (orthogonal_triangular(x) for x in (point[0], point[1].mT))
    forth, back = _times((left, right.mT), direction)
    core = matmul(left.mT, forth)
    inside = sylvester_of_roots(root_a, root_b, core)
    outside_a, outside_b = forth - matmul(left, core), back - matmul(core, right.mT)
    return Tangent(
        matmul(left, matmul(inside, root_b)) + divide(root_b, outside_a.mT).mT,
        matmul(matmul(root_a.mT, inside), right.mT) + divide(root_a, outside_b),
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
    return Tangent(*_times(balanced_point(point), gradient))


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
    check_direction(point, tangent)
    moved_a, moved_b = riemannian_gradient(point, hessian_product)
    bent_a, bent_b = _times(tangent, gradient)
    return projection(point, Tangent(moved_a + bent_a, moved_b + bent_b))


def retraction(point: Point, tangent: Tangent, *, kind: str = "balanced") -> Point:
    """A point near `X + xi`, equal to it to first order, and to the geodesic to second order if `"balanced"`.

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
        Derivatives are of every order for `"balanced"`, of first order for `"truncated"`. The product moves by
        `t xi + t^2 dA dB` in both `"balanced"` and, up to `t^3`, `exp`: the error falls by 8 when t halves. Truncation
        is of second order for the Euclidean metric of matrices, and of first order for this one.
    """
    balanced_point(point)
    check_direction(point, tangent)
    (a, b), (step_a, step_b) = point, tangent
    if kind == "balanced":
        return Point(*balanced(a + step_a, b + step_b))
    if kind != "truncated":
        raise ValueError(f"kind must be 'balanced' or 'truncated', got {kind!r}")
    left, right = jnp.concatenate([a, step_a], -1), jnp.concatenate([b + step_b, b], -2)
    new = Point(*truncated(left, right, jnp.zeros(a.shape[-1])))
    return turned(new, rotation(new, point))


def transport(point: Point, other: Point, tangent: Tangent) -> Tangent:
    """Carries a tangent vector from one point to another: its lift, turned to the other pair, made horizontal there.

    Cheap, and a contraction; `parallel_transport` keeps lengths and angles.

    Args:
        point: X.
        other: Y.
        tangent: a tangent vector at X.

    Raises:
        ValueError: the shapes do not fit.
    """
    balanced_point(point)
    check_direction(point, tangent)
    check_direction(point, other, "other")
    balanced_point(other, "other")
    return projection(other, turned(Tangent(*tangent), rotation(point, other)))


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
    balanced_point(point)
    check_direction(point, other, "other")
    balanced_point(other, "other")
    near = turned(Point(*point), rotation(point, other))
    return root(sum(((x - y) ** 2).sum((-2, -1)) for x, y in zip(near, other, strict=True)))


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


def rotation(pair, other):
    """The rotation that turns a pair towards another."""
    return polar(matmul(pair[0].mT, other[0]) + matmul(pair[1], other[1].mT))


def turned(pair, rotation):
    """The pair `(A O, O^T B)`, or the tangent vector in the gauge of that pair."""
    return type(pair)(matmul(pair[0], rotation), matmul(rotation.mT, pair[1]))


def root(square):
    """The square root, with derivative 0 at 0."""
    zero = square == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))
