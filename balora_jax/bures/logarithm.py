"""The logarithm of the manifold, the inverse of the exponential map, and the distance along geodesics.

It is found by shooting: from the difference of the turned pairs on, what the end of a geodesic is off is carried back
along it and added to its start, with Anderson's acceleration. The iteration is in the span of the columns and rows of
the two points, in which a shortest geodesic stays.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from balora_jax.bures.geodesics import followed, over_leading, retraced, step_sizes
from balora_jax.bures.manifold import inner_product, norm, projection, rotation, turned
from balora_jax.bures.matrix_functions import lyapunov, polar, solve_linear
from balora_jax.bures.points import Point, Tangent, balanced_point, check_direction
from balora_jax.linalg import eigh, matmul, qr

MOST_ITERATIONS = 100
_MEMORY = 24
_PATIENCE = 4  # iterations that gain nothing, near the end
_ROUGH = 1e-4  # the accuracy of steps where it does not count
_SHARE = 1e-3  # of the last error, the accuracy of steps where it does
_LEAST = 1e-13  # what is as good as it can be


def log(point: Point, other: Point) -> Tangent:
    """The logarithm: the tangent vector at a point whose geodesic is at another one at the time 1.

    Args:
        point: X.
        other: Y, of the same shapes, in any gauge.

    Returns:
        The tangent vector, of a shortest geodesic if the points are near. NaN where shooting does not end there: points
        far from each other may be joined by none, as square matrices of full rank whose determinants differ in sign.

    Raises:
        ValueError: the shapes do not fit, or a pair is not balanced.

    Notes:
        Some 5 to 50 iterations of two geodesics each, in float64 whatever the dtype is. Derivatives, forward and
        reverse, by the implicit function theorem: along directions that keep the pairs balanced.

    Examples:
        >>> from balora_jax import bures
        >>> point = bures.random_point(jax.random.key(0), (6, 5), 2)
        >>> tangent = bures.random_tangent_vector(jax.random.key(1), point)
        >>> found = bures.log(point, bures.exp(point, tangent))
        >>> bool(jnp.allclose(found.lora_a, tangent.lora_a, atol=1e-4))
        True
    """
    balanced_point(point)
    check_direction(point, other, "other")
    balanced_point(other, "other")
    return Tangent(*over_leading(_log)(point, other))


def geodesic_distance(point: Point, other: Point) -> jax.Array:
    """The distance along the geodesic that `log` finds, `(...)`; at least `distance`, which agrees to second order.

    Its derivatives, forward and reverse, are those of the first variation of length: its gradient at X is `-log / d`.
    It has none at distance 0.

    Args:
        point: X.
        other: Y, of the same shapes.

    Raises:
        ValueError: the shapes do not fit, or a pair is not balanced.
    """
    balanced_point(point)
    check_direction(point, other, "other")
    balanced_point(other, "other")
    return _length(Point(*point), Point(*other))


@jax.custom_jvp
def _length(point, other):
    return norm(point, log(point, other))


@_length.defjvp
def _(primals, tangents):
    (point, other), steps = primals, tangents
    there, back = log(point, other), log(other, point)
    length = norm(point, there)
    slope = -inner_product(point, there, Tangent(*steps[0])) - inner_product(other, back, Tangent(*steps[1]))
    return length, slope / length


@jax.custom_jvp
def _log(point, other):
    """The logarithm without leading axes, within the span of both points, in float64."""
    rank, dtype = point[0].shape[-1], point[0].dtype
    with jax.enable_x64(True):
        bases, sides = [], []
        for x, y in ((point[0], other[0]), (point[1].mT, other[1].mT)):
            basis, both = qr(jnp.concatenate([x, y], -1).astype(jnp.float64))
            bases.append(basis)
            sides.append(jnp.pad(both, ((0, 2 * rank - both.shape[0]), (0, 0))))
        near, far = jnp.split(jnp.stack(sides), 2, -1)
        found = _shot(_balanced(near), _balanced(far))
        a, b = (matmul(basis, x[: basis.shape[1]]).astype(dtype) for basis, x in zip(bases, found, strict=True))
    return a, b.mT


@_log.defjvp
def _(primals, tangents):
    """From `F(X, Y, v) = 0` for what the geodesic is off, and for the part of v that is not horizontal."""
    (point, other), steps = primals, tangents
    found = _log(point, other)
    course = course_of(point, found)
    _, moved = jax.jvp(lambda point, other: off(course, point, other, found), (point, other), tuple(map(tuple, steps)))

    def linear(tangent):
        return jax.jvp(lambda tangent: off(course, point, other, tangent), (found,), (tangent,))[1]

    right = tuple(-x for x in moved)
    return found, solve_linear(linear, right, tolerance=10 * float(jnp.finfo(found[0].dtype).eps))


class Course(NamedTuple):
    """A geodesic that has been followed: the sizes of its steps, its end, the way back, and the steps of that."""

    sizes: jax.Array
    end: tuple[jax.Array, ...]
    back: tuple[jax.Array, ...]
    sizes_back: jax.Array


def course_of(point: Point, tangent: Tangent) -> Course:
    """The course of the geodesic of a tangent vector, without leading axes and without derivatives."""
    fixed = lax.stop_gradient((tuple(point), tuple(tangent)))
    sizes = step_sizes(*fixed)
    a, b, *speed = retraced(sizes, *fixed, fixed[1])
    end, back = (a, b), tuple(-x for x in speed)
    return Course(sizes, end, back, step_sizes(end, back, tolerance=_ROUGH))


def off(course: Course, point: Point, other: Point, tangent: Tangent) -> tuple[jax.Array, jax.Array]:
    """What is 0 if a tangent vector is the logarithm, and has derivatives, near a course.

    Returns:
        The part of the tangent vector that is not horizontal, less what the end of its geodesic is off, carried back.
    """
    there = Point(*retraced(course.sizes, tuple(point), tuple(tangent))[:2])
    near = turned(Point(*other), rotation(other, there))
    rest = projection(Point(*course.end), Tangent(*(x - y for x, y in zip(near, there, strict=True))))
    carried = retraced(course.sizes_back, course.end, course.back, tuple(rest))[2:]
    horizontal = projection(Point(*point), Tangent(*tangent))
    a, b = (t - h - x for t, h, x in zip(tangent, horizontal, carried, strict=True))
    return a, b


def _balanced(place):
    """A nearly balanced pair `(2, n, r)` made balanced to rounding, by Newton's iteration."""
    for _ in range(3):
        p, q = matmul(place.mT, place)
        change = lyapunov(p + q, q - p)
        second = matmul(change, change) / 2
        place = place + jnp.stack([matmul(place[0], second + change), matmul(place[1], second - change)])
    return place


def _shot(place, other):
    """The logarithm `(2, n, r)` by shooting; NaN where it does not converge."""
    shape, rounding = place.shape, jnp.finfo(place.dtype).eps
    scale = jnp.sqrt((place**2).sum() + (other**2).sum())

    def turned_to(x, y):
        return matmul(x, polar(matmul(x.mT, y).sum(0)))

    def horizontal(place, vector):
        tangent = projection(Point(place[0], place[1].mT), Tangent(vector[0], vector[1].mT))
        return jnp.stack([tangent[0], tangent[1].mT])

    def correction(vector, tolerance):
        """What the end of a geodesic is off, carried back to its start, and its relative size."""
        end, speed = followed(place, vector.reshape(shape), tolerance=tolerance)
        rest = turned_to(other, end) - end
        back = followed(end, -speed, horizontal(end, rest), tolerance=_ROUGH)[2]
        error = jnp.sqrt((rest**2).sum()) / scale
        back = horizontal(place, back)  # what is rough about it must not leave the tangent space
        return back.ravel(), jnp.maximum(error, jnp.where(tolerance > _LEAST, tolerance, 0))

    def unfinished(carry):
        count, *_, best, _, stalled, _, _ = carry
        return (count < MOST_ITERATIONS) & (best > 4 * rounding) & ((stalled < _PATIENCE) | (best > jnp.sqrt(rounding)))

    def improve(carry):
        """Anderson: the combination of the last steps that would have left the least correction."""
        count, size, vector, step, error, best, chosen, stalled, vectors, steps = carry
        lengths = jnp.sqrt((steps**2).sum(1))
        unit = steps / jnp.where(lengths > 0, lengths, 1)[:, None]
        values, turn = eigh(matmul(unit, unit.T))
        kept = values > 1e-12 * values[-1]
        weights = matmul(turn, jnp.where(kept, matmul(turn.T, matmul(unit, step)) / jnp.where(kept, values, 1), 0))
        combined = step - matmul(weights / jnp.where(lengths > 0, lengths, 1), vectors + steps)
        new = vector + jnp.where(size < 1, size * step, combined)
        new_step, new_error = correction(new, jnp.minimum(_SHARE * error, _ROUGH))
        fine = new_error < 4 * best
        place = jnp.where(fine & (count > 0), count % _MEMORY, _MEMORY)  # beyond the end: dropped
        return (
            count + 1,
            jnp.where(fine, 1, size / 4),
            jnp.where(fine, new, vector),
            jnp.where(fine, new_step, step),
            jnp.where(fine, new_error, error),
            jnp.fmin(new_error, best),
            jnp.where(new_error < best, new, chosen),
            jnp.where(new_error < best / 2, 0, stalled + 1),
            vectors.at[place].set(new - vector, mode="drop"),
            steps.at[place].set(new_step - step, mode="drop"),
        )

    start = horizontal(place, turned_to(other, place) - place).ravel()
    blank, zero, far = jnp.zeros((_MEMORY, start.size)), jnp.zeros((), int), jnp.asarray(jnp.inf, place.dtype)
    carry = zero, jnp.ones(()), start, 0 * start, far, far, start, zero, blank, blank
    *_, best, chosen, _, _, _ = lax.while_loop(unfinished, improve, carry)
    return jnp.where(best < 10 * rounding**0.75, chosen, jnp.nan).reshape(shape)
