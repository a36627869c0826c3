"""Mistakes that the command line shows as one line."""

import difflib
import unicodedata
from collections.abc import Iterable
from typing import Any


class ConfigError(ValueError):
    """A config that cannot be run; the message says what to do."""


class RunError(RuntimeError):
    """A run directory that cannot be used; the message says what to do."""


def printable(text: str, *, keep: str = "") -> str:
    """Returns a text with escapes in the place of control characters, which could steer a terminal, and of surrogates.

    Args:
        text: any text.
        keep: characters that may stay.
    """
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in ("Cc", "Cs") and c not in keep else c for c in text)


def not_among(what: str, name: object, names: Iterable[str]) -> str:
    """Returns what to say of a name that is none of those there are, with the nearest of them."""
    names = list(names)
    near = difflib.get_close_matches(str(name), names, n=1)
    return f"{what} must be one of {', '.join(names)}, got {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def shown_value(value: Any) -> str:
    """Returns a value from outside, in short."""
    try:
        text = repr(value)
    except Exception as error:  # an integer of more than 4300 digits has no text, and other objects have code of theirs
        text = f"a {type(value).__name__} that has no text ({error})"
    return text if len(text) <= 200 else f"{text[:200]}..."
