"""Solvers on products of manifolds: they find what SciPy's decompositions find, in few iterations."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balora_jax import bures
from balora_jax.bures import Point

pytestmark = pytest.mark.usefixtures("float64")

SOLVERS = {
    "trust_regions": partial(bures.trust_regions, steps=60),
    "lbfgs": partial(bures.lbfgs, steps=400),
    "conjugate_gradient": partial(bures.conjugate_gradient, steps=400),
    "steepest_descent": partial(bures.steepest_descent, steps=2000),
}


def problem(condition=5.0, seed=0):
    """Two matrices whose product with a vector and whose entries are known; minima are the best approximations."""
    rng = np.random.default_rng(seed)
    targets = {}
    for name, shape in (("first", (6, 5)), ("second", (2, 4, 7))):
        u, v = (np.linalg.qr(rng.standard_normal((*shape[:-2], n, 2)))[0] for n in shape[-2:])
        targets[name] = jnp.asarray(u * np.geomspace(condition, 1, 2) @ np.swapaxes(v, -1, -2))
    points = {name: bures.from_matrix(z + 0.1 * rng.standard_normal(z.shape), 2) for name, z in targets.items()}

    def loss(points):
        misfits = [points[name].lora_a @ points[name].lora_b - z for name, z in targets.items()]
        return 0.5 * sum(jnp.sum(x**2) + 0.1 * jnp.sum(x**4) for x in misfits)

    return targets, loss, points


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_reach_the_minimum_of_a_product(name):
    targets, loss, start = problem()
    found = jax.jit(lambda start: SOLVERS[name](loss, start, tolerance=1e-12))(start)
    assert bool(found.converged), found.gradient_norm
    count = int(found.iterations)
    for key, target in targets.items():
        error = np.linalg.norm(bures.to_matrix(found.point[key]) - target) / np.linalg.norm(target)
        assert error < 1e-12
        bures.check_point(found.point[key])
    assert np.all(np.isfinite(found.losses[: count + 1]))
    assert np.all(np.isnan(found.losses[count + 1 :]))
    np.testing.assert_allclose(found.losses[0], loss(start), rtol=1e-12)
    gradient = jax.grad(loss)(start)
    norm = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(found.gradient_norms[0], norm, rtol=1e-12)
    assert found.gradient_norms[count] == found.gradient_norm <= 1e-12
    limits = {"trust_regions": 8, "lbfgs": 60, "conjugate_gradient": 80, "steepest_descent": 400}
    assert 2 < count <= limits[name]


def test_trust_regions_converge_quadratically_where_the_minimum_is_not_zero():
    """The best approximation of a matrix of full rank, with a Hessian that the metric's connection is part of."""
    z = jnp.asarray(np.random.default_rng(0).standard_normal((7, 6)))
    start = bures.random_point(jax.random.key(0), z.shape, 2)
    found = jax.jit(lambda p: bures.trust_regions(lambda p: 0.5 * jnp.sum((p[0] @ p[1] - z) ** 2), p, tolerance=1e-11))(
        start
    )
    u, s, vt = np.linalg.svd(z)
    np.testing.assert_allclose(bures.to_matrix(found.point), u[:, :2] * s[:2] @ vt[:2], atol=1e-9)
    np.testing.assert_allclose(found.loss, 0.5 * np.sum(s[2:] ** 2))
    norms = np.asarray(found.gradient_norms[: int(found.iterations) + 1])
    assert norms[-1] < norms[-2] ** 1.5
    assert found.products > found.iterations


def test_solvers_do_not_see_the_gauge():
    _, loss, start = problem()
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((2, 2)))[0]
    other = {name: Point(p.lora_a @ turn, turn.T @ p.lora_b) for name, p in start.items()}
    for name in ("trust_regions", "lbfgs", "conjugate_gradient"):
        solve = jax.jit(partial(SOLVERS[name].func, loss, steps=4, tolerance=0.0))
        np.testing.assert_allclose(solve(start).losses, solve(other).losses, rtol=1e-9, atol=1e-20)


def test_trust_regions_do_not_see_the_units_of_the_objective():
    _, loss, start = problem()
    solve = jax.jit(lambda unit: bures.trust_regions(lambda p: unit * loss(p), start, steps=8, tolerance=1e-12 * unit))
    base = solve(1.0)
    for unit in (2.0**-30, 2.0**30):
        found = solve(unit)
        np.testing.assert_array_equal(found.losses, unit * base.losses)
        assert (found.iterations, found.products) == (base.iterations, base.products)


def test_what_is_no_product_of_points_is_refused():
    _, loss, start = problem()
    with pytest.raises(TypeError, match="leaves of the tree must be Points, got ArrayImpl"):
        bures.lbfgs(loss, {"first": tuple(start["first"])})
    with pytest.raises(ValueError, match="at least one Point"):
        bures.trust_regions(loss, {})
    with pytest.raises(ValueError, match=r"the point must be a balanced pair, .* relative gap of"):
        bures.conjugate_gradient(loss, start | {"first": Point(2 * start["first"][0], start["first"][1])})
    with pytest.raises(ValueError, match=r"steps must be an integer of at least 0, got 2\.5"):
        bures.steepest_descent(loss, start, steps=2.5)
    with pytest.raises(ValueError, match="memory must be a positive integer, got 0"):
        bures.lbfgs(loss, start, memory=0)
