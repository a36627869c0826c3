"""The heat maps of learning rate x scale.

    python experiments/comparison/sensitivity.py RUN ... [--output FOLDER]

RUN are output folders of `balora-jax run configs/sensitivity.py`, or of another config with such a grid. A cell is the
mean final evaluation loss over its seeds; a method is as little sensitive as it has many cells near its best one.
"""

import matplotlib.pyplot as plt
import numpy as np
from tables import arguments, write

from balora_jax.training.comparison import Run, load_runs, sorted_by

NEAR = 1.1
"""A cell is near the best one if its loss is below so many times the best."""


def scale(run: Run) -> float:
    """The scale of the adapters, and of their product where LoRA-GA starts, four digits of it."""
    gamma = dict(run.field("options")).get("gamma", 1.0)
    return float(f"{run.field('adapter.alpha') / run.field('adapter.rank') / gamma:.4g}")


def draw(maps: dict[str, np.ndarray], rates: list[float], scales: list[float]):
    """One heat map for each method, on one scale of colours; crosses where a run diverged."""
    finite = np.concatenate([grid[np.isfinite(grid)] for grid in maps.values()])
    figure, panels = plt.subplots(1, len(maps), figsize=(3 * len(maps), 3.4), sharey=True, layout="constrained")
    for axes, (method, grid) in zip(panels, maps.items(), strict=True):
        image = axes.imshow(np.where(np.isfinite(grid), grid, np.nan), vmin=finite.min(), vmax=np.quantile(finite, 0.9))
        for i, j in np.ndindex(grid.shape):
            text = f"{grid[i, j]:.2f}" if np.isfinite(grid[i, j]) else "x"
            bright = not np.isfinite(grid[i, j]) or grid[i, j] > image.norm.vmin + 0.6 * (
                image.norm.vmax - image.norm.vmin
            )
            axes.text(j, i, text, ha="center", va="center", fontsize=7, color="k" if bright else "w")
        axes.set(title=method, xlabel="learning rate", xticks=range(len(rates)), yticks=range(len(scales)))
        axes.set_xticklabels([f"{rate:g}" for rate in rates], rotation=45)
        axes.set_yticklabels([f"{scale:g}" for scale in scales])
    panels[0].set_ylabel("scale s")
    figure.colorbar(image, ax=panels, label="evaluation loss")
    return figure


def main() -> None:
    """Reads the runs, writes record, table and figure."""
    options = arguments(__doc__)
    runs, environments = load_runs(options.runs)
    rates = sorted({run.field("optimizer.learning_rate") for run in runs})
    scales = sorted(set(map(scale, runs)))
    maps, rows = {}, []
    for method, group in sorted_by(runs, lambda run: run.field("method")).items():
        grid = np.full((len(scales), len(rates)), np.nan)
        cells = sorted_by(group, lambda run: (scale(run), run.field("optimizer.learning_rate")))
        for (s, rate), members in cells.items():
            grid[scales.index(s), rates.index(rate)] = np.mean([run.loss for run in members])
        if np.isnan(grid).any():
            raise SystemExit(f"{method} must have a run at every learning rate and scale")
        maps[method] = grid
        i, j = np.unravel_index(grid.argmin(), grid.shape)
        rows.append(
            {
                "method": method,
                "learning_rates": rates,
                "scales": scales,
                "evaluation_loss": [[float(x) if np.isfinite(x) else str(x) for x in row] for row in grid],
                "best": {"loss": float(grid[i, j]), "learning_rate": rates[j], "scale": scales[i]},
                "near_best": int((grid < NEAR * grid.min()).sum()),
                "cells": grid.size,
                "seeds": len({run.field("seed") for run in group}),
                "diverged": int(sum(not np.isfinite(run.loss) for run in group)),
            }
        )
    table = [["method", "best loss", "at learning rate, scale", "cells within 10 % of it", "seeds", "diverged"]]
    table += [
        [
            row["method"],
            f"{row['best']['loss']:.4f}",
            f"{row['best']['learning_rate']:g}, {row['best']['scale']:g}",
            f"{row['near_best']} of {row['cells']}",
            str(row["seeds"]),
            str(row["diverged"]),
        ]
        for row in rows
    ]
    write("sensitivity", rows, environments, table, draw(maps, rates, scales), folder=options.output)


if __name__ == "__main__":
    main()
