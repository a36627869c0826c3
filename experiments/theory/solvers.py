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
from geometries import RANK, SHAPE, descend, measured, problem
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
                if name in SOLVERS:
                    runs = [solve(*parts, name) for parts in problems]
                else:
                    runs = [descend(*parts, name, most=MOST, chunk=CHUNK)[:2] for parts in problems]
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
