"""From examples to batches of fixed shape: tokenized once, packed or padded into rows, shuffled by grain.

Every row is a text or several; four arrays of shape `(length,)`, in a batch `(rows, length)`, describe it:

| array | meaning |
|---|---|
| `tokens` | the tokens; `pad_id` where nothing is |
| `positions` | position of a token in its own text |
| `segment_ids` | which text of the row a token belongs to, from 1; 0 is padding |
| `loss_mask` | whether the token is one that the model must predict (an answer and its end) |
"""

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
    def encode_question(self, messages: Sequence[Message]) -> list[int]: ...  # noqa: D102
    def decode(self, ids: Sequence[int]) -> str: ...  # noqa: D102
    def spell(self, ids: Sequence[int]) -> str: ...  # noqa: D102


class Pieces(Sequence[np.ndarray]):
    """Pieces of a long array, each a view of it; the same as a list of arrays, in 16 bytes a piece.

    Args:
        values: `(m,)`, all the pieces are made of.
        starts: `(n,)` int, where each piece starts in it.
        stops: `(n,)` int, where each ends.
    """

    def __init__(self, values: np.ndarray, starts: np.ndarray, stops: np.ndarray):
        self._values, self._starts, self._stops = values, starts, stops

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Pieces(self._values, self._starts[index], self._stops[index])
        return self._values[self._starts[index] : self._stops[index]]

    @property
    def lengths(self) -> np.ndarray:
        """`(n,)` number of entries of each piece."""
        return self._stops - self._starts

    def parts(self, owners: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> "Pieces":
        """Returns pieces of these pieces: from `starts` to `stops` of the one that is named by `owners`, all `(k,)`."""
        offsets = self._starts[owners]
        return Pieces(self._values, offsets + starts, offsets + stops)


class Encoded(NamedTuple):
    """Tokenized examples.

    Attributes:
        tokens: the tokens of each example.
        learned: for each example, which of its tokens the model must predict; never the first, as nothing is there to
            predict it from.
        kept: `(n,)` which example of the data set each is; several are of one where a text was cut into pieces.
    """

    tokens: Sequence[np.ndarray]
    learned: Sequence[np.ndarray]
    kept: np.ndarray

    @property
    def prompt_lengths(self) -> list[int]:
        """Number of tokens of each example before the first that the model must predict."""
        return [int(learned.argmax()) for learned in self.learned]


_ENCODED = datasets.Features(
    {
        "tokens": datasets.List(datasets.Value("int32")),
        "learned": datasets.List(datasets.Value("bool")),
        "bare": datasets.Value("bool"),
    }
)


def encode(examples: datasets.Dataset, tokenizer: Tokenizer, *, max_length: int) -> Encoded:
    """Tokenizes a data set, or takes the tokens of an earlier call from the cache.

    Args:
        examples: with text columns `prompt` and `answer`, or a column `messages` of conversations.
        tokenizer: turns text into tokens.
        max_length: examples of more tokens are left out, and `len(examples) - len(set(encoded.kept))` tells how many;
            bare texts, whose prompt is empty, are cut into pieces of so many tokens instead.

    Returns:
        The kept examples, in about 5 bytes of memory a token. A prompt and its answer are `bos prompt answer eos` (no
        `bos` if the tokenizer has none), of which the answer and `eos` are learned; conversations are as the chat
        template has them, and the assistant's turns are learned. A piece of a text begins with the last token of the
        piece before, as a first token is never learned.

    Raises:
        ValueError: every example is too long, or the tokenizer cannot encode one.
    """

    def tokenize(batch):
        if "messages" in batch:
            rows = [tokenizer.encode_conversation(messages) for messages in batch["messages"]]
            bare = [False] * len(rows)
        else:
            rows = [_encode_answer(tokenizer, *row) for row in zip(batch["prompt"], batch["answer"], strict=True)]
            bare = [not prompt for prompt in batch["prompt"]]
        return {"tokens": [tokens for tokens, _ in rows], "learned": [learned for _, learned in rows], "bare": bare}

    key = ("tokens", tokenizer.fingerprint)
    encoded = mapped(examples, tokenize, features=_ENCODED, key=key, description="Tokenizing")
    tokens, learned = _pieces(encoded, "tokens"), _pieces(encoded, "learned")
    bare = encoded.data.column("bare").to_numpy()
    owners, starts, stops = _spans(tokens.lengths, bare, max_length)
    if not len(owners):
        raise ValueError(
            f"max_length (data.length) must leave at least one example, got {max_length} "
            f"and a shortest example of {min(tokens.lengths, default=0)} tokens"
        )
    masks: Sequence[np.ndarray] = learned.parts(owners, starts, stops)
    if starts.any():  # two pieces share a token, which one of them learns
        masks = [np.append(False, mask[1:]) for mask in masks]
    return Encoded(tokens.parts(owners, starts, stops), masks, owners)


def _spans(lengths: np.ndarray, bare: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which example each kept piece is of, and from where to where in it.

    Examples that are not too long are one piece; bare ones are otherwise cut, each piece from the last token of the one
    before.
    """
    fits = lengths <= max_length
    step = max_length - 1
    counts = np.where(fits, 1, np.where(bare & (step > 0), -(-(lengths - 1) // max(step, 1)), 0))
    owners = np.repeat(np.arange(len(lengths)), counts)
    within = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = within * step
    return owners, starts, np.minimum(starts + max_length, lengths[owners])


def _encode_answer(tokenizer: Tokenizer, prompt: str, answer: str) -> tuple[list[int], list[bool]]:
    """The tokens of a prompt and its answer, and which are learned; without a prompt all but the first are."""
    before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    if prompt:
        before += tokenizer.encode(prompt)
    after = [*(tokenizer.encode_continuation if prompt else tokenizer.encode)(answer), tokenizer.eos_id]
    learned = [False] * len(before) + [True] * len(after)
    return before + after, [False, *learned[1:]]


def _pieces(encoded: datasets.Dataset, name: str) -> Pieces:
    """The rows of a column of lists."""
    values, bounds = [np.zeros(0, bool)], [np.zeros(1, np.int64)]
    for chunk in encoded.data.column(name).chunks:
        offsets = np.asarray(chunk.offsets).astype(np.int64)
        values.append(chunk.values[offsets[0] : offsets[-1]].to_numpy(zero_copy_only=False))
        bounds.append(offsets[1:] - offsets[0] + bounds[-1][-1])
    ends = np.concatenate(bounds)
    return Pieces(np.concatenate(values), ends[:-1], ends[1:])


class Rows(Sequence[Arrays]):
    """Rows of equal length, each filled with examples one behind the other; a row is laid out when it is asked for.

    Args:
        encoded: the examples.
        order: `(n,)` int, the examples as they follow each other through the rows.
        bounds: `(rows + 1,)` int, which of them are in a row: `order[bounds[row]:bounds[row + 1]]`.
        length: tokens per row, at least as many as its examples have.
        pad_id: fills the rest of a row.
    """

    def __init__(self, encoded: Encoded, order: np.ndarray, bounds: np.ndarray, *, length: int, pad_id: int):
        self._encoded, self._order, self._bounds = encoded, order, bounds
        self._length, self._pad_id = length, pad_id

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @property
    def length(self) -> int:
        """Tokens per row."""
        return self._length

    def __getitem__(self, row):
        if isinstance(row, slice):
            start, stop, step = row.indices(len(self))
            if step != 1:
                raise ValueError(f"rows are taken one after the other, got a slice of step {step}")
            bounds = self._bounds[start : max(start, stop) + 1]
            return Rows(self._encoded, self._order, bounds, length=self._length, pad_id=self._pad_id)
        if not -len(self) <= row < len(self):
            raise IndexError(f"there are {len(self)} rows, got the index {row}")
        row %= len(self)
        arrays = {
            "tokens": np.full(self._length, self._pad_id, np.int32),
            "positions": np.zeros(self._length, np.int32),
            "segment_ids": np.zeros(self._length, np.int32),
            "loss_mask": np.zeros(self._length, bool),
        }
        start = 0
        for segment, i in enumerate(self._order[self._bounds[row] : self._bounds[row + 1]], start=1):
            tokens = self._encoded.tokens[i]
            here = slice(start, start + len(tokens))
            arrays["tokens"][here] = tokens
            arrays["positions"][here] = np.arange(len(tokens))
            arrays["segment_ids"][here] = segment
            arrays["loss_mask"][here] = self._encoded.learned[i]
            start = here.stop
        return arrays

    def arrays(self) -> Arrays:
        """Returns all rows at once, in arrays `(rows, length)`: 13 bytes a token."""
        rows = list(self)
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def pad(encoded: Encoded, *, length: int, pad_id: int) -> Rows:
    """Lays out one example per row."""
    count = len(encoded.tokens)
    return Rows(encoded, np.arange(count), np.arange(count + 1), length=length, pad_id=pad_id)


def pad_left(
    prompts: Sequence[Sequence[int] | np.ndarray], *, pad_id: int, length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Lays out prompts for generation, so that all of them end where it begins.

    Args:
        prompts: the tokens of each, at least one.
        pad_id: fills a row before its prompt.
        length: tokens of a row, at least as many as the longest prompt has; None for these.

    Returns:
        Tokens and segment ids, both `(prompts, length)` int32; the segment is 0 in front of a prompt and
        1 in it.

    Raises:
        ValueError: a prompt has no tokens.
    """
    lengths = [len(prompt) for prompt in prompts]
    if not all(lengths):
        raise ValueError("a prompt must have at least one token, got an empty one")
    length = length or max(lengths)
    segment_ids = (np.arange(length) >= length - np.array(lengths)[:, None]).astype(np.int32)
    tokens = np.full_like(segment_ids, pad_id)
    tokens[segment_ids == 1] = np.concatenate(prompts)
    return tokens, segment_ids


def pack(encoded: Encoded, *, length: int, pad_id: int, open_rows: int = 16) -> Rows:
    """Lays out several examples per row: each goes to the fullest of the open rows that it fits.

    Args:
        encoded: the examples, none longer than `length`.
        length: tokens per row.
        pad_id: fills the rest of a row.
        open_rows: number of rows that are filled at a time; more waste less padding.

    Returns:
        The rows. Attention and positions do not cross examples when the model is given them.
    """
    row_of = np.empty(len(encoded.tokens), np.int64)
    rows = 0
    room: list[tuple[int, int]] = []  # (tokens left, row) of the open rows
    for i, tokens in enumerate(encoded.tokens):
        size = len(tokens)
        fitting = [slot for slot in room if slot[0] >= size]
        if fitting:
            left, row = min(fitting)
            room.remove((left, row))
        else:
            left, row = length, rows
            rows += 1
            if len(room) == open_rows:
                room.remove(min(room))
        row_of[i] = row
        room.append((left - size, row))
    bounds = np.append(0, np.cumsum(np.bincount(row_of, minlength=rows)))
    return Rows(encoded, np.argsort(row_of, kind="stable"), bounds, length=length, pad_id=pad_id)


def batches(rows: Sequence[Arrays], *, batch_size: int, seed: int) -> grain.DatasetIterator:
    """Returns an endless iterator of shuffled batches; every epoch has another order.

    Args:
        rows: from `pack` or `pad`.
        batch_size: rows per batch; the last rows of all epochs together fill batches too, so none is short.
        seed: decides the order.

    Returns:
        A grain iterator whose state can be saved and restored exactly.
    """
    return iter(shuffled(rows, seed=seed).batch(batch_size).to_iter_dataset(grain.ReadOptions(num_threads=0)))


def shuffled(rows: Sequence[Arrays], *, seed: int) -> grain.MapDataset:
    """Returns the endless sequence of rows that `batches` cuts into batches, to be read at any place.

    Args:
        rows: as for `batches`.
        seed: as for `batches`.
    """
    return grain.MapDataset.source(rows).shuffle(seed=seed).repeat(None)
