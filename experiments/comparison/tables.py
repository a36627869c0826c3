"""What the studies of this folder read, and where they leave NAME.json, NAME.md (a table) and NAME.png."""

import argparse
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from balora_jax.training.comparison import Cell, Difference, paired_difference
from balora_jax.training.records import Record
from balora_jax.training.standings import LEVEL, holm

HERE = Path(__file__).parent


def arguments(description: str) -> argparse.Namespace:
    """Reads the command line: `runs`, the run directories, and `output`, a folder, by default this one."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = "output folder of balora-jax run; without any the figures are drawn again from what is recorded"
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help=what)
    parser.add_argument("--output", type=Path, default=HERE, help="folder that gets the files")
    return parser.parse_args()


def write(
    name: str,
    rows: list[Record],
    environments: list[Record],
    table: Sequence[Sequence[str]],
    figure,
    *,
    folder: Path = HERE,
) -> None:
    """Writes rows with the environments of their runs, the table, and the figure; prints the table.

    Args:
        name: of the files.
        rows: what the table shows, in full.
        environments: of the runs.
        table: cells, the header first.
        figure: of matplotlib.
        folder: where they go; is made if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for environment in environments:
        environment["command"] = re.sub(r" --output \S+| \S+/(?=configs/)", _shortened, environment["command"])
    record = {"environments": environments, "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    write_table(name, table, folder=folder)
    save_figure(name, figure, folder=folder)


def save_figure(name: str, figure, *, folder: Path = HERE) -> None:
    """Writes NAME.png; arguments as for `write`."""
    figure.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight", metadata={"Software": None})


def recorded_rows(name: str, folder: Path) -> list[Record]:
    """Returns the rows that `write` has recorded in a folder."""
    return json.loads((folder / f"{name}.json").read_text())["rows"]


def standing_records(rows: Sequence[Record], by: str | None = None) -> list[Record]:
    """Returns what `balora_jax.training.figures.draw_standings` draws of recorded rows, compared with LoRA.

    Args:
        rows: with a method, and its losses by seed.
        by: the dotted name of a field by whose values the rows are compared; its last part is among theirs.
    """
    of_group = {row[by.rsplit(".", 1)[-1]] if by else None: row for row in rows if row["method"] == "lora"}
    found = []
    for row in rows:
        group = row[by.rsplit(".", 1)[-1]] if by else None
        losses, reference = row["evaluation_loss"], of_group[group]["evaluation_loss"]["values"]
        values = {by: group} if by else {}
        values |= {"method": row["method"], "n": len(row["seeds"])}
        values |= {"loss_mean": losses["mean"], "loss_std": losses["std"], "difference": None, "verdict": ""}
        if row["method"] != "lora":
            difference = paired_difference(losses["values"], reference)
            values |= {"difference": difference.mean, "low": difference.mean - difference.half_width}
            values |= {"high": difference.mean + difference.half_width, "p_value": difference.p_value}
        found.append(values)
    compared = [values for values in found if "p_value" in values]
    for values, p_value in zip(compared, holm([values["p_value"] for values in compared]), strict=True):
        values["verdict"] = "undecided" if p_value > LEVEL else "better" if values["difference"] < 0 else "worse"
    return found


def _shortened(match: re.Match) -> str:
    """What a record keeps of where the files lay: nothing."""
    return "" if "--output" in match[0] else " "


def write_table(name: str, table: Sequence[Sequence[str]], *, folder: Path = HERE) -> None:
    """Writes and prints a table alone; arguments as for `write`."""
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    lines.insert(1, "|" + "---|" * len(table[0]))
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def summary(cell: Cell, difference: Difference | None) -> Record:
    """Returns what is recorded of a method's best cell, and of its difference from LoRA's."""
    results = [cell.runs[seed].result for seed in sorted(cell.runs)]
    row = {
        "best": dict(cell.values),
        "on_edge": list(cell.on_edge),
        "seeds": sorted(cell.runs),
        "evaluation_loss": spread(cell.losses),
        "accuracy": None if None in (found := [result["accuracy"] for result in results]) else spread(found),
        "runs": cell.searched[0],
        "diverged": cell.searched[1],
    }
    if difference is not None:
        row["difference"] = recorded(difference)
    return row


def recorded(difference: Difference) -> Record:
    """Returns a difference as it is recorded."""
    return difference.__dict__ | {"verdict": difference.verdict}


def spread(values: Sequence[float]) -> Record:
    """Mean, standard deviation, and the values."""
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values), "values": list(values)}


def loss_text(row: Record) -> str:
    """Mean and standard deviation of the final loss."""
    return f"{row['evaluation_loss']['mean']:.4f} ± {row['evaluation_loss']['std']:.4f}"


def difference_text(difference: Record | None) -> str:
    """A recorded difference with its interval, and in how many seeds the loss is lower."""
    if difference is None:
        return "-"
    return (
        f"{difference['mean']:+.4f} ± {difference['half_width']:.4f}, {difference['better']} of {difference['n']}: "
        f"{difference['verdict']}"
    )


def best_text(row: Record) -> str:
    """The values of the best cell."""
    return ", ".join(
        f"{name.rsplit('.', 1)[-1].replace('_', ' ')} {value:g}{' (edge)' * (name in row['on_edge'])}"
        for name, value in row["best"].items()
    )
