"""From examples to batches of fixed shape: tokenised once, packed or padded into arrays, shuffled by grain.

Every row of an array is a text or several; four arrays of shape `(rows, length)` describe it:

| array | meaning |
|---|---|
| `tokens` | the tokens; `pad_id` where nothing is |
| `positions` | position of a token in its own text |
| `segment_ids` | which text of the row a token belongs to, from 1; 0 is padding |
| `loss_mask` | whether the token is one that the model must predict (an answer and its end) |
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import datasets
import grain
import numpy as np

from balora_jax.data.cache import mapped
from balora_jax.data.conversations import Message

Arrays = dict[str, np.ndarray]


class Tokenizer(Protocol):
    """What the data pipeline needs of a tokenizer."""

    @property
    def pad_id(self) -> int: ...  # noqa: D102
    @property
    def bos_id(self) -> int | None: ...  # noqa: D102
    @property
    def eos_id(self) -> int: ...  # noqa: D102
    @property
    def end_ids(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def fingerprint(self) -> str: ...  # noqa: D102
    def encode(self, text: str) -> list[int]: ...  # noqa: D102
    def encode_continuation(self, text: str) -> list[int]: ...  # noqa: D102
    def encode_conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]: ...  # noqa: D102
    def decode(self, ids: Sequence[int]) -> str: ...  # noqa: D102


class Encoded(NamedTuple):
    """Tokenised examples.

    Attributes:
        tokens: the tokens of each example.
        learned: for each example, which of its tokens the model must predict.
        kept: which example of the data set each is; several are of one where a text was cut into pieces.
    """

    tokens: list[np.ndarray]
    learned: list[np.ndarray]
    kept: list[int]

    @property
    def prompt_lengths(self) -> list[int]:
        """Number of tokens of each example before the first that the model must predict."""
        return [int(learned.argmax()) for learned in self.learned]


_ENCODED = datasets.Features(
    {"tokens": datasets.List(datasets.Value("int32")), "learned": datasets.List(datasets.Value("bool"))}
)


def encode(examples: datasets.Dataset, tokenizer: Tokenizer, *, max_length: int) -> Encoded:
    """Tokenises a data set, or takes the tokens of an earlier call from the cache.

    Args:
        examples: with text columns `prompt` and `answer`, or a column `messages` of conversations.
        tokenizer: turns text into tokens.
        max_length: examples of more tokens are left out, and `len(examples) - len(set(encoded.kept))` tells how many;
            bare texts, whose prompt is empty, are cut into pieces of so many tokens instead.

    Returns:
        The kept examples. A prompt and its answer are `bos prompt answer eos` (no `bos` if the tokenizer has none), of
        which the answer and `eos` are learned; conversations are as the chat template has them, and the assistant's
        turns are learned. A first token is never learned, as nothing is there to predict it from; a piece of a text
        therefore begins with the last token of the piece before.

    Raises:
        ValueError: every example is too long, or the tokenizer cannot encode one.
    """

    def tokenise(batch):
        if "messages" in batch:
            rows = [tokenizer.encode_conversation(messages) for messages in batch["messages"]]
        else:
            rows = [_encode_answer(tokenizer, *row) for row in zip(batch["prompt"], batch["answer"], strict=True)]
        return {"tokens": [tokens for tokens, _ in rows], "learned": [learned for _, learned in rows]}

    key = ("tokens", tokenizer.fingerprint)
    encoded = mapped(examples, tokenise, features=_ENCODED, key=key, description="Tokenising")
    tokens, learned = _rows(encoded, "tokens"), _rows(encoded, "learned")
    bare = [not prompt for prompt in examples["prompt"]] if "prompt" in examples.column_names else [False] * len(tokens)
    places = [(i, part) for i, row in enumerate(tokens) for part in _pieces(len(row), max_length, cut=bare[i])]
    if not places:
        raise ValueError(
            f"max_length must leave at least one example, got {max_length} "
            f"and a shortest example of {min(map(len, tokens), default=0)} tokens"
        )
    masks = [np.append(False, learned[i][part][1:]) if part.start else learned[i][part] for i, part in places]
    return Encoded([tokens[i][part] for i, part in places], masks, [i for i, _ in places])


def _pieces(length: int, max_length: int, *, cut: bool) -> list[slice]:
    """The whole of a text that is not too long; none of one that is, or pieces that share a token with the next."""
    if length <= max_length:
        return [slice(None)]
    starts = range(0, length - 1, max_length - 1) if cut and max_length > 1 else ()
    return [slice(start, start + max_length) for start in starts]


def _encode_answer(tokenizer: Tokenizer, prompt: str, answer: str) -> tuple[list[int], list[bool]]:
    """The tokens of a prompt and its answer, and which are learned; without a prompt all but the first are."""
    before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    if prompt:
        before += tokenizer.encode(prompt)
    after = [*(tokenizer.encode_continuation if prompt else tokenizer.encode)(answer), tokenizer.eos_id]
    learned = [False] * len(before) + [True] * len(after)
    return before + after, [False, *learned[1:]]


def _rows(encoded: datasets.Dataset, name: str) -> list[np.ndarray]:
    """The rows of a column of lists, as views of the (memory-mapped) column."""
    rows = []
    for chunk in encoded.with_format("arrow")[:][name].chunks:
        offsets = np.asarray(chunk.offsets)
        values = chunk.values.to_numpy(zero_copy_only=False)
        rows += [values[start:stop] for start, stop in itertools.pairwise(offsets)]
    return rows


def pad(encoded: Encoded, *, length: int, pad_id: int) -> Arrays:
    """Lays out one example per row."""
    return _fill([[i] for i in range(len(encoded.tokens))], encoded, length, pad_id)


def pack(encoded: Encoded, *, length: int, pad_id: int, open_rows: int = 16) -> Arrays:
    """Lays out several examples per row: each goes to the fullest of the open rows that it fits.

    Args:
        encoded: the examples, none longer than `length`.
        length: tokens per row.
        pad_id: fills the rest of a row.
        open_rows: number of rows that are filled at a time; more waste less padding.

    Returns:
        The four arrays. Attention and positions do not cross examples when the model is given them.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row) of the open rows
    for i, tokens in enumerate(encoded.tokens):
        fitting = [slot for slot in room if slot[0] >= len(tokens)]
        if fitting:
            left, row = min(fitting)
            room.remove((left, row))
        else:
            left, row = length, len(rows)
            rows.append([])
            if len(room) == open_rows:
                room.remove(min(room))
        rows[row].append(i)
        room.append((left - len(tokens), row))
    return _fill(rows, encoded, length, pad_id)


def _fill(rows: list[list[int]], encoded: Encoded, length: int, pad_id: int) -> Arrays:
    """The arrays whose row `k` holds the examples `rows[k]`, one behind the other."""
    shape = (len(rows), length)
    arrays = {
        "tokens": np.full(shape, pad_id, np.int32),
        "positions": np.zeros(shape, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "loss_mask": np.zeros(shape, bool),
    }
    for row, members in enumerate(rows):
        start = 0
        for segment, i in enumerate(members, start=1):
            tokens = encoded.tokens[i]
            stop = start + len(tokens)
            arrays["tokens"][row, start:stop] = tokens
            arrays["positions"][row, start:stop] = np.arange(len(tokens))
            arrays["segment_ids"][row, start:stop] = segment
            arrays["loss_mask"][row, start:stop] = encoded.learned[i]
            start = stop
    return arrays


class _Rows:
    """The rows of the arrays as a grain source."""

    def __init__(self, arrays: Arrays):
        self._arrays = arrays

    def __len__(self) -> int:
        return len(next(iter(self._arrays.values())))

    def __getitem__(self, index):
        return {name: array[index] for name, array in self._arrays.items()}


def batches(arrays: Arrays, *, batch_size: int, seed: int) -> grain.DatasetIterator:
    """Returns an endless iterator of shuffled batches; every epoch has another order.

    Args:
        arrays: rows from `pack` or `pad`.
        batch_size: rows per batch; the last rows of all epochs together fill batches too, so none is short.
        seed: decides the order.

    Returns:
        A grain iterator whose state can be saved and restored exactly.
    """
    rows = grain.MapDataset.source(_Rows(arrays)).shuffle(seed=seed).repeat(None)
    return iter(rows.batch(batch_size).to_iter_dataset(grain.ReadOptions(num_threads=0)))
