"""The flags of a command, parsed by tyro, with mistakes in one line; those of config files set their fields."""

import contextlib
import io
import itertools
import os
import re
import shlex
from collections import deque
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import tyro

from balora_jax.errors import ConfigError
from balora_jax.settings import Config
from balora_jax.training.config import Sweep, combinations, load_config
from balora_jax.training.fields import field_names, get_field, suggestion, with_fields

T = TypeVar("T")

_OF_FILES = ("evaluations",)
"""Fields without a flag."""


def parse(kind: type[T], arguments: list[str], *, prog: str, **options: Any) -> T:
    """Lets tyro parse flags; its boxed message becomes one line.

    Args:
        kind: a dataclass whose fields are the flags.
        arguments: the arguments.
        prog: what the help calls the command.
        **options: of `tyro.cli`: `default`, a value whose fields are taken where no flag is given; `description`.

    Raises:
        ConfigError: an argument that is unknown, missing or of the wrong type.
        SystemExit: after the help was shown.
    """
    if "--help" in arguments or "-h" in arguments:
        return tyro.cli(kind, args=arguments, prog=prog, **options)
    message = io.StringIO()
    width, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), "1000"
    try:
        with contextlib.redirect_stderr(message), contextlib.redirect_stdout(message):
            return tyro.cli(kind, args=arguments, prog=prog, **options)
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


class Flag(NamedTuple):
    """A flag of a command's own, beside the fields of its config.

    Attributes:
        help: what it does.
        value: what its value is, "a folder" say; None for a flag without one.
        many: whether it takes all values up to the next flag; they are given as words of a shell.
    """

    help: str
    value: str | None = None
    many: bool = False


Own = Mapping[str, Flag]


def read_config(
    command: str, arguments: list[str], *, what: str, own: Own = MappingProxyType({})
) -> tuple[Config, Sweep, dict[str, str]]:
    """Returns what a command that takes a config file is asked to do.

    Args:
        command: its name.
        arguments: the config file, and flags.
        what: the command does, for its help.
        own: the flags that the command has beside the fields, `--output` say.

    Returns:
        The config, the sweep, and of the command's own flags those that were given, with their values.

    Raises:
        ConfigError: no config file, a wrong one, or a wrong flag.
        SystemExit: after the help was shown.
    """
    prog = f"balora-jax {command}"
    flags = "\n".join(f"{flag}: {its.help}" for flag, its in own.items())
    help_text = "\n\n".join(part for part in (what, flags, "Every field of the config can be set:") if part)
    if arguments and arguments[0] in ("--help", "-h"):
        parse(Config, arguments[:1], prog=f"{prog} CONFIG", description=help_text, default=Config(name="..."))
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError(f"{command} needs a config file: {prog} CONFIG; {prog} --help says more")
    config, sweep = load_config(arguments[0])
    rest, given = _take(arguments[1:], own)
    if "--output" in rest:
        raise ConfigError(f"{command} prints its result and has no --output")
    config, sweep = apply_overrides(config, sweep, rest, prog=f"{prog} {arguments[0]}", description=help_text)
    return config, sweep, given


def apply_overrides(
    config: Config, sweep: Sweep, arguments: list[str], *, prog: str = "balora-jax", description: str | None = None
) -> tuple[Config, Sweep]:
    """Applies dotted flags to a config; a field that is set this way is no longer swept.

    Of a sweep of several mappings, those stay that hold the value that is set, so that flags pick out runs of the
    sweep; if none does, all stay, and have the value.

    Args:
        config: the file's config.
        sweep: the file's sweep.
        arguments: `--field.name value ...`.
        prog: what the help calls the command.
        description: what the help says of it.

    Returns:
        The config and the sweep.

    Raises:
        ConfigError: an unknown field, or a value that is not of its type.
    """
    known, overridden = set(field_names()), []
    for argument, following in itertools.pairwise([*arguments, "--"]):
        if argument.startswith("--") and argument not in ("--help",):
            name = argument[2:].split("=", 1)[0].replace("-", "_")
            if name.split(".")[0] in _OF_FILES:
                raise ConfigError(f"{name.split('.')[0]} is set in the config file, and has no flag")
            negated = ".".join([*name.split(".")[:-1], name.split(".")[-1].removeprefix("no_")])
            if name not in known and negated not in known:
                raise ConfigError(f"there is no field {name}{suggestion(name)}")
            field = name if name in known else negated
            if isinstance(get_field(config, field), bool) and ("=" in argument or not following.startswith("--")):
                part, _, last = field.rpartition(".")
                raise ConfigError(f"{field} takes no value; write --{field} or --{part}.no-{last}")
            if field == "options" and "=" in following:
                raise ConfigError(f"options are given as --options NAME VALUE, got {following}")
            overridden.append(field)
    config = parse(Config, arguments, prog=prog, description=description, default=config)
    return config, _without(config, sweep, overridden)


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


def _take(arguments: list[str], own: Own) -> tuple[list[str], dict[str, str]]:
    """The arguments without a command's own flags, and these with their values, which are empty if they have none."""
    rest, given = [], {}
    remaining = deque(arguments)
    while remaining:
        argument = remaining.popleft()
        flag, sign, value = argument.partition("=")
        if flag not in own:
            rest.append(argument)
            continue
        wanted = own[flag].value
        if wanted is None and sign:
            raise ConfigError(f"{flag} takes no value, got {value}")
        values = [value] if value else []
        while wanted is not None and remaining and not remaining[0].startswith("--") and (own[flag].many or not values):
            values.append(remaining.popleft())
        if wanted is not None and not any(values):
            raise ConfigError(f"{flag} needs {wanted}")
        given[flag] = shlex.join(values) if own[flag].many else "".join(values)
    return rest, given
