"""The figure of a run: evaluation loss over steps and over time."""

import itertools
import statistics
from pathlib import Path
from typing import IO

from balora_jax.training.records import Record, RunDirectory

# Colours that people with colour blindness can tell apart (Okabe and Ito).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def loss_curves(directory: RunDirectory, rows: list[Record], file: str | Path | IO[bytes]) -> None:
    """Draws the evaluation loss of every method's best cell: the median over its seeds, and their range if several.

    The time is that of the steps of one run: without compiling and evaluating, and shared evenly between the runs that
    train together.

    Args:
        directory: the finished run.
        rows: from `balora_jax.training.results.summarise`.
        file: to write, by name or open.
    """
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(10.4, 4.2), layout="constrained")
    over_steps, over_time = figure.subplots(1, 2, sharey=True)
    for index, row in enumerate(row for row in rows if "best" in row):
        curves: dict[int, list[float]] = {}
        for member in row["members"]:
            for record in directory.of("evaluation", population=row["population"], member=member):
                curves.setdefault(record["step"], []).append(record["evaluation_loss"])
        steps = sorted(curves)
        best = ", ".join(f"{field.rsplit('.', 1)[-1]} {value:g}" for field, value in row["best"].items())
        label = f"{row['population']} ({best}; n = {row['n']})" if best else f"{row['population']} (n = {row['n']})"
        look = {"color": _COLOURS[index % len(_COLOURS)]}
        elapsed = elapsed_seconds(directory, row["population"], row["runs"])
        panels = {over_steps: steps, over_time: [elapsed[step] for step in steps]} if elapsed else {over_steps: steps}
        for axes, places in panels.items():
            axes.plot(places, [statistics.median(curves[step]) for step in steps], label=label, **look)
            low, high = ([choose(curves[step]) for step in steps] for choose in (min, max))
            axes.fill_between(places, low, high, alpha=0.2, lw=0, **look)
    over_steps.set(xlabel="step", ylabel="evaluation loss (nats per answer token)")
    over_time.set(xlabel="seconds of training, per run")
    several = any(row.get("n", 0) > 1 for row in rows)
    figure.suptitle(f"{'median and range over seeds, ' if several else ''}best cell of every method", fontsize=10)
    for axes in (over_steps, over_time):
        axes.grid(alpha=0.3)
    if over_steps.lines:
        over_steps.legend(frameon=False)
    figure.savefig(file, dpi=150)


def elapsed_seconds(directory: RunDirectory, population: str, runs: int) -> list[float]:
    """Returns the time for which one run of a population had trained after each step, from step 0 on.

    Args:
        directory: the finished run.
        population: its name.
        runs: number of runs in it.

    Returns:
        Seconds. Steps whose time was not taken, the first after a start, count as the median one. Empty if no time was
        taken at all.
    """
    records = directory.of("train", population=population)
    seconds = {record["step"]: record["seconds"] for record in records if "seconds" in record}
    if not seconds:
        return []
    typical = statistics.median(seconds.values())
    last = max(record["step"] for record in records)
    return [0.0, *itertools.accumulate(seconds.get(step, typical) / runs for step in range(1, last + 1))]
