"""Riemannian solvers on products of manifolds: gradient descent, conjugate gradients, L-BFGS.

Each is one loop of `lax`, and can be jitted and vmapped. The objective is a function of products: no change of gauge
`(A R, R^-1 B)` changes it. Then the gradients of the factors are the Riemannian gradient, and the factors plus a step
have the product of the retraction: a search along a line needs no balancing. The step that it tries first minimizes the
objective's second-order model along the line. Trust regions are in `balora_jax.bures.trust_region`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from balora_jax.bures.points import Point, Tangent
from balora_jax.bures.products import added, chosen, combined, dot, flattened, lengths, projected, retracted, times

SUFFICIENT_DECREASE = 1e-4
SHRINKAGE = 0.5
MOST_TRIALS = 40

Objective = Callable[[Any], jax.Array]


class Solution(NamedTuple):
    """The outcome of a solver.

    Attributes:
        point: the tree of points at the end.
        loss: `()`, the objective there.
        gradient_norm: `()`, of the Riemannian gradient there.
        iterations: `()`, how many were done.
        converged: `()` bool, whether the norm of the gradient is at most the tolerance. If not, the iterations were
            used up, or no step decreases the objective any more.
        losses: `(steps + 1,)`, before each iteration and at the end; NaN beyond.
        gradient_norms: `(steps + 1,)`, likewise.
        products: `()`, how many products with the Hessian were formed; 0 but for `trust_regions`.
    """

    point: Any
    loss: jax.Array
    gradient_norm: jax.Array
    iterations: jax.Array
    converged: jax.Array
    losses: jax.Array
    gradient_norms: jax.Array
    products: jax.Array


def steepest_descent(objective: Objective, start: Any, *, steps: int = 1000, tolerance: float = 1e-6) -> Solution:
    """Gradient descent with a search along each line.

    Args:
        objective: `tree of points -> ()`, differentiable, of the products of the pairs.
        start: a `Point`, or a tree of points, each perhaps with leading axes.
        steps: at most so many iterations.
        tolerance: ends when the norm of the Riemannian gradient is at most this.

    Returns:
        A `Solution`.

    Raises:
        TypeError: the tree holds something else than points.
        ValueError: a point is not balanced, or `steps` is no count.
    """
    return _descend(objective, start, steps, tolerance, lambda _: (), lambda memory, *_: (None, memory))


def conjugate_gradient(objective: Objective, start: Any, *, steps: int = 1000, tolerance: float = 1e-6) -> Solution:
    """Conjugate gradients by the rule of Hestenes and Stiefel, with transport by projection.

    Args:
        objective: as for `steepest_descent`.
        start: as for `steepest_descent`.
        steps: at most so many iterations.
        tolerance: ends when the norm of the Riemannian gradient is at most this.

    Returns:
        A `Solution`.

    Raises:
        TypeError: as `steepest_descent`.
        ValueError: as `steepest_descent`.

    Source: Boumal 2023, An introduction to optimization on smooth manifolds; the rule is pymanopt's default.

    Examples:
        >>> from balora_jax import bures
        >>> z = jnp.outer(jnp.arange(1.0, 5.0), jnp.arange(1.0, 4.0))
        >>> start = bures.random_point(jax.random.key(0), z.shape, 1)
        >>> found = bures.conjugate_gradient(lambda p: jnp.sum((p.lora_a @ p.lora_b - z) ** 2), start, tolerance=1e-3)
        >>> bool(found.converged), float(found.loss) < 1e-6
        (True, True)
    """

    def following(memory, points, gradient, old_gradient, step, _):
        del memory
        change = combined(1.0, gradient, -1.0, projected(points, old_gradient))
        step = projected(points, step)
        slope = dot(step, change)
        beta = jnp.where(slope == 0, 0, jnp.maximum(0, dot(gradient, change) / jnp.where(slope == 0, 1, slope)))
        return combined(-1.0, gradient, beta, step), ()

    return _descend(objective, start, steps, tolerance, lambda _: (), following)


def lbfgs(
    objective: Objective, start: Any, *, steps: int = 1000, tolerance: float = 1e-6, memory: int = 10
) -> Solution:
    """L-BFGS: the last steps and changes of the gradient, carried along by projection, model the Hessian.

    Args:
        objective: as for `steepest_descent`.
        start: as for `steepest_descent`.
        steps: at most so many iterations.
        tolerance: ends when the norm of the Riemannian gradient is at most this.
        memory: how many steps are kept.

    Returns:
        A `Solution`.

    Raises:
        TypeError: as `steepest_descent`.
        ValueError: as `steepest_descent`, or `memory` is no positive integer.

    Source: Huang, Gallivan and Absil 2015 (a Broyden class of quasi-Newton methods for Riemannian optimization).
    """
    if isinstance(memory, bool) or not isinstance(memory, int) or memory < 1:
        raise ValueError(f"memory must be a positive integer, got {memory!r}")

    def empty(points):
        blank = [Tangent(*(jnp.zeros((memory, *x.shape), x.dtype) for x in pair)) for pair in points]
        return blank, blank, jnp.zeros(memory, points[0][0].dtype)

    def following(kept, points, gradient, old_gradient, step, size):
        moved = partial(projected, points)
        steps, changes, inverses = kept
        steps, changes = jax.vmap(moved)(steps), jax.vmap(moved)(changes)
        step = times(size, moved(step))
        change = combined(1.0, gradient, -1.0, moved(old_gradient))
        curved = dot(step, change)
        good = curved > jnp.finfo(curved.dtype).eps * jnp.sqrt(dot(step, step) * dot(change, change))
        inverse = jnp.where(good, 1 / jnp.where(good, curved, 1), 0)
        pushed = jax.tree.map(
            lambda old, new: jnp.concatenate([old[1:], new[None]]), (steps, changes, inverses), (step, change, inverse)
        )
        kept = chosen(good, pushed, (steps, changes, inverses))
        return times(-1.0, _modelled(kept, gradient)), kept

    return _descend(objective, start, steps, tolerance, empty, following)


def _modelled(kept, gradient):
    """The inverse of the model of the Hessian, applied to the gradient: the recursion of two loops."""
    steps, changes, inverses = kept
    last_step, last_change = (jax.tree.map(lambda x: x[-1], x) for x in (steps, changes))
    square = dot(last_change, last_change)
    gamma = jnp.where(square > 0, dot(last_step, last_change) / jnp.where(square > 0, square, 1), 1)

    def back(vector, entry):
        step, change, inverse = entry
        weight = inverse * dot(step, vector)
        return combined(1.0, vector, -weight, change), weight

    def forth(vector, entry):
        step, change, inverse, weight = entry
        return combined(1.0, vector, weight - inverse * dot(change, vector), step), None

    vector, weights = lax.scan(back, list(gradient), (steps, changes, inverses), reverse=True)
    return lax.scan(forth, times(gamma, vector), (steps, changes, inverses, weights))[0]


def check_steps(steps: int) -> None:
    """Raises a `ValueError` if a number of iterations is no count."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps must be an integer of at least 0, got {steps!r}")


def _descend(objective, start, steps, tolerance, empty, following):
    """Steps along directions that a rule `(memory, points, gradient, old gradient, step, size)` gives."""
    check_steps(steps)
    points, tree = flattened(start)

    def value(points):
        return objective(tree(points))

    def evaluated(points):
        loss, gradient = jax.value_and_grad(value)(points)
        return loss, [Tangent(*pair) for pair in gradient]

    def unfinished(carry):
        count, size, *_, norms = carry
        return (count < steps) & (norms[count] > tolerance) & (size > 0)

    def improve(carry):
        count, _, points, loss, gradient, step, kept, losses, norms = carry
        slope = dot(step, gradient)
        uphill = ~(slope < 0)
        step = chosen(uphill, times(-1.0, gradient), step)
        slope = jnp.where(uphill, -dot(gradient, gradient), slope)
        size = searched(value, points, step, loss, slope)
        points = chosen(size > 0, retracted(points, size, step), points)
        loss, new_gradient = evaluated(points)
        step, kept = following(kept, points, new_gradient, gradient, step, size)
        step = times(-1.0, new_gradient) if step is None else step
        losses, norms = (
            losses.at[count + 1].set(loss),
            norms.at[count + 1].set(jnp.sqrt(dot(new_gradient, new_gradient))),
        )
        return count + 1, size, points, loss, new_gradient, step, kept, losses, norms

    loss, gradient = evaluated(points)
    blank = jnp.full(steps + 1, jnp.nan, loss.dtype)
    carry = (
        jnp.zeros((), int),
        jnp.ones((), loss.dtype),
        points,
        loss,
        gradient,
        times(-1.0, gradient),
        empty(points),
        blank.at[0].set(loss),
        blank.at[0].set(jnp.sqrt(dot(gradient, gradient))),
    )
    count, _, points, loss, *_, losses, norms = lax.while_loop(unfinished, improve, carry)
    return Solution(
        tree(points), loss, norms[count], count, norms[count] <= tolerance, losses, norms, jnp.zeros((), int)
    )


def searched(
    value: Callable[[list[Point]], jax.Array],
    points: list[Point],
    step: list[Tangent],
    loss: jax.Array,
    slope: jax.Array,
) -> jax.Array:
    """The size of a step that decreases the objective by Armijo's rule, 0 if there is none.

    Args:
        value: the objective.
        points: where the search starts.
        step: its direction.
        loss: the objective there.
        slope: its derivative along the step, negative.
    """

    def along(size):
        return value(added(points, size, step))

    one = jnp.ones((), loss.dtype)
    _, curvature = jax.jvp(lambda t: jax.jvp(along, (t,), (one,))[1], (0 * one,), (one,))
    longest = lengths(points) / jnp.sqrt(dot(step, step))
    start = jnp.where(curvature > 0, jnp.minimum(-slope / jnp.where(curvature > 0, curvature, 1), longest), longest)
    slack = 2 * jnp.finfo(loss.dtype).eps * jnp.abs(loss)

    def too_long(carry):
        trials, size, new = carry
        return (trials < MOST_TRIALS) & ~(new <= loss + SUFFICIENT_DECREASE * size * slope + slack)

    def shorter(carry):
        trials, size, _ = carry
        size = size * SHRINKAGE
        return trials + 1, size, along(size)

    trials, size, _ = lax.while_loop(too_long, shorter, (0, start, along(start)))
    return jnp.where(trials < MOST_TRIALS, size, 0)
