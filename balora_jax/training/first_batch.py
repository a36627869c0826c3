"""The first batch of a run as text, with what is learned marked: the fastest way to see a wrong mask."""

from collections.abc import Iterator
from itertools import groupby

import numpy as np
from rich.text import Text

from balora_jax.data.batches import Arrays, Tokenizer, batches
from balora_jax.errors import printable
from balora_jax.settings import Config
from balora_jax.training.loading import load_data

MOST_ROWS = 4
"""Rows that are shown."""


def first_batch(config: Config) -> Iterator[Text]:
    """Yields the first rows of the first batch, and before them what is not as asked for, a line or several each.

    Args:
        config: of a run.

    Raises:
        ConfigError: its data or its tokenizer do not do.
    """
    rows, examples, notes = load_data(config.data, config.model.path)
    yield from map(Text, (*notes["training"], *notes["evaluation"]))
    size = config.training.batch_size * config.training.accumulate
    batch = next(batches(rows, batch_size=size, seed=config.seed))
    yield Text(f"{min(size, MOST_ROWS)} of the {size} rows of the first batch; what is learned is in \u00ab \u00bb")
    for number in range(min(size, MOST_ROWS)):
        yield from shown_row(number, {name: array[number] for name, array in batch.items()}, examples.tokenizer)


def shown_row(number: int, row: Arrays, tokenizer: Tokenizer) -> Iterator[Text]:
    """Yields a row's heading, and each of its texts.

    Args:
        number: of the row.
        row: arrays `(length,)`, as `balora_jax.data.batches` makes them.
        tokenizer: that made them.
    """
    segments, learned = row["segment_ids"], row["loss_mask"]
    length, filled = len(segments), int((segments > 0).sum())
    yield Text(
        f"\nrow {number + 1}: {length} tokens, {length - filled} of them padding, {int(learned.sum())} learned",
        style="bold",
    )
    for segment in range(1, int(segments.max()) + 1):
        places = np.flatnonzero(segments == segment)
        out = Text(f"text {segment}: ")
        for is_learned, part in groupby(places.tolist(), key=lambda place: bool(learned[place])):
            text = printable(tokenizer.spell(row["tokens"][list(part)].tolist()), keep="\n\t")
            out.append(f"\u00ab{text}\u00bb" if is_learned else text, style="green" if is_learned else "")
        yield out
