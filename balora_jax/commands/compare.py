"""`balora-jax compare`: the methods of finished runs, each at its best cell, against a reference."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg

from balora_jax.commands.arguments import parse
from balora_jax.commands.folders import check_runs, explained
from balora_jax.console import PlainConsole

TABLE_WIDTH = 140
"""Columns that the table needs."""


@dataclass(frozen=True)
class Options:
    """Compares the methods of finished runs, each at its best cell, with a reference, seed by seed.

    Attributes:
        runs: run directories, of a whole sweep or of parts of it.
        reference: the method with which the others are compared.
        by: a swept field whose values are compared each by itself, as adapter.rank; may be given several times.
        csv: file for the table.
        figure: file for a figure, .png or .pdf say; without an ending it gets .png.
    """

    runs: Annotated[tuple[Path, ...], Positional, arg(metavar="RUN")]
    reference: str = "lora"
    by: Annotated[tuple[str, ...], UseAppendAction] = ()
    csv: Path | None = None
    figure: Path | None = None


def main(arguments: list[str]) -> int:
    """Runs the command."""
    options = parse(Options, arguments, prog="balora-jax compare")
    check_runs("compare", options.runs)
    from balora_jax.commands.compared import table, write_csv  # heavy, as what follows: after the cheap mistakes
    from balora_jax.training.comparison import load_runs
    from balora_jax.training.figures import draw_standings
    from balora_jax.training.standings import record, standings, verdict

    with explained("RUN"):
        runs, _ = load_runs(options.runs)
    rows = standings(runs, reference=options.reference, by=options.by)
    written = {}
    if options.csv is not None:
        with explained("--csv"):
            write_csv(rows, options.csv)
        written["table"] = options.csv
    if options.figure is not None:
        name, ending = os.path.splitext(options.figure)
        figure = Path(f"{name}.png") if ending in ("", ".") else options.figure
        records = [{**row.group, **record(row)} for row in rows]
        with explained("--figure"):
            draw_standings(records, options.reference).savefig(figure, dpi=150)
        written["figure"] = figure
    console = PlainConsole(soft_wrap=True)
    PlainConsole(width=max(console.width, TABLE_WIDTH)).print(table(rows, options.reference))
    console.print(verdict(rows, options.reference))
    for what, file in written.items():
        console.print(f"{what}: {file}")
    return 0
