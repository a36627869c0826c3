"""The logarithm of the manifold, the inverse of the exponential map, and the distance along geodesics.

It is found by shooting: from the difference of the turned pairs on, what the end of a geodesic is off is carried back
along it and added to its start, with Anderson's acceleration. The iteration is in the span of the columns and rows of
the two points, in which a shortest geodesic stays.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.sparse.linalg import gmres

from balora_jax.bures.geodesics import flown, over_leading
from balora_jax.bures.manifold import inner_product, norm, projection, rotation, turned
from balora_jax.bures.points import Point, Tangent, balanced_point, check_direction
from balora_jax.linalg import eigh, matmul, qr

MOST_ITERATIONS = 100
_MEMORY = 8


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
        Some 3 to 40 iterations of two geodesics each. Derivatives by the implicit function theorem, forward
        (`jax.jvp`, `jax.jacfwd`).

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


def _end(point, tangent, other):
    """The end of a geodesic, its velocity there, and what it is off from another point, as a tangent vector there."""
    a, b, *speed = flown(point, tangent, tangent)
    end = Point(a, b)
    near = turned(Point(*other), rotation(other, end))
    return end, Tangent(*speed), Tangent(*(x - y for x, y in zip(near, end, strict=True)))


def _back(end, speed, tangent):
    """Carries a tangent vector from the end of a geodesic back to its start."""
    return Tangent(*flown(end, Tangent(*(-x for x in speed)), projection(end, tangent))[2:])


@jax.custom_jvp
def _log(point, other):
    """The logarithm without leading axes, within the span of both points."""
    (basis_a, both_a), (basis_b, both_b) = (
        qr(jnp.concatenate(pair, -1)) for pair in ((point[0], other[0]), (point[1].mT, other[1].mT))
    )
    rank = point[0].shape[-1]
    near, far = (Point(both_a[:, part], both_b[:, part].mT) for part in (slice(rank), slice(rank, None)))
    found = _shot(near, far)
    return matmul(basis_a, found[0]), matmul(found[1], basis_b.mT)


@_log.defjvp
def _(primals, tangents):
    """From `F(X, Y, v) = 0` for what the geodesic is off, and for the part of v that is not horizontal."""
    (point, other), steps = primals, tangents
    found = _log(point, other)
    a, b, *speed = flown(*lax.stop_gradient((point, found, found)))

    def off(point, other, tangent):
        tangent = Tangent(*tangent)
        _, _, rest = _end(point, tangent, other)
        back = _back(*lax.stop_gradient((Point(a, b), speed)), rest)
        horizontal = projection(Point(*point), tangent)
        return tuple(t - h - x for t, h, x in zip(tangent, horizontal, back, strict=True))

    _, moved = jax.jvp(lambda point, other: off(point, other, found), (point, other), tuple(map(tuple, steps)))
    rounding = jnp.finfo(a.dtype).eps
    _, linear = jax.linearize(lambda tangent: off(point, other, tangent), found)
    step, _ = gmres(
        linear,
        tuple(-x for x in moved),
        tol=10 * rounding,
        restart=30,
        maxiter=10,
    )
    return found, step


def _shot(point, other):
    """The logarithm by shooting; NaN where it does not converge."""
    shapes = [x.shape for x in point]
    dtype = point[0].dtype
    scale = jnp.sqrt(sum((x**2).sum() for pair in (point, other) for x in pair))

    def flat(pair):
        return jnp.concatenate([x.ravel() for x in pair])

    def pair_of(vector):
        left, right = jnp.split(vector, [shapes[0][0] * shapes[0][1]])
        return Tangent(left.reshape(shapes[0]), right.reshape(shapes[1]))

    def correction(vector):
        end, speed, rest = _end(point, pair_of(vector), other)
        return flat(_back(end, speed, rest)), jnp.sqrt(sum((x**2).sum() for x in rest)) / scale

    def unfinished(carry):
        count, _, _, error, best, *_ = carry
        improving = (error < 2 * best) | (best > jnp.sqrt(jnp.finfo(dtype).eps))
        return (count < MOST_ITERATIONS) & (best > jnp.finfo(dtype).eps) & improving

    def improve(carry):
        """Anderson: the combination of the last steps that would have left the least correction."""
        count, vector, step, _, best, chosen, vectors, steps = carry
        gram = matmul(steps, steps.T)
        values, turn = eigh(gram)
        kept = values > 1e-10 * values[-1]
        weights = matmul(turn, jnp.where(kept, matmul(turn.T, matmul(steps, step)) / jnp.where(kept, values, 1), 0))
        new = vector + step - matmul(weights, vectors + steps)
        new_step, error = correction(new)
        fallback, spoiled = vector + step / 4, ~(error < 4 * best)
        new = jnp.where(spoiled, fallback, new)
        new_step, error = lax.cond(spoiled, correction, lambda _: (new_step, error), new)
        place = count % _MEMORY
        vectors, steps = vectors.at[place].set(new - vector), steps.at[place].set(new_step - step)
        chosen = jnp.where(error < best, new, chosen)
        return count + 1, new, new_step, error, jnp.fmin(error, best), chosen, vectors, steps

    start = turned(Point(*other), rotation(other, point))
    vector = flat(projection(point, Tangent(*(x - y for x, y in zip(start, point, strict=True)))))
    step, error = correction(vector)
    memory = jnp.zeros((_MEMORY, vector.size), dtype)
    carry = jnp.zeros((), int), vector, step, error, error, vector, memory, memory
    *_, best, chosen, _, _ = lax.while_loop(unfinished, improve, carry)
    return pair_of(jnp.where(best < 10 * jnp.finfo(dtype).eps ** 0.75, chosen, jnp.nan))
