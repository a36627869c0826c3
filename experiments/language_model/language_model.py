"""Does BaLoRA end lower than LoRA, and does rank change that? `language_model.py RANK`; what is run is in PLAN.md.

Each run leaves a row in rank-RANK.json, and what is there is not run again; `--report` writes the tables and the
figure from all.
"""

import argparse
import functools
import json
import math
import statistics
import time
from pathlib import Path

import numpy as np
from scipy import stats

from balora_jax.data.batches import pack
from balora_jax.files import whole_file
from balora_jax.models.weights import load_decoder
from balora_jax.settings import (
    AdapterSettings,
    BalanceSettings,
    Config,
    DataSettings,
    OptimizerSettings,
    TrainingSettings,
)
from balora_jax.training.comparison import paired_difference
from balora_jax.training.feed import Feed
from balora_jax.training.loading import load_data
from balora_jax.training.program import Program
from balora_jax.training.records import environment
from balora_jax.training.standings import holm

HERE = Path(__file__).parent
RANKS = (8, 64)
STEPS, COARSE_STEPS = 2000, 500
TUNING_SEED, SEEDS = 1000, tuple(range(12))
TUNING_QUESTIONS, QUESTIONS = 600, 2000
EQUIVALENCE = 1.0  # percent of the loss
TIMES = tuple(round(x) for x in np.geomspace(20, STEPS, 10))
FIRST_SCALES, FIRST_RATE = (2.0, 32.0), 3e-3
COARSE, FINE = math.sqrt(10), 1.8  # ratios of rates
SCALES_APART = 16.0

PAPER = BalanceSettings(gauge="raw_svd", transport=False, least_ratio=0.0)
METHODS = {
    "LoRA": ("lora", BalanceSettings()),
    "RefLoRA": ("reflora", BalanceSettings()),
    "BaLoRA, paper": ("balora", PAPER),
    "BaLoRA": ("balora", BalanceSettings()),
}
"""The library's method, and how it balances."""


def config_of(rank, method, scale, rate, seed, steps):
    """The config of a run."""
    name, balance = METHODS[method]
    return Config(
        name="language_model",
        method=name,
        seed=seed,
        adapter=AdapterSettings(rank=rank, alpha=scale * rank),
        optimizer=OptimizerSettings(learning_rate=rate, schedule="cosine", warmup_steps=50, weight_decay=0.0),
        balance=balance,
        data=DataSettings(
            modules=(
                "algebra__linear_2d",
                "arithmetic__add_or_sub_in_base",
                "calculus__differentiate",
                "polynomials__add",
                "polynomials__expand",
            ),
            train_examples=60_000,
            eval_examples=TUNING_QUESTIONS + QUESTIONS,
        ),
        training=TrainingSettings(steps=steps, batch_size=4, members_at_once=1),
    )


@functools.cache
def data():
    """The training rows, and the questions for tuning and for the test, `(rows, length)` arrays."""
    settings = config_of(8, "LoRA", 2.0, 1e-3, 0, STEPS).data
    rows, examples, _ = load_data(settings)
    parts = slice(0, TUNING_QUESTIONS), slice(TUNING_QUESTIONS, None)
    columns = examples.encoded._asdict()
    held_out = [type(examples.encoded)(**{name: x[part] for name, x in columns.items()}) for part in parts]
    packed = [pack(part, length=settings.length, pad_id=examples.tokenizer.pad_id).arrays() for part in held_out]
    return rows, *packed


@functools.cache
def program(config):
    """The compiled functions of all runs that differ in numbers alone."""
    return Program(config, load_decoder(config.model.path))


def mean_loss(functions, state, questions):
    """The mean loss over all predicted tokens of the questions, in nats."""
    total, tokens = 0.0, 0.0
    for start in range(0, len(questions["tokens"]), 64):
        rows = {name: array[start : start + 64] for name, array in questions.items()}
        losses, counts = functions.evaluate(state, functions.base, rows)
        total, tokens = total + float(losses.sum()), tokens + float(counts.sum())
    return total / tokens if math.isfinite(total) else math.inf


def run(rank, method, scale, rate, seed, steps):
    """The row of one run: the loss after each of TIMES steps on a quarter of the questions, at the end on all."""
    started = time.monotonic()
    config = config_of(rank, method, scale, rate, seed, steps)
    like = config_of(rank, method, 2.0, 1e-3, 0, steps)
    functions, (rows, tuning, test) = program(like), data()
    questions = tuning if seed == TUNING_SEED else test
    quarter = {name: array[: len(array) // 4] for name, array in questions.items()}
    state, batches = functions.initial_state([config]), Feed(rows, [seed], config.training, None)
    curve = []
    for step in range(1, steps + 1):
        state, _ = functions.step(state, functions.base, batches(step)[0])
        if step in TIMES and seed != TUNING_SEED:
            curve.append(mean_loss(functions, state, quarter))
    diverged = int(np.asarray(state.diverged_at)[0])
    return {
        "method": method,
        "scale": scale,
        "rate": rate,
        "seed": seed,
        "steps": steps,
        "loss": mean_loss(functions, state, questions) if diverged < 0 else math.inf,
        "curve": curve,
        "diverged_at": diverged,
        "seconds": round(time.monotonic() - started, 1),
    }


class Study:
    """The runs of one rank, in a file."""

    def __init__(self, rank):
        self.rank, self.file, self.environment = rank, HERE / f"rank-{rank}.json", environment()
        self.rows = json.loads(self.file.read_text())["rows"] if self.file.exists() else []

    def loss(self, *what):
        """The final loss of a run `(method, scale, rate, seed, steps)`, which is run if it is not there."""
        return self.row(*what)["loss"]

    def row(self, method, scale, rate, seed, steps):
        """The row of a run, which is run if it is not there."""
        asked = {"method": method, "scale": scale, "rate": float(f"{rate:.3g}"), "seed": seed, "steps": steps}
        found = next((row for row in self.rows if asked.items() <= row.items()), None)
        if found is None:
            about = {name: self.environment[name] for name in ("commit", "uncommitted_changes")}
            found = run(self.rank, **asked) | about
            self.rows.append(found)
            with whole_file(self.file) as out:
                out.write(json.dumps({"environment": self.environment, "rows": self.rows}, indent=1) + "\n")
            print(self.rank, *asked.values(), f"{found['loss']:.5f}", f"{found['seconds']} s", flush=True)
        return found

    def best_rate(self, method, scale, rate, ratio, steps):
        """The rate of the lowest loss on a grid that is extended until the best is inside."""

        def loss(rate):
            return self.loss(method, scale, rate, TUNING_SEED, steps)

        while (better := min((rate, rate / ratio, rate * ratio), key=loss)) != rate:
            rate = better
        return rate

    def tuned(self, method):
        """Scale and rate of the lowest loss: scales far apart first, then rates close to each other."""
        rates = {}

        def best(scale):
            if scale not in rates:
                nearest = min(rates, key=lambda other: abs(math.log(other / scale)), default=None)
                first = FIRST_RATE if nearest is None else rates[nearest] * (nearest / scale) ** 0.5
                rates[scale] = self.best_rate(method, scale, first, COARSE, COARSE_STEPS)
            return self.loss(method, scale, rates[scale], TUNING_SEED, COARSE_STEPS)

        scale = min(FIRST_SCALES, key=best)
        while (better := min((scale, scale / SCALES_APART, scale * SCALES_APART), key=best)) != scale:
            scale = better
        return scale, self.best_rate(method, scale, rates[scale], FINE, STEPS)


class Results:
    """What the runs of one rank show so far."""

    def __init__(self, rank):
        self.rows = json.loads((HERE / f"rank-{rank}.json").read_text())["rows"]
        self.test = [row for row in self.rows if row["seed"] in SEEDS]
        self.chosen = {row["method"]: (row["scale"], row["rate"]) for row in self.test}

    def runs(self, method):
        """The test's rows by seed."""
        return {row["seed"]: row for row in self.test if row["method"] == method}

    def pairs(self, method):
        """The rows of a method and LoRA's of the same seeds, without diverged runs, and how many pairs these cost."""
        own, reference = self.runs(method), self.runs("LoRA")
        both = [(own[seed], reference[seed]) for seed in sorted(own.keys() & reference.keys())]
        kept = [pair for pair in both if all(row["diverged_at"] < 0 for row in pair)]
        return kept, len(both) - len(kept)

    def difference(self, method, values=lambda row: [row["loss"]]):
        """The paired differences from LoRA in percent of its mean loss, of each of the values of a row; None if few."""
        kept, _ = self.pairs(method)
        if len(kept) < 2:
            return None
        found = []
        for own, reference in zip(
            *(zip(*map(values, side), strict=True) for side in zip(*kept, strict=True)), strict=True
        ):
            mean = statistics.fmean(reference)
            found.append(paired_difference([100 * x / mean for x in own], [100 * x / mean for x in reference]))
        return found

    def slope(self, method):
        """The slope of the paired difference in the logarithm of the steps, in percent of the loss for each decade."""
        kept, _ = self.pairs(method)
        if len(kept) < 2:
            return None
        curves = np.array([[own["curve"], reference["curve"]] for own, reference in kept])
        percent = 100 * (curves[:, 0] - curves[:, 1]) / curves[:, 1].mean(axis=0)
        slopes = np.polyfit(np.log10(TIMES), percent.T, 1)[0]
        return paired_difference(list(slopes), [0.0] * len(slopes))


def is_equivalent(difference):
    """Whether the 90 % interval lies within EQUIVALENCE percent."""
    half_width = difference.half_width * stats.t.ppf(0.95, difference.n - 1) / stats.t.ppf(0.975, difference.n - 1)
    return abs(difference.mean) + half_width < EQUIVALENCE


def shown(difference):
    """A difference with its interval."""
    return f"{difference.mean:+.2f} ± {difference.half_width:.2f} %"


def table(*columns):
    """The first lines of a table."""
    return [f"| {' | '.join(columns)} |", len(columns) * "|---" + "|"]


def report():
    """Writes final.md, tuning.md and differences.png from the ranks that have rows."""
    results = {rank: Results(rank) for rank in RANKS if (HERE / f"rank-{rank}.json").exists()}
    tuning = table("rank", "method", "scale: best loss after 500 steps", "rate at the best scale: loss after 2,000")
    final = table(
        *("rank", "method", "scale, rate", "seeds", "final loss, mean", "less LoRA's", "p, Holm", "within 1 %"),
        *("slope a decade of steps", "diverged"),
    )
    contrasts = {(r, m): found.difference(m) for r, found in results.items() for m in found.chosen if m != "LoRA"}
    told = {key: difference[0] for key, difference in contrasts.items() if difference}
    corrected = dict(zip(told, holm([difference.p_value for difference in told.values()]), strict=True))
    for rank, found in results.items():
        for method in METHODS:
            tried = [row for row in found.rows if row["method"] == method and row["seed"] == TUNING_SEED]
            cells = []
            for steps, name in ((COARSE_STEPS, "scale"), (STEPS, "rate")):
                best = {}
                for row in sorted((row for row in tried if row["steps"] == steps), key=lambda row: row[name]):
                    best[row[name]] = min(row["loss"], best.get(row[name], math.inf))
                cells.append(", ".join(f"{value:.3g}: {loss:.4f}" for value, loss in best.items()))
            tuning.append(f"| {rank} | {method} | {' | '.join(cells)} |")
            if method not in found.chosen:
                continue
            scale, rate = found.chosen[method]
            runs = list(found.runs(method).values())
            finite = [row["loss"] for row in runs if row["diverged_at"] < 0]
            mean = f"{statistics.fmean(finite):.4f}" if finite else "-"
            cells = [str(rank), method, f"{scale:.3g}, {rate:.3g}", str(len(runs)), mean]
            difference = told.get((rank, method))
            if difference is None:
                cells += 4 * ["-"]
            else:
                cells += [shown(difference), f"{corrected[rank, method]:.2g}"]
                cells += ["yes" if is_equivalent(difference) else "not shown", shown(found.slope(method))]
            final.append(f"| {' | '.join(cells)} | {len(runs) - len(finite)} |")
    (HERE / "tuning.md").write_text("\n".join(tuning) + "\n")
    if told:
        (HERE / "final.md").write_text("\n".join(final) + "\n")
        draw(results)


def draw(results):
    """Writes the figure: the differences over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4 * len(results), 3.6), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axes, (rank, found) in zip(panels, results.items(), strict=True):
        for method in found.chosen:
            differences = method != "LoRA" and found.difference(method, lambda row: row["curve"])
            if differences:
                mean, half = (np.array([getattr(d, name) for d in differences]) for name in ("mean", "half_width"))
                (line,) = axes.plot(TIMES, mean, marker=".", label=method)
                axes.fill_between(TIMES, mean - half, mean + half, color=line.get_color(), alpha=0.15)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(xscale="log", xlabel="step", title=f"rank {rank}, {len(found.runs('LoRA'))} seeds")
        axes.legend(fontsize=8)
    panels[0].set_ylabel("loss less LoRA's, % of it; 95 % intervals")
    figure.savefig(HERE / "differences.png", dpi=110, metadata={"Software": None})


def main():
    """Runs what is not there yet, or writes what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rank", nargs="?", type=int, choices=RANKS)
    parser.add_argument("--report", action="store_true", help="write the tables and the figure")
    options = parser.parse_args()
    if options.report:
        report()
        return
    for rank in RANKS if options.rank is None else [options.rank]:
        study = Study(rank)
        chosen = {method: study.tuned(method) for method in METHODS}
        for seed in SEEDS:
            for method, (scale, rate) in chosen.items():
                study.row(method, scale, rate, seed, STEPS)


if __name__ == "__main__":
    main()
