"""Means of points: weighted Fréchet means, and the points of a geodesic between two.

The mean of two adapters on the manifold has their rank, as the mean of their products has not, and does not depend on
their gauges, as the mean of their factors does.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from balora_jax.bures.geodesics import exp
from balora_jax.bures.logarithm import course_of, log, off
from balora_jax.bures.manifold import norm, projection
from balora_jax.bures.matrix_functions import solve_linear
from balora_jax.bures.points import Point, Tangent, balanced_point, check_direction

MOST_ITERATIONS = 60


def interpolation(point: Point, other: Point, weight: jax.typing.ArrayLike) -> Point:
    """The point of the geodesic from one point to another that is a share of the way along.

    Args:
        point: X, at weight 0.
        other: Y, at weight 1, in any gauge.
        weight: `(...)` or `()`.

    Returns:
        The balanced pair in the gauge of X. NaN where `log` finds no geodesic.

    Raises:
        ValueError: the shapes do not fit, or a pair is not balanced.

    Examples:
        >>> from balora_jax import bures
        >>> first, second = (bures.random_point(jax.random.key(k), (6, 5), 2) for k in (0, 1))
        >>> middle = bures.interpolation(first, second, 0.5)
        >>> ends = [bures.geodesic_distance(middle, end) for end in (first, second)]
        >>> bool(jnp.isclose(*ends, rtol=1e-4))
        True
    """
    weight = jnp.asarray(weight, point[0].dtype)[..., None, None]
    return exp(point, Tangent(*(weight * x for x in log(point, other))))


def frechet_mean(points: Sequence[Point], weights: jax.typing.ArrayLike | None = None) -> Point:
    """The point with the least weighted sum of squared geodesic distances from some points.

    Args:
        points: of the same shapes, in any gauges.
        weights: `(n,)`, of the points, positive; equal if None. Only their ratios count.

    Returns:
        The balanced pair, in a gauge near that of the first point. NaN where `log` finds no geodesic: the points must
        be so near each other that the mean is unique.

    Raises:
        ValueError: there is no point, the weights are not one for each, or a pair is not balanced.

    Notes:
        Karcher's iteration: along the mean of the logarithms, until it is a rounding. Derivatives, forward and reverse,
        are horizontal: right for all that a rotation of the pair does not change.
    """
    points = [Point(*point) for point in points]
    if not points:
        raise ValueError("points must hold at least one point, got none")
    dtype = points[0][0].dtype
    weights = jnp.ones(len(points), dtype) if weights is None else jnp.asarray(weights, dtype)
    if weights.shape != (len(points),):
        raise ValueError(f"weights must be ({len(points)},), one for each point, got shape {weights.shape}")
    weights = weights / weights.sum()
    leading = points[0][0].shape[:-2]
    for point in points:
        check_direction(points[0], point, "every point")
        balanced_point(point, "every point")
    stacked = tuple(
        jnp.stack(side, -3).reshape(-1, len(points), *side[0].shape[-2:]) for side in zip(*points, strict=True)
    )
    if not leading:
        return Point(*_mean(tuple(x[0] for x in stacked), weights))
    means = jax.vmap(_mean, (0, None))(stacked, weights)
    return Point(*(x.reshape(*leading, *x.shape[1:]) for x in means))


@jax.custom_jvp
def _mean(points, weights):
    """The mean of stacked points `(n, a, r)`, `(n, r, b)`."""
    first = Point(*(x[0] for x in points))
    rounding = 4 * jnp.finfo(first[0].dtype).eps * jnp.sqrt(sum((x**2).sum() for x in first))

    def unfinished(carry):
        count, _, moved = carry
        return (count < MOST_ITERATIONS) & (moved > rounding)

    def improve(carry):
        count, mean, _ = carry
        step = Tangent(*(jnp.tensordot(weights, x, 1) for x in _logarithms(mean, points)))
        return count + 1, exp(mean, step), norm(mean, step)

    start = jnp.zeros((), int), first, jnp.asarray(jnp.inf, first[0].dtype)
    return tuple(lax.while_loop(unfinished, improve, start)[1])


@_mean.defjvp
def _(primals, tangents):
    """From the equations for the mean and the logarithms there, whose weighted sum is 0."""
    (points, weights), (steps, weight_steps) = primals, tangents
    mean = _mean(points, weights)
    logs = _logarithms(mean, points)
    courses = jax.vmap(course_of, (None, 0))(mean, logs)

    def ends(mean, points, logs):
        return jax.vmap(off, (0, None, 0, 0))(courses, mean, points, logs)

    def summed(weights, logs):
        return projection(Point(*mean), Tangent(*(jnp.tensordot(weights, x, 1) for x in logs)))

    def linear(unknown):
        """In terms of the step of the mean and those of the logarithms' far ends, which is nearly the identity."""
        mean_step, far = unknown
        log_steps = Tangent(*(x - y for x, y in zip(far, mean_step, strict=True)))
        _, moved = jax.jvp(lambda mean, logs: ends(mean, points, logs), (mean, logs), (mean_step, log_steps))
        vertical = [x - y for x, y in zip(mean_step, projection(Point(*mean), Tangent(*mean_step)), strict=True)]
        return tuple(x - y for x, y in zip(vertical, summed(weights, log_steps), strict=True)), moved

    _, moved = jax.jvp(lambda points: ends(mean, points, logs), (points,), (steps,))
    right = tuple(summed(weight_steps, logs)), tuple(-x for x in moved)
    return mean, solve_linear(linear, right, tolerance=10 * float(jnp.finfo(mean[0].dtype).eps))[0]


def _logarithms(mean, points):
    """The logarithms of stacked points at one."""
    return log(Point(*(jnp.broadcast_to(x, y.shape) for x, y in zip(mean, points, strict=True))), Point(*points))
