"""How many digits are kept, against float64 in NumPy; and nothing is answered about pairs that are not balanced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balora_jax import bures
from balora_jax.bures import Point, Tangent


def lift(a, b, z):
    """The horizontal lift of the projection of Z, in float64, from decompositions of the factors."""
    (q, r), (v, s) = np.linalg.qr(a), np.linalg.qr(b.T)
    core = q.T @ z @ v
    (x, values_x, _), (y, values_y, _) = np.linalg.svd(r), np.linalg.svd(s)
    inside = x @ (x.T @ core @ y / (values_x[:, None] ** 2 + values_y**2)) @ y.T
    left = q @ inside @ s + np.linalg.solve(s, (z @ v - q @ core).T).T
    return np.concatenate([left, (r.T @ inside @ v.T + np.linalg.solve(r, q.T @ z - core @ v.T)).T])


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_projections_of_matrices_lose_no_more_than_rounding_of_the_input(rank):
    """In float32, at most ten times as much."""
    rng = np.random.default_rng(0)
    pairs, matrices = [], rng.standard_normal((5, 30, 20))
    for condition in (1.0, 1e2, 1e3, 1e4, 1e6):
        u, v, turn = (np.linalg.qr(rng.standard_normal((n, rank)))[0] for n in (30, 20, rank))
        root = np.geomspace(1, 1 / condition, rank) ** 0.5
        pairs.append((u * root @ turn, turn.T @ (v * root).T))
    rounded = [[x.astype("float32") for x in (*pair, z)] for pair, z in zip(pairs, matrices, strict=True)]
    a, b, z = (jnp.stack(side) for side in zip(*rounded, strict=True))
    found = jax.jit(bures.projection)(Point(a, b), z)
    for i, pair in enumerate(pairs):
        exact, limit = lift(*pair, matrices[i]), lift(*(x.astype(float) for x in rounded[i]))
        error = np.linalg.norm(np.concatenate([found[0][i], found[1][i].T]) - exact)
        assert error < 10 * max(np.linalg.norm(limit - exact), 6e-8 * np.linalg.norm(exact))


PAIR_WANTED = {
    "inner_product": lambda p, q, t: bures.inner_product(p, t, t),
    "norm": lambda p, q, t: bures.norm(p, t),
    "riemannian_gradient": lambda p, q, t: bures.riemannian_gradient(p, jnp.ones((6, 5))),
    "riemannian_hessian": lambda p, q, t: bures.riemannian_hessian(p, jnp.ones((6, 5)), jnp.ones((6, 5)), t),
    "retraction": lambda p, q, t: bures.retraction(p, t),
    "transport": lambda p, q, t: bures.transport(p, q, t),
    "transport to": lambda p, q, t: bures.transport(q, p, t),
    "distance": lambda p, q, t: bures.distance(p, q),
    "distance to": lambda p, q, t: bures.distance(q, p),
    "exp": lambda p, q, t: bures.exp(p, t),
    "log": lambda p, q, t: bures.log(p, q),
    "log to": lambda p, q, t: bures.log(q, p),
    "geodesic_distance": lambda p, q, t: bures.geodesic_distance(p, q),
    "parallel_transport": lambda p, q, t: bures.parallel_transport(p, t, t),
    "sectional_curvature": lambda p, q, t: bures.sectional_curvature(p, t, t),
    "interpolation": lambda p, q, t: bures.interpolation(p, q, 0.5),
    "descent": lambda p, q, t: bures.riemannian_gradient_descent(lambda a, b: jnp.sum(a @ b), p, steps=1),
}


@pytest.mark.parametrize("name", PAIR_WANTED)
def test_what_needs_a_balanced_pair_says_so(name):
    point = bures.random_point(jax.random.key(0), (6, 5), 2)
    tangent = Tangent(*(jnp.ones_like(x) for x in point))
    other = Point(3 * point.lora_a, point.lora_b / 3)
    with pytest.raises(ValueError, match=r"must be a balanced pair, A\^T A = B B\^T, got a relative gap of 9\.8e-01"):
        PAIR_WANTED[name](other, point, tangent)


def test_balance_to_rounding_is_enough():
    point = bures.random_point(jax.random.key(0), (6, 5), 2)
    near = Point(point.lora_a * (1 + 1e-5), point.lora_b)
    assert bures.distance(near, point) < 1e-4
    assert jax.jit(bures.distance)(Point(3 * point.lora_a, point.lora_b / 3), point) > 1  # traced: taken on trust
