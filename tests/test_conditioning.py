"""Condition numbers, against dense Hessians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balora_jax import balance
from balora_jax.conditioning import (
    extreme_eigenvalues,
    factorization_condition_number,
    factorization_eigenvalues,
    gauss_newton_product,
    hessian_product,
    least_condition_number,
    optimal_step,
    predicted_rate,
)

pytestmark = pytest.mark.usefixtures("float64")


def minimiser(shape, values, rank, seed=0, mixed=False):
    """A target with the singular values, and a pair whose product is its best approximation."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((n, len(values))))[0] for n in shape)
    root = np.sqrt(values[:rank])
    a, b = u[:, :rank] * root, root[:, None] * v[:, :rank].T
    if mixed:
        mix = rng.standard_normal((rank, rank))
        a, b = a @ mix, np.linalg.solve(mix, b)
    return u * values @ v.T, jnp.asarray(a), jnp.asarray(b)


def factorization(target):
    return lambda pair: 0.5 * jnp.sum((pair["lora_a"] @ pair["lora_b"] - target) ** 2)


def dense_spectrum(loss, params):
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    return np.linalg.eigvalsh(jax.hessian(lambda x: loss(unravel(x)))(flat))[::-1]


CASES = {
    "rank r": ((7, 9), (3.0, 2.0, 0.5), 3),
    "above rank r": ((7, 9), (3.0, 2.0, 0.5, 0.4, 0.1), 3),
    "tall": ((9, 4), (3.0, 2.0, 1.0, 0.3), 2),
    "one side of length r": ((3, 8), (3.0, 2.0, 1.0), 3),
    "square of full rank": ((3, 3), (3.0, 2.0, 1.0), 3),
}


@pytest.mark.parametrize("mixed", [False, True], ids=["balanced", "any pair"])
@pytest.mark.parametrize("case", CASES)
def test_closed_form_is_the_spectrum_of_the_hessian(case, mixed):
    shape, values, rank = CASES[case]
    target, a, b = minimiser(shape, np.array(values), rank, mixed=mixed)
    dense = dense_spectrum(factorization(target), {"lora_a": a, "lora_b": b})
    found = factorization_eigenvalues(a, b, values[rank:])
    assert found.size == dense.size - rank**2
    np.testing.assert_allclose(np.sort(np.abs(dense))[: rank**2], 0, atol=1e-10)
    np.testing.assert_allclose(found, dense[: found.size], atol=1e-10 * dense[0])
    np.testing.assert_allclose(factorization_condition_number(a, b, values[rank:]), found[0] / found[-1])
    if min(shape) > rank and not mixed:
        np.testing.assert_allclose(
            factorization_condition_number(a, b, values[rank:]), least_condition_number(values, rank)
        )


@pytest.mark.parametrize("condition", [1e2, 1e8, 1e12, 1e16])
@pytest.mark.parametrize("pair", ["balanced", "scaled"])
def test_condition_numbers_keep_their_digits_beyond_rank_r(condition, pair):
    """`sigma_i -+ tau` of balanced pairs; blocks of size 2 of pairs whose Gram matrices are diagonal."""
    values, rest = np.geomspace(1, 1 / condition, 3), np.array([0.5, 0.1]) / condition
    rng = np.random.default_rng(0)
    u, v, turn = (np.linalg.qr(rng.standard_normal((n, 3)))[0] for n in (7, 6, 3))
    scale = np.array([3.0, 0.5, 2.0]) if pair == "scaled" else np.ones(3)
    a, b = u * values**0.5 * scale @ turn, turn.T @ (v * values**0.5 / scale).T
    p, q = values * scale**2, values / scale**2
    large = [(p + q) / 2 + np.sqrt((p - q) ** 2 / 4 + tau**2) for tau in rest]
    small = [(p * q - tau**2) / x for tau, x in zip(rest, large, strict=True)]
    expected = (p.max() + q.max()) / np.min([*small, p, q])
    rounding = 100 * np.finfo(float).eps * np.sqrt(condition)
    np.testing.assert_allclose(factorization_condition_number(a, b, rest), expected, rtol=rounding)


def test_no_refactorisation_is_better_than_balance():
    values = np.array([3.0, 2.0, 0.5, 0.2])
    pairs = [minimiser((8, 6), values, 3, seed=0, mixed=False)[1:]]
    rng = np.random.default_rng(1)
    for _ in range(200):
        mix = rng.standard_normal((3, 3))
        pairs.append((pairs[0][0] @ mix, np.linalg.solve(mix, pairs[0][1])))
    stacked = tuple(np.stack(side) for side in zip(*pairs, strict=True))
    numbers = factorization_condition_number(*stacked, values[3:])
    assert numbers.shape == (201,)
    np.testing.assert_allclose(numbers[0], least_condition_number(values, 3))
    assert np.all(numbers[1:] >= numbers[0] * (1 - 1e-12))
    balanced = [np.asarray(x) for x in balance(*map(jnp.asarray, stacked))]
    np.testing.assert_allclose(factorization_condition_number(*balanced, values[3:]), numbers[0], rtol=1e-8)


def test_a_zero_gap_has_no_finite_condition_number():
    _, a, b = minimiser((5, 6), np.array([2.0, 1.0, 1.0]), 2)
    assert factorization_condition_number(a, b, [1.0]) > 1e12
    assert least_condition_number([2.0, 1.0, 1.0], 2) == np.inf
    assert factorization_condition_number(a, 0 * b) == np.inf


def test_rate_of_gradient_descent():
    """The slowest direction shrinks by the predicted factor at the optimal step."""
    target, a, b = minimiser((6, 5), np.array([2.0, 1.0]), 2)
    kappa = factorization_condition_number(a, b)
    assert kappa == pytest.approx(4)
    values = factorization_eigenvalues(a, b)
    step, loss = optimal_step(values[0], values[-1]), factorization(target)
    rng = np.random.default_rng(0)
    params = {k: x + 1e-4 * rng.standard_normal(x.shape) for k, x in {"lora_a": a, "lora_b": b}.items()}
    losses = []
    for _ in range(60):
        losses.append(float(loss(params)))
        params = jax.tree.map(lambda x, g: x - step * g, params, jax.grad(loss)(params))
    rate = (losses[20] / losses[10]) ** 0.05
    np.testing.assert_allclose(rate, predicted_rate(kappa), rtol=2e-2)
    assert predicted_rate(np.inf) == 1
    assert predicted_rate(1) == 0


def network(seed=0):
    """Two adapted layers, a bias, and cross-entropy."""
    rng = np.random.default_rng(seed)
    shapes = {"first": (5, 6), "second": (6, 4)}
    params = {
        name: {"lora_a": jnp.asarray(rng.standard_normal((m, 2))), "lora_b": jnp.asarray(rng.standard_normal((2, n)))}
        for name, (m, n) in shapes.items()
    }
    base = {name: jnp.asarray(rng.standard_normal(shape)) for name, shape in shapes.items()}
    x, labels = jnp.asarray(rng.standard_normal((40, 5))), jnp.asarray(rng.integers(0, 4, 40))

    def outputs(params):
        weights = {name: base[name] + params[name]["lora_a"] @ params[name]["lora_b"] for name in shapes}
        return jnp.tanh(x @ weights["first"]) @ weights["second"] + params["bias"]

    def loss(logits):
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()

    return outputs, loss, params | {"bias": jnp.zeros(4)}


def horizontal_basis(params):
    """An orthonormal basis of the complement of `(A M, -M B)`, dense."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    directions = []
    for name, pair in params.items():
        if name == "bias":
            continue
        for unit in np.eye(4).reshape(4, 2, 2):
            step = {"lora_a": pair["lora_a"] @ unit, "lora_b": -unit @ pair["lora_b"]}
            directions.append(jax.flatten_util.ravel_pytree(zeros | {name: step})[0])
    q, _ = np.linalg.qr(np.stack(directions).T, mode="complete")
    return q[:, len(directions) :]


@pytest.mark.parametrize("kind", ["hessian", "gauss-newton"])
def test_measured_extremes_are_those_of_the_dense_matrix(kind):
    outputs, loss, params = network()
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    basis = horizontal_basis(params)
    if kind == "hessian":
        product = hessian_product(lambda params: loss(outputs(params)), params)
        dense = jax.hessian(lambda x: loss(outputs(unravel(x))))(flat)
    else:
        product = gauss_newton_product(outputs, loss, params)
        jacobian = jax.jacobian(lambda x: outputs(unravel(x)).ravel())(flat)
        curvature = jax.hessian(lambda y: loss(y.reshape(40, 4)))(outputs(params).ravel())
        dense = jacobian.T @ curvature @ jacobian
        assert np.abs(dense @ (np.eye(flat.size) - basis @ basis.T)).max() < 1e-12
    expected = np.linalg.eigvalsh(basis.T @ dense @ basis)
    found = jax.jit(lambda key: extreme_eigenvalues(product, params, key=key, iterations=1000))(jax.random.key(0))
    assert found.ritz_values.size == basis.shape[1]
    np.testing.assert_allclose(found.largest, expected[-1], rtol=1e-10)
    np.testing.assert_allclose(found.smallest, expected[0], atol=1e-10)
    early = extreme_eigenvalues(product, params, key=jax.random.key(1), iterations=12)
    np.testing.assert_allclose(early.largest, expected[-1], rtol=1e-3)
    assert early.residuals[0] > 1e-12
    error = np.abs(np.linalg.eigvalsh(basis.T @ dense @ basis) - early.largest).min()
    assert error <= early.residuals[0]


def test_an_invariant_subspace_ends_the_iteration():
    """At a minimiser of a factorisation the Hessian has few distinct eigenvalues, none of them zero."""
    target, a, b = minimiser((12, 15), np.array([2.0, 1.0]), 2)
    params = {"lora_a": a, "lora_b": b}
    expected = factorization_eigenvalues(a, b)
    product = hessian_product(factorization(target), params)
    found = extreme_eigenvalues(product, params, key=jax.random.key(0), iterations=40)
    np.testing.assert_allclose([found.largest, found.smallest], expected[[0, -1]], rtol=1e-10)
    np.testing.assert_allclose(found.condition_number, 4, rtol=1e-9)
    alive = found.ritz_values[np.isfinite(found.ritz_values)]
    np.testing.assert_allclose(alive, np.unique(expected.round(9)), atol=1e-9)
    np.testing.assert_allclose(found.weights.sum(), 1)
    whole = extreme_eigenvalues(product, params, key=jax.random.key(0), iterations=40, deflate=False)
    assert abs(whole.smallest) < 1e-9


def test_residuals_tell_of_a_spectrum_that_decays_below_rounding():
    """The iteration ends early there too, though the subspace is not invariant."""
    params = {"lora_a": jnp.ones((20, 1), jnp.float32), "lora_b": jnp.ones((1, 20), jnp.float32)}
    scales = jnp.asarray(np.geomspace(1, 1e-6, 40), jnp.float32)

    def product(tree):
        flat, unravel = jax.flatten_util.ravel_pytree(tree)
        return unravel(scales * flat)

    found = extreme_eigenvalues(product, params, key=jax.random.key(0), iterations=40, deflate=False)
    np.testing.assert_allclose(found.largest, 1, rtol=1e-5)
    assert found.residuals[1] + 1e-6 >= abs(found.smallest - 1e-6)
    short = extreme_eigenvalues(product, params, key=jax.random.key(0), iterations=10, deflate=False)
    assert short.residuals[1] > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: factorization_eigenvalues(np.ones((3, 2)), np.ones((3, 4))), "got shapes"),
        (lambda: factorization_eigenvalues(np.ones((3, 4)), np.ones((4, 5))), "r must be at most"),
        (lambda: factorization_eigenvalues(np.ones((3, 2)), np.ones((2, 4)), [1.0, 1.0]), "at most .* 1 singular"),
        (lambda: factorization_eigenvalues(np.ones((4, 2)), np.ones((2, 4)), [0.1, -0.1]), "not negative, got -0.1"),
        (lambda: factorization_eigenvalues(np.ones((4, 2)), np.ones((2, 4)), [[0.1]]), "leading axes"),
        (lambda: least_condition_number([1.0, 2.0], 1), "must descend"),
        (lambda: least_condition_number([2.0, 1.0], 3), "rank must be from 1"),
        (lambda: extreme_eigenvalues(lambda v: v, {"x": jnp.ones(3)}, key=jax.random.key(0)), "LoRA pair"),
    ],
)
def test_bad_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()
