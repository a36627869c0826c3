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
    return _exchange("\n\n".join(part for part in (row["instruction"], row["input"]) if part), row["output"])


def codefeedback(row: Row) -> dict[str, Any] | None:
    """`query`, `answer`."""
    return _exchange(row["query"], row["answer"])


def openhermes(row: Row) -> dict[str, Any] | None:
    """`instruction`, `input`, `output` (the first, 243k); or conversations (2.5, 1M)."""
    return _turns(row) if "conversations" in row else alpaca(row)


def openorca(row: Row) -> dict[str, Any] | None:
    """`system_prompt` (may be empty), `question`, `response`."""
    return _exchange(row["question"], row["response"], system=row["system_prompt"])


def wizardlm(row: Row) -> dict[str, Any] | None:
    """`instruction`, `output` (70k); or conversations (V2, 196k)."""
    return _turns(row) if "conversations" in row else _exchange(row["instruction"], row["output"])


def metamathqa(row: Row) -> dict[str, Any] | None:
    """`query`, `response`, which ends in `The answer is: ...`."""
    return _question(row["query"], row["response"])


def gsm8k(row: Row) -> dict[str, Any] | None:
    """`question`, `answer`, which ends in `#### ...`."""
    return _question(row["question"], row["answer"])


def text(row: Row) -> dict[str, Any] | None:
    """`text`, a line or a document; every token of it is learned."""
    return _text(row["text"])


def arxiv(row: Row) -> dict[str, Any] | None:
    """`article`, the body of a paper (and `abstract`); every token of it is learned."""
    return _text(row["article"])


def arc(row: Row) -> dict[str, Any] | None:
    """`question`, `choices` (`text`, `label`), `answerKey`, the right label."""
    labels, texts = row["choices"]["label"], row["choices"]["text"]
    if row["answerKey"] not in labels:
        raise ValueError(f"answerKey must be one of the labels {', '.join(labels)}, got {row['answerKey']!r}")
    lines = [row["question"], *(f"{label}. {text}" for label, text in zip(labels, texts, strict=True))]
    question = _question("\n".join(lines), row["answerKey"])
    return question and {**question, "choices": [f" {label}" for label in labels]}


def _text(text: str | None) -> dict[str, Any] | None:
    return {"prompt": "", "answer": text.strip()} if text and text.strip() else None


def _question(question: str | None, answer: str | None) -> dict[str, Any] | None:
    if not question or not answer or not question.strip() or not answer.strip():
        return None
    return {"prompt": f"Question: {question.strip()}\nAnswer:", "answer": f" {answer.strip()}"}


def _exchange(question: str | None, answer: str | None, system: str | None = None) -> dict[str, Any] | None:
    messages = [Message(role="system", content=system)] if system else []
    turns = [Message(role="user", content=question or ""), Message(role="assistant", content=answer or "")]
    return _conversation(messages + turns)


def _turns(row: Row) -> dict[str, Any] | None:
    """`conversations`: turns with `from` (`system`, `human`, `gpt`) and `value`."""
    messages = []
    for turn in row["conversations"]:
        if turn["from"] not in _ROLES:
            raise ValueError(f"a turn must be from one of {', '.join(_ROLES)}, got {turn['from']!r}")
        messages.append(Message(role=_ROLES[turn["from"]], content=turn["value"] or ""))
    return _conversation(messages)


def _conversation(messages: list[Message]) -> dict[str, Any] | None:
    """The turns up to the assistant's last, if they begin with a user's and the assistant says something in each."""
    while messages and messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if not turns or turns[0]["role"] != "user" or not all(turn["content"].strip() for turn in turns):
        return None
    return {"messages": messages}
