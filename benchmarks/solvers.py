"""Solvers on matrices of rank r beside pymanopt's, on the same problems from the same starts.

    python benchmarks/solvers.py [--repeats N] [--record FOLDER]

The problems are those of `experiments/theory/geometries.py`, 30 x 25 of rank 3 in float64: factorisation, sensing with
Gaussian measurements, completion from a start near Z. Each solver ends when the norm of the gradient is at most 1e-12
sigma_1, by when `||X - Z|| <= 1e-12 ||Z||`; where it does not get there within a minute or 2,000 iterations the error
that is left is shown.

pymanopt's trust regions need a Hessian that its manifold of fixed-rank matrices lacks, so they run on the two factors
as Euclidean matrices, with exact gradients and Hessians in NumPy; its conjugate gradients run on that manifold. Solvers
are run in turn, one of each in every repeat, so that a noisy machine harms them alike; times are medians without
compilation, "of ours" is the median of the ratios within a repeat. With `--record` they are written to
`solvers-DEVICE.json`.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pymanopt
from pymanopt.manifolds import Euclidean, FixedRankEmbedded, Product
from pymanopt.optimizers import ConjugateGradient, TrustRegions
from record_files import add_record_flag, with_environment, write

from balora_jax import bures

sys.path.append(str(Path(__file__).parent.parent / "experiments" / "theory"))
import geometries

KINDS = ("factorisation", "sensing", "completion, near")
CONDITIONS = (1.0, 10.0, 100.0)
TOLERANCE, STEPS, SECONDS = 1e-12, 2000, 60


def ours(solver, target, sensors, start, tolerance):
    """A call of one of this package's solvers: iterations and the error."""
    data = geometries.measured(sensors, target)

    def loss(point):
        return 0.5 * jnp.sum((geometries.measured(sensors, point.lora_a @ point.lora_b) - data) ** 2)

    solve = jax.jit(partial(solver, loss, steps=STEPS, tolerance=tolerance))

    def call():
        found = jax.block_until_ready(solve(start))
        return int(found.iterations), bures.to_matrix(found.point)

    return call


def gradient_and_product(target, sensors):
    """The Euclidean gradient, and the Hessian's product with a direction, in NumPy."""
    if sensors is None:
        return lambda x: x - target, lambda d: d
    if sensors.ndim == 2:
        return lambda x: sensors**2 * (x - target), lambda d: sensors**2 * d
    rows = np.asarray(sensors).reshape(sensors.shape[0], -1)

    def product(d):
        return (rows.T @ (rows @ d.ravel())).reshape(d.shape)

    return lambda x: product(x - target), product


def pymanopt_trust_regions(target, sensors, start, tolerance):
    """A call of pymanopt's trust regions on the factors."""
    target = np.asarray(target)
    gradient, product = gradient_and_product(target, None if sensors is None else np.asarray(sensors))
    manifold = Product([Euclidean(*x.shape) for x in start])

    @pymanopt.function.numpy(manifold)
    def cost(a, b):
        return 0.5 * np.sum((a @ b - target) * gradient(a @ b))

    @pymanopt.function.numpy(manifold)
    def slope(a, b):
        g = gradient(a @ b)
        return g @ b.T, a.T @ g

    @pymanopt.function.numpy(manifold)
    def bend(a, b, da, db):
        g, h = gradient(a @ b), product(da @ b + a @ db)
        return h @ b.T + g @ db.T, a.T @ h + da.T @ g

    problem = pymanopt.Problem(manifold, cost, euclidean_gradient=slope, euclidean_hessian=bend)
    return _called(TrustRegions, problem, [np.array(x) for x in start], tolerance, lambda p: p[0] @ p[1])


def pymanopt_conjugate_gradient(target, sensors, start, tolerance):
    """A call of pymanopt's conjugate gradients on the embedded manifold."""
    target = np.asarray(target)
    gradient, _ = gradient_and_product(target, None if sensors is None else np.asarray(sensors))
    x = np.asarray(bures.to_matrix(start))
    rank = start[0].shape[1]
    manifold = FixedRankEmbedded(*x.shape, rank)

    @pymanopt.function.numpy(manifold)
    def cost(u, s, vt):
        matrix = u * s @ vt
        return 0.5 * np.sum((matrix - target) * gradient(matrix))

    @pymanopt.function.numpy(manifold)
    def slope(u, s, vt):
        g = gradient(u * s @ vt)
        return g @ vt.T * s, np.diagonal(u.T @ g @ vt.T), s[:, None] * (u.T @ g)

    u, s, vt = np.linalg.svd(x, full_matrices=False)
    point = type(manifold.random_point())(u[:, :rank], s[:rank], vt[:rank])
    problem = pymanopt.Problem(manifold, cost, euclidean_gradient=slope)
    return _called(ConjugateGradient, problem, point, tolerance, lambda p: p[0] * p[1] @ p[2])


def _called(kind, problem, point, tolerance, matrix):
    optimizer = kind(max_iterations=STEPS, max_time=SECONDS, min_gradient_norm=tolerance, min_step_size=0, verbosity=0)

    def call():
        found = optimizer.run(problem, initial_point=point)
        return found.iterations, matrix(found.point)

    return call


SOLVERS = {
    "trust_regions": partial(ours, bures.trust_regions),
    "pymanopt, trust regions": pymanopt_trust_regions,
    "conjugate_gradient": partial(ours, bures.conjugate_gradient),
    "pymanopt, conjugate gradients": pymanopt_conjugate_gradient,
    "lbfgs": partial(ours, bures.lbfgs),
}


def rows(repeats):
    """What each solver needs on each problem."""
    for kind in KINDS:
        for condition in CONDITIONS:
            target, sensors, start = geometries.problem(kind, condition, 0)
            calls = {name: make(target, sensors, start, TOLERANCE * condition) for name, make in SOLVERS.items()}
            taken: dict[str, list[float]] = {name: [] for name in calls}
            found = {name: call() for name, call in calls.items() if not name.startswith("pymanopt")}  # compiles
            for _ in range(repeats):
                for name, call in calls.items():
                    begin = time.perf_counter()
                    found[name] = call()
                    taken[name].append(time.perf_counter() - begin)
            for name in calls:
                iterations, matrix = found[name]
                mine = taken["trust_regions" if "trust" in name else "conjugate_gradient"]
                yield {
                    "problem": kind,
                    "condition": condition,
                    "solver": name,
                    "iterations": iterations,
                    "milliseconds": 1e3 * float(np.median(taken[name])),
                    "of_ours": float(np.median(np.divide(taken[name], mine))),
                    "error": float(np.linalg.norm(matrix - target) / np.linalg.norm(target)),
                    "n": repeats,
                }


def main() -> None:
    """Measures, prints and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each time")
    add_record_flag(parser)
    arguments = parser.parse_args()
    found = []
    for row in rows(arguments.repeats):
        found.append(row)
        print(
            f"{row['problem']:17} {row['condition']:5.0f}  {row['solver']:30} {row['iterations']:5} iterations "
            f"{row['milliseconds']:9.1f} ms {row['of_ours']:7.2f} of ours, error {row['error']:.0e}",
            flush=True,
        )
    write(arguments.record, f"solvers-{jax.devices()[0].platform}.json", with_environment(found))


if __name__ == "__main__":
    with jax.enable_x64(True):
        main()
