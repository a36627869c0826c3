"""Does BaLoRA end lower than LoRA, and does rank change that? `language_model.py RANK`; what is run is in PLAN.md.

Each run leaves a row in rank-RANK.json, and what is there is not run again.
"""

import argparse
import functools
import json
import math
import time
from pathlib import Path

import numpy as np

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
from balora_jax.training.feed import Feed
from balora_jax.training.loading import load_data
from balora_jax.training.program import Program
from balora_jax.training.records import environment

HERE = Path(__file__).parent
RANKS = (8, 64)
STEPS, COARSE_STEPS = 2000, 500
TUNING_SEED, SEEDS = 1000, tuple(range(12))
TUNING_QUESTIONS, QUESTIONS = 600, 2000
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


def main():
    """Runs what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rank", type=int, choices=RANKS)
    options = parser.parse_args()
    study = Study(options.rank)
    chosen = {method: study.tuned(method) for method in METHODS}
    for seed in SEEDS:
        for method, (scale, rate) in chosen.items():
            study.row(method, scale, rate, seed, STEPS)


if __name__ == "__main__":
    main()
