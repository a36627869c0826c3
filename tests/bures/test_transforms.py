"""Every function of the geometry under jit, vmap, forward and reverse differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conditioned_points import points, vectors

from balora_jax import bures
from balora_jax.bures import Point, Tangent

pytestmark = pytest.mark.usefixtures("float64", "quick_compilation")

FUNCTIONS = {
    "parallel_transport": lambda p, q, u, v: bures.to_matrix(bures.exp(p, u), bures.parallel_transport(p, u, v)),
    "log": lambda p, q, u, v: bures.to_matrix(p, bures.log(p, q)),
    "frechet_mean": lambda p, q, u, v: bures.to_matrix(
        bures.frechet_mean([p, q, bures.retraction(p, u)], 1 + u[0][0, 0])
    ),
    "sectional_curvature": lambda p, q, u, v: bures.sectional_curvature(p, u, v),
    "retraction": lambda p, q, u, v: bures.to_matrix(bures.retraction(p, u)),
    "truncation": lambda p, q, u, v: bures.to_matrix(bures.retraction(p, u, kind="truncated")),
    "transport": lambda p, q, u, v: bures.to_matrix(q, bures.transport(p, q, u)),
    "distance": lambda p, q, u, v: bures.distance(p, q),
    "projection": lambda p, q, u, v: bures.to_matrix(p, bures.projection(p, v)),
    "lifting": lambda p, q, u, v: bures.projection(p, bures.to_matrix(q))[0] @ p[1],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_batched_jitted_differentiable(name):
    """Differences of the values under vmap, at points that are balanced to first order, are the derivatives."""
    point = jax.tree.map(lambda x: x[:2], points(3))
    step, u, v = vectors(point, 0.5, 3)
    other = bures.retraction(point, step)
    arguments = point, other, u, v
    moves = [vectors(x, 0.5, seed=seed)[0] for x, seed in ((point, 2), (other, 3), (point, 4), (point, 5))]
    moves = (Point(*moves[0]), Point(*moves[1]), *moves[2:])

    def value(*arguments):
        found = FUNCTIONS[name](*arguments)
        return jnp.sum(np.random.default_rng(0).standard_normal(found.shape) * found)

    def along(t):
        return value(*jax.tree.map(lambda x, y: x + t * y, arguments, moves))

    def derivatives(arguments, moves):
        """Those of both modes, of one linear function."""
        here, pushed = jax.linearize(value, *arguments)
        return here, pushed(*moves), jax.linear_transpose(pushed, *arguments)(jnp.ones(()))

    size = 1e-5
    values = jax.jit(jax.vmap(along))(size * jnp.arange(-1, 2))
    here, slope, gradient = jax.jit(derivatives)(arguments, moves)
    np.testing.assert_allclose(values[1], here, rtol=1e-12)
    np.testing.assert_allclose(slope, (values[2] - values[0]) / (2 * size), rtol=1e-6)
    inner = sum(np.vdot(x, y) for x, y in zip(jax.tree.leaves(gradient), jax.tree.leaves(moves), strict=True))
    np.testing.assert_allclose(inner, slope, rtol=1e-10)


def test_the_gradient_of_half_the_squared_distance_is_minus_the_logarithm():
    """At every condition number, from the derivatives of the logarithm itself, in float32."""
    point, tolerance = points(2, dtype=np.float32), 1e-4
    other = bures.retraction(point, vectors(point, 0.5)[0])

    @jax.jit
    def found(point, other):
        def energy(point, other):
            log = bures.log(point, other)
            return 0.5 * jnp.sum(bures.norm(point, log) ** 2), log

        return jax.grad(energy, (0, 1), has_aux=True)(point, other)

    (here, there), log = found(point, other)
    length = bures.norm(point, log)
    horizontal = bures.projection(point, Tangent(*here))
    lost = bures.norm(point, Tangent(*(x + y for x, y in zip(horizontal, log, strict=True))))
    assert np.all(lost <= tolerance * length)
    other_length = bures.norm(other, bures.projection(other, Tangent(*there)))
    np.testing.assert_allclose(other_length, length, rtol=tolerance)
