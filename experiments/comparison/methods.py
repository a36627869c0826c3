"""The table and the figure of the comparison: `python experiments/comparison/methods.py RUN ...`.

RUN are output folders of `balora-jax run configs/compare_methods.py`, of the whole sweep or of parts of it. For each
method the learning rate with the lowest mean final evaluation loss over the seeds is taken; its losses are compared
with LoRA's at LoRA's own best rate, seed by seed. Times of a step are those of `benchmarks/methods.py`.
"""

import json
import sys
from collections.abc import Collection
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from tables import HERE, best_text, difference_text, loss_text, recorded, summary, write, write_table

from balora_jax.training.comparison import Cell, best_cell, compare, load_runs, sorted_by

TIMES = HERE.parent.parent / "benchmarks" / "recorded" / "methods-cpu.json"
SHOWN = 8


def step_times() -> dict[str, dict]:
    """The recorded times and memory of a step of every method, by its name."""
    return {row["method"]: row for row in json.loads(TIMES.read_text())["rows"]} if TIMES.exists() else {}


def unbalanced(name: str, cells: Collection[str]) -> str | None:
    """The method that a balanced one is without balancing."""
    names = "lora" + name.removeprefix("balora"), name.removeprefix("balora_")
    return next((other for other in names if name.startswith("balora") and other in cells), None)


def draw(cells: dict[str, Cell], times: dict[str, dict]):
    """Evaluation loss over steps and over time, median over the seeds; the best methods and LoRA in colour."""
    order = sorted(cells, key=lambda name: np.mean(cells[name].losses))
    coloured = [name for name in order if name in order[: SHOWN - 2] or name in ("lora", "balora")]
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for name in reversed(order):
        curves = [run.curve for run in cells[name].runs.values()]
        steps = np.array(sorted(curves[0]))
        median = np.median([[curve[step] for step in steps] for curve in curves], axis=0)
        look = {"color": f"C{coloured.index(name)}", "label": name, "lw": 1.6} if name in coloured else {"color": "0.8"}
        panels[0].plot(steps, median, **look)
        if name in times:
            panels[1].plot(steps * times[name]["milliseconds"] / 1e3, median, **look)
    panels[0].set(xlabel="step", ylabel="evaluation loss (nats per answer token)")
    panels[1].set(xlabel="seconds of training")
    panels[0].legend(frameon=False, reverse=True)
    least = min(np.mean(cell.losses) for cell in cells.values())
    panels[0].set_ylim(0.95 * least, 1.6 * least)  # the loss before training is far above
    for axes in panels:
        axes.grid(alpha=0.3)
    return figure


def main() -> None:
    """Reads the runs, writes record, table and figure."""
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
        row["step"] = times.get(name)
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
    write("methods", rows, environments, table, draw(cells, times))
    pairs = [(row["method"], row["balancing"]) for row in rows if "balancing" in row]
    head = ["balanced", "and not", "difference of the losses, same seed: lower in"]
    write_table("balancing", [head, *([name, found["of"], difference_text(found)] for name, found in pairs)])


if __name__ == "__main__":
    main()
