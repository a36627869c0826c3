"""The table of the study on the language model: `python experiments/gauges/language_model.py RUN ...`.

RUN are output folders of `balora-jax run configs/gauges.py`, of the whole sweep or of parts of it. For each rank and
method the learning rate with the lowest mean evaluation loss over the seeds is taken, and its losses are compared
with those of LoRA at LoRA's own best rate, seed by seed. Writes `language_model.json` and prints a table.
"""

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
T_FOR_FIVE = 2.776
"""97.5 % quantile of Student's t with 4 degrees of freedom: five seeds."""


def load(folders: list[Path]) -> tuple[dict, list]:
    """Results by (rank, method) and learning rate and seed; and the environments of the runs."""
    found: dict = defaultdict(lambda: defaultdict(dict))
    for folder in folders:
        configs = json.loads((folder / "config.json").read_text())
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            if record["kind"] != "result":
                continue
            config = configs[record["member"]]
            balance = config["balance"]
            method = "LoRA" if config["method"] == "lora" else (balance["gauge"], balance["transport"])
            rate = config["optimizer"]["learning_rate"]
            found[config["adapter"]["rank"], method][rate][config["seed"]] = record
    starts = [start for folder in folders for start in json.loads((folder / "environment.json").read_text())]
    for start in starts:
        start["command"] = re.sub(r" --output \S+", "", start["command"])
    return found, starts


def best_rate(rates: dict) -> float:
    """The learning rate with the lowest mean loss, a diverged run counting as infinite."""

    def mean(rate):
        runs = rates[rate].values()
        return np.mean([r["evaluation_loss"] if r["status"] == "finished" else np.inf for r in runs])

    return min(rates, key=mean)


def main() -> None:
    """Reads the runs, writes the record and prints the table."""
    found, environments = load([Path(argument) for argument in sys.argv[1:]])
    rows = []
    for rank, method in sorted(found, key=lambda key: (key[0], key[1] != "LoRA", str(key[1]))):
        rates, reference = found[rank, method], found[rank, "LoRA"]
        rate, reference_rate = best_rate(rates), best_rate(reference)
        seeds = sorted(rates[rate])
        losses, references = (
            np.array([runs[seed]["evaluation_loss"] for seed in seeds])
            for runs in (rates[rate], reference[reference_rate])
        )
        difference = losses - references
        assert len(seeds) == 5
        row = {
            "rank": rank,
            "gauge": method if method == "LoRA" else method[0],
            "moments": "-" if method == "LoRA" else ("carried" if method[1] else "left"),
            "learning_rate": rate,
            "on_edge": rate in (min(rates), max(rates)),
            "n": len(seeds),
            "evaluation_loss": {"mean": losses.mean(), "std": losses.std(ddof=1)},
            "accuracy": float(np.mean([rates[rate][seed]["accuracy"] for seed in seeds])),
            "difference": {"mean": difference.mean(), "half_width": T_FOR_FIVE * difference.std(ddof=1) / 5**0.5},
            "better_seeds": int(np.sum(difference < 0)),
            "diverged": sum(r["status"] != "finished" for runs in rates.values() for r in runs.values()),
            "runs": sum(map(len, rates.values())),
            "loss_by_rate": {str(r): np.mean([x["evaluation_loss"] for x in rates[r].values()]) for r in sorted(rates)},
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
        compared = f"{difference['mean']:+.4f} ± {difference['half_width']:.4f} | {row['better_seeds']} of 5"
        rate = f"{row['learning_rate']:g}{' (edge)' * row['on_edge']}"
        print(
            f"| {row['rank']} | {row['gauge']} | {row['moments']} | {rate} "
            f"| {loss['mean']:.4f} ± {loss['std']:.4f} | {compared if row['gauge'] != 'LoRA' else '- | -'} "
            f"| {100 * row['accuracy']:.1f} % |"
        )


if __name__ == "__main__":
    main()
