"""Riemannian gradient descent: what its iterates are, and what it keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from balora_jax import balancing_gap, bures

pytestmark = pytest.mark.usefixtures("float64")

METRICS = ["bures", "embedded", "scaled"]


def problem(seed=0, shape=(8, 6), rank=3, condition=3.0):
    """A target of rank r, the loss of its factorisation, and a point near it."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((n, rank)))[0] for n in shape)
    target = jnp.asarray(u * np.geomspace(condition, 1, rank) @ v.T)
    point = bures.from_matrix(target + 0.1 * rng.standard_normal(shape), rank)

    def loss(a, b):
        return 0.5 * jnp.sum((a @ b - target) ** 2)

    return target, loss, point


def h_operator(x, w):
    u, s, vt = np.linalg.svd(x)
    rank = np.sum(s > 1e-12 * s[0])
    u, s, v = u[:, :rank], s[:rank], vt[:rank].T
    return u * s @ u.T @ w + w @ v * s @ v.T


def test_balora_gd_is_riemannian_gradient_descent():
    """`X - tau H_X[G] + tau^2 G X^T G`, in dense matrices, from any gauge of the start."""
    target, loss, point = problem()
    tau, dense = 0.1, np.asarray(bures.to_matrix(point))
    tx = bures.balora_gd(tau)
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))[0]
    params = {"lora_a": point.lora_a @ turn, "lora_b": turn.T @ point.lora_b}
    state = tx.init(params)
    descent = bures.riemannian_gradient_descent(loss, point, steps=20, step_size=tau)
    losses = []
    for _ in range(20):
        losses.append(0.5 * np.sum((dense - target) ** 2))
        gradient = dense - np.asarray(target)
        dense = dense - tau * h_operator(dense, gradient) + tau**2 * gradient @ dense.T @ gradient
        updates, state = tx.update(jax.grad(lambda p: loss(p["lora_a"], p["lora_b"]))(params), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["lora_a"] @ params["lora_b"], dense, atol=1e-12)
    np.testing.assert_allclose(bures.to_matrix(descent.point), dense, atol=1e-12)
    np.testing.assert_allclose(descent.losses, losses, rtol=1e-10)
    np.testing.assert_array_equal(descent.step_sizes, tau)


def test_gradient_flow_keeps_the_difference_of_the_gram_matrices():
    """`A^T A - B B^T` does not change along it, so gradient descent leaves it by O(tau^2) a step."""
    _, loss, point = problem()
    a, b = 2 * point.lora_a, point.lora_b / 2
    start = a.T @ a - b @ b.T

    def drift(tau):
        pair = (a, b)
        for _ in range(round(0.1 / tau)):
            pair = tuple(x - tau * g for x, g in zip(pair, jax.grad(loss, (0, 1))(*pair), strict=True))
        return np.linalg.norm(pair[0].T @ pair[0] - pair[1] @ pair[1].T - start)

    coarse, fine = drift(1e-3), drift(1e-4)
    assert 8 < coarse / fine < 12
    assert fine < 1e-3 * np.linalg.norm(start)


@pytest.mark.parametrize("metric", METRICS)
def test_descent_converges_and_records(metric):
    target, loss, point = problem()
    descent = jax.jit(
        lambda point: bures.riemannian_gradient_descent(
            loss, point, steps=200, step_size=1.0, search=True, metric=metric
        )
    )(point)
    losses = np.asarray(descent.losses)
    assert losses[-1] < 1e-20
    assert np.all(np.diff(losses) <= 0)
    assert float(balancing_gap(*descent.point)) < 1e-12
    np.testing.assert_allclose(descent.singular_values[0], np.linalg.svd(bures.to_matrix(point))[1][:3], rtol=1e-10)
    np.testing.assert_allclose(bures.to_matrix(descent.point), target, atol=1e-9)
    assert {x.shape[0] for x in descent[1:]} == {200}


@pytest.mark.parametrize("metric", METRICS)
def test_gradient_norms_and_sufficient_decrease(metric):
    """The slope along the negative gradient is the square of its norm, and the search keeps a quarter of it."""
    _, loss, point = problem()

    def run(steps, size, search=False):
        return bures.riemannian_gradient_descent(loss, point, steps=steps, step_size=size, search=search, metric=metric)

    slopes = [(loss(*run(1, size).point) - loss(*point)) / size for size in (1e-5, 2e-5)]
    slope = 2 * slopes[0] - slopes[1]
    np.testing.assert_allclose(slope, -(run(1, 1e-5).gradient_norms[0] ** 2), rtol=1e-6)
    descent = run(6, 64.0, search=True)
    decrease = -np.diff(descent.losses)
    promised = (descent.step_sizes * descent.gradient_norms**2)[:-1]
    assert np.all(decrease >= 0.25 * promised * (1 - 1e-9))
    assert descent.step_sizes[0] < 64


@pytest.mark.parametrize("metric", METRICS)
def test_descent_does_not_see_the_gauge(metric):
    _, loss, point = problem()
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))[0]
    other = bures.Point(point.lora_a @ turn, turn.T @ point.lora_b)
    first, second = (
        bures.riemannian_gradient_descent(loss, p, steps=5, step_size=0.1, metric=metric) for p in (point, other)
    )
    np.testing.assert_allclose(bures.to_matrix(first.point), bures.to_matrix(second.point), atol=1e-12)


def test_embedded_descent_is_projected_gradient_and_truncation():
    target, loss, point = problem()
    x = np.asarray(bures.to_matrix(point))
    u, _, vt = np.linalg.svd(x)
    u, v = u[:, :3] @ u[:, :3].T, vt[:3].T @ vt[:3]
    g = x - np.asarray(target)
    u_new, s_new, vt_new = np.linalg.svd(x - 0.3 * (u @ g + g @ v - u @ g @ v))
    found = bures.riemannian_gradient_descent(loss, point, steps=1, step_size=0.3, metric="embedded")
    np.testing.assert_allclose(bures.to_matrix(found.point), u_new[:, :3] * s_new[:3] @ vt_new[:3], atol=1e-12)


def test_scaled_descent_is_scaled_gradient_descent():
    _, loss, point = problem()
    a, b = map(np.asarray, point)
    ga, gb = jax.grad(loss, (0, 1))(a, b)
    expected = (a - 0.3 * ga @ np.linalg.inv(b @ b.T)) @ (b - 0.3 * np.linalg.inv(a.T @ a) @ gb)
    found = bures.riemannian_gradient_descent(loss, point, steps=1, step_size=0.3, metric="scaled")
    np.testing.assert_allclose(bures.to_matrix(found.point), expected, atol=1e-12)


def test_balanced_quotient_descent_is_that_of_its_metric():
    """The gradient is dual in `tr(dA (A^T A)^-1 dA^T) + tr(dB^T (B B^T)^-1 dB)`, and steps are added to factors."""
    _, loss, point = problem()
    a, b = map(np.asarray, point)
    ga, gb = (np.asarray(g) for g in jax.grad(loss, (0, 1))(a, b))
    da, db = ga @ (a.T @ a), (b @ b.T) @ gb
    rng = np.random.default_rng(0)
    xa, xb = rng.standard_normal(a.shape), rng.standard_normal(b.shape)
    metric = np.sum(xa * (da @ np.linalg.inv(a.T @ a))) + np.sum(xb * np.linalg.solve(b @ b.T, db))
    np.testing.assert_allclose(metric, np.sum(xa * ga) + np.sum(xb * gb))
    found = bures.riemannian_gradient_descent(loss, point, steps=1, step_size=0.1, metric="balanced_quotient")
    np.testing.assert_allclose(bures.to_matrix(found.point), (a - 0.1 * da) @ (b - 0.1 * db), atol=1e-12)
    np.testing.assert_allclose(found.gradient_norms[0] ** 2, np.sum(da * ga) + np.sum(db * gb))


def test_gauss_newton_steps_solve_the_linear_problem():
    """The least-squares step of measurements that are linear in the matrix, over the tangent space."""
    rng = np.random.default_rng(0)
    target, _, point = problem(shape=(6, 5), rank=2)
    sensors = rng.standard_normal((40, 6, 5))

    def outputs(a, b):
        return jnp.einsum("kij,ij->k", sensors, a @ b)

    def loss(values):
        return 0.5 * jnp.sum((values - outputs(target, jnp.eye(5))) ** 2)

    descent = bures.riemannian_gradient_descent(
        lambda a, b: loss(outputs(a, b)), point, steps=1, step_size=1.0, metric=bures.gauss_newton(outputs, loss)
    )
    a, b = map(np.asarray, point)
    flat = sensors.reshape(40, -1)
    columns = [np.kron(np.eye(6), b.T), np.kron(a, np.eye(5))]  # of dA row by row, and of dB
    jacobian = flat @ np.concatenate(columns, 1)
    misfit = flat @ (a @ b - np.asarray(target)).ravel()
    step = np.linalg.lstsq(jacobian, -misfit)[0]  # the shortest is horizontal
    new = (a + step[:12].reshape(6, 2)) @ (b + step[12:].reshape(2, 5))
    np.testing.assert_allclose(bures.to_matrix(descent.point), new, atol=1e-10)


def test_schedules_and_vmap():
    _, loss, point = problem()
    schedule = optax.exponential_decay(0.1, 1, 0.5)
    descent = bures.riemannian_gradient_descent(loss, point, steps=3, step_size=schedule)
    np.testing.assert_allclose(descent.step_sizes, [0.1, 0.05, 0.025])
    sizes = jnp.array([0.05, 0.1])
    many = jax.vmap(lambda size: bures.riemannian_gradient_descent(loss, point, steps=3, step_size=size).losses)(sizes)
    for size, losses in zip(sizes, many, strict=True):
        alone = bures.riemannian_gradient_descent(loss, point, steps=3, step_size=size).losses
        np.testing.assert_allclose(losses, alone, rtol=1e-12)


def test_a_search_that_finds_nothing_stays():
    _, loss, point = problem()
    uphill = bures.riemannian_gradient_descent(
        lambda a, b: jnp.where(loss(a, b) == loss(*point), 0.0, 1.0) + 0 * a.sum() + loss(a, b),
        point,
        steps=3,
        step_size=1.0,
        search=True,
    )
    np.testing.assert_array_equal(uphill.step_sizes, 0)
    np.testing.assert_array_equal(uphill.point.lora_a, point.lora_a)


def test_bad_arguments_raise():
    _, loss, point = problem()
    with pytest.raises(ValueError, match=r"steps must be an integer of at least 0, got 2\.5"):
        bures.riemannian_gradient_descent(loss, point, steps=2.5)
    with pytest.raises(ValueError, match=r"metric must be a Metric or one of bures, .*, got 'euclidean'"):
        bures.riemannian_gradient_descent(loss, point, steps=1, metric="euclidean")
    stacked = jax.tree.map(lambda x: x[None], point)
    with pytest.raises(ValueError, match="leading axes"):
        bures.riemannian_gradient_descent(loss, stacked, steps=1)


def test_a_constant_objective_does_not_make_the_step_overflow():
    _, _, point = problem()
    descent = bures.riemannian_gradient_descent(lambda a, b: 0 * a.sum(), point, steps=2000, search=True)
    assert float(descent.step_sizes[-1]) == 1.0
    np.testing.assert_allclose(bures.to_matrix(descent.point), bures.to_matrix(point), atol=1e-12)
