"""The table and the figure of the ablation of the rank.

    python experiments/comparison/ranks.py RUN ... [--output FOLDER]

RUN are output folders of `balora-jax run configs/rank_ablation.py`, or of another config that sweeps the rank. For each
method and rank the learning rate with the lowest mean final evaluation loss over the seeds is taken, and compared with
LoRA of that rank, seed by seed. Without RUN the figure is drawn again from the record.
"""

from tables import (
    arguments,
    best_text,
    difference_text,
    loss_text,
    recorded_rows,
    save_figure,
    standing_records,
    summary,
    write,
)

from balora_jax.training.comparison import load_runs
from balora_jax.training.figures import draw_standings
from balora_jax.training.standings import standings


def draw(rows: list[dict]):
    """The losses, and their differences from LoRA's, over the rank."""
    return draw_standings(standing_records(rows, "adapter.rank"), "lora")


def main() -> None:
    """Reads the runs, writes record, table and figure."""
    options = arguments(__doc__)
    if not options.runs:
        save_figure("ranks", draw(recorded_rows("ranks", options.output)), folder=options.output)
        return
    runs, environments = load_runs(options.runs)
    found, rows = standings(runs, by=["adapter.rank"]), []
    lost = [(row.group["adapter.rank"], row.method) for row in found if row.cell is None]
    if lost:
        raise SystemExit(f"every learning rate diverged for (rank, method) {', '.join(map(str, lost))}")
    for row in found:
        rows.append({"rank": row.group["adapter.rank"], "method": row.method, **summary(row.cell, row.difference)})
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
