"""`balora-jax methods`: the methods, what they are, and their own numbers."""

import re
from dataclasses import dataclass
from typing import Annotated

from rich import box
from rich.table import Table
from tyro.conf import Positional, arg

from balora_jax.commands.arguments import parse
from balora_jax.console import PlainConsole
from balora_jax.errors import ConfigError, not_among
from balora_jax.settings import METHOD_NAMES

TABLE_WIDTH = 120
"""Columns that the table needs."""


@dataclass(frozen=True)
class Options:
    """Lists the methods, their sources, and their own options with defaults; of one method what each option does.

    Attributes:
        method: its name; default all.
    """

    method: Annotated[str | None, Positional, arg(metavar="[METHOD]")] = None


def main(arguments: list[str]) -> int:
    """Runs the command."""
    options = parse(Options, arguments, prog="balora-jax methods")
    console = PlainConsole()
    if options.method is not None:
        if options.method not in METHOD_NAMES:
            raise ConfigError(not_among("METHOD", options.method, METHOD_NAMES))
        console.print(*described(options.method), sep="\n", soft_wrap=True)
        return 0
    PlainConsole(width=max(console.width, TABLE_WIDTH)).print(table())
    return 0


def described(name: str) -> list[str]:
    """Returns what a method is, and a line for each of its own options.

    Args:
        name: of the method.
    """
    from balora_jax.methods import METHODS  # heavy: not for the help

    method = METHODS[name]
    lines = [f"{option} {value.default:g}: {value.meaning}" for option, value in method.all_options.items()]
    return [f"{name}: {method.summary}", *(lines or ["no options of its own"])]


def table() -> Table:
    """Returns the methods as a table for people, in the order in which they are registered."""
    from balora_jax.methods import METHODS  # heavy: not for the help

    out = Table(box=box.SIMPLE_HEAD, caption_justify="left")
    out.add_column("method", no_wrap=True)
    out.add_column("what it is", min_width=40)
    out.add_column("source", no_wrap=True)
    out.add_column("own options")
    for name, method in METHODS.items():
        what, source = split_source(method.summary)
        options = ", ".join(f"{option} {value:g}" for option, value in method.defaults.items())
        out.add_row(name, what, source, options)
    out.caption = "--method NAME chooses one, --options NAME VALUE ... sets its own numbers; methods NAME explains them"
    return out


def split_source(summary: str) -> tuple[str, str]:
    """Returns what a method is and the source that its summary ends with, in parentheses; `""` if it has none."""
    what, source, _ = re.split(r" \(([^()]*)\)$", summary) if summary.endswith(")") else (summary, "", "")
    return what, source
