"""Which of optax's optimizers may be followed by the projection: `python experiments/optimizers/optimizers.py`.

A 20 x 20 matrix of rank 4, the product of standard normal factors, is approximated by `A B` of rank 4, `A` uniform as
in LoRA and `B` zero at the start, under the mean squared error, with equal rates for both factors: by each optimizer
alone, and followed by `balora_project` that waits for nothing, for several shares `least_ratio`, or for some first
steps. The rate of each is the one of 7 with the lowest median loss over the seeds after 200 steps; runs that diverge
count as infinite. Writes `optimizers.json` and the table `optimizers.md`. About 10 minutes on two CPU cores.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from balora_jax import balora, balora_project
from balora_jax.training.records import environment

HERE = Path(__file__).parent
SIZE, RANK, SEEDS, STEPS = 20, 4, 5, 200
RATES = np.geomspace(3e-3, 3, 7)
RATIOS = (0.0, 0.03, 0.1, 0.3)
START_STEP = 50
WORSE = 3.0
"""Called worse if the median loss is this much higher than the optimizer's alone, and above `ROUNDING`."""
ROUNDING = 1e-8

OPTIMIZERS = {
    "acprop": contrib.acprop,
    "adabelief": optax.adabelief,
    "adadelta": optax.adadelta,
    "adafactor": optax.adafactor,
    "adagrad": optax.adagrad,
    "adam": optax.adam,
    "adamax": optax.adamax,
    "adamaxw": optax.adamaxw,
    "adamw": optax.adamw,
    "adan": optax.adan,
    "ademamix": contrib.ademamix,
    "adopt": contrib.adopt,
    "amsgrad": optax.amsgrad,
    "cocob": contrib.cocob,
    "dadapt_adamw": contrib.dadapt_adamw,
    "dog": contrib.dog,
    "dowg": contrib.dowg,
    "fromage": optax.fromage,
    "galore": functools.partial(contrib.galore, rank=RANK),
    "lamb": optax.lamb,
    "lars": optax.lars,
    "lion": optax.lion,
    "madgrad": contrib.madgrad,
    "mechanize(adamw)": lambda rate: contrib.mechanize(optax.adamw(rate)),
    "muon": contrib.muon,
    "nadam": optax.nadam,
    "nadamw": optax.nadamw,
    "noisy_sgd": optax.noisy_sgd,
    "novograd": optax.novograd,
    "optimistic_adam_v2": optax.optimistic_adam_v2,
    "optimistic_gradient_descent": optax.optimistic_gradient_descent,
    "prodigy": contrib.prodigy,
    "radam": optax.radam,
    "rmsprop": optax.rmsprop,
    "rprop": optax.rprop,
    "schedule_free_adamw": contrib.schedule_free_adamw,
    "schedule_free_sgd": contrib.schedule_free_sgd,
    "sgd": optax.sgd,
    "sgd, momentum 0.9": functools.partial(optax.sgd, momentum=0.9),
    "sign_sgd": optax.sign_sgd,
    "simplified_ademamix": contrib.simplified_ademamix,
    "sm3": optax.sm3,
    "yogi": optax.yogi,
}
"""Of a rate. Not here are those that ask for more than gradients: lbfgs, polyak_sgd, sophia, momo, sam."""


def problem(seed: jax.typing.ArrayLike):
    """The target and the factors at the start."""
    keys = jax.random.split(jax.random.key(seed), 3)
    target = jax.random.normal(keys[0], (SIZE, RANK)) @ jax.random.normal(keys[1], (RANK, SIZE))
    lora_a = jax.random.uniform(keys[2], (SIZE, RANK), minval=-1, maxval=1) / SIZE**0.5
    return target, {"lora_a": lora_a, "lora_b": jnp.zeros((RANK, SIZE))}


def final_loss(tx: optax.GradientTransformation, seed: jax.typing.ArrayLike, steps: int = STEPS):
    """The loss after all steps."""
    target, params = problem(seed)

    def loss(params):
        return 0.5 * jnp.mean((params["lora_a"] @ params["lora_b"] - target) ** 2)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=steps)
    return loss(params)


def best(losses: np.ndarray) -> dict:
    """The best rate for losses `(rates, seeds)`: its median, quartiles, and how many of all runs diverged."""
    losses = np.where(np.isfinite(losses), losses, np.inf)
    low, median, high = np.quantile(losses, (0.25, 0.5, 0.75), axis=1, method="nearest")
    i = int(median.argmin())
    return {
        "rate": RATES[i],
        "on_edge": i in (0, len(RATES) - 1),
        "median": median[i],
        "low": low[i],
        "high": high[i],
        "n": losses.shape[1],
        "diverged": int(np.isinf(losses).sum()),
    }


def measured(factory) -> dict:
    """The outcomes of an optimizer: alone, and followed by the projection in each way."""

    def grid(transformation, *settings):
        one = jax.vmap(
            lambda rate, seed, *s: final_loss(transformation(rate, *s), seed), (None, 0, *len(settings) * (None,))
        )
        over_rates = jax.vmap(one, (0, None, *len(settings) * (None,)))
        seeds, rates = jnp.arange(SEEDS), jnp.asarray(RATES, jnp.float32)
        if not settings:
            return np.asarray(jax.jit(over_rates)(rates, seeds))
        return np.asarray(jax.jit(jax.vmap(over_rates, (None, None, *len(settings) * (0,))))(rates, seeds, *settings))

    def projected(rate, ratio, start):
        return optax.chain(factory(rate), balora_project(least_ratio=ratio, start_step=start))

    ratios = jnp.asarray([*RATIOS, 0.0])
    starts = jnp.asarray([0] * len(RATIOS) + [START_STEP])
    names = [*(f"least_ratio={ratio:g}" for ratio in RATIOS), f"start_step={START_STEP}"]
    outcome = {"alone": best(grid(factory))}
    outcome |= {name: best(losses) for name, losses in zip(names, grid(projected, ratios, starts), strict=True)}
    try:
        balora(factory(0.1)).init(problem(0)[1])
        outcome["moments"] = "carried"
    except ValueError:
        outcome["moments"] = "transport=False"
    return outcome


def verdict(outcome: dict) -> str:
    """What the table says of an optimizer."""
    most = max(WORSE * outcome["alone"]["median"], ROUNDING)
    good = [name for name, cell in outcome.items() if name not in ("alone", "moments") and cell["median"] <= most]
    if f"least_ratio={RATIOS[0]:g}" in good:
        return "works"
    if good:
        return f"works with {good[0]}"
    return "worse than alone"


def table(results: dict) -> str:
    """The table as Markdown."""
    columns = [name for name in next(iter(results.values())) if name != "moments"]
    lines = [f"| optimizer | {' | '.join(columns)} | `balora` | verdict |", "|---" * (len(columns) + 3) + "|"]
    for name, outcome in results.items():
        cells = [
            f"{outcome[c]['median']:.0e} at {outcome[c]['rate']:.2g}{'*' * outcome[c]['on_edge']}" for c in columns
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {outcome['moments']} | {verdict(outcome)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs everything, writes the record and prints the table."""
    jax.config.update("jax_disable_most_optimizations", True)  # to compile is most of the work
    results = {}
    for name, factory in OPTIMIZERS.items():
        results[name] = measured(factory)
        print(table({name: results[name]}).splitlines()[-1], flush=True)
    record = {"environment": environment(), "results": results}
    (HERE / "optimizers.json").write_text(json.dumps(record, indent=1, default=float) + "\n")
    (HERE / "optimizers.md").write_text(table(results) + "\n")


if __name__ == "__main__":
    main()
