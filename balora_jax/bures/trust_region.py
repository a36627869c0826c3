"""The Riemannian trust-region method, with the exact Hessian, on products of manifolds."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from balora_jax.bures.points import Tangent
from balora_jax.bures.products import chosen, combined, dot, flattened, lengths, projected, retracted, times
from balora_jax.bures.solvers import Objective, Solution, check_steps

LEAST_RATIO = 0.1  # of actual and expected decrease, for a step to be taken
_LINEAR, _QUADRATIC = 0.1, 2.0  # when the inner iteration ends: the largest share, and the power of the last progress


def trust_regions(
    objective: Objective,
    start: Any,
    *,
    steps: int = 200,
    tolerance: float = 1e-6,
    radius: float | jax.Array | None = None,
    hessian: Callable[[Any, Any], Any] | None = None,
) -> Solution:
    """Minimizes second-order models in balls that grow and shrink with the models' success.

    The models are minimized by truncated conjugate gradients (Steihaug and Toint). Products with the Riemannian Hessian
    are the horizontal parts of products with the Hessian of the factors.

    Args:
        objective: `tree of points -> ()`, twice differentiable, of the products of the pairs.
        start: a `Point`, or a tree of points, each perhaps with leading axes.
        steps: at most so many iterations.
        tolerance: ends when the norm of the Riemannian gradient is at most this.
        radius: of the first ball; a quarter of the norm of all factors if None. No ball is larger than eight times it.
        hessian: another operator in the place of the objective's Hessian, `(tree, direction) -> direction`, symmetric
            on directions of the factors, as trees of the points' form: `conditioning.gauss_newton_product`, say.

    Returns:
        A `Solution`.

    Raises:
        TypeError: the tree holds something else than points.
        ValueError: a point is not balanced, or `steps` is no count.

    Notes:
        How accurately a model is minimized follows from how much the last step gained, not from the size of the
        gradient: an objective in other units takes the same steps.

    Source: Absil, Baker and Gallivan 2007 (trust-region methods on Riemannian manifolds), with Manopt's constants;
    Eisenstat and Walker 1996 (how accurate the steps of Newton's method must be).

    Examples:
        >>> from balora_jax import bures
        >>> z = jnp.outer(jnp.arange(1.0, 5.0), jnp.arange(1.0, 4.0))
        >>> start = bures.random_point(jax.random.key(0), z.shape, 1)
        >>> found = bures.trust_regions(lambda p: jnp.sum((p.lora_a @ p.lora_b - z) ** 2), start, tolerance=1e-3)
        >>> bool(found.converged), int(found.iterations) < 20
        (True, True)
    """
    check_steps(steps)
    points, tree = flattened(start)
    first = jnp.asarray(lengths(points) / 4 if radius is None else radius, points[0][0].dtype)
    largest = 8 * first

    def value(points):
        return objective(tree(points))

    def gradient_of(points):
        return [Tangent(*pair) for pair in jax.grad(value)(points)]

    def operator(points):
        if hessian is None:
            product = jax.linearize(jax.grad(value), points)[1]
        else:

            def product(vectors):
                return flattened_pairs(hessian(tree(points), tree(vectors)))

        kind = type(points[0])
        return lambda vectors: projected(points, product([kind(*v) for v in vectors]))

    def flattened_pairs(direction):
        leaves = jax.tree.leaves(direction)
        return list(zip(leaves[::2], leaves[1::2], strict=True))

    def unfinished(carry):
        count, _, radius, *_, norms = carry
        return (count < steps) & (norms[count] > tolerance) & (radius > jnp.finfo(radius.dtype).eps * first)

    def improve(carry):
        count, products, radius, points, loss, gradient, losses, norms = carry
        last = norms[jnp.maximum(count - 1, 0)]
        accuracy = jnp.minimum((norms[count] / last) ** _QUADRATIC, _LINEAR)
        step, bent, inner, at_edge = _minimized(operator(points), gradient, radius, accuracy)
        new = retracted(points, 1.0, step)
        new_loss = value(new)
        # rounding of the objective must not decide near its minimum
        slack = 10 * jnp.finfo(loss.dtype).eps * (jnp.abs(loss) + jnp.finfo(loss.dtype).eps * jnp.abs(losses[0]))
        expected = -dot(gradient, step) - dot(step, bent) / 2
        ratio = (loss - new_loss + slack) / (expected + slack)
        fine = (ratio > LEAST_RATIO) & (expected >= 0)
        radius = jnp.where(~(ratio >= 0.25) | (expected < 0), radius / 4, radius)
        radius = jnp.where((ratio > 0.75) & at_edge, jnp.minimum(2 * radius, largest), radius)
        points, loss = chosen(fine, (new, new_loss), (points, loss))
        gradient = gradient_of(points)
        losses, norms = losses.at[count + 1].set(loss), norms.at[count + 1].set(jnp.sqrt(dot(gradient, gradient)))
        return count + 1, products + inner, radius, points, loss, gradient, losses, norms

    loss, gradient = value(points), gradient_of(points)
    blank = jnp.full(steps + 1, jnp.nan, loss.dtype)
    zero = jnp.zeros((), int)
    recorded = blank.at[0].set(loss), blank.at[0].set(jnp.sqrt(dot(gradient, gradient)))
    carry = lax.while_loop(unfinished, improve, (zero, zero, first, points, loss, gradient, *recorded))
    count, products, _, points, loss, _, losses, norms = carry
    return Solution(tree(points), loss, norms[count], count, norms[count] <= tolerance, losses, norms, products)


def _minimized(product, gradient, radius, accuracy):
    """The step that nearly minimizes the model in a ball, the Hessian's product with it, how many, whether at the edge.

    Truncated conjugate gradients: they stop at the edge, where the curvature is negative, or when the residual is the
    gradient times the accuracy.
    """
    start_norm = jnp.sqrt(dot(gradient, gradient))
    enough = start_norm * accuracy
    dimension = sum(x.size for v in gradient for x in v)

    def unfinished(carry):
        count, *_, square, at_edge = carry
        return (count < dimension) & ~at_edge & (jnp.sqrt(square) > enough)

    def improve(carry):
        count, step, bent, residual, direction, square, _ = carry
        pushed = product(direction)
        curvature = dot(direction, pushed)
        size = square / jnp.where(curvature == 0, 1, curvature)
        across, along, length = dot(step, step), dot(step, direction), dot(direction, direction)
        at_edge = ~(curvature > 0) | (across + 2 * size * along + size**2 * length >= radius**2)
        to_edge = (-along + jnp.sqrt(jnp.maximum(along**2 + length * (radius**2 - across), 0))) / length
        size = jnp.where(at_edge, to_edge, size)
        step, bent = combined(1.0, step, size, direction), combined(1.0, bent, size, pushed)
        residual = combined(1.0, residual, size, pushed)
        new_square = dot(residual, residual)
        direction = combined(-1.0, residual, new_square / square, direction)
        return count + 1, step, bent, residual, direction, new_square, at_edge

    zero = times(0.0, gradient)
    carry = jnp.zeros((), int), zero, zero, list(gradient), times(-1.0, gradient), start_norm**2, jnp.zeros((), bool)
    count, step, bent, *_, at_edge = lax.while_loop(unfinished, improve, carry)
    return step, bent, count, at_edge
