"""The flags of a command, parsed by tyro, with mistakes in one line; those of config files set their fields."""

import contextlib
import io
import itertools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import tyro

from balora_jax.errors import ConfigError
from balora_jax.training.config import (
    Config,
    Sweep,
    combinations,
    field_names,
    get_field,
    load_config,
    suggestion,
    with_fields,
)

T = TypeVar("T")


def parse(kind: type[T], arguments: list[str], *, prog: str, **default: Any) -> T:
    """Lets tyro parse flags; its boxed message becomes one line.

    Args:
        kind: a dataclass whose fields are the flags.
        arguments: the arguments.
        prog: what the help calls the command.
        **default: `default`, a value whose fields are taken where no flag is given.

    Raises:
        ConfigError: an argument that is unknown, missing or of the wrong type.
        SystemExit: after the help was shown.
    """
    if "--help" in arguments or "-h" in arguments:
        return tyro.cli(kind, args=arguments, prog=prog, **default)
    message = io.StringIO()
    width, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), "1000"
    try:
        with contextlib.redirect_stderr(message), contextlib.redirect_stdout(message):
            return tyro.cli(kind, args=arguments, prog=prog, **default)
    except SystemExit:
        asked, _, _ = message.getvalue().partition("For full helptext")
        missing = re.findall(r"^[│ ] {5}(\S+)", asked, re.MULTILINE)
        if "Missing from" in asked and missing:
            raise ConfigError(f"{prog} needs {', '.join(missing)}; {prog} --help says more") from None
        title, *lines = [line.strip("│╭╰╮╯─-| ") for line in message.getvalue().splitlines()]
        raise ConfigError(next((line for line in lines if line), title)) from None
    finally:
        if width is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = width


def read_config(
    command: str, arguments: list[str], *, option: tuple[str, str] | None = None
) -> tuple[Config, Sweep, Path | None]:
    """Returns what a command that takes a config file is asked to do.

    Args:
        command: its name.
        arguments: the config file, and flags.
        option: of the command's own, and what it names; `run` has `--output` instead.

    Returns:
        The config, the sweep, and the path that was given with the option.

    Raises:
        ConfigError: no config file, a wrong one, or a wrong flag.
    """
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError(f"{command} needs a config file: balora-jax {command} CONFIG")
    config, sweep = load_config(arguments[0])
    rest, path = _take(arguments[1:], *option) if option else (arguments[1:], None)
    config, sweep, output = apply_overrides(config, sweep, rest, prog=f"balora-jax {command} {arguments[0]}")
    if command != "run" and output is not None:
        raise ConfigError(f"{command} prints its result and has no --output")
    return config, sweep, path or output


def apply_overrides(
    config: Config, sweep: Sweep, arguments: list[str], *, prog: str = "balora-jax"
) -> tuple[Config, Sweep, Path | None]:
    """Applies dotted flags to a config; a field that is set this way is no longer swept.

    Of a sweep of several mappings, those stay that hold the value that is set, so that flags pick out runs of the
    sweep; if none does, all stay, and have the value.

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
    arguments, output = _take(arguments, "--output", "a folder")
    known, overridden = set(field_names()), []
    for argument, following in itertools.pairwise([*arguments, "--"]):
        if argument.startswith("--") and argument not in ("--help",):
            name = argument[2:].split("=", 1)[0].replace("-", "_")
            negated = ".".join([*name.split(".")[:-1], name.split(".")[-1].removeprefix("no_")])
            if name not in known and negated not in known:
                raise ConfigError(f"there is no field {name}{suggestion(name)}")
            field = name if name in known else negated
            if isinstance(get_field(config, field), bool) and ("=" in argument or not following.startswith("--")):
                part, _, last = field.rpartition(".")
                raise ConfigError(f"{field} takes no value; write --{field} or --{part}.no-{last}")
            overridden.append(field)
    config = parse(Config, arguments, prog=prog, default=config)
    return config, _without(config, sweep, overridden), output


def _without(config: Config, sweep: Sweep, overridden: list[str]) -> Sweep:
    """The sweep without some fields; runs that differed in these alone, and are now the same, are one run."""
    mappings = [sweep] if isinstance(sweep, Mapping) else list(sweep)
    if not any(name in mapping for mapping in mappings for name in overridden):
        return sweep

    for name in overridden:
        holding = [mapping for mapping in mappings if get_field(config, name) in mapping.get(name, ())]
        if holding:
            mappings = [mapping for mapping in mappings if name not in mapping or mapping in holding]
    runs: set[Config] = set()
    kept: list[dict] = []
    for mapping in mappings:
        for choice in combinations({name: values for name, values in mapping.items() if name not in overridden}):
            run = with_fields(config, choice)
            if run not in runs:
                runs.add(run)
                kept.append({name: (value,) for name, value in choice.items()})
    return kept


def _take(arguments: list[str], flag: str, what: str) -> tuple[list[str], Path | None]:
    """The arguments without a flag that has a path, and the path."""
    rest, path = [], None
    remaining = iter(arguments)
    for argument in remaining:
        if argument == flag or argument.startswith(f"{flag}="):
            value = argument.partition("=")[2] or next(remaining, "")
            if not value or value.startswith("--"):
                raise ConfigError(f"{flag} needs {what}")
            path = Path(value)
        else:
            rest.append(argument)
    return rest, path
