"""The factorisations of a number: `python experiments/theory/fig2.py` (3 s on two CPU cores).

All pairs (A, B) of 1 x 1 factors with A B = 1 are one adapter; the balanced ones are A = B = +-1. Gradient descent of
`1/2 (A B - 1)^2` from five starts of equal products, with and without balancing. Figure 2 of arXiv 2605.31484.
"""

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from recording import write

from balora_jax import balora_project

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STARTS, PRODUCT, RATE, STEPS = (0.25, 0.4, 0.7, 1.2, 3.0), 0.3, 0.05, 400


def trajectory(tx, start):
    """The factors over the steps, `(STEPS + 1, 2)`."""
    params = {"lora_a": jnp.full((1, 1), start), "lora_b": jnp.full((1, 1), PRODUCT / start)}

    def loss(params):
        return 0.5 * jnp.sum((params["lora_a"] @ params["lora_b"] - 1) ** 2)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), jnp.concatenate(jax.tree.leaves(params)).ravel()

    return jax.lax.scan(step, (params, tx.init(params)), length=STEPS + 1)[1]


def main() -> None:
    """Runs, draws and records."""
    methods = {"LoRA": optax.sgd(RATE), "BaLoRA": optax.chain(optax.sgd(RATE), balora_project(least_ratio=0))}
    starts = jnp.asarray(STARTS)
    paths = {name: np.asarray(jax.vmap(lambda s, tx=tx: trajectory(tx, s))(starts)) for name, tx in methods.items()}
    results: dict = {"starts": STARTS, "product": PRODUCT, "learning_rate": RATE}
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), sharex=True, sharey=True, layout="constrained")
    grid = np.geomspace(0.1, 4, 200)
    for axis, (name, path) in zip(axes, paths.items(), strict=True):
        errors = np.abs(path[:, :, 0] * path[:, :, 1] - 1)
        ends = path[:, -1]
        results[name] = {
            "steps_to_1e-3": [int(np.argmax(e < 1e-3)) if (e < 1e-3).any() else None for e in errors],
            "difference_of_squares": [(path[:, t, 0] ** 2 - path[:, t, 1] ** 2).tolist() for t in (0, STEPS)],
            "condition_number_at_the_end": ((ends**2).sum(1)).tolist(),
        }
        for product, meaning, place in ((PRODUCT, "start", (1.45, 0.06)), (1.0, "target", (2.1, 0.52))):
            axis.plot(grid, product / grid, color="0.7", lw=1)
            axis.text(*place, f"A B = {product:g} ({meaning})", color="0.4")
        axis.plot(grid, grid, color="C1", lw=1, ls="--")
        axis.text(1.62, 1.5, "balanced", color="C1")
        for one in path:
            axis.plot(one[:, 0], one[:, 1], ".-", ms=2, lw=0.8, color="C0")
            axis.plot(*one[0], "o", color="C0", ms=4)
        axis.set(title=name, xlabel="A", ylabel="B", xlim=(0, 3.4), ylim=(0, 2))
    write("fig2", results, figure)
    print(results)


if __name__ == "__main__":
    with jax.enable_x64(True):
        main()
