"""Gauge x transport under true Adam on a 20 x 20 matrix: `python experiments/gauges/synthetic.py`.

A standard normal target is approximated by `A B` of rank 4 (`A` standard normal, `B` zero at the start), by Adam with
a constant learning rate. Every method sees the same targets and starts; its learning rate is the one of 16 with the
lowest median of the loss, less that of the best rank-4 approximation, over 32 seeds, for each number of steps by
itself. Against LoRA it is the geometric mean of the ratios seed by seed, with its 95 % interval by Student's t of the
logarithms. What is below 1e-11 is rounding: it ranks nothing, and counts as 1e-11 in the ratios. All runs of a method
are one compiled program, in float64. Writes `synthetic.json` and prints the table of the README.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from balora_jax import GAUGES, balora
from balora_jax.training.comparison import paired_ratio
from balora_jax.training.records import environment

SIZE, RANK, SEEDS, STEPS = 20, 4, 32, (100, 300)
RATES = np.geomspace(1e-3, 1.0, 16)
ROUNDING = 1e-11


def excess_losses(transformation, seed, rate):
    """Loss less the optimum, after each number of `STEPS`."""
    keys = jax.random.split(jax.random.key(seed))
    target = jax.random.normal(keys[0], (SIZE, SIZE))
    optimum = 0.5 * jnp.sum(jnp.linalg.svd(target, compute_uv=False)[RANK:] ** 2)
    params = {"lora_a": jax.random.normal(keys[1], (SIZE, RANK)), "lora_b": jnp.zeros((RANK, SIZE))}
    tx = transformation(rate)

    def loss(params):
        return 0.5 * jnp.sum((params["lora_a"] @ params["lora_b"] - target) ** 2)

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    _, losses = jax.lax.scan(step, (params, tx.init(params)), length=STEPS[-1] + 1)
    return losses[jnp.array(STEPS)] - optimum


def study() -> list[dict]:
    """One row per method and number of steps."""
    methods = {("LoRA", ""): optax.adam}
    for gauge in GAUGES:
        for transport in (False, True):
            methods[gauge, "carried" if transport else "left"] = lambda rate, gauge=gauge, transport=transport: balora(
                optax.adam(rate), gauge=gauge, transport=transport, least_ratio=0
            )
    rows: list[dict] = []
    ends: list[np.ndarray] = []  # of LoRA
    for (gauge, moments), transformation in methods.items():
        run = jax.vmap(jax.vmap(lambda s, r, t=transformation: excess_losses(t, s, r), (0, None)), (None, 0))
        found = np.asarray(jax.jit(run)(jnp.arange(SEEDS), jnp.asarray(RATES)))  # (rates, seeds, steps)
        for i, steps in enumerate(STEPS):
            medians = np.median(np.nan_to_num(found[:, :, i], nan=np.inf), axis=1)
            best = int(medians.argmin())
            quarters = np.quantile(found[best, :, i], (0.25, 0.75))
            if gauge == "LoRA":
                ends.append(found[best, :, i])
            of_lora = paired_ratio(found[best, :, i].tolist(), ends[i].tolist(), floor=ROUNDING)
            rows.append(
                {
                    "gauge": gauge,
                    "moments": moments,
                    "steps": steps,
                    "median": float(medians[best]),
                    "quartiles": quarters.tolist(),
                    "of_lora": dataclasses.asdict(of_lora),
                    "n": SEEDS,
                    "learning_rate": float(RATES[best]),
                    "on_edge": best in (0, len(RATES) - 1),
                    "diverged": int(np.sum(~np.isfinite(found[best, :, i]))),
                }
            )
    return rows


def show(rows: list[dict]) -> None:
    """Prints the table of the README: a row for each method, with its columns for each number of steps."""
    print("| gauge | moments |" + "".join(f" excess loss after {steps} steps | of LoRA's, paired |" for steps in STEPS))
    print("|---" * (2 + 2 * len(STEPS)) + "|")
    for i in range(0, len(rows), len(STEPS)):
        cells = [rows[i]["gauge"], rows[i]["moments"] or "-"]
        for row in rows[i : i + len(STEPS)]:
            low, high = row["quartiles"]
            known = row["median"] > ROUNDING
            cells.append(f"{row['median']:.1e} [{low:.1e}, {high:.1e}]" if known else "rounding")
            bound = "" if known else "at most "
            ratio = "{mean:.2g} [{low:.2g}, {high:.2g}]".format(**row["of_lora"])
            cells.append("-" if row["gauge"] == "LoRA" else bound + ratio)
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    with jax.enable_x64(True):
        rows = study()
    show(rows)
    record = {"environment": environment(), "rows": rows}
    (Path(__file__).parent / "synthetic.json").write_text(json.dumps(record, indent=1) + "\n")
