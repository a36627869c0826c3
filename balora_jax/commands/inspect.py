"""`balora-jax inspect`: the pairs of a PEFT adapter in numbers and as a figure."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, Positional, arg

from balora_jax.commands.arguments import parse
from balora_jax.commands.folders import check_peft, explained
from balora_jax.console import PlainConsole
from balora_jax.errors import ConfigError

TABLE_WIDTH = 130
"""Columns that the table needs."""


@dataclass(frozen=True)
class Options:
    """Shows the spectrum, balance and conditioning of every pair of a PEFT adapter; no base model is needed.

    Attributes:
        adapter: a PEFT folder.
        figure: file for a figure, .png or .pdf say; without an ending it gets .png.
        json: prints one JSON object instead, for programs; a condition number that is infinite is null there.
    """

    adapter: Annotated[Path, Positional, arg(metavar="ADAPTER")]
    figure: Path | None = None
    json: FlagCreatePairsOff[bool] = False


def main(arguments: list[str]) -> int:
    """Runs the command."""
    options = parse(Options, arguments, prog="balora-jax inspect")
    check_peft("ADAPTER", options.adapter)
    from balora_jax.adapters import read_peft  # heavy, as what follows: after the cheap mistakes
    from balora_jax.adapters.diagnosis import diagnose_adapter
    from balora_jax.commands.inspected import as_json, draw, notes, summary, table

    with explained("ADAPTER"):
        adapter = read_peft(options.adapter)
        diagnoses = diagnose_adapter(adapter, scaled=True)
    figure = options.figure
    if figure is not None:
        name, ending = os.path.splitext(figure)
        figure = Path(f"{name}.png") if ending in ("", ".") else figure
        try:
            draw(diagnoses, figure)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot write the figure {figure}: {error}") from error
    if options.json:
        print(json.dumps({"adapter": str(options.adapter)} | as_json(diagnoses) | {"notes": notes(adapter)}))
        return 0
    console = PlainConsole(soft_wrap=True)
    console.print(*summary(diagnoses), sep="\n")
    PlainConsole(width=max(console.width, TABLE_WIDTH)).print(table(diagnoses))
    for note in notes(adapter):
        console.print(note)
    if figure is not None:
        console.print(f"figure: {figure}")
    return 0
