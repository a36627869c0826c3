"""The figure of a run: evaluation loss over steps."""

import statistics
from pathlib import Path

from balora_jax.training.records import Record, RunDirectory

# Colours that people with colour blindness can tell apart (Okabe and Ito).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def loss_curves(directory: RunDirectory, rows: list[Record], path: Path) -> None:
    """Draws the evaluation loss of every method's best cell: the median over its seeds, and their range.

    Args:
        directory: the finished run.
        rows: from `balora_jax.training.results.summarise`.
        path: file to write.
    """
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, row in enumerate(row for row in rows if "best" in row):
        curves: dict[int, list[float]] = {}
        for member in row["members"]:
            for record in directory.of("evaluation", population=row["population"], member=member):
                curves.setdefault(record["step"], []).append(record["evaluation_loss"])
        steps = sorted(curves)
        colour = _COLOURS[index % len(_COLOURS)]
        best = ", ".join(f"{field.rsplit('.', 1)[-1]} {value:g}" for field, value in row["best"].items())
        label = f"{row['population']} ({best}; n = {row['n']})" if best else f"{row['population']} (n = {row['n']})"
        axes.plot(steps, [statistics.median(curves[s]) for s in steps], color=colour, label=label)
        axes.fill_between(
            steps,
            [min(curves[s]) for s in steps],
            [max(curves[s]) for s in steps],
            color=colour,
            alpha=0.2,
            lw=0,
        )
    axes.set_xlabel("step")
    axes.set_ylabel("evaluation loss (nats per answer token)")
    axes.set_title("median and range over seeds, best cell of every method", fontsize=10)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
