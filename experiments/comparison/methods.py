"""The table and the figure of the comparison: `python experiments/comparison/methods.py RUN ...`.

RUN are output folders of `balora-jax run configs/compare_methods.py`, of the whole sweep or of parts of it. For each
method the learning rate with the lowest mean final evaluation loss over the seeds is taken; its losses are compared
with LoRA's at LoRA's own best rate, seed by seed. Times of a step are those of `benchmarks/methods.py`. Without RUN the
figures are drawn again from the record, that of the losses if it holds curves.
"""

import json
import statistics
import sys
from collections.abc import Collection
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from tables import (
    HERE,
    best_text,
    difference_text,
    loss_text,
    recorded,
    recorded_rows,
    save_figure,
    standing_records,
    summary,
    write,
    write_table,
)

from balora_jax.training.colors import color_of
from balora_jax.training.comparison import Cell, best_cell, compare, load_runs, sorted_by
from balora_jax.training.figures import draw_standings, label_ends, name_values

TIMES = HERE.parent.parent / "benchmarks" / "recorded" / "methods-cpu.json"
SHOWN = 8


def step_times() -> dict[str, dict]:
    """The recorded times and memory of a step of every method, by its name."""
    return {row["method"]: row for row in json.loads(TIMES.read_text())["rows"]} if TIMES.exists() else {}


def unbalanced(name: str, cells: Collection[str]) -> str | None:
    """The method that a balanced one is without balancing."""
    names = "lora" + name.removeprefix("balora"), name.removeprefix("balora_")
    return next((other for other in names if name.startswith("balora") and other in cells), None)


def median_curve(cell: Cell) -> dict[str, list]:
    """The median of the evaluation losses over the seeds, by step."""
    curves = [run.curve for run in cell.runs.values()]
    steps = sorted(curves[0])
    return {"steps": steps, "losses": [statistics.median(curve[step] for curve in curves) for step in steps]}


def draw(rows: list[dict]):
    """Evaluation loss over steps and over time, median over the seeds; the best methods and LoRA stand out."""
    chosen = {*[row["method"] for row in rows[: SHOWN - 2]], "lora", "balora"}
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    ends = []
    for row in reversed(rows):
        name, steps, losses = row["method"], np.array(row["curve"]["steps"]), row["curve"]["losses"]
        look = {"color": color_of(name), "lw": 1.8 if name in chosen else 0.7, "alpha": 1 if name in chosen else 0.5}
        panels[0].plot(steps, losses, **look)
        ends.append((losses[-1], name, look["color"]))
        if row["step"]:
            panels[1].plot(steps * row["step"]["milliseconds"] / 1e3, losses, **look)
    panels[0].set(xlabel="step", ylabel="evaluation loss (nats per answer token)", xlim=(0, steps[-1]), yscale="log")
    panels[1].set(xlabel="seconds of training")
    least = rows[0]["evaluation_loss"]["mean"]
    panels[0].set_ylim(0.95 * least, 1.6 * least)  # the loss before training is far above
    name_values(panels[0])
    for axes in panels:
        axes.grid(alpha=0.3, which="both")
    label_ends(panels[0], ends)
    return figure


def main() -> None:
    """Reads the runs, writes record, tables and figures."""
    if not sys.argv[1:]:
        rows = recorded_rows("methods", HERE)
        save_figure("differences", draw_standings(standing_records(rows), "lora"))
        if all("curve" in row for row in rows):
            save_figure("methods", draw(rows))
        return
    runs, environments = load_runs(map(Path, sys.argv[1:]))
    groups, times = sorted_by(runs, lambda run: run.field("method")), step_times()
    chosen = {name: best_cell(group, ["optimizer.learning_rate"]) for name, group in groups.items()}
    cells = {name: cell for name, cell in chosen.items() if cell is not None}
    rows = []
    for name in sorted(cells, key=lambda name: np.mean(cells[name].losses)):
        cell, reference = cells[name], None if name == "lora" else cells["lora"]
        first = next(iter(cell.runs.values()))
        row = {"method": name, "options": dict(first.field("options"))}
        row |= summary(cell, None if reference is None else compare(cell, reference))
        row |= {key: first.result[key] for key in ("trained_parameters", "state_bytes")}
        row["step"], row["curve"] = times.get(name), median_curve(cell)
        if (partner := unbalanced(name, cells)) is not None:
            row["balancing"] = {"of": partner, **recorded(compare(cell, cells[partner]))}
        rows.append(row)
    table = [
        [
            *("method", "learning rate", "evaluation loss", "less LoRA's, same seed: lower in", "exact match"),
            *("ms / step", "state, kB", "diverged"),
        ]
    ]
    table += [
        [
            row["method"],
            best_text(row).removeprefix("learning rate "),
            loss_text(row),
            difference_text(row.get("difference")),
            f"{100 * row['accuracy']['mean']:.1f} ± {100 * row['accuracy']['std']:.1f} %",
            f"{row['step']['milliseconds']:.1f}" if row["step"] else "-",
            f"{row['state_bytes'] / 1e3:.0f}",
            f"{row['diverged']} of {row['runs']}",
        ]
        for row in rows
    ]
    table += [[name, "every rate diverged", *["-"] * 6] for name, cell in chosen.items() if cell is None]
    write("methods", rows, environments, table, draw(rows))
    save_figure("differences", draw_standings(standing_records(rows), "lora"))
    pairs = [(row["method"], row["balancing"]) for row in rows if "balancing" in row]
    head = ["balanced", "and not", "difference of the losses, same seed: lower in"]
    write_table("balancing", [head, *([name, found["of"], difference_text(found)] for name, found in pairs)])


if __name__ == "__main__":
    main()
