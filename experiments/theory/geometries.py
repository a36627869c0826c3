"""Three metrics on the matrices of rank r: `python experiments/theory/geometries.py` (some minutes on two CPU cores).

Riemannian gradient descent with Armijo's rule under the Bures, the embedded and the scaled metric, for

* factorisation: `1/2 ||X - Z||^2`;
* sensing: `1/2 ||y - M(X)||^2` for m = 4 r (a + b - r) Gaussian measurements of entries N(0, 1 / m);
* completion: `1 / (2 p) ||P(X - Z)||^2` on a random share p = 0.8 of the entries.

Z is 30 x 25 of rank 3 with singular values from the condition number to 1. All start from the same point, the best
approximation of rank 3 of the first gradient at 0, as is usual for these problems (spectral start). For completion its
error exceeds the small singular values of an ill-conditioned Z, and every method ends in a swamp: so there is also a
start near Z, off by a tenth of its smallest singular value. Iterations and seconds until `||X - Z|| <= 1e-10 ||Z||`, of
at most 50,000; medians over 3 seeds, those that do not get there counting as more.
"""

import time
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from recording import write

from balora_jax import bures

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHAPE, RANK, SHARE, SEEDS, MOST, CHUNK = (30, 25), 3, 0.8, 3, 50_000, 200
KINDS = ("factorisation", "sensing", "completion", "completion, near")
CONDITIONS = (1.0, 10.0, 100.0, 1e3, 1e4)
METRICS = ("bures", "embedded", "scaled")


def measured(sensors, x):
    """What is known of a matrix: all of it, inner products with sensors, or weighted entries."""
    if sensors is None:
        return x
    return jnp.einsum("kij,ij->k", sensors, x) if sensors.ndim == 3 else sensors * x


def noise(rng):
    """A random matrix of spectral norm about 1."""
    return jnp.asarray(rng.standard_normal(SHAPE)) / sum(np.sqrt(SHAPE))


def problem(kind, condition, seed):
    """The target, the sensors, and the spectral start."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((n, RANK)))[0] for n in SHAPE)
    target = jnp.asarray(u * np.geomspace(condition, 1, RANK) @ v.T)
    sensors = None
    if kind == "sensing":
        count = 4 * RANK * (sum(SHAPE) - RANK)
        sensors = jnp.asarray(rng.standard_normal((count, *SHAPE)) / np.sqrt(count))
    elif kind != "factorisation":
        sensors = jnp.asarray((rng.random(SHAPE) < SHARE) / np.sqrt(SHARE))
    start = jax.vjp(lambda x: measured(sensors, x), target)[1](measured(sensors, target))[0]
    if kind == "factorisation":  # whose spectral start is the solution
        start = target + noise(rng)
    elif kind == "completion, near":
        start = target + 0.1 * noise(rng)
    return target, sensors, bures.from_matrix(start, RANK)


@partial(jax.jit, static_argnames=("metric", "count"))
def some(target, sensors, point, size, metric, count):
    """Some iterations, each with the distance from the target before it."""
    data = measured(sensors, target)
    if metric == "gauss_newton":
        metric = bures.gauss_newton(
            lambda a, b: measured(sensors, a @ b), lambda seen: 0.5 * jnp.sum((seen - data) ** 2)
        )

    def loss(a, b):
        return 0.5 * jnp.sum((measured(sensors, a @ b) - data) ** 2)

    def one(carry, _):
        point, size = carry
        error = jnp.linalg.norm(point.lora_a @ point.lora_b - target) / jnp.linalg.norm(target)
        descent = bures.riemannian_gradient_descent(loss, point, steps=1, step_size=size, search=True, metric=metric)
        return (descent.point, 2 * descent.step_sizes[0]), error

    return jax.lax.scan(one, (point, size), length=count)


def descend(target, sensors, point, metric, *, most=MOST, chunk=CHUNK):
    """Iterations, seconds without compilation and the error where the target is reached, or where it is not."""
    size, done = jnp.asarray(1.0), 0
    jax.block_until_ready(some(target, sensors, point, size, metric, chunk))
    start = time.perf_counter()
    while done < most:
        (point, size), errors = jax.block_until_ready(some(target, sensors, point, size, metric, chunk))
        reached = np.flatnonzero(np.asarray(errors) <= 1e-10)
        if reached.size:
            seconds = (time.perf_counter() - start) * (done + reached[0]) / (done + chunk)
            return done + int(reached[0]), float(seconds), float(errors[reached[0]])
        done += chunk
        if float(size) == 0 or not np.isfinite(errors[-1]):  # no step decreases the loss any more
            break
    return np.inf, np.inf, float(errors[-1])


def main() -> None:
    """Runs, draws and records."""
    rows = []
    figure, axes = plt.subplots(1, len(KINDS), figsize=(14, 3.6), sharex=True, sharey=True)
    for axis, kind in zip(axes, KINDS, strict=True):
        for metric in METRICS:
            medians = []
            for condition in CONDITIONS:
                runs = [descend(*problem(kind, condition, seed), metric) for seed in range(SEEDS)]
                iterations, seconds, errors = (np.median(x) for x in zip(*runs, strict=True))
                row = {
                    "problem": kind,
                    "metric": metric,
                    "condition": condition,
                    "iterations": iterations if np.isfinite(iterations) else None,
                    "seconds": seconds if np.isfinite(seconds) else None,
                    "reached": sum(bool(np.isfinite(run[0])) for run in runs),
                    "n": SEEDS,
                    "error": errors,
                }
                rows.append(row)
                medians.append(iterations)
                print(row, flush=True)
            axis.loglog(CONDITIONS, np.where(np.isfinite(medians), medians, np.nan), "o-", label=metric)
        axis.set(title=kind, xlabel="condition number of Z")
    axes[0].set_ylabel("iterations to 1e-10")
    axes[0].legend()
    write("geometries", {"rows": rows}, figure)


if __name__ == "__main__":
    with jax.enable_x64(True):
        main()
