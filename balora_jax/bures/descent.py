"""Gradient descent on the matrices of rank r, under the Bures metric and others to compare it with."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from balora_jax.bures.metrics import METRICS, Metric
from balora_jax.bures.points import Point, Tangent, balanced_point, singular_values
from balora_jax.transform import Pairs, balora_project

SUFFICIENT_DECREASE = 0.25
SHRINKAGE = 0.5
MOST_TRIALS = 40


class Descent(NamedTuple):
    """The outcome of `riemannian_gradient_descent`; the arrays have an entry for each of the steps.

    Attributes:
        point: the last point.
        losses: `(steps,)`, the objective before each step.
        gradient_norms: `(steps,)`, in the metric.
        singular_values: `(steps, r)`, descending, before each step.
        step_sizes: `(steps,)`; 0 where the search found no decrease, which ends the descent.
    """

    point: Point
    losses: jax.Array
    gradient_norms: jax.Array
    singular_values: jax.Array
    step_sizes: jax.Array


def balora_gd(learning_rate: optax.ScalarOrSchedule, *, pairs: Pairs | None = None) -> optax.GradientTransformation:
    """Gradient descent of the factors, balanced after each step: Riemannian gradient descent under the Bures metric.

    From balanced pairs, a step takes the product X with the gradient G to
    `X - lr H_X[G] + lr^2 G X^T G`, whatever the gauge.

    Args:
        learning_rate: of the descent, or a schedule of it.
        pairs: which parameters are pairs, as for `balora_project`.

    Source: arXiv 2605.31484 (BaLoRA-GD).
    """
    return optax.chain(optax.sgd(learning_rate), balora_project(pairs=pairs))


def riemannian_gradient_descent(
    objective: Callable[[jax.Array, jax.Array], jax.Array],
    point: Point,
    *,
    steps: int,
    step_size: float | jax.Array | Callable[[jax.Array], jax.Array] = 1.0,
    search: bool = False,
    metric: str | Metric = "bures",
) -> Descent:
    """Gradient descent with a retraction.

    Args:
        objective: a differentiable function `(lora_a, lora_b) -> ()` of the product of its arguments.
        point: where to start, without leading axes; use `vmap` for several.
        steps: how many.
        step_size: of each step; or a function of the number of the step, an array `()`, that gives it.
        search: whether `step_size` is only where Armijo's rule starts to look: the step is halved until the objective
            falls by a quarter of what its slope promises. Later searches start at twice the last step.
        metric: which gradient, and which retraction: a name in `METRICS`, `"bures"`, `"embedded"`, `"scaled"` or
            `"balanced_quotient"`, or a `Metric`, of `gauss_newton` say.

    Returns:
        A `Descent`.

    Raises:
        ValueError: the metric is unknown, the point has leading axes or is not balanced, or `steps` is no count.
    """
    if not isinstance(metric, Metric) and metric not in METRICS:
        raise ValueError(f"metric must be a Metric or one of {', '.join(METRICS)}, got {metric!r}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps must be an integer of at least 0, got {steps!r}")
    point = Point(*(jnp.asarray(x) for x in point))
    if point.lora_a.ndim != 2:
        raise ValueError(f"the point must not have leading axes, got shape {point.lora_a.shape}; use vmap")
    balanced_point(point)
    direction, move = metric if isinstance(metric, Metric) else METRICS[metric]
    size_of = step_size if callable(step_size) else lambda _: step_size
    value_and_gradient = jax.value_and_grad(objective, (0, 1))

    def searched(point, tangent, slope, loss, start):
        def too_long(carry):
            trials, size, new_loss = carry
            return (trials < MOST_TRIALS) & ~(new_loss <= loss - SUFFICIENT_DECREASE * size * slope)

        def shorter(carry):
            trials, size, _ = carry
            size = size * SHRINKAGE
            return trials + 1, size, objective(*move(point, _scaled(tangent, -size)))

        first = (0, start, objective(*move(point, _scaled(tangent, -start))))
        trials, size, _ = lax.while_loop(too_long, shorter, first)
        return jnp.where(trials < MOST_TRIALS, size, 0).astype(start.dtype)

    def step(carry, number):
        point, start = carry
        loss, gradient = value_and_gradient(*point)
        tangent = direction(point, gradient)
        slope = sum((x * y).sum() for x, y in zip(tangent, gradient, strict=True))
        size = jnp.asarray(start if search else size_of(number), point.lora_a.dtype)
        if search:
            size = searched(point, tangent, slope, loss, size)
        moved = move(point, _scaled(tangent, -size))
        new = jax.tree.map(lambda x, y: jnp.where(size == 0, y, x).astype(y.dtype), moved, point)
        record = loss, jnp.sqrt(jnp.maximum(slope, 0)), singular_values(point), size
        longer = jnp.where(slope > 0, size / SHRINKAGE, size)  # where nothing is left to gain, any step is taken
        return (new, longer if search else start), record

    first = jnp.asarray(size_of(jnp.zeros((), int)), point.lora_a.dtype)
    (point, _), record = lax.scan(step, (point, first), jnp.arange(steps))
    return Descent(point, *record)


def _scaled(tangent, factor):
    return Tangent(*(factor * x for x in tangent))
