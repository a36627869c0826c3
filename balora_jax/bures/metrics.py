"""Metrics on the matrices of rank r beside the Bures metric, as gradients and retractions of balanced pairs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg

from balora_jax.bures.manifold import projection, retraction
from balora_jax.bures.matrix_functions import balanced, solve
from balora_jax.bures.points import Point, Tangent
from balora_jax.linalg import matmul


class Metric(NamedTuple):
    """What gradient descent needs of a metric.

    Attributes:
        direction: `(point, gradients of the factors) -> direction of the factors`, the gradient under the metric.
        move: `(point, direction) -> point`, a retraction.
    """

    direction: Callable[[Point, Tangent], Tangent]
    move: Callable[[Point, Tangent], Point]


def gauss_newton(outputs: Callable[[jax.Array, jax.Array], Any], loss: Callable[[Any], jax.Array]) -> Metric:
    """The pullback of a loss's curvature: `<xi, eta> = <J xi, H J eta>`, with J of the outputs and H of their loss.

    For a negative log-likelihood of an exponential family it is the Fisher metric, and its gradient the natural one; a
    step of size 1 is one of Gauss and Newton.

    Args:
        outputs: `(lora_a, lora_b) -> outputs`, of the product of its arguments.
        loss: `outputs -> ()`, convex.

    Returns:
        A `Metric`. Its gradient is found by conjugate gradients on the horizontal space, and needs outputs that tell
        all tangent vectors apart.

    Source: Amari 1998 (natural gradient).
    """

    def direction(point, gradient):
        value, pushed = jax.linearize(lambda pair: outputs(*pair), tuple(point))
        pulled = jax.linear_transpose(pushed, tuple(point))
        bent = jax.linearize(jax.grad(loss), value)[1]

        def product(step):
            (back,) = pulled(bent(pushed(tuple(projection(point, Tangent(*step))))))
            return tuple(projection(point, Tangent(*back)))

        (a, b), rounding = point, jnp.finfo(point[0].dtype).eps
        size = a.size + b.size - a.shape[-1] ** 2
        return Tangent(*cg(product, tuple(gradient), tol=10 * rounding, maxiter=2 * size)[0])

    return Metric(direction, retraction)


def _bures(point, gradient):
    return Tangent(*gradient)


def _scaled(point, gradient):
    (a, b), (gradient_a, gradient_b) = point, gradient
    return Tangent(solve(matmul(b, b.T), gradient_a.T).T, solve(matmul(a.T, a), gradient_b))


def _embedded(point, gradient):
    """The factor directions that add up to the projected gradient; what both could give, half from each."""
    a, b = point
    step_a, step_b = _scaled(point, gradient)
    core = solve(matmul(a.T, a), matmul(a.T, step_a))  # P_U G P_V = A core B
    return Tangent(step_a - matmul(a, core) / 2, step_b - matmul(core, b) / 2)


def _balanced_quotient(point, gradient):
    (a, b), (gradient_a, gradient_b) = point, gradient
    return Tangent(matmul(gradient_a, matmul(a.T, a)), matmul(matmul(b, b.T), gradient_b))


def _added(point, tangent):
    return Point(*balanced(*(x + y for x, y in zip(point, tangent, strict=True))))


METRICS = {
    "bures": Metric(_bures, retraction),
    "embedded": Metric(_embedded, lambda point, tangent: retraction(point, tangent, kind="truncated")),
    "scaled": Metric(_scaled, _added),
    "balanced_quotient": Metric(_balanced_quotient, _added),
}
"""The metrics by their names.

* `"bures"`: `H_X[G]`, and the paper's retraction.
* `"embedded"`: the Euclidean metric of matrices: `P_U G + G P_V - P_U G P_V`, where `P_U` and `P_V` project on the
  column and row spaces, and the nearest matrix of rank r (Vandereycken 2013).
* `"scaled"`: the quotient metric `<dA, dA B B^T> + <dB, A^T A dB>`: `(g_A (B B^T)^-1, (A^T A)^-1 g_B)`, added to the
  factors (Mishra et al. 2012; as ScaledGD, Tong et al. 2021).
* `"balanced_quotient"`: `<dA, dA (A^T A)^-1> + <dB, (B B^T)^-1 dB>`: `(g_A A^T A, B B^T g_B)`, added to the factors;
  Manopt's geometry of balanced factors (Meyer, Bonnabel and Sepulchre 2011).
"""
