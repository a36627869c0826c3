"""What `balora-jax compare` shows: the standings of methods as a table and as a CSV file."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from balora_jax.files import whole_file
from balora_jax.training.standings import LEVEL, Standing, loss_text, record, settings, shown


def table(rows: Sequence[Standing], reference: str) -> Table:
    """Returns the standings as a table for people."""
    out = Table(box=box.SIMPLE_HEAD, caption_justify="left")
    fields = list(rows[0].group)
    for name in (*(field.rsplit(".", 1)[-1].replace("_", " ") for field in fields), "method", "best"):
        out.add_column(name, no_wrap=name != "best")
    for name in ("n", "evaluation loss", f"less {reference}'s", "lower in", "p (Holm)", "verdict", "diverged"):
        out.add_column(name, justify="left" if name == "verdict" else "right", no_wrap=True)
    for row in rows:
        out.add_row(*(shown(value) for value in row.group.values()), row.method, *_cells(row, reference))
    count = sum(row.difference is not None for row in rows)
    out.caption = (
        "mean ± standard deviation over n seeds, at the cell of lowest mean evaluation loss; difference: mean over "
        "common seeds ± half of its own 95 % interval (paired, Student's t); p and verdict: corrected by Holm's method "
        f"for {count} comparison{'s' * (count != 1)}, {100 * LEVEL:g} % in all; diverged: cells with a diverged run"
    )
    return out


def _cells(row: Standing, reference: str) -> tuple[str, ...]:
    diverged = f"{row.cells[1]} of {row.cells[0]}"
    if row.cell is None:
        return "every cell diverged", "0", "", "", "", "", "", diverged
    shared = settings(row.cell.values, row.cell.on_edge), str(len(row.cell.runs)), loss_text(row.cell)
    found = row.difference
    if found is None or row.corrected is None:
        return *shared, "", "", "", "reference" if row.method == reference else "not compared", diverged
    difference = f"{found.mean:+.4f} ± {found.half_width:.4f}"
    return *shared, difference, f"{found.better} of {found.n}", f"{row.corrected:.2g}", row.verdict, diverged


def write_csv(rows: Sequence[Standing], file: Path) -> None:
    """Writes the standings, a line each.

    Args:
        rows: at least one.
        file: to write.
    """
    searched = list(dict.fromkeys(name for row in rows if row.cell for name in row.cell.values))
    lines = [_line(row, searched) for row in rows]
    with whole_file(file) as out:
        writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def _line(row: Standing, searched: Sequence[str]) -> dict[str, Any]:
    best = row.cell.values if row.cell else {}
    line = {name: shown(value) for name, value in row.group.items()} | {"method": row.method}
    return line | {name: shown(best[name]) if name in best else None for name in searched} | record(row)
