"""LoRA against BaLoRA on matrices: `python experiments/theory/fig3.py` (1.5 minutes on two CPU cores).

Fits `1/2 ||W - Y||_F^2` with 20 x 20 matrices of standard normal entries, where W is one layer `W1 + A1 B1` or the
product of two, each with a frozen standard normal W and an adapter of rank 4, one factor standard normal and the
other zero. Three optimizers: gradient descent, the sign descent `g / (|g| + 1e-8)`, which the synthetic code of the
paper calls Adam, and Adam. Figure 3 of arXiv 2605.31484.

Both methods start from the same matrices for each of 32 seeds. The learning rate of a method is the one of a grid with
the lowest median of the last loss over the seeds; a choice on the edge of the grid is marked, and diverged runs count.
The losses are given less the lowest possible one; how the methods differ, as the geometric mean of the ratios seed by
seed, with its 95 % interval by Student's t of the logarithms. In a second study the settings are those of the paper's
code: 8 trajectories, its 50 learning rates, the best of them for each trajectory by itself. All runs of a method,
learning rates x seeds, are one compiled program, in float64.
"""

import time
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from recording import against, quantiles, table, write

from balora_jax import balora_project

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIZE, RANK, STEPS, SEEDS = 20, 4, 100, 32
RATES = {
    ("GD", 1): np.geomspace(1e-3, 1, 61),
    ("sign", 1): np.geomspace(1e-4, 1, 31),
    ("Adam", 1): np.geomspace(1e-3, 3, 31),
    ("GD", 2): np.geomspace(1e-5, 1e-1, 61),
    ("sign", 2): np.geomspace(1e-4, 1, 31),
    ("Adam", 2): np.geomspace(1e-3, 3, 31),
}
PAPER_RATES, PAPER_SEEDS = (np.linspace(1e-5, 0.3, 50), np.geomspace(1e-5, 0.3, 50)), 8
# Median loss less the optimum at iteration 100 from the published synthetic code; the last with the logarithmic grid.
PUBLISHED = {("sign", 1): (2.06, 0.344), ("GD", 1): (3.7e-3, 1e-4), ("sign", 2): (96.2, 22.8), ("GD", 2): (31.6, 14.1)}


def sign_descent(rate):
    """`-rate g / (|g| + 1e-8)`."""
    return optax.stateless(lambda g, _: jax.tree.map(lambda x: -rate * x / (jnp.abs(x) + 1e-8), g))


OPTIMIZERS = {"GD": optax.sgd, "sign": sign_descent, "Adam": optax.adam}
METHODS = {"LoRA": optax.identity, "BaLoRA": partial(balora_project, least_ratio=0)}  # the paper waits for nothing


def problem(key, layers):
    """Target, frozen weights and adapters, and the lowest possible loss."""
    keys = jax.random.split(key, 2 * layers + 1)
    target = jax.random.normal(keys[0], (SIZE, SIZE))
    frozen = [jax.random.normal(k, (SIZE, SIZE)) for k in keys[1 : layers + 1]]
    params = [
        {"lora_a": jax.random.normal(k, (SIZE, RANK)), "lora_b": jnp.zeros((RANK, SIZE))} for k in keys[layers + 1 :]
    ]
    # the adapters change the product by any matrix of rank layers * r
    values = jnp.linalg.svd(target - product(frozen), compute_uv=False)
    return target, frozen, params, 0.5 * jnp.sum(values[layers * RANK :] ** 2)


def product(matrices):
    """Of one matrix or two."""
    return matrices[0] if len(matrices) == 1 else matrices[0] @ matrices[1]


def excess_losses(tx, problem):
    """Loss less the optimum over the iterations, `(STEPS + 1,)`."""
    target, frozen, params, optimum = problem

    def loss(params):
        layers = [w + p["lora_a"] @ p["lora_b"] for w, p in zip(frozen, params, strict=True)]
        return 0.5 * jnp.sum((product(layers) - target) ** 2)

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    return jax.lax.scan(step, (params, tx.init(params)), length=STEPS + 1)[1] - optimum


def all_runs(optimizer, method, layers, rates, seeds):
    """`(rates, seeds, STEPS + 1)` by one program; and its time without compilation."""

    def run(seed, rate):
        tx = optax.chain(OPTIMIZERS[optimizer](rate), METHODS[method]())
        return excess_losses(tx, problem(jax.random.key(seed), layers))

    program = jax.jit(jax.vmap(jax.vmap(run, (0, None)), (None, 0)))
    program = program.lower(jnp.arange(seeds), jnp.asarray(rates)).compile()
    start = time.perf_counter()
    found = np.asarray(program(jnp.arange(seeds), jnp.asarray(rates)))
    return np.where(np.isfinite(found), found, np.inf), time.perf_counter() - start


def show(header: str, rows: list[dict]) -> None:
    """Prints rows, LoRA's and BaLoRA's in turn, as the table of the README."""
    cells = []
    for lora, balora in zip(rows[::2], rows[1::2], strict=True):
        cells.append([lora["optimizer"], str(lora["layers"])])
        for row in (lora, balora):
            diverged = f", {row['diverged']} of {row['n']} diverged" if row["diverged"] else ""
            cells[-1].append(f"{row['median']:.2g} [{row['low']:.2g}, {row['high']:.2g}]{diverged}")
            cells[-1] += [f"{row['published']:.3g}"] if "published" in row else []
        cells[-1].append("{mean:.2g} [{low:.2g}, {high:.2g}]".format(**balora["of_lora"]))
    table(header, cells)


def main() -> None:
    """Runs, draws and records."""
    rows, paper_rows = [], []
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.5), sharex=True)
    for (optimizer, layers), rates in RATES.items():
        ends: dict[str, list] = {"all": [], "paper": []}  # the last losses of each method, LoRA's first
        axis = axes[layers - 1][list(OPTIMIZERS).index(optimizer)]
        for method in METHODS:
            found, seconds = all_runs(optimizer, method, layers, rates, SEEDS)
            best = int(np.median(found[:, :, -1], axis=1).argmin())
            ends["all"].append(found[best, :, -1])
            row = {
                "optimizer": optimizer,
                "layers": layers,
                "method": method,
                **quantiles(found[best, :, -1]),
                "of_lora": against(ends["all"][-1], ends["all"][0]),
                "learning_rate": rates[best],
                "on_edge": best in (0, len(rates) - 1),
                "diverged_in_grid": int(np.sum(~np.isfinite(found[:, :, -1]))),
                "runs": int(found[:, :, -1].size),
                "seconds": seconds,
            }
            rows.append(row)
            low, middle, high = np.quantile(found[best], (0.25, 0.5, 0.75), axis=0, method="median_unbiased")
            axis.semilogy(middle, label=f"{method}, learning rate {rates[best]:.2g}")
            axis.fill_between(np.arange(STEPS + 1), low, high, alpha=0.25)
            if optimizer != "Adam":
                grid = PAPER_RATES[(optimizer, layers) == ("GD", 2)]
                found, _ = all_runs(optimizer, method, layers, grid, PAPER_SEEDS)
                per_run = found[:, :, -1].min(0)
                ends["paper"].append(per_run)
                published = PUBLISHED[optimizer, layers][list(METHODS).index(method)]
                paper_rows.append(
                    {
                        "optimizer": optimizer,
                        "layers": layers,
                        "method": method,
                        **quantiles(per_run),
                        "of_lora": against(per_run, ends["paper"][0]),
                        "published": published,
                    }
                )
        axis.set(title=f"{optimizer}, {layers} layer{'s' * (layers > 1)}", ylim=(1e-6 if layers == 1 else 1, None))
        axis.legend(fontsize=7)
    axes[1][1].set_xlabel("iteration")
    axes[0][0].set_ylabel("loss less the optimum")
    show("optimizer | layers | LoRA | BaLoRA | BaLoRA / LoRA, paired", rows)
    show("optimizer | layers | LoRA, here | published | BaLoRA, here | published | BaLoRA / LoRA, paired", paper_rows)
    write("fig3", {"rows": rows, "paper_settings": paper_rows}, figure)


if __name__ == "__main__":
    with jax.enable_x64(True):
        main()
