"""Does conditioning set the speed in a transformer? `python experiments/teacher/teacher.py CELL ...`; see PLAN.md.

A student with adapters learns a teacher, the shipped model with an adapter of a chosen spectrum, by their
Kullback-Leibler divergence, whose minimum is 0. CELL is RANK-CONDITION, `16-10` say; without one all nine are run. Each
cell leaves CELL.json, and what is there is not run again; `--report` writes the tables and the figure from all.
"""

import argparse
import functools
import itertools
import json
import math
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from balora_jax import balora_project
from balora_jax.adapters import add_adapters, iter_adapters, remove_adapters
from balora_jax.data.batches import shuffled
from balora_jax.files import whole_file
from balora_jax.methods import get_method
from balora_jax.models.weights import load_decoder
from balora_jax.settings import (
    AdapterSettings,
    BalanceSettings,
    Config,
    DataSettings,
    OptimizerSettings,
    TrainingSettings,
)
from balora_jax.training.adapted import AdaptedModel
from balora_jax.training.comparison import paired_difference
from balora_jax.training.loading import load_data
from balora_jax.training.records import environment
from balora_jax.training.standings import holm

HERE = Path(__file__).parent
TARGETS, SCALE, SIZE, ROWS, LENGTH, HELD_OUT = ("gate_proj", "up_proj", "down_proj"), 2.0, 0.2, 8, 64, 64
STEPS, TUNING_SEEDS, SEEDS = 300, (100, 101), tuple(range(8))
TIMES = tuple(round(x) for x in np.geomspace(3, STEPS, 10))
CELLS = tuple(f"{rank}-{condition}" for rank in (4, 16, 64) for condition in (1, 10, 100))
WITH_DESCENT = "16-10"

PAPER, WAITING = BalanceSettings(transport=False, least_ratio=0.0), BalanceSettings(transport=False)


def descent(rate, _):
    """Gradient descent."""
    return optax.sgd(rate)


def sign_descent(rate, _):
    """Descent along the signs of the gradient."""
    return optax.sign_sgd(rate)


def by(method):
    """The optimizer of one of the library's methods, without decay and clipping, at a constant rate."""

    def make(rate, balance):
        settings = OptimizerSettings(learning_rate=rate, weight_decay=0.0, clip_norm=None)
        options = {"warmup_steps": 10.0} if method == "reflora" else {}
        return get_method(method).transformation(settings, balance, steps=STEPS, scale=SCALE, options=options)

    return make


def projected(make):
    """An optimizer in front of the projection, in the paper's form or waiting."""
    return lambda rate, balance: optax.chain(make(rate, balance), balora_project(least_ratio=balance.least_ratio))


METHODS = {
    "GD: LoRA": (descent, PAPER, 1.0),
    "GD: BaLoRA, paper": (projected(descent), PAPER, 1.0),
    "GD: BaLoRA, waiting": (projected(descent), WAITING, 1.0),
    "AdamW: LoRA": (by("lora"), PAPER, 2e-3),
    "AdamW: BaLoRA, paper": (by("balora"), PAPER, 2e-3),
    "AdamW: BaLoRA": (by("balora"), BalanceSettings(), 2e-3),
    "sign: LoRA": (sign_descent, PAPER, 1e-3),
    "sign: BaLoRA, paper": (projected(sign_descent), PAPER, 1e-3),
    "sign: BaLoRA, waiting": (projected(sign_descent), WAITING, 1e-3),
    "AdamW: RefLoRA": (by("reflora"), PAPER, 2e-3),
    "AdamW: scaled": (by("scaled_adamw"), PAPER, 2e-3),
    "LoRA-RITE": (by("lora_rite"), PAPER, 2e-2),
}
"""The optimizer, how it balances, and the first rate that is tried."""


def reference(method):
    """The LoRA that a method is compared with."""
    kind = method.partition(":")[0]
    return f"{kind if kind in ('GD', 'sign') else 'AdamW'}: LoRA"


class Own(NamedTuple):
    """What a run has for itself of a model."""

    adapters: nnx.State
    random: nnx.State
    frozen: nnx.State


class Laboratory:
    """The task of one cell."""

    def __init__(self, rank, condition):
        self.config = Config(
            name="teacher",
            adapter=AdapterSettings(rank=rank, alpha=SCALE * rank, targets=TARGETS),
            data=DataSettings(train_examples=20_000, eval_examples=500, length=LENGTH),
            training=TrainingSettings(steps=STEPS, batch_size=ROWS),
        )
        self.model = AdaptedModel(self.config, load_decoder(self.config.model.path))
        self.rank, self.condition = rank, condition
        self.rows, _, _ = load_data(self.config.data, self.config.model.path)
        held_out = self.rows[-HELD_OUT:].arrays()
        self.held_out = {name: jnp.asarray(array) for name, array in held_out.items()}
        self.divergence = jax.jit(self._divergence)
        self.teacher, self.step = functools.cache(self._teacher), functools.cache(self._step)

    def _teacher(self, seed):
        """The weights of the teacher."""
        model = self.model.decoder(self.model.bare)
        add_adapters(model, targets=TARGETS, rank=self.rank, alpha=float(self.rank), rngs=nnx.Rngs(seed))
        sigma = np.geomspace(1, 1 / self.condition, self.rank)
        rng = np.random.default_rng(seed)
        for _, adapter in iter_adapters(model):
            layers = []
            for kernel in np.asarray(adapter.base.kernel[...]):
                u, v = (np.linalg.qr(rng.standard_normal((side, self.rank)))[0] for side in kernel.shape)
                size = SIZE * np.linalg.norm(kernel) / np.linalg.norm(sigma)
                layers.append((u * np.sqrt(size * sigma), (v * np.sqrt(size * sigma)).T))
            lora_a, lora_b = (np.stack(part).astype(np.float32) for part in zip(*layers, strict=True))
            adapter.lora_a[...], adapter.lora_b[...] = jnp.asarray(lora_a), jnp.asarray(lora_b)
        remove_adapters(model, merge=True)
        return nnx.state(model)

    def start(self, seed):
        """Fresh adapters, and what is frozen beside them."""
        return self.model.own_parts(self.model.start(self.model.bare, seed, self.config.adapter.alpha))

    def batches(self, seed):
        """Endless rows, without those that are held out."""
        order = shuffled(self.rows[:-HELD_OUT], seed=seed)
        for start in itertools.count(0, ROWS):
            rows = [order[start + i] for i in range(ROWS)]
            yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _divergence(self, adapters, parts, teacher, batch):
        """The mean divergence over the tokens, in nats."""
        inputs = {name: batch[name] for name in ("tokens", "positions", "segment_ids")}
        student = self.model(Own(adapters, *parts), self.model.base)
        target, found = (jax.nn.log_softmax(model(**inputs)) for model in (self.model.decoder(teacher), student))
        each = (jnp.exp(target) * (target - found)).sum(-1)
        return each.mean(where=batch["segment_ids"] > 0)

    def _step(self, method):
        """The compiled step of a method, whose rate is an argument."""
        make, balance, _ = METHODS[method]

        @jax.jit
        def step(rate, adapters, opt_state, parts, teacher, batch):
            grads = jax.grad(self._divergence)(adapters, parts, teacher, batch)
            updates, opt_state = make(rate, balance).update(grads, opt_state, adapters)
            return optax.apply_updates(adapters, updates), opt_state

        return step

    def run(self, method, rate, seed):
        """The divergence on held-out rows after each of TIMES steps; infinite from where it is no number."""
        make, balance, _ = METHODS[method]
        adapters, *parts = self.start(seed)
        teacher, opt_state, found = self.teacher(seed), make(rate, balance).init(adapters), []
        for number, batch in zip(range(1, STEPS + 1), self.batches(seed), strict=False):
            adapters, opt_state = self.step(method)(rate, adapters, opt_state, parts, teacher, batch)
            if number in TIMES:
                value = float(self.divergence(adapters, parts, teacher, self.held_out))
                found.append(value if math.isfinite(value) else math.inf)
                if not math.isfinite(value):
                    return found + [math.inf] * (len(TIMES) - len(found))
        return found

    def at_start(self, seed):
        """The divergence before training."""
        adapters, *parts = self.start(seed)
        return float(self.divergence(adapters, parts, self.teacher(seed), self.held_out))


def tuned(laboratory, method):
    """The rate of the lowest median divergence, on a grid that is extended until the best is inside, and the grid."""
    tried = {}

    def median(rate):
        if rate not in tried:
            tried[rate] = statistics.median(laboratory.run(method, rate, seed)[-1] for seed in TUNING_SEEDS)
        return tried[rate]

    best = METHODS[method][2]
    while (better := min((best / 2, best, best * 2), key=median)) != best:
        best = better
    return best, dict(sorted(tried.items()))


def cell(name):
    """Tunes and tests the methods of a cell, and writes its record."""
    rank, condition = map(int, name.split("-"))
    laboratory, file, about = Laboratory(rank, condition), HERE / f"{name}.json", environment()
    if file.exists():
        results = json.loads(file.read_text())["results"]
    else:
        at_start = [laboratory.at_start(seed) for seed in SEEDS]
        results = {"at_start": at_start, "times": TIMES, "seeds": SEEDS, "tuning_seeds": TUNING_SEEDS, "methods": {}}
    for method in METHODS:
        if method in results["methods"] or (name != WITH_DESCENT and method.startswith(("GD", "sign"))):
            continue
        start = time.monotonic()
        rate, tried = tuned(laboratory, method)
        runs = [laboratory.run(method, rate, seed) for seed in SEEDS]
        seconds = round(time.monotonic() - start)
        results["methods"][method] = {"rate": rate, "tried": list(tried.items()), "runs": runs, "seconds": seconds}
        results["methods"][method] |= {name: about[name] for name in ("commit", "uncommitted_changes")}
        with whole_file(file) as out:
            out.write(json.dumps({"environment": about, "results": results}, indent=1) + "\n")
        print(name, method, f"rate {rate:g}", f"median {statistics.median(run[-1] for run in runs):.3g}", flush=True)


def contrasts(results):
    """For each method the paired difference of log10 of the final divergence from its reference, by Holm corrected."""
    found = {}
    for method in results["methods"]:
        if method != reference(method):
            both = (results["methods"][name]["runs"] for name in (method, reference(method)))
            pair = [[math.log10(run[-1]) for run in runs] for runs in both]
            kept = [one for one in zip(*pair, strict=True) if all(map(math.isfinite, one))]
            found[method] = paired_difference(*zip(*kept, strict=True)) if len(kept) > 1 else None
    told = [difference for difference in found.values() if difference is not None]
    corrected = iter(holm([difference.p_value for difference in told]))
    return {name: (difference, next(corrected) if difference else None) for name, difference in found.items()}


def report():
    """Writes teacher.md, a table for each cell, and teacher.png, the divergence of the cell with all methods."""
    lines = []
    for name in (name for name in CELLS if (HERE / f"{name}.json").exists()):
        results = json.loads((HERE / f"{name}.json").read_text())["results"]
        rank, condition = name.split("-")
        start = statistics.median(results["at_start"])
        lines += [f"Rank {rank}, condition {condition}; divergence at the start {start:.3g} nats:", ""]
        lines += ["| method | rate | final divergence, median | log10 difference from LoRA | p, Holm | diverged |"]
        lines += ["|---|---|---|---|---|---|"]
        compared = contrasts(results)
        for method, record in results["methods"].items():
            last = [run[-1] for run in record["runs"]]
            difference, p_value = compared.get(method, (None, None))
            against = f"{difference.mean:+.2f} ± {difference.half_width:.2f}" if difference else "-"
            shown = f"{p_value:.1g}" if difference else "-"
            diverged = sum(map(math.isinf, last))
            median = statistics.median(last)
            cells = method, f"{record['rate']:.3g}", f"{median:.3g}", against, shown, f"{diverged} of {len(last)}"
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    (HERE / "teacher.md").write_text("\n".join(lines))
    draw(json.loads((HERE / f"{WITH_DESCENT}.json").read_text())["results"])


def draw(results):
    """Writes the figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4))
    panels = dict(zip(("AdamW", "GD", "sign"), figure.subplots(1, 3, sharey=True), strict=True))
    for method, record in results["methods"].items():
        kind, _, label = method.rpartition(": ")
        axes = panels.get(kind, panels["AdamW"])
        curves = np.array(record["runs"])
        axes.plot(results["times"], np.median(curves, axis=0), marker=".", label=label)
    for kind, axes in panels.items():
        axes.set(xscale="log", yscale="log", xlabel="step", title=kind)
        axes.legend(fontsize=7)
    panels["AdamW"].set_ylabel("KL to the teacher, nats; median")
    figure.savefig(HERE / "teacher.png", dpi=110, bbox_inches="tight", metadata={"Software": None})


def main():
    """Runs the cells that are asked for and not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", choices=[*CELLS, []], metavar="CELL", help="RANK-CONDITION")
    parser.add_argument("--report", action="store_true", help="write the tables and the figure")
    options = parser.parse_args()
    if options.report:
        report()
        return
    for name in options.cells or CELLS:
        cell(name)


if __name__ == "__main__":
    main()
