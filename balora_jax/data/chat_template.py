"""Chat templates, rendered so that the same turns give the same text at every time and on every machine."""

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NoReturn

from balora_jax.data.conversations import Message
from balora_jax.limits import limited

_MOST_SECONDS, _MOST_MEMORY = 10.0, 2**29
"""What the rendering of a conversation may take."""

_MOST_ADDED = 2**20
"""Characters that a template may add to those of the turns, which it may repeat."""

_TODAY = datetime.datetime(2024, 7, 26)
"""What templates that state today's date are told (Llama 3 by `date_string`, Mistral Small by `strftime_now`)."""


def render(
    template: str, messages: Sequence[Message], *, prompt: bool, special_tokens: Mapping[str, Any], name: str
) -> str:
    """Returns the text of a conversation under a chat template, as `transformers` renders it.

    Args:
        template: the template, in Jinja.
        messages: the turns.
        prompt: whether the generation prompt follows.
        special_tokens: variables of the template (`bos_token`, ...).
        name: what the template is called in messages.

    Raises:
        ValueError: the template fails, takes too long or too much memory, or asks for what depends on chance or on the
            machine.
    """
    try:
        with limited(seconds=_MOST_SECONDS, memory=_MOST_MEMORY):
            text = _compiled(template).render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=prompt,
                date_string=_TODAY.strftime("%d %b %Y"),
                **special_tokens,
            )
        if len(text) > _MOST_ADDED + 2 * sum(len(message["content"]) for message in messages):
            raise ValueError(f"it makes a text of {len(text)} characters of them")
        return text
    except Exception as error:  # a template is a program, and may fail in any way
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"{name} fails on the turns of {roles}: {type(error).__name__}: {error}") from error


@cache
def _compiled(template: str) -> Any:
    """The template, in an environment like that of `transformers`, but without a clock and without chance."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which marks what the assistant says and changes no text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def failing(message):
        raise TemplateError(message)

    def refused(what: str, why: str):
        def refuse(*_, **__) -> NoReturn:
            raise TemplateError(f"it uses {what}, which {why}, so that a run would not be the same twice")

        return refuse

    def on_the_fixed_day(form: str) -> str:
        if "%s" in form:
            refused("strftime_now('%s')", "depends on the machine's time zone")()
        return _TODAY.strftime(form)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters |= {"tojson": to_json, "random": refused("the filter random", "draws at random")}
    environment.globals |= {
        "raise_exception": failing,
        "strftime_now": on_the_fixed_day,
        "lipsum": refused("lipsum", "draws at random"),
    }
    return environment.from_string(template)
