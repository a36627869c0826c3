"""`balora-jax merge-adapters`: one PEFT adapter between two of the same base."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from balora_jax.commands.arguments import parse
from balora_jax.commands.folders import check_free, check_peft
from balora_jax.console import PlainConsole
from balora_jax.errors import ConfigError


@dataclass(frozen=True)
class Options:
    """Writes the PEFT adapter that is a share of the way from one adapter to another of the same base and rank.

    Attributes:
        first: a PEFT folder; its config and other files are copied as they are.
        second: a PEFT folder of the same modules, shapes and ranks.
        out: a new folder.
        weight: how far along, from 0 (FIRST) to 1 (SECOND).
        how: along the geodesic of the updates among matrices of their rank, or by averages of the factors, or of the
            updates, cut to their rank.
    """

    first: Annotated[Path, Positional, arg(metavar="FIRST")]
    second: Annotated[Path, Positional, arg(metavar="SECOND")]
    out: Annotated[Path, Positional, arg(metavar="OUT")]
    weight: float = 0.5
    how: Literal["geodesic", "factors", "products"] = "geodesic"


def main(arguments: list[str]) -> int:
    """Runs the command."""
    options = parse(Options, arguments, prog="balora-jax merge-adapters")
    if not 0 <= options.weight <= 1:
        raise ConfigError(f"--weight must be from 0 to 1, got {options.weight}")
    check_free(options.out)
    check_peft("FIRST", options.first)
    check_peft("SECOND", options.second)
    from balora_jax.commands.adapters_merged import write_between  # heavy: after the cheap mistakes

    write_between(options.first, options.second, options.out, options.weight, options.how, PlainConsole(soft_wrap=True))
    return 0
