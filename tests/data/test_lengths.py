"""Batches by length: all examples, in few shapes, and little padding."""

import numpy as np
import pytest

from balora_jax.data.lengths import batches_by_length


@pytest.mark.parametrize(("count", "batch_size"), [(1, 4), (7, 3), (64, 64), (1000, 16)])
@pytest.mark.parametrize("longest", [5, 100, 777])
def test_every_example_is_in_a_batch_that_is_long_enough(count, batch_size, longest):
    lengths = np.random.default_rng(0).integers(1, longest + 1, count)
    batches = batches_by_length(lengths, batch_size=batch_size)
    assert set(np.concatenate([rows for rows, _ in batches])) == set(range(count))
    assert {rows.shape for rows, _ in batches} == {(min(batch_size, count),)}
    assert len(batches) == -(-count // batch_size)
    for rows, length in batches:
        assert max(lengths[rows]) <= length <= max(lengths)
    ends = [max(lengths[rows]) for rows, _ in batches]
    assert ends == sorted(ends)
    assert len({length for _, length in batches}) <= 4


def test_short_examples_are_not_padded_to_the_longest():
    """Of a thousand as long as 60 and a tenth of them ten times as long."""
    lengths = np.where(np.arange(1000) % 10 == 0, 600, 60)
    batches = batches_by_length(lengths, batch_size=20)
    assert sorted({length for _, length in batches}) == [80, 600]
    assert sum(len(rows) * length for rows, length in batches) < 1.2 * lengths.sum()


def test_a_shape_for_few_batches_is_not_worth_its_compilation():
    lengths = [60] * 3 + [600] * 10
    assert {length for _, length in batches_by_length(lengths, batch_size=1)} == {600}
    assert {length for _, length in batches_by_length([60, *lengths], batch_size=1)} == {80, 600}
    assert {length for _, length in batches_by_length([20] * 50 + [40] * 50, batch_size=1)} == {40}
