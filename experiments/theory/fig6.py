"""Condition numbers of factorisations: `python experiments/theory/fig6.py` (40 s on two CPU cores).

Of the minimisers (A, B) of `1/2 ||A B - Z||^2`, Z of size 20 x 20 and rank r = 4: random refactorisations
`(A M, M^-1 B)` of the balanced pair, M standard normal; and the end points of gradient descent with and without
balancing, from the usual start (A standard normal, B zero), its learning rate the best of a grid for each run. Once for
Z of exactly rank 4, and once for a full matrix. All are given as multiples of the least condition number over the
orbit, `2 sigma_1 / (sigma_r - sigma_{r+1})`. Figure 6 of arXiv 2605.31484.
"""

from functools import partial

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from recording import quantiles, write

from balora_jax import balora_project
from balora_jax.conditioning import factorization_condition_number, least_condition_number

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIZE, RANK, SEEDS, REFACTORISATIONS, STEPS = 20, 4, 32, 2000, 3000
RATES = np.geomspace(3e-3, 1e-1, 8)
METHODS = {"LoRA": optax.identity, "BaLoRA": partial(balora_project, least_ratio=0)}  # the paper waits for nothing


def problem(key, exact):
    """Target and start."""
    keys = jax.random.split(key, 4)
    target = jax.random.normal(keys[0], (SIZE, SIZE))
    if exact:
        target = jax.random.normal(keys[1], (SIZE, RANK)) @ jax.random.normal(keys[2], (RANK, SIZE)) / RANK**0.5
    return target, {"lora_a": jax.random.normal(keys[3], (SIZE, RANK)), "lora_b": jnp.zeros((RANK, SIZE))}


def end_points(method, exact):
    """The factors where the descent ends for the best rate of each seed, and how far above the optimum."""

    def run(seed, rate):
        target, params = problem(jax.random.key(seed), exact)
        tx = optax.chain(optax.sgd(rate), METHODS[method]())
        optimum = 0.5 * jnp.sum(jnp.linalg.svd(target, compute_uv=False)[RANK:] ** 2)

        def loss(params):
            return 0.5 * jnp.sum((params["lora_a"] @ params["lora_b"] - target) ** 2)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=STEPS)
        return params, loss(params) - optimum, target

    program = jax.jit(jax.vmap(jax.vmap(run, (0, None)), (None, 0)))
    params, excess, target = jax.tree.map(np.asarray, program(jnp.arange(SEEDS), jnp.asarray(RATES)))
    best = np.where(np.isfinite(excess), excess, np.inf).argmin(0)
    pick = (best, np.arange(SEEDS))
    return params["lora_a"][pick], params["lora_b"][pick], excess[pick], target[pick]


def within(ratios, bins):
    """Ratios for a histogram: one that rounding has left below 1 belongs to the first bin, a huge one to the last."""
    return np.clip(ratios, bins[0], bins[-1])


def main() -> None:
    """Runs, draws and records."""
    results: dict = {}
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for axis, exact in zip(axes, (True, False), strict=True):
        name = "rank 4" if exact else "full rank"
        rng = np.random.default_rng(0)
        target = np.asarray(problem(jax.random.key(0), exact)[0])
        u, s, vt = np.linalg.svd(target)
        root, rest = np.sqrt(s[:RANK]), () if exact else s[RANK:]
        mixes = rng.standard_normal((REFACTORISATIONS, RANK, RANK))
        pairs = u[:, :RANK] * root @ mixes, np.linalg.solve(mixes, root[:, None] * vt[:RANK])
        values = s[: RANK + len(rest)]
        refactored = factorization_condition_number(*pairs, rest) / least_condition_number(values, RANK)
        results[name] = {"refactorisations": quantiles(refactored) | {"least": float(refactored.min())}}
        bins = np.geomspace(1, 1e6, 49)
        axis.hist(
            within(refactored, bins),
            bins,
            weights=np.full(refactored.size, 1 / refactored.size),
            color="0.75",
            label="random refactorisations",
        )
        for method in METHODS:
            a, b, excess, targets = end_points(method, exact)
            done = excess < 1e-8
            ratios = []
            for one_a, one_b, one_target in zip(a[done], b[done], targets[done], strict=True):
                values = np.linalg.svd(one_target, compute_uv=False)
                rest = () if exact else values[RANK:]
                least = least_condition_number(values[: RANK + len(rest)], RANK)
                ratios.append(factorization_condition_number(one_a, one_b, rest) / least)
            ratio = np.array(ratios)
            results[name][f"end points of {method}"] = quantiles(ratio) | {
                "not_converged": int(np.sum(~done)),
                "most": float(ratio.max()),
            }
            axis.hist(
                within(ratio, bins),
                bins,
                weights=np.full(ratio.size, 1 / ratio.size),
                alpha=0.6,
                label=f"end points of {method}",
            )
        axis.set(xscale="log", title=f"Z of {name}", xlabel="condition number / least possible", ylabel="share")
        axis.legend(fontsize=7)
        print(name, results[name], flush=True)
    write("fig6", results, figure)


if __name__ == "__main__":
    with jax.enable_x64(True):
        main()
