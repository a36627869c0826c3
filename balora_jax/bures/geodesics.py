"""Geodesics of the manifold: the exponential map, parallel transport, and the sectional curvature.

With `L = [A; B^T]`, `J = diag(I, -I)` and `G = L^T L` the balanced pairs are `L^T J L = 0`, a submanifold of Euclidean
space, and the manifold is its quotient by rotations of the columns of L. So its geodesics lift to those of the pairs
that start horizontally, and stay so: `L'' = J L S` with the symmetric S of `S G + G S = -2 L'^T J L'`. A geodesic stays
in the span of the columns of A, dA and of the rows of B, dB: only numbers of size r x r are integrated.

The space is not complete. To drop the last singular value is a path of length `sqrt(2 sigma_r)`, and a geodesic that
arrives there ends: what would lie beyond is NaN. Curvature has both signs.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from balora_jax.bures.integration import Flow, adaptive, repeated
from balora_jax.bures.matrix_functions import lyapunov, orthogonal_triangular, sylvester_of_roots
from balora_jax.bures.points import Point, Tangent, balanced_point, check_direction
from balora_jax.linalg import matmul


def exp(point: Point, tangent: Tangent) -> Point:
    """The exponential map: where the geodesic that starts with a tangent vector is at the time 1.

    Args:
        point: X.
        tangent: xi; its length is that of the geodesic.

    Returns:
        The balanced pair at the end of the horizontal lift. NaN where the geodesic meets the matrices of lower rank
        before.

    Raises:
        ValueError: the shapes do not fit, or the pair is not balanced.

    Notes:
        O((a + b) r^2), and some hundred r x r eigenvalue problems, in float64 whatever the dtype is. Accurate to some
        roundings of the length, or to `eps sigma_1 / sigma_r` in float64. Derivatives of every order, forward and
        reverse.

    Examples:
        >>> from balora_jax import bures
        >>> point = bures.random_point(jax.random.key(0), (6, 5), 2)
        >>> tangent = bures.random_tangent_vector(jax.random.key(1), point)
        >>> bool(bures.distance(point, bures.exp(point, tangent)) < 1)
        True
    """
    balanced_point(point)
    check_direction(point, tangent)
    return Point(*over_leading(flown)(point, tangent)[:2])


def parallel_transport(point: Point, direction: Tangent, tangent: Tangent) -> Tangent:
    """Carries a tangent vector along the geodesic of another, without a change of lengths and angles.

    Along it the lift obeys `xi' = J L T + L W` with the symmetric T of `G T + T G = -(L'^T J xi + xi^T J L')` and the
    skew W of `G W + W G = -(L'^T xi - xi^T L')`.

    Args:
        point: X.
        direction: the tangent vector of the geodesic.
        tangent: what is carried.

    Returns:
        A tangent vector at `exp(point, direction)`, NaN where that is.

    Raises:
        ValueError: the shapes do not fit, or the pair is not balanced.
    """
    balanced_point(point)
    check_direction(point, direction, "the direction")
    check_direction(point, tangent)
    return Tangent(*over_leading(flown)(point, direction, tangent)[2:])


def sectional_curvature(point: Point, first: Tangent, second: Tangent) -> jax.Array:
    """The sectional curvature of the plane of two tangent vectors, `(...)`.

    `(tr(S_uu G S_vv) - tr(S_uv G S_uv) + 3/4 tr(W^T G W)) / |u ^ v|^2`, where
    `S_xy G + G S_xy = -(x^T J y + y^T J x)` and `G W + W G = 2 (u^T v - v^T u)`: the equations of Gauss for the pairs,
    and of O'Neill for their quotient.

    Args:
        point: X.
        first: u.
        second: v, not a multiple of u.

    Raises:
        ValueError: the shapes do not fit, or the pair is not balanced.
    """
    a, b = balanced_point(point)
    check_direction(point, first, "the first tangent vector")
    check_direction(point, second, "the second tangent vector")
    root = orthogonal_triangular(jnp.concatenate([a, b.mT], -2))[1]  # G = R^T R; G itself would lose small values

    def products(x, y):
        return matmul(x[0].mT, y[0]), matmul(x[1], y[1].mT)

    def solved(c):
        """`R` times the solution of `G X + X G = C`."""
        return matmul(root, sylvester_of_roots(root.mT, root.mT, c))

    def bend(x, y):
        left, right = products(x, y)
        return solved(-_twice_symmetric(left - right))

    left, right = products(first, second)
    both = left + right
    turn = solved(2 * (both - both.mT))
    along, across, mixed = bend(first, first), bend(second, second), bend(first, second)
    numerator = _trace(along, across) - _trace(mixed, mixed) + 0.75 * _trace(turn, turn)
    inner = both.trace(axis1=-2, axis2=-1)
    squares = [sum(x.trace(axis1=-2, axis2=-1) for x in products(y, y)) for y in (first, second)]
    return numerator / (squares[0] * squares[1] - inner**2)


def _trace(x, y):
    """`tr(x^T y)`."""
    return (x * y).sum((-2, -1))


def _twice_symmetric(x):
    return x + x.mT


def over_leading(function: Callable) -> Callable:
    """The function of pairs without leading axes over those of all its arguments."""

    def mapped(*pairs):
        leading = pairs[0][0].shape[:-2]
        flat = [tuple(x.reshape(-1, *x.shape[-2:]) for x in pair) for pair in pairs]
        if not leading:
            return function(*(tuple(x[0] for x in pair) for pair in flat))
        out = jax.vmap(function)(*flat)
        return tuple(x.reshape(*leading, *x.shape[1:]) for x in out)

    return mapped


def flown(point: Point, direction: Tangent, *carried: Tangent) -> tuple[jax.Array, ...]:
    """The factors at the end of a geodesic, and those of what is carried along, by coefficients in a basis."""
    return _flown((tuple(point), tuple(direction), *map(tuple, carried)))


@jax.custom_jvp
def _flown(pairs):
    """In float64: in float32 Gram matrices small singular values would be lost."""
    with jax.enable_x64(True):
        bases, parameters, state = _start(pairs, jnp.float64)
        return _factors(bases, adaptive(_GEODESIC, parameters, state)[0], pairs[0][0].dtype)


@_flown.defjvp
def _(primals, tangents):
    (pairs,) = primals
    sizes = step_sizes(*pairs)
    return _flown(pairs), jax.jvp(lambda *pairs: retraced(sizes, *pairs), pairs, tangents[0])[1]


def step_sizes(*pairs: tuple[jax.Array, ...], tolerance: float = 0.0) -> jax.Array:
    """The sizes of the steps in which a geodesic is followed, in the dtype of its pairs; without derivatives."""
    with jax.enable_x64(True):
        _, parameters, state = _start(lax.stop_gradient(pairs), jnp.float64)
        return adaptive(_GEODESIC, parameters, state, tolerance)[1].astype(pairs[0][0].dtype)


def retraced(sizes: jax.Array, *pairs: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """What `flown` gives, by given steps, in the dtype of the pairs, and with derivatives."""
    dtype = pairs[0][0].dtype
    with jax.enable_x64(True):
        bases, parameters, state = _start(pairs, dtype)
        return _factors(bases, repeated(_GEODESIC, parameters, state, sizes), dtype)


def followed(place: jax.Array, *vectors: jax.Array, tolerance: float | jax.Array = 0.0) -> tuple[jax.Array, ...]:
    """The end of a geodesic, its velocity there and what was carried along, all `(2, n, r)`: the A and the B^T.

    Args:
        place: the start.
        vectors: its velocity, and what is carried.
        tolerance: of a step, relative to the vectors' lengths.
    """
    return adaptive(_GEODESIC, (None, _scales([(x**2).sum() for x in vectors])), (place, *vectors), tolerance)[0]


def _start(pairs, dtype):
    """The columns of all A and of all B^T, the parameters of the flow, and what takes them to each pair."""
    bases = [jnp.concatenate(side, -1).astype(dtype) for side in zip(*((a, b.mT) for a, b in pairs), strict=True)]
    size, rank = bases[0].shape[-1], pairs[0][0].shape[-1]
    units = jnp.eye(size, dtype=dtype).reshape(len(pairs), -1, size).mT  # (pairs, size, r)
    state = tuple(jnp.broadcast_to(unit, (2, *unit.shape)) for unit in units)
    grams = jnp.stack([matmul(x.mT, x) for x in bases])
    squares = jnp.diagonal(grams.sum(0)).reshape(-1, rank).sum(1)
    return bases, (grams, _scales(squares[1:])), state


def _scales(squares):
    """What errors of L, L' and carried vectors are relative to, from the squared lengths of the last two."""
    return jnp.stack([squares[0], *squares])


def _factors(bases, state, dtype):
    """The pairs of L and of the carried vectors."""
    ends = [state[0], *state[2:]]
    return tuple(x.astype(dtype) for end in ends for x in (matmul(bases[0], end[0]), matmul(bases[1], end[1]).mT))


def _slope(parameters, state):
    """Of L, L' and carried vectors, each as coefficients `(2, basis, r)` of the columns of A and of B^T."""
    (grams, _), (place, speed, *carried) = parameters, state
    sign = jnp.array([1, -1], place.dtype)[:, None, None]

    def products(x, y):
        return matmul(x.mT, _times(grams, y))

    gram, along, bend = products(place, place).sum(0), products(place, speed).sum(0), products(speed, speed)
    right = [-2 * (bend[0] - bend[1]), _twice_symmetric(along)]
    for vector in carried:
        left, other = products(speed, vector)
        both = left + other
        right += [-_twice_symmetric(left - other), both.mT - both]
    bend, growth, *others = lyapunov(gram, jnp.stack(right))
    slopes = [speed, sign * matmul(place, bend)]
    slopes += [sign * matmul(place, t) + matmul(place, w) for t, w in zip(others[::2], others[1::2], strict=True)]
    return tuple(slopes), jnp.sqrt((growth**2).sum())


def _size(parameters, error):
    """The norm of errors of L and L', relative to the length of L', and of carried vectors, relative to theirs."""
    grams, scales = parameters
    parts = jnp.stack([(x * _times(grams, x)).sum() for x in error])
    return jnp.sqrt(jnp.maximum(jnp.where(scales > 0, parts / jnp.where(scales > 0, scales, 1), 0).sum(), 0))


def _times(grams, x):
    """The Gram matrices of the bases times coefficients; the bases are orthonormal if there are none."""
    return x if grams is None else matmul(grams, x)


_GEODESIC = Flow(_slope, _size)
