"""The command line: `balora-jax COMMAND CONFIG [--output FOLDER] [--field.name VALUE ...]`."""

import contextlib
import io
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import tyro
from rich.console import Console

from balora_jax.training.config import (
    Config,
    ConfigError,
    Sweep,
    combinations,
    expand,
    field_names,
    get_field,
    load_config,
    suggestion,
    with_fields,
)
from balora_jax.training.records import RunError

USAGE = """usage: balora-jax run CONFIG [--output FOLDER] [--field.name VALUE ...]

       balora-jax estimate CONFIG [--field.name VALUE ...]

commands:
  run       train and compare what a config file describes; the same command goes on after an interruption
  estimate  print the sizes and the memory of a step, before any weight is loaded

Every field of the config can be set: balora-jax run CONFIG --help lists them.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code: 0, 2 for a wrong command or config, 130 after an interruption."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    try:
        if arguments[0] not in _COMMANDS:
            raise ConfigError(f"unknown command {arguments[0]!r}; commands are {', '.join(_COMMANDS)}")
        return _COMMANDS[arguments[0]](arguments[1:])
    except (ConfigError, RunError) as error:
        print(f"balora-jax: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("balora-jax: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


def _read(command: str, arguments: list[str]) -> tuple[Config, Sweep, Path | None]:
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError(f"{command} needs a config file: balora-jax {command} CONFIG")
    config, sweep = load_config(arguments[0])
    return apply_overrides(config, sweep, arguments[1:], prog=f"balora-jax {command} {arguments[0]}")


def _run(arguments: list[str]) -> int:
    config, sweep, output = _read("run", arguments)
    from balora_jax.training import results, run  # heavy: after the cheap mistakes

    console = Console()
    output = output or Path("runs") / config.name
    rows = run(config, sweep, output, console)
    Console(width=max(console.width, results.TABLE_WIDTH)).print(results.table(rows))
    console.print(f"record: {output}, figure: {output / 'figure.png'}", highlight=False, soft_wrap=True)
    return 0


def _estimate(arguments: list[str]) -> int:
    config, sweep, output = _read("estimate", arguments)
    if output is not None:
        raise ConfigError("estimate prints its result and has no --output")
    from balora_jax.training import results
    from balora_jax.training.estimate import estimate, report
    from balora_jax.training.run import sort_into_populations

    console = Console(width=max(Console().width, results.TABLE_WIDTH))
    for name, members in sort_into_populations(expand(config, sweep)).items():
        console.print(report(name, estimate(tuple(members.values()))))
    return 0


_COMMANDS = {"run": _run, "estimate": _estimate}


def apply_overrides(
    config: Config, sweep: Sweep, arguments: list[str], *, prog: str = "balora-jax"
) -> tuple[Config, Sweep, Path | None]:
    """Applies dotted flags to a config; a field that is set this way is no longer swept.

    Of a sweep of several mappings, those stay that hold the value that is set, so that flags pick out runs of the
    sweep; if none does, all stay.

    Args:
        config: the file's config.
        sweep: the file's sweep.
        arguments: `--field.name value ...`, and perhaps `--output folder`.
        prog: what the help calls the command.

    Returns:
        The config, the sweep, and the output folder if one was given.

    Raises:
        ConfigError: an unknown field, or a value that is not of its type.
    """
    arguments, output = _take_output(arguments)
    known, overridden = set(field_names()), []
    for argument in arguments:
        if argument.startswith("--") and argument not in ("--help",):
            name = argument[2:].split("=", 1)[0].replace("-", "_")
            negated = ".".join([*name.split(".")[:-1], name.split(".")[-1].removeprefix("no_")])
            if name not in known and negated not in known:
                raise ConfigError(f"there is no field {name}{suggestion(name)}")
            overridden.append(name if name in known else negated)
    config = _parse(config, arguments, prog)
    return config, _without(config, sweep, overridden), output


def _without(config: Config, sweep: Sweep, overridden: list[str]) -> Sweep:
    """The sweep without some fields; runs that differed in these alone, and are now the same, are one run."""
    mappings = [sweep] if isinstance(sweep, Mapping) else list(sweep)
    if not any(name in mapping for mapping in mappings for name in overridden):
        return sweep

    def holds(mapping):
        return all(get_field(config, name) in mapping[name] for name in overridden if name in mapping)

    runs: list[Config] = []
    kept: list[dict] = []
    for mapping in [mapping for mapping in mappings if holds(mapping)] or mappings:
        for choice in combinations({name: values for name, values in mapping.items() if name not in overridden}):
            run = with_fields(config, choice)
            if run not in runs:
                runs.append(run)
                kept.append({name: (value,) for name, value in choice.items()})
    return kept


def _take_output(arguments: list[str]) -> tuple[list[str], Path | None]:
    rest, output = [], None
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--output" or argument.startswith("--output="):
            value = argument.partition("=")[2] or next(remaining, "")
            if not value or value.startswith("--"):
                raise ConfigError("--output needs a folder")
            output = Path(value)
        else:
            rest.append(argument)
    return rest, output


def _parse(config: Config, arguments: list[str], prog: str) -> Config:
    """Lets tyro parse the flags; its boxed message becomes one line."""
    if "--help" in arguments or "-h" in arguments:
        return tyro.cli(Config, default=config, args=arguments, prog=prog)
    message = io.StringIO()
    width, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), "1000"
    try:
        with contextlib.redirect_stderr(message), contextlib.redirect_stdout(message):
            return tyro.cli(Config, default=config, args=arguments, prog=prog)
    except SystemExit:
        title, *lines = [line.strip("│╭╰╮╯─-| ") for line in message.getvalue().splitlines()]
        raise ConfigError(next((line for line in lines if line), title)) from None
    finally:
        if width is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = width


if __name__ == "__main__":
    sys.exit(main())
