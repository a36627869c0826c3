"""The table of the study on the language model: `python experiments/gauges/language_model.py RUN ...`.

RUN are output folders of `balora-jax run configs/gauges.py`, of the whole sweep or of parts of it. For each rank and
method the learning rate with the lowest mean evaluation loss over the seeds is taken, and its losses are compared
with those of LoRA at LoRA's own best rate, seed by seed. Writes `language_model.json` and prints a table.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np

from balora_jax.training.comparison import Run, best_cell, compare, load_runs, sorted_by

HERE = Path(__file__).parent


def kind(run: Run) -> tuple:
    """The rank and the method: LoRA, or the gauge and whether the moments are carried."""
    balanced = run.field("balance.gauge"), run.field("balance.transport")
    return run.field("adapter.rank"), "LoRA" if run.field("method") == "lora" else balanced


def main() -> None:
    """Reads the runs, writes the record and prints the table."""
    runs, environments = load_runs(sys.argv[1:])
    for start in environments:
        start["command"] = re.sub(r" --output \S+", "", start["command"])
    groups, rows = sorted_by(runs, kind), []
    cells = {key: best_cell(group, ["optimizer.learning_rate"]) for key, group in groups.items()}
    for rank, method in sorted(cells, key=lambda key: (key[0], key[1] != "LoRA", str(key[1]))):
        cell, reference = cells[rank, method], cells[rank, "LoRA"]
        assert cell is not None
        assert reference is not None
        difference = compare(cell, reference) if method != "LoRA" else None
        by_rate = sorted_by(groups[rank, method], lambda run: run.field("optimizer.learning_rate"))
        row = {
            "rank": rank,
            "gauge": method if method == "LoRA" else method[0],
            "moments": "-" if method == "LoRA" else ("carried" if method[1] else "left"),
            "learning_rate": cell.values["optimizer.learning_rate"],
            "on_edge": bool(cell.on_edge),
            "n": len(cell.runs),
            "evaluation_loss": {"mean": np.mean(cell.losses), "std": np.std(cell.losses, ddof=1)},
            "accuracy": float(np.mean([run.result["accuracy"] for run in cell.runs.values()])),
            "difference": {"mean": difference.mean, "half_width": difference.half_width} if difference else None,
            "better_seeds": difference.better if difference else None,
            "diverged": cell.searched[1],
            "runs": cell.searched[0],
            "loss_by_rate": {str(r): np.mean([run.loss for run in by_rate[r]]) for r in sorted(by_rate)},
        }
        rows.append(row)
    record = {"environments": environments, "rows": rows}
    (HERE / "language_model.json").write_text(json.dumps(record, indent=1, default=float) + "\n")
    print(
        "| rank | gauge | moments | learning rate | evaluation loss | less LoRA's, same seed | better | exact match |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        loss, difference = row["evaluation_loss"], row["difference"]
        compared = "- | -"
        if difference:
            compared = (
                f"{difference['mean']:+.4f} ± {difference['half_width']:.4f} | {row['better_seeds']} of {row['n']}"
            )
        rate = f"{row['learning_rate']:g}{' (edge)' * row['on_edge']}"
        print(
            f"| {row['rank']} | {row['gauge']} | {row['moments']} | {rate} "
            f"| {loss['mean']:.4f} ± {loss['std']:.4f} | {compared} "
            f"| {100 * row['accuracy']:.1f} % |"
        )


if __name__ == "__main__":
    main()
