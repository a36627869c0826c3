"""The console on which people see what comes out: text from outside (paths, names of tensors) is shown as it is."""

from typing import Any

from rich.console import Console
from rich.text import Text

from balora_jax.errors import printable


class PlainConsole(Console):
    """A console without markup, where `[/x]`, `:smile:` and control characters in a text are shown, and mean nothing.

    Args of the constructor: those of `rich.console.Console`.
    """

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Returns a string of any kind (a line, a table's cell, title or caption) as it is shown."""
        return super().render_str(printable(text, keep="\n\t"), **options)
