"""Measured against predicted convergence: `python experiments/theory/rates.py` (30 s on two CPU cores).

Near a minimiser of `1/2 ||A B - Z||^2` gradient descent with the step `2 / (lambda_1 + lambda_min)` should multiply the
error by `(kappa - 1) / (kappa + 1)` a step. Z is 20 x 20 of rank 4, its singular values from kappa_Z to 1. From the
minimiser at which plain gradient descent ends (A standard normal, B zero at the start), and from the balanced one with
the same product, both displaced a little, the contraction of the distance of A B from Z is measured.
"""

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from recording import quantiles, write

from balora_jax import bures
from balora_jax.conditioning import (
    factorization_condition_number,
    factorization_eigenvalues,
    least_condition_number,
    optimal_step,
    predicted_rate,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIZE, RANK, SEEDS, SPREADS, DISPLACEMENT = 20, 4, 16, (1.0, 3.0, 10.0, 30.0), 1e-6


def minimiser(seed, spread):
    """The target, the pair at which gradient descent of small steps ends, and the balanced pair."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((SIZE, RANK)))[0] for _ in range(2))
    target = jnp.asarray(u * np.geomspace(spread, 1, RANK) @ v.T)
    start = jnp.asarray(rng.standard_normal((SIZE, RANK))), jnp.zeros((RANK, SIZE))

    def step(_, pair):
        a, b = pair
        residual = a @ b - target
        return a - 0.02 * residual @ b.T, b - 0.02 * a.T @ residual

    return target, jax.lax.fori_loop(0, 20_000, step, start), bures.from_matrix(target, RANK)


minimisers = jax.jit(minimiser, static_argnums=(0, 1))


def contraction(target, pair, step, count, seed):
    """By what `||A B - Z||` shrinks a step, over the second half of some steps."""
    keys = jax.random.split(jax.random.key(seed))
    pair = tuple(x + DISPLACEMENT * jax.random.normal(k, x.shape) for x, k in zip(pair, keys, strict=True))

    def descend(pair, _):
        a, b = pair
        residual = a @ b - target
        return (a - step * residual @ b.T, b - step * a.T @ residual), jnp.linalg.norm(residual)

    errors = np.asarray(jax.jit(lambda pair: jax.lax.scan(descend, pair, length=count)[1])(pair))
    half = count // 2
    return (errors[-1] / errors[half]) ** (1 / (count - 1 - half))


def main() -> None:
    """Runs, draws and records."""
    rows, figure = [], plt.figure(figsize=(5, 4))
    for spread in SPREADS:
        for name in ("LoRA", "BaLoRA"):
            found = []
            for seed in range(SEEDS):
                target, end, balanced = minimisers(seed, spread)
                pair = end if name == "LoRA" else balanced
                values = factorization_eigenvalues(*pair)
                kappa = factorization_condition_number(*pair)
                # as many steps as bring a normal displacement down to a thousandth
                count = int(np.clip(7 / -np.log(predicted_rate(kappa)), 20, 20_000))
                measured = contraction(target, pair, optimal_step(values[0], values[-1]), count, seed)
                found.append((float(kappa), float(predicted_rate(kappa)), float(measured)))
            kappa, predicted, measured = np.array(found).T
            rows.append(
                {
                    "spread": spread,
                    "minimiser": name,
                    "least_condition_number": float(least_condition_number([spread, 1.0], 2)),
                    "condition_number": quantiles(kappa),
                    "predicted": quantiles(predicted),
                    "measured": quantiles(measured),
                    "largest_error_of_1_minus_rate": float(np.abs((1 - measured) / (1 - predicted) - 1).max()),
                }
            )
            plt.plot(1 - predicted, 1 - measured, "o", ms=4, alpha=0.6, color={"LoRA": "C0", "BaLoRA": "C1"}[name])
            print({k: v if not isinstance(v, dict) else f"{v['median']:.4g}" for k, v in rows[-1].items()}, flush=True)
    plt.plot([1e-4, 1], [1e-4, 1], color="0.6", lw=1)
    plt.gca().set(xscale="log", yscale="log", xlabel="1 - predicted rate", ylabel="1 - measured rate")
    write("rates", {"rows": rows}, figure)


if __name__ == "__main__":
    with jax.enable_x64(True):
        main()
