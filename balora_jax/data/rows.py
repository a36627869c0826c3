"""From the rows of published data sets to what a model reads and answers.

Each function takes a row with the published columns and returns `prompt` and `answer` (and `choices`, where the answer
is one of several), or `messages`, the turns of a conversation; or None for a row without a question or an answer. The
formats are those of arXiv 2605.31484: conversations for the instruction sets, `Question: ...`, a new line and `Answer:`
for the mathematical ones, bare text for Wikitext and arXiv.
"""

from collections.abc import Callable, Mapping
from typing import Any

from balora_jax.data.conversations import Message

Row = Mapping[str, Any]
Reader = Callable[[Row], dict[str, Any] | None]

_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def alpaca(row: Row) -> dict[str, Any] | None:
    """`instruction`, `input` (often empty), `output`."""
    question = "\n\n".join(part for part in (_string(row, "instruction"), _string(row, "input")) if part)
    return _exchange(question, _string(row, "output"))


def codefeedback(row: Row) -> dict[str, Any] | None:
    """`query`, `answer`."""
    return _exchange(_string(row, "query"), _string(row, "answer"))


def openhermes(row: Row) -> dict[str, Any] | None:
    """`instruction`, `input`, `output` (the first, 243k); or conversations (2.5, 1M)."""
    return _turns(row) if "conversations" in row else alpaca(row)


def openorca(row: Row) -> dict[str, Any] | None:
    """`system_prompt` (may be empty), `question`, `response`."""
    return _exchange(_string(row, "question"), _string(row, "response"), system=_string(row, "system_prompt"))


def wizardlm(row: Row) -> dict[str, Any] | None:
    """`instruction`, `output` (70k); or conversations (V2, 196k)."""
    if "conversations" in row:
        return _turns(row)
    return _exchange(_string(row, "instruction"), _string(row, "output"))


def metamathqa(row: Row) -> dict[str, Any] | None:
    """`query`, `response`, which ends in `The answer is: ...`."""
    return _question(_string(row, "query"), _string(row, "response"))


def gsm8k(row: Row) -> dict[str, Any] | None:
    """`question`, `answer`, which ends in `#### ...`."""
    return _question(_string(row, "question"), _string(row, "answer"))


def text(row: Row) -> dict[str, Any] | None:
    """`text`, a line or a document; every token of it is learned."""
    return _text(_string(row, "text"))


def arxiv(row: Row) -> dict[str, Any] | None:
    """`article`, the body of a paper (and `abstract`); every token of it is learned."""
    return _text(_string(row, "article"))


def arc(row: Row) -> dict[str, Any] | None:
    """`question`, `choices` (`text`, `label`), `answerKey`, the right label."""
    choices = _of_type(row, "choices", Mapping, "an object")
    labels, texts = (_of_type(choices, name, list, "a list") for name in ("label", "text"))
    right, question = _string(row, "answerKey"), _string(row, "question")
    for name, values in (("label", labels), ("text", texts)):
        if not all(isinstance(value, str) for value in values) or len(values) != len(labels):
            raise ValueError(f"{name} of choices must be a text for each choice, got {values!r:.80}")
    if right not in labels:
        raise ValueError(f"answerKey must be one of the labels {', '.join(labels)}, got {right!r}")
    lines = [question, *(f"{label}. {text}" for label, text in zip(labels, texts, strict=True))]
    found = _question("\n".join(lines), right)
    return found and {**found, "choices": [f" {label}" for label in labels]}


def _string(row: Row, name: str) -> str:
    """The text in a column, empty where there is none."""
    return "" if row[name] is None else _of_type(row, name, str, "a text")


def _of_type(row: Row, name: str, kind: type, wanted: str) -> Any:
    if not isinstance(row[name], kind):
        raise ValueError(f"{name} must be {wanted}, got {row[name]!r:.80}")
    return row[name]


def _text(text: str) -> dict[str, Any] | None:
    return {"prompt": "", "answer": text.strip()} if text.strip() else None


def _question(question: str, answer: str) -> dict[str, Any] | None:
    if not question.strip() or not answer.strip():
        return None
    return {"prompt": f"Question: {question.strip()}\nAnswer:", "answer": f" {answer.strip()}"}


def _exchange(question: str, answer: str, system: str = "") -> dict[str, Any] | None:
    messages = [Message(role="system", content=system)] if system else []
    return _conversation([*messages, Message(role="user", content=question), Message(role="assistant", content=answer)])


def _turns(row: Row) -> dict[str, Any] | None:
    """`conversations`: turns with `from` (`system`, `human`, `gpt`) and `value`."""
    messages = []
    for turn in _of_type(row, "conversations", list, "a list of turns"):
        if not isinstance(turn, Mapping):
            raise ValueError(f"conversations must hold turns with from and value, got {turn!r:.80}")
        speaker = _string(turn, "from")
        if speaker not in _ROLES:
            raise ValueError(f"a turn must be from one of {', '.join(_ROLES)}, got {speaker!r}")
        messages.append(Message(role=_ROLES[speaker], content=_string(turn, "value")))
    return _conversation(messages)


def _conversation(messages: list[Message]) -> dict[str, Any] | None:
    """The turns up to the assistant's last, if they begin with a user's and the assistant says something in each."""
    while messages and messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if not turns or turns[0]["role"] != "user" or not all(turn["content"].strip() for turn in turns):
        return None
    return {"messages": messages}
