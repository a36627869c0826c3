"""Points of several condition numbers, and tangent vectors there as long as their surroundings allow."""

import jax
import jax.numpy as jnp
import numpy as np

from balora_jax import bures
from balora_jax.bures import Point, Tangent

CONDITIONS = (1.0, 1e2, 1e4, 1e6)  # 1: equal singular values
SHAPE = (10, 9)


def points(rank, seed=0, dtype=np.float64):
    """A point of each condition number, stacked, in random gauges."""
    rng = np.random.default_rng(seed)
    pairs = []
    for condition in CONDITIONS:
        u, v = (np.linalg.qr(rng.standard_normal((n, rank)))[0] for n in SHAPE)
        root = np.geomspace(1, 1 / condition, rank) ** 0.5
        turn = np.linalg.qr(rng.standard_normal((rank, rank)))[0]
        pairs.append((u * root @ turn, turn.T @ (v * root).T))
    return Point(*(jnp.asarray(np.stack(side), dtype) for side in zip(*pairs, strict=True)))


def vectors(point, length, count=1, seed=1):
    """Tangent vectors of some length, relative to the distance from the matrices of lower rank."""
    reach = length * jnp.sqrt(2 * bures.singular_values(point)[..., -1])[..., None, None]
    keys = jax.random.split(jax.random.key(seed), count)
    found = [bures.random_tangent_vector(key, point) for key in keys]
    return [Tangent(*(reach.astype(x.dtype) * x for x in tangent)) for tangent in found]


def lifts(pair):
    """`[A; B^T]` in float64."""
    return np.concatenate([pair[0], pair[1].mT], -2).astype(float)
