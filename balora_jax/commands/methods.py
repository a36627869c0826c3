"""`balora-jax methods`: the methods, what they are, and their own numbers."""

import re
from dataclasses import dataclass

from rich import box
from rich.table import Table

from balora_jax.commands.arguments import parse
from balora_jax.console import PlainConsole

TABLE_WIDTH = 120
"""Columns that the table needs."""


@dataclass(frozen=True)
class Options:
    """Lists the methods, their sources, and their own options with defaults."""


def main(arguments: list[str]) -> int:
    """Runs the command."""
    parse(Options, arguments, prog="balora-jax methods")
    console = PlainConsole()
    PlainConsole(width=max(console.width, TABLE_WIDTH)).print(table())
    return 0


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
        options = ", ".join(f"{option} {value:g}" for option, value in method.options.items())
        out.add_row(name, what, source, options)
    out.caption = "--method NAME chooses one, --options NAME VALUE ... sets its own numbers"
    return out


def split_source(summary: str) -> tuple[str, str]:
    """Returns what a method is and the source that its summary ends with, in parentheses; `""` if it has none."""
    what, source, _ = re.split(r" \(([^()]*)\)$", summary) if summary.endswith(")") else (summary, "", "")
    return what, source
