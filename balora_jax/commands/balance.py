"""`balora-jax balance`: the pairs of any PEFT adapter, balanced."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from balora_jax.commands.arguments import parse
from balora_jax.commands.folders import check_free, check_peft
from balora_jax.console import PlainConsole
from balora_jax.settings import Gauge


@dataclass(frozen=True)
class Options:
    """Balances every pair of a PEFT adapter: A^T A = B B^T. The products, and so the adapted model, stay as they are.

    Attributes:
        adapter: a PEFT folder; no base model is needed.
        out: a new folder. The config, the other tensors and the other files are copied as they are.
        gauge: which of the balanced pairs.
    """

    adapter: Annotated[Path, Positional, arg(metavar="ADAPTER")]
    out: Annotated[Path, Positional, arg(metavar="OUT")]
    gauge: Gauge = "svd"


def main(arguments: list[str]) -> int:
    """Runs the command."""
    options = parse(Options, arguments, prog="balora-jax balance")
    check_free(options.out)
    check_peft("ADAPTER", options.adapter)
    from balora_jax.commands.balanced import write_balanced  # heavy: after the cheap mistakes

    write_balanced(options.adapter, options.out, options.gauge, PlainConsole(soft_wrap=True))
    return 0
