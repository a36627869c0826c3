"""The table and the figure of the ablation of the rank.

    python experiments/comparison/ranks.py RUN ... [--output FOLDER]

RUN are output folders of `balora-jax run configs/rank_ablation.py`, or of another config that sweeps the rank. For each
method and rank the learning rate with the lowest mean final evaluation loss over the seeds is taken, and compared with
LoRA of that rank, seed by seed.
"""

import matplotlib.pyplot as plt
import numpy as np
from tables import arguments, best_text, difference_text, loss_text, summary, write

from balora_jax.training.comparison import best_cell, compare, load_runs, sorted_by


def draw(rows: list[dict]):
    """Bars of the mean loss by rank, with the standard deviation over the seeds."""
    ranks = sorted({row["rank"] for row in rows})
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    width = 0.8 / len(methods)
    for index, method in enumerate(methods):
        of_method = [row for row in rows if row["method"] == method]
        places = [ranks.index(row["rank"]) + (index - (len(methods) - 1) / 2) * width for row in of_method]
        losses = [row["evaluation_loss"] for row in of_method]
        axes.bar(places, [x["mean"] for x in losses], width, yerr=[x["std"] for x in losses], capsize=2, label=method)
    low = min(row["evaluation_loss"]["mean"] - row["evaluation_loss"]["std"] for row in rows)
    axes.set(
        xticks=range(len(ranks)), xticklabels=ranks, xlabel="rank", ylabel="evaluation loss", ylim=(0.9 * low, None)
    )
    axes.legend(frameon=False, ncols=3)
    return figure


def main() -> None:
    """Reads the runs, writes record, table and figure."""
    options = arguments(__doc__)
    runs, environments = load_runs(options.runs)
    rows, groups = [], sorted_by(runs, lambda run: (run.field("adapter.rank"), run.field("method")))
    cells = {key: best_cell(group, ["optimizer.learning_rate"]) for key, group in groups.items()}
    lost = [key for key, cell in cells.items() if cell is None]
    if lost:
        raise SystemExit(f"every learning rate diverged for (rank, method) {', '.join(map(str, lost))}")
    for rank, method in sorted(cells, key=lambda key: (key[0], np.mean(cells[key].losses))):
        cell = cells[rank, method]
        difference = None if method == "lora" else compare(cell, cells[rank, "lora"])
        rows.append({"rank": rank, "method": method, **summary(cell, difference)})
    table = [["rank", "method", "learning rate", "evaluation loss", "less LoRA's, same seed: lower in", "exact match"]]
    table += [
        [
            str(row["rank"]),
            row["method"],
            best_text(row).removeprefix("learning rate "),
            loss_text(row),
            difference_text(row.get("difference")),
            f"{100 * row['accuracy']['mean']:.1f} %" if row["accuracy"] else "-",
        ]
        for row in rows
    ]
    write("ranks", rows, environments, table, draw(rows), folder=options.output)


if __name__ == "__main__":
    main()
