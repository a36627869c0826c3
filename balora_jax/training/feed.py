"""The rows of each step of a population, by the number of the step: nothing need be kept to go on with them."""

import math
from collections.abc import Sequence

import grain
import jax
import numpy as np

from balora_jax.data.batches import Arrays, Rows, shuffled
from balora_jax.settings import TrainingSettings
from balora_jax.training.layout import Layout
from balora_jax.training.step import Batch


class Feed:
    """The batches of a population. Members of one seed see the same rows."""

    def __init__(self, rows: Rows, seeds: Sequence[int], settings: TrainingSettings, layout: Layout | None):
        """Takes what is trained on.

        Args:
            rows: of the training data.
            seeds: of each member.
            settings: of the loop.
            layout: of the population; each process reads the rows of its own devices.
        """
        self._seeds, self._settings, self._layout = seeds, settings, layout
        self._shuffled = {seed: shuffled(rows, seed=seed) for seed in sorted(set(seeds))}
        self._shape = len(seeds), settings.accumulate, settings.batch_size, rows.length

    def __call__(self, step: int) -> tuple[Batch | Arrays, int]:
        """Returns the batch of a step, arrays `(members, accumulate, rows, length)`, and its number of tokens.

        Args:
            step: from 1.
        """
        if self._layout is None:
            batch = self._part(step, (slice(None),) * 4)
            return batch, _tokens(batch)
        sharding, parts = self._layout.batch(), dict[str, Arrays]()
        for index in sharding.addressable_devices_indices_map(self._shape).values():
            if index is not None and str(index) not in parts:
                parts[str(index)] = self._part(step, index)

        def array(name: str) -> jax.Array:
            return jax.make_array_from_callback(self._shape, sharding, lambda index: parts[str(index)][name])

        read = sum(part["segment_ids"].size for part in parts.values())  # by this process, of all
        tokens = sum(map(_tokens, parts.values())) * math.prod(self._shape) // read
        return {name: array(name) for name in next(iter(parts.values()))}, tokens

    def first(self, count: int, rows: int) -> dict[int, Arrays]:
        """Returns the first rows that members of each seed see, arrays `(count, rows, length)`.

        Args:
            count: number of batches.
            rows: of each.

        Returns:
            The arrays by seed; nothing without batches.
        """
        if not count:
            return {}
        return {seed: _stacked(order, range(count * rows), (count, rows)) for seed, order in self._shuffled.items()}

    def _part(self, step: int, index: tuple[slice, ...]) -> Arrays:
        """The part of a step's batch that some slices cut out; rows are cut whole."""
        members, micro, rows = (range(size)[part] for size, part in zip(self._shape, index[:3], strict=False))
        start = (step - 1) * self._settings.accumulate * self._settings.batch_size
        places = [start + batch * self._settings.batch_size + row for batch in micro for row in rows]
        seeds = [self._seeds[member] for member in members]
        by_seed = {seed: _stacked(self._shuffled[seed], places, (len(micro), len(rows))) for seed in set(seeds)}
        return {name: np.stack([by_seed[seed][name] for seed in seeds]) for name in by_seed[seeds[0]]}


def _stacked(order: grain.MapDataset, places: Sequence[int], shape: tuple[int, int]) -> Arrays:
    rows = [order[place] for place in places]
    return {name: np.stack([row[name] for row in rows]).reshape(*shape, -1) for name in rows[0]}


def _tokens(batch: Arrays) -> int:
    return int((batch["segment_ids"] > 0).sum())
