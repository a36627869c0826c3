"""Means of points: weighted Fréchet means, and the points of a geodesic between two.

The mean of two adapters on the manifold has their rank, as the mean of their products has not, and does not depend on
their gauges, as the mean of their factors does.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from balora_jax.bures.geodesics import exp
from balora_jax.bures.logarithm import log
from balora_jax.bures.manifold import norm
from balora_jax.bures.points import Point, Tangent

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
        Karcher's iteration: along the mean of the logarithms, until it is a rounding.
    """
    points = [Point(*point) for point in points]
    if not points:
        raise ValueError("points must hold at least one point, got none")
    dtype = points[0][0].dtype
    weights = jnp.ones(len(points), dtype) if weights is None else jnp.asarray(weights, dtype)
    if weights.shape != (len(points),):
        raise ValueError(f"weights must be ({len(points)},), one for each point, got shape {weights.shape}")
    weights = weights / weights.sum()
    # one call of the logarithm, compiled once
    stacked = Point(*(jnp.stack(side) for side in zip(*points, strict=True)))
    rounding = 4 * jnp.finfo(dtype).eps * jnp.sqrt(sum((x**2).sum() for x in points[0]))

    def unfinished(carry):
        count, _, moved = carry
        return (count < MOST_ITERATIONS) & (moved > rounding)

    def improve(carry):
        count, mean, _ = carry
        logs = log(Point(*(jnp.broadcast_to(x, y.shape) for x, y in zip(mean, stacked, strict=True))), stacked)
        step = Tangent(*(jnp.tensordot(weights, x, 1) for x in logs))
        return count + 1, exp(mean, step), jnp.max(norm(mean, step))

    start = jnp.zeros((), int), points[0], jnp.asarray(jnp.inf, dtype)
    return lax.while_loop(unfinished, improve, start)[1]
