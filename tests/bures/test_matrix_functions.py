"""Derivatives of matrix functions, against finite differences, also where singular values are equal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from balora_jax import balance, bures
from balora_jax.bures.matrix_functions import balanced, core_singular_values, polar, solve, sylvester

pytestmark = pytest.mark.usefixtures("float64")


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def definite(size, seed=0):
    root = normal(size, size, seed=seed)
    return root @ root.T + jnp.eye(size)


def check_derivatives(function, x, *, order=2, tolerance=1e-6):
    """First derivatives forward and reverse, and second ones, of a scalar function of an array along a direction."""
    step, size = normal(*x.shape, seed=77), 1e-5
    slope = jax.jvp(function, (x,), (step,))[1]
    expected = (function(x + size * step) - function(x - size * step)) / (2 * size)
    np.testing.assert_allclose(slope, expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(jnp.vdot(jax.jit(jax.grad(function))(x), step), slope, rtol=1e-9, atol=1e-9)
    if order == 2:
        along = lambda t: jnp.vdot(jax.grad(function)(x + t * step), step)  # noqa: E731
        curvature = jax.grad(along)(0.0)
        expected = (along(size) - along(-size)) / (2 * size)
        np.testing.assert_allclose(curvature, expected, rtol=tolerance, atol=tolerance)


def test_sylvester():
    p, q, c = definite(4), definite(3, seed=1), normal(4, 3)
    np.testing.assert_allclose(
        sylvester(p, q, c), scipy.linalg.solve_sylvester(*map(np.asarray, (p, q, c))), atol=1e-12
    )
    np.testing.assert_allclose(solve(p, c), np.linalg.solve(p, c), atol=1e-12)


WEIGHTS = {"distinct": lambda r: jnp.linspace(1.0, 2.0, r), "equal": jnp.ones}


@pytest.mark.parametrize("values", WEIGHTS)
def test_derivatives_of_the_parts(values):
    """With equal eigenvalues the derivative of an eigenvalue decomposition would be NaN."""
    weight, c = jnp.diag(WEIGHTS[values](4)), normal(4, 4, seed=2)
    turn = jnp.linalg.qr(normal(4, 4, seed=3))[0]
    base = turn @ weight @ turn.T
    check_derivatives(lambda x: jnp.sum(sylvester(x + x.T, base, c) ** 2), base)
    check_derivatives(lambda x: jnp.sum(c * solve(x + x.T, c) ** 2), base)
    check_derivatives(lambda x: jnp.sum(c * polar(x)), turn @ weight)


@pytest.mark.parametrize("values", WEIGHTS)
def test_derivatives_of_balancing(values):
    u, v = (jnp.linalg.qr(normal(n, 3, seed=n))[0] for n in (7, 5))
    root = jnp.sqrt(WEIGHTS[values](3))
    mix = definite(3, seed=4)
    a, b = u * root @ mix, jnp.linalg.solve(mix, root[:, None] * v.T)
    for x, y in zip(balanced(a, b), balance(a, b, gauge="symmetric"), strict=True):
        np.testing.assert_allclose(x, y)
    weights = normal(7, 3, seed=5), normal(3, 5, seed=6)
    check_derivatives(lambda a: sum(jnp.sum(w * x) for w, x in zip(weights, balanced(a, b), strict=True)), a)
    check_derivatives(lambda b: sum(jnp.sum(w * x) for w, x in zip(weights, balanced(a, b), strict=True)), b)


@pytest.mark.parametrize("values", WEIGHTS)
@pytest.mark.parametrize("kind", ["balanced", "truncated"])
def test_derivatives_of_a_retraction(kind, values):
    """Of its factors entry by entry: both retractions give one pair, not only its class."""
    u, v = (jnp.linalg.qr(normal(n, 3, seed=n))[0] for n in (7, 5))
    root = jnp.sqrt(WEIGHTS[values](3))
    point = bures.Point(u * root, root[:, None] * v.T)
    weights = normal(7, 3, seed=5), normal(3, 5, seed=6)
    other = bures.random_tangent_vector(jax.random.key(0), point)

    def of_step(step_a):
        tangent = bures.projection(point, bures.Tangent(step_a, other.lora_b))
        return sum(jnp.sum(w * x) for w, x in zip(weights, bures.retraction(point, tangent, kind=kind), strict=True))

    check_derivatives(of_step, 0.1 * normal(7, 3, seed=8), order=2 if kind == "balanced" else 1)


@pytest.mark.parametrize("values", WEIGHTS)
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (5, 5), (3, 6)])
def test_derivatives_of_truncation(shape, values):
    u, v = (jnp.linalg.qr(normal(n, 3, seed=n))[0] for n in shape)
    rest = normal(*shape, seed=9)
    rest = rest - u @ u.T @ rest
    rest = 0.3 * (rest - rest @ v @ v.T)
    matrix = u * WEIGHTS[values](3) @ v.T + rest / max(1, float(jnp.linalg.norm(rest)))
    weight = normal(*shape, seed=10)
    check_derivatives(lambda x: jnp.sum(weight * bures.to_matrix(bures.from_matrix(x, 3))), matrix, order=1)


def test_derivative_of_the_distance():
    point, other = (bures.random_point(jax.random.key(seed), (7, 5), 3) for seed in (0, 1))
    distance = jax.jit(lambda a: bures.distance(bures.Point(a, point.lora_b), other))  # traced: not only balanced pairs
    check_derivatives(distance, point.lora_a)
    zero = bures.Tangent(*(0 * x for x in point))
    assert all(np.array_equal(x, 0 * x) for x in jax.grad(lambda t: bures.norm(point, t))(zero))


@pytest.mark.parametrize("values", WEIGHTS)
def test_derivatives_of_singular_values(values):
    u, v = (jnp.linalg.qr(normal(n, 3, seed=n))[0] for n in (7, 5))
    root, mix = jnp.sqrt(WEIGHTS[values](3)), definite(3, seed=4)
    right = jnp.linalg.solve(mix, root[:, None] * v.T)
    check_derivatives(lambda a: core_singular_values(a, right).sum(), u * root @ mix, order=1)
    if values == "distinct":
        weights = jnp.arange(1.0, 4.0)
        check_derivatives(lambda a: core_singular_values(a, right) @ weights, u * root @ mix, order=1)
        point = bures.Point(*balance(u * root @ mix, right))
        gradient = jax.grad(lambda a: bures.singular_values(bures.Point(a, point.lora_b))[0])(point.lora_a)
        left, _, onward = np.linalg.svd(point.lora_a @ point.lora_b)
        np.testing.assert_allclose(gradient, np.outer(left[:, 0], onward[0] @ point.lora_b.T), atol=1e-10)
