"""`balora-jax report`: finished runs as one HTML file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg

from balora_jax.commands.arguments import parse
from balora_jax.commands.folders import check_runs, explained
from balora_jax.console import PlainConsole
from balora_jax.errors import ConfigError
from balora_jax.files import whole_file


@dataclass(frozen=True)
class Options:
    """Writes an HTML file about finished runs: verdict, table, charts, environment. It opens without a network.

    Attributes:
        runs: run directories, of a whole sweep or of parts of it.
        output: the file; default report.html in the run directory, if it is one.
        reference: the method with which the others are compared; default lora, or the first.
        by: a swept field whose values are compared each by itself, as adapter.rank; may be given several times.
    """

    runs: Annotated[tuple[Path, ...], Positional, arg(metavar="RUN")]
    output: Path | None = None
    reference: str | None = None
    by: Annotated[tuple[str, ...], UseAppendAction] = ()


def main(arguments: list[str]) -> int:
    """Runs the command."""
    options = parse(Options, arguments, prog="balora-jax report")
    check_runs("report", options.runs)
    if options.output is None and len(options.runs) > 1:
        raise ConfigError("a report of several run directories needs --output FILE")
    from balora_jax.training.report import report_page  # heavy: after the cheap mistakes

    file = options.output or options.runs[0] / "report.html"
    with explained("RUN"):
        page = report_page(options.runs, reference=options.reference, by=options.by)
    with explained("--output"), whole_file(file) as out:
        out.write(page)
    PlainConsole(soft_wrap=True).print(f"report: {file}")
    return 0
