"""Riemannian momentum and Adam, against dense steps in NumPy, and beside leaves that are no pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

from balora_jax import bures

pytestmark = pytest.mark.usefixtures("float64")

RATE, MOMENTUM, B1, B2, EPS = 0.05, 0.8, 0.9, 0.99, 1e-8


def lift(a, b):
    return np.concatenate([a, b.T])


def horizontal(x, direction, rows):
    """The orthogonal projection onto the horizontal space at a lift, by least squares with all vertical directions."""
    rank = x.shape[1]
    sides = np.zeros_like(x), np.zeros_like(x)
    sides[0][:rows], sides[1][rows:] = x[:rows], x[rows:]
    vertical = [(sides[0] @ unit - sides[1] @ unit.T).ravel() for unit in np.eye(rank**2).reshape(-1, rank, rank)]
    basis = np.linalg.qr(np.stack(vertical, 1))[0]
    return (direction.ravel() - basis @ (basis.T @ direction.ravel())).reshape(x.shape)


def balanced(x, rows):
    """`(A T, T^-1 B)` with the symmetric T that balances."""
    p, q = x[:rows].T @ x[:rows], x[rows:].T @ x[rows:]
    root = scipy.linalg.sqrtm(p)
    mean = np.linalg.solve(root, np.linalg.solve(root, scipy.linalg.sqrtm(root @ q @ root)).T).T
    change = np.real(scipy.linalg.sqrtm(mean))
    return np.concatenate([x[:rows] @ change, x[rows:] @ np.linalg.inv(change).T])


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_steps_are_those_of_dense_mathematics(name):
    rows, columns, rank = 6, 5, 2
    rng = np.random.default_rng(0)
    target = rng.standard_normal((rows, columns))
    point = bures.random_point(jax.random.key(0), (rows, columns), rank)
    params = {"lora_a": point.lora_a, "lora_b": point.lora_b, "bias": jnp.ones(3)}
    if name == "sgd":
        tx, plain = bures.riemannian_sgd(RATE, momentum=MOMENTUM), optax.sgd(RATE, MOMENTUM)
    else:
        tx, plain = bures.riemannian_adam(RATE, b1=B1, b2=B2, eps=EPS), optax.adam(RATE, B1, B2, EPS)

    def loss(params):
        return 0.5 * jnp.sum((params["lora_a"] @ params["lora_b"] - target) ** 2) + jnp.sum(params["bias"] ** 4)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, bias = tx.init(params), {"bias": params["bias"]}
    plain_state = plain.init(bias)
    x = lift(*map(np.asarray, point))
    momentum, square = np.zeros_like(x), 0.0
    for count in range(1, 6):
        difference = x[:rows] @ x[rows:].T - target
        gradient = np.concatenate([difference @ x[rows:], difference.T @ x[:rows]])
        if name == "sgd":
            momentum = MOMENTUM * momentum + gradient
            direction = momentum
        else:
            momentum, square = B1 * momentum + (1 - B1) * gradient, B2 * square + (1 - B2) * np.sum(gradient**2)
            direction = momentum / (1 - B1**count) / (np.sqrt(square / (1 - B2**count)) + EPS)
        x = balanced(x - RATE * direction, rows)
        momentum = horizontal(x, momentum, rows)
        params, state = step(params, state)
        np.testing.assert_allclose(lift(params["lora_a"], params["lora_b"]), x, atol=1e-11)
        np.testing.assert_allclose(lift(state.momentum["lora_a"], state.momentum["lora_b"]), momentum, atol=1e-11)
        updates, plain_state = plain.update(jax.grad(lambda p: jnp.sum(p["bias"] ** 4))(bias), plain_state)
        bias = optax.apply_updates(bias, updates)
        np.testing.assert_allclose(params["bias"], bias["bias"], rtol=1e-12)


def test_stacked_pairs_are_alone():
    points = [bures.random_point(jax.random.key(k), (6, 5), 2) for k in (0, 1)]
    alone = [{"lora_a": p.lora_a, "lora_b": p.lora_b} for p in points]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *alone)
    tx = bures.riemannian_adam(RATE)
    found = [tx.update(jax.tree.map(jnp.sin, p), tx.init(p), p)[0] for p in (*alone, stacked)]
    jax.tree.map(
        lambda x, y, both: np.testing.assert_allclose(jnp.stack([x, y]), both, atol=1e-13), found[0], found[1], found[2]
    )


def test_a_fresh_pair_is_refused():
    params = {"layer": {"lora_a": jnp.ones((4, 1)), "lora_b": jnp.zeros((1, 3))}}
    with pytest.raises(ValueError, match="the pair layer/lora_a, layer/lora_b must be a balanced pair"):
        bures.riemannian_sgd(0.1).init(params)
