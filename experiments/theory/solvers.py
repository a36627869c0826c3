"""Five metrics and three solvers: `python experiments/theory/solvers.py` (minutes on two CPU cores).

The problems of `geometries.py`, and one that does not favour metrics which whiten by the factors: *skewed sensing*,
where the measurements see `C_a X C_b` with covariances of condition number 10, in directions that have nothing to do
with Z.

Gradient descent with Armijo's rule under the Bures, the embedded, the scaled, the balanced quotient and the
Gauss-Newton metric; conjugate gradients, L-BFGS and trust regions under the Bures metric. Iterations and seconds until
`||X - Z|| <= 1e-10 ||Z||`, of at most 5,000; medians over 3 seeds, those that do not get there counting as more. All
are jitted loops of the same library; times are without compilation.
"""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from geometries import RANK, SHAPE, measured, problem
from recording import write

from balora_jax import bures

KINDS, CONDITIONS, SEEDS, MOST, CHUNK = ("factorisation", "sensing", "skewed sensing"), (1.0, 10.0, 100.0), 3, 5000, 50
SKEW = 10.0
METRICS = ("bures", "embedded", "scaled", "balanced_quotient", "gauss_newton")
SOLVERS = {
    "trust regions": bures.trust_regions,
    "conjugate gradients": bures.conjugate_gradient,
    "L-BFGS": bures.lbfgs,
}


def skewed(kind, condition, seed):
    """A problem of `geometries`, or sensing through covariances, from a start near Z."""
    if kind != "skewed sensing":
        return problem(kind, condition, seed)
    target, sensors, _ = problem("sensing", condition, seed)
    rng = np.random.default_rng(100 + seed)
    for axis, size in ((1, SHAPE[0]), (2, SHAPE[1])):
        turn = np.linalg.qr(rng.standard_normal((size, size)))[0]
        root = turn * np.geomspace(1, 1 / SKEW, size) ** 0.5 @ turn.T
        sensors = jnp.moveaxis(jnp.tensordot(sensors, root, (axis, 0)), -1, axis)
    noise = rng.standard_normal(SHAPE) / sum(np.sqrt(SHAPE))
    return target, sensors, bures.from_matrix(target + 0.3 * noise, RANK)


@partial(jax.jit, static_argnames="metric")
def some(target, sensors, point, size, metric):
    """Some steps of gradient descent, each with the relative error before it."""
    data = measured(sensors, target)

    def loss(a, b):
        return 0.5 * jnp.sum((measured(sensors, a @ b) - data) ** 2)

    if metric == "gauss_newton":
        metric = bures.gauss_newton(
            lambda a, b: measured(sensors, a @ b), lambda seen: 0.5 * jnp.sum((seen - data) ** 2)
        )

    def one(carry, _):
        point, size = carry
        error = jnp.linalg.norm(point.lora_a @ point.lora_b - target) / jnp.linalg.norm(target)
        descent = bures.riemannian_gradient_descent(loss, point, steps=1, step_size=size, search=True, metric=metric)
        return (descent.point, 2 * descent.step_sizes[0]), error

    return jax.lax.scan(one, (point, size), length=CHUNK)


def descend(target, sensors, point, metric):
    """Iterations and seconds of gradient descent, infinite if it does not get there."""
    size, done = jnp.asarray(1.0), 0
    jax.block_until_ready(some(target, sensors, point, size, metric))
    start = time.perf_counter()
    while done < MOST:
        (point, size), errors = jax.block_until_ready(some(target, sensors, point, size, metric))
        reached = np.flatnonzero(np.asarray(errors) <= 1e-10)
        if reached.size:
            return done + int(reached[0]), (time.perf_counter() - start) * (done + reached[0]) / (done + CHUNK)
        done += CHUNK
        if not np.isfinite(errors[-1]) or float(size) == 0:
            break
    return np.inf, np.inf


@partial(jax.jit, static_argnames="name")
def solved(target, sensors, point, tolerance, name):
    """The outcome of a solver."""
    data = measured(sensors, target)

    def loss(point):
        return 0.5 * jnp.sum((measured(sensors, point.lora_a @ point.lora_b) - data) ** 2)

    found = SOLVERS[name](loss, point, steps=MOST, tolerance=tolerance)
    error = jnp.linalg.norm(bures.to_matrix(found.point) - target) / jnp.linalg.norm(target)
    return found.iterations, error


def solve(target, sensors, point, name):
    """Iterations and seconds of a solver, with the largest tolerance of its gradient that is enough."""
    scale = float(jnp.linalg.norm(target))
    for tolerance in scale * 10.0 ** np.arange(-9.0, -14.0, -1):
        jax.block_until_ready(solved(target, sensors, point, tolerance, name))
        start = time.perf_counter()
        iterations, error = jax.block_until_ready(solved(target, sensors, point, tolerance, name))
        if error <= 1e-10:
            return int(iterations), time.perf_counter() - start
    return np.inf, np.inf


def main() -> None:
    """Runs and records."""
    rows = []
    for kind in KINDS:
        for condition in CONDITIONS:
            problems = [skewed(kind, condition, seed) for seed in range(SEEDS)]
            for name in (*METRICS, *SOLVERS):
                runs = [(solve if name in SOLVERS else descend)(*parts, name) for parts in problems]
                iterations, seconds = (np.median(x) for x in zip(*runs, strict=True))
                reached = bool(np.isfinite(iterations))
                row = {
                    "problem": kind,
                    "solver": name,
                    "condition": condition,
                    "iterations": iterations if reached else None,
                    "seconds": seconds if reached else None,
                    "reached": sum(bool(np.isfinite(run[0])) for run in runs),
                    "n": SEEDS,
                }
                rows.append(row)
                print(row, flush=True)
    write("solvers", {"rows": rows})


if __name__ == "__main__":
    with jax.enable_x64(True):
        main()
