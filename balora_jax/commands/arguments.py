"""The flags of a command, parsed by tyro, with mistakes in one line."""

import contextlib
import io
import os
import re
from typing import Any, TypeVar

import tyro

from balora_jax.training.config import ConfigError

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
