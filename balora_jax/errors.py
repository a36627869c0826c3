"""Mistakes that the command line shows as one line."""

import unicodedata


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
