"""From examples to batches of fixed shape: tokenised once, packed or padded into arrays, shuffled by grain.

Every row of an array is a text or several; four arrays of shape `(rows, length)` describe it:

| array | meaning |
|---|---|
| `tokens` | the tokens; `pad_id` where nothing is |
| `positions` | position of a token in its own text |
| `segment_ids` | which text of the row a token belongs to, from 1; 0 is padding |
| `loss_mask` | whether the token is one that the model must predict (the answer and its end) |
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import datasets
import grain
import numpy as np

Arrays = dict[str, np.ndarray]


class Tokenizer(Protocol):
    """What the data pipeline needs of a tokenizer."""

    @property
    def pad_id(self) -> int: ...  # noqa: D102
    @property
    def bos_id(self) -> int | None: ...  # noqa: D102
    @property
    def eos_id(self) -> int: ...  # noqa: D102
    def encode(self, text: str) -> list[int]: ...  # noqa: D102
    def decode(self, ids: Sequence[int]) -> str: ...  # noqa: D102


class Encoded(NamedTuple):
    """Tokenised examples.

    Attributes:
        tokens: one list of tokens per example, prompt and answer.
        prompt_lengths: number of tokens of each prompt.
        kept: indices of the examples that were not too long, into the data set.
    """

    tokens: list[list[int]]
    prompt_lengths: list[int]
    kept: list[int]


def encode(examples: datasets.Dataset, tokenizer: Tokenizer, *, max_length: int) -> Encoded:
    """Tokenises a data set with text columns `prompt` and `answer`.

    Args:
        examples: the data set.
        tokenizer: turns text into tokens.
        max_length: examples of more tokens are left out; `len(examples) - len(encoded.kept)` tells how many.

    Returns:
        The kept examples, each as `bos prompt answer eos` (without `bos` if the tokenizer has none).

    Raises:
        ValueError: every example is too long.
    """

    def tokenise(batch):
        prompts = [tokenizer.encode(text) for text in batch["prompt"]]
        if tokenizer.bos_id is not None:
            prompts = [[tokenizer.bos_id, *prompt] for prompt in prompts]
        answers = [[*tokenizer.encode(text), tokenizer.eos_id] for text in batch["answer"]]
        return {
            "tokens": [p + a for p, a in zip(prompts, answers, strict=True)],
            "prompt_length": [len(p) for p in prompts],
        }

    columns = tokenise(examples[:])
    kept = [i for i, tokens in enumerate(columns["tokens"]) if len(tokens) <= max_length]
    if not kept:
        raise ValueError(
            f"max_length must leave at least one example, got {max_length} "
            f"and a shortest example of {min(map(len, columns['tokens']))} tokens"
        )
    return Encoded([columns["tokens"][i] for i in kept], [columns["prompt_length"][i] for i in kept], kept)


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
            tokens, prompt_length = encoded.tokens[i], encoded.prompt_lengths[i]
            stop = start + len(tokens)
            arrays["tokens"][row, start:stop] = tokens
            arrays["positions"][row, start:stop] = np.arange(len(tokens))
            arrays["segment_ids"][row, start:stop] = segment
            arrays["loss_mask"][row, start + prompt_length : stop] = True
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
