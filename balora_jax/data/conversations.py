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
            shorter, longer = (before, through) if text.startswith(through) else (through, text)
            same = next(i for i, (a, b) in enumerate(zip(shorter + "\0", longer + "\0", strict=False)) if a != b)
            raise ValueError(
                f"the chat template renders turn {index + 1} of {len(messages)} otherwise when more follows: "
                f"{shorter[same : same + 30]!r} became {longer[same : same + 30]!r} behind {text[:same][-30:]!r}; "
                "with such a template the model would not learn what it is asked"
            )
        spans.append((len(before), len(through)))
    if not spans:
        raise ValueError(f"a conversation must have an assistant turn, got {[m['role'] for m in messages]}")
    return text, spans
