"""Which parts of a conversation's text the assistant says."""

from collections.abc import Callable, Sequence
from typing import TypedDict


class Message(TypedDict):
    """One turn; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


def learned_spans(
    render: Callable[[Sequence[Message], bool], str], messages: Sequence[Message]
) -> tuple[str, list[tuple[int, int]]]:
    """Renders a conversation and finds the assistant turns in it.

    A turn begins behind what the model is given when it is its turn (the rendering of the turns before, with the
    generation prompt) and reaches to the end of the rendering of the turns up to it.

    Args:
        render: the chat template: from messages, and whether the generation prompt follows, to text.
        messages: a conversation.

    Returns:
        The text, and for each assistant turn the places of its first character and behind its last.

    Raises:
        ValueError: no turn is the assistant's, or a beginning of the conversation is not rendered as the beginning of
            its text. A model could then not be asked in the way in which it was trained.
    """
    text, spans = render(messages, False), []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, through = render(messages[:index], True), render(messages[: index + 1], False)
        if not (text.startswith(through) and through.startswith(before)):
            raise ValueError(
                f"the chat template {_difference(render, messages, index, text)}; "
                "with such a template the model would not learn what it is asked"
            )
        spans.append((len(before), len(through)))
    if not spans:
        raise ValueError(f"a conversation must have an assistant turn, got {[m['role'] for m in messages]}")
    return text, spans


def _difference(
    render: Callable[[Sequence[Message], bool], str], messages: Sequence[Message], index: int, text: str
) -> str:
    """Says what a template does to the turn of an index so that what is learned is not what is asked."""
    asked, through = render(messages[:index], True), render(messages[: index + 1], False)
    so_far = render(messages[:index], False)
    turn = f"turn {index + 1} of {len(messages)}"
    if text.startswith(through) and through.startswith(so_far) and asked.startswith(so_far):
        prompt, rendered = asked[len(so_far) :], through[len(so_far) :]
        return f"asks for {turn} with the generation prompt {prompt!r}, but renders the turn as {rendered[:60]!r}"
    shorter, longer = (asked, through) if text.startswith(through) else (through, text)
    same = next(i for i, (a, b) in enumerate(zip(shorter + "\0", longer + "\0", strict=False)) if a != b)
    return (
        f"renders {turn} otherwise when more follows: {shorter[same : same + 30]!r} became "
        f"{longer[same : same + 30]!r} behind {text[:same][-30:]!r}"
    )
