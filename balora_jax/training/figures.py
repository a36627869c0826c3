"""Figures of runs: evaluation loss over steps and over time, and differences of methods from a reference."""

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from balora_jax.errors import printable
from balora_jax.training.colors import color_of, looks
from balora_jax.training.records import Record, RunDirectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_IN_LEGEND = 6
"""Lines that a legend explains; more have their names at their ends."""


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

    shown = [row for row in rows if "best" in row]
    figure = matplotlib.figure.Figure(figsize=(10.4, 4.2), layout="constrained")
    whole, zoomed = figure.subplots(1, 2)
    ends, floor, ceiling = [], math.inf, -math.inf
    for row, (color, dashes) in zip(shown, looks(row["population"].split("-")[0] for row in shown), strict=True):
        curves: dict[int, list[float]] = {}
        for member in row["members"]:
            for record in directory.of("evaluation", population=row["population"], member=member):
                curves.setdefault(record["step"], []).append(record["evaluation_loss"])
        steps = sorted(curves)
        median, low, high = ([choose(curves[step]) for step in steps] for choose in (statistics.median, min, max))
        best = ", ".join(f"{field.rsplit('.', 1)[-1]} {value:g}" for field, value in row["best"].items())
        label = f"{row['population']} ({best}; n = {row['n']})" if best else f"{row['population']} (n = {row['n']})"
        elapsed = elapsed_seconds(directory, row["population"], row["runs"])
        for axes, places in ((whole, steps), (zoomed, [elapsed[step] for step in steps] if elapsed else steps)):
            axes.plot(places, median, color=color, ls=dashes, label=plain(label))
            axes.fill_between(places, low, high, color=color, alpha=0.2, lw=0)
        ends.append((median[-1], row["population"], color))
        floor, ceiling = min(floor, *low), max(ceiling, median[len(steps) // 2], high[-1])
    timed = any(elapsed_seconds(directory, row["population"], row["runs"]) for row in shown)
    whole.set(xlabel="step", ylabel="evaluation loss (nats per answer token)", yscale="log", title="from the start")
    zoomed.set(xlabel="seconds of training, per run" if timed else "step", title="enlarged")
    several = any(row.get("n", 0) > 1 for row in rows)
    figure.suptitle(f"{'median and range over seeds, ' if several else ''}best cell of every method", fontsize=10)
    for axes in (whole, zoomed):
        axes.grid(alpha=0.3, which="both")
    name_values(whole)
    if ceiling > floor:
        zoomed.set_ylim(floor - 0.05 * (ceiling - floor), ceiling + 0.05 * (ceiling - floor))
    if len(ends) > MOST_IN_LEGEND:
        label_ends(zoomed, ends)
    elif ends:
        whole.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)


def name_values(axes: "Axes") -> None:
    """Writes the values at a logarithmic y axis of losses, which seldom holds a power of ten."""
    for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatted("{x:g}")


def plain(text: str) -> str:
    """Returns a text as matplotlib shows it as it is, and takes none of it for a formula."""
    return printable(text).replace("$", r"\$")


def label_ends(axes: "Axes", ends: Sequence[tuple[float, str, str]]) -> None:
    """Writes the names of lines at their right ends, as far apart as letters are high.

    Args:
        axes: with its limits set.
        ends: the last value of a line, its name and its color.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = sorted(ends)
    places = [float(to_axes.transform((axes.get_xlim()[1], value))[1]) for value, _, _ in ends]
    shifted = apart(places, 0.78 / max(20, len(ends)))
    lift = max(0.0, -shifted[0]) - max(0.0, shifted[-1] - 1)
    for place, at, (_, name, color) in zip(places, (lift + at for at in shifted), ends, strict=True):
        axes.plot([1, 1.03], [place, at], color=color, lw=0.5, transform=axes.transAxes, clip_on=False)
        axes.text(1.035, at, plain(name), color=color, fontsize=7, va="center", transform=axes.transAxes)


def apart(places: Sequence[float], distance: float) -> list[float]:
    """Returns the nearest places, in the same order, that lie a distance apart: an isotonic regression.

    Args:
        places: in ascending order.
        distance: the least between neighbors.
    """
    blocks: list[list[float]] = []
    for index, place in enumerate(places):
        blocks.append([place - index * distance])
        while len(blocks) > 1 and statistics.fmean(blocks[-2]) >= statistics.fmean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    means = [statistics.fmean(block) for block in blocks for _ in block]
    return [mean + index * distance for index, mean in enumerate(means)]


def draw_standings(records: Sequence[Record], reference: str) -> "Figure":
    """Draws the differences of methods from a reference with their 95 % intervals.

    Groups that differ in one number become lines with bands over it, beside the losses; others a panel each.

    Args:
        records: from `balora_jax.training.standings.record`, after the fields by which they are grouped.
        reference: the method with which the others are compared.

    Returns:
        A figure of matplotlib.
    """
    from matplotlib.figure import Figure

    by = list(itertools.takewhile("method".__ne__, records[0]))
    groups: dict[tuple, list[Record]] = {}
    for row in records:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    if len(by) == 1 and len(groups) > 1 and all(isinstance(value, int | float) for (value,) in groups):
        return _over_numbers(records, by[0], reference)
    methods = list(dict.fromkeys(row["method"] for row in records if row["difference"] is not None))
    size = 2.5 + 3.2 * len(groups), max(2.0, 1.2 + 0.24 * len(methods))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, (values, rows) in zip(panels, groups.items(), strict=True):
        for row in (row for row in rows if row["difference"] is not None):
            place, color = methods.index(row["method"]), color_of(row["method"])
            axes.plot([row["low"], row["high"]], [place, place], color=color, lw=2, alpha=0.5)
            axes.plot(row["difference"], place, "o", color=color, mfc=color if row["verdict"] != "undecided" else "w")
        axes.axvline(0, color="0.4", lw=1)
        axes.set(title=plain(", ".join(map(str, values))), xlabel=f"loss less {reference}'s, same seed")
        axes.grid(alpha=0.3, axis="x")
    panels[0].set_yticks(range(len(methods)), methods)
    panels[0].set_ylim(len(methods) - 0.4, -0.6)
    figure.suptitle("mean difference and 95 % interval; filled: differs after the correction", fontsize=9)
    return figure


def _over_numbers(records: Sequence[Record], field: str, reference: str) -> "Figure":
    """Losses and differences over a number, as lines with bands."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    losses, differences = figure.subplots(1, 2)
    methods, ends = list(dict.fromkeys(row["method"] for row in records)), []
    for method in methods:
        look = {"color": color_of(method)}
        rows = sorted((row for row in records if row["method"] == method and row["n"]), key=lambda row: row[field])
        if not rows:
            continue
        places, means = [row[field] for row in rows], [row["loss_mean"] for row in rows]
        spreads = [row["loss_std"] or 0.0 for row in rows]
        losses.plot(places, means, marker=".", label=method, **look)
        band = [[m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1)]
        losses.fill_between(places, *band, alpha=0.12, lw=0, **look)
        ends.append((means[-1], method, look["color"]))
        compared = [row for row in rows if row["difference"] is not None]
        places = [row[field] for row in compared]
        differences.plot(places, [row["difference"] for row in compared], marker=".", **look)
        band = [[row[side] for row in compared] for side in ("low", "high")]
        differences.fill_between(places, *band, alpha=0.12, lw=0, **look)
    differences.axhline(0, color=color_of(reference), lw=1)
    name, values = field.rsplit(".", 1)[-1].replace("_", " "), sorted({row[field] for row in records})
    for axes in (losses, differences):
        if values[0] > 0 and values[-1] / values[0] > 4:
            axes.set_xscale("log")
            axes.set_xticks(values, [f"{value:g}" for value in values], minor=False)
            axes.set_xticks([], minor=True)
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
    losses.set(ylabel="evaluation loss", yscale="log", title="mean and standard deviation over seeds")
    name_values(losses)
    shown = [row for row in records if row["difference"] is not None]
    differences.set(ylabel=f"loss less {reference}'s, same seed", title="mean difference and 95 % interval, enlarged")
    if shown:  # where most of the intervals are; what lies far off is seen on the left
        reaches = [max(abs(row["low"]), abs(row["high"])) for row in shown]
        reach = 1.05 * min(max(reaches), 3 * statistics.median(reaches))
        differences.set_ylim(-reach or None, reach or None)
    if len(ends) > MOST_IN_LEGEND:
        label_ends(losses, ends)
    else:
        losses.legend(frameon=False, fontsize=8)
    return figure


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
