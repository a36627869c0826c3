"""From the records of a run to its table: per method the best cell, with count and spread."""

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.table import Table

from balora_jax.settings import Config
from balora_jax.training.fields import get_field
from balora_jax.training.records import Record, RunDirectory

TABLE_WIDTH = 110
"""Columns that the table needs."""


def summarise(directory: RunDirectory, members: Mapping[str, Config], axes: Mapping[str, Any]) -> list[Record]:
    """Returns one row per group of runs that differ only in numbers and seeds: its best cell.

    A cell is what differs in its seed alone; the best is that with the lowest mean final evaluation loss among the
    cells without a diverged run. `trained_parameters` and `state_bytes` (of the optimizer) are those of one run.

    Args:
        directory: the finished run.
        members: its configs by name.
        axes: for each group (population), the numeric fields it sweeps with their values; from `numeric_axes`.
    """
    rows = []
    for population in dict.fromkeys(r["population"] for r in directory.of("result")):
        results = directory.of("result", population=population)
        fields = [name for name in axes[population] if name != "seed"]
        cells: dict[tuple, list[Record]] = {}
        for result in results:
            cells.setdefault(tuple(get_field(members[result["member"]], f) for f in fields), []).append(result)
        losses = {
            cell: statistics.fmean(r["evaluation_loss"] for r in runs)
            for cell, runs in cells.items()
            if all(r["diverged_at"] < 0 for r in runs)
        }
        row: Record = {
            "population": population,
            "runs": len(results),
            "diverged": sum(r["diverged_at"] >= 0 for r in results),
            "step_seconds": _step_seconds(directory, population, len(results)),
            "trained_parameters": results[0]["trained_parameters"],
            "state_bytes": results[0]["state_bytes"],
        }
        if losses:
            best = min(losses, key=losses.__getitem__)
            runs = cells[best]
            row |= {
                "best": dict(zip(fields, best, strict=True)),
                "on_edge": [
                    field
                    for field, value in zip(fields, best, strict=True)
                    if len(axes[population][field]) > 2
                    and value in (min(axes[population][field]), max(axes[population][field]))
                ],
                "members": [r["member"] for r in runs],
                "n": len(runs),
                "score": runs[0].get("score", "exact match"),
                "base_loss": statistics.fmean(
                    r["evaluation_loss"] for r in directory.of("evaluation", population=population, step=0)
                ),
            }
            for key in ("evaluation_loss", "accuracy", "gap_mean"):
                if any(key in run for run in runs):  # without pairs there is no gap
                    row[key] = _spread(run.get(key) for run in runs)
            if "others" in runs[0]:
                row["others"] = {name: _other(name, runs) for name in runs[0]["others"]}
        rows.append(row)
    return rows


def table(rows: list[Record]) -> Table:
    """Returns the rows as a table for people."""
    out = Table(box=box.SIMPLE_HEAD, caption_justify="left")
    scores = {row["score"] for row in rows if row.get("accuracy")}
    score = scores.pop() if len(scores) == 1 else "right answers"
    others = list(dict.fromkeys(name for row in rows for name in row.get("others", ())))
    for name in ("method", "best", "evaluation loss", score, *others, "n", "gap", "ms / step", "diverged"):
        out.add_column(name, justify="left" if name in ("method", "best") else "right", no_wrap=name != "best")
    for row in rows:
        shared = (f"{1000 * row['step_seconds']:.1f}", f"{row['diverged']} of {row['runs']}")
        if "best" not in row:
            out.add_row(row["population"], "every cell diverged", "", "", *("" for _ in others), "0", "", *shared)
            continue
        best = ", ".join(
            f"{field.rsplit('.', 1)[-1]} {value:g}{' (edge of the grid)' if field in row['on_edge'] else ''}"
            for field, value in row["best"].items()
        )
        loss, accuracy, gap = row["evaluation_loss"], row["accuracy"], row.get("gap_mean")
        out.add_row(
            row["population"],
            best,
            mean_and_spread(loss, ".4f"),
            _percent(accuracy),
            *(_on_another(row.get("others", {}).get(name)) for name in others),
            str(row["n"]),
            "-" if gap is None else f"{gap['mean']:.1e}",
            *shared,
        )
    bases = [row["base_loss"] for row in rows if "base_loss" in row]
    if bases:
        several = any(row.get("n", 0) > 1 for row in rows)
        what = "mean ± standard deviation over n seeds, at the cell of lowest mean" if several else "the cell of lowest"
        out.caption = (
            f"{what} evaluation loss; loss before training {bases[0]:.4f}; gap: relative balancing gap; ms / step: of "
            "one run, trained in its population"
        )
    return out


def _percent(accuracy: Mapping[str, Any] | None) -> str:
    return f"{mean_and_spread(accuracy, '.1f', factor=100)} %" if accuracy else "-"


def _on_another(found: Mapping[str, Any] | None) -> str:
    """Loss, and below it the right answers if there are any, on a further evaluation set."""
    if found is None or found["evaluation_loss"] is None:
        return "-"
    loss = mean_and_spread(found["evaluation_loss"], ".4f")
    return f"{loss}\n{_percent(found['accuracy'])}" if found["accuracy"] else loss


def mean_and_spread(spread: Mapping[str, Any], form: str, *, factor: float = 1.0) -> str:
    """Returns the mean of some values and their standard deviation, of one value that alone.

    Args:
        spread: `mean` and `std`, which is None for one value.
        form: how a number is written.
        factor: by which both are multiplied.
    """
    numbers = [factor * spread[name] for name in ("mean", "std") if spread[name] is not None]
    return " ± ".join(format(number, form) for number in numbers)


def numeric_axes(members: Iterable[Config], fields: Iterable[str]) -> dict[str, list]:
    """Returns the numeric fields in which configs differ, with their values in order."""
    members = list(members)
    axes = {field: sorted({get_field(member, field) for member in members}) for field in fields}
    return {field: values for field, values in axes.items() if len(values) > 1}


def _spread(values: Iterable[float | None]) -> Record | None:
    """Mean and standard deviation, which one value has not; None without values (accuracies without a score)."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return None
    return {
        "mean": statistics.fmean(numbers),
        "std": statistics.stdev(numbers) if len(numbers) > 1 else None,
        "values": numbers,
    }


def _other(name: str, runs: list[Record]) -> Record:
    """What runs have reached on one of the further evaluation sets."""
    found = [run["others"][name] for run in runs]
    spreads = {key: _spread(one[key] for one in found) for key in ("evaluation_loss", "accuracy")}
    return {"score": found[0]["score"], **spreads}


def _step_seconds(directory: RunDirectory, population: str, members: int) -> float:
    """The median time of a step, divided by the number of runs that it advances."""
    seconds = [r["seconds"] for r in directory.of("train", population=population) if "seconds" in r]
    return statistics.median(seconds) / members if seconds else float("nan")
