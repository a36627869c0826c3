"""Laying examples out into rows, and the order in which they are drawn."""

import itertools

import datasets
import numpy as np
import pytest

from balora_jax.data.batches import batches, encode, pack, pad, pad_left
from balora_jax.data.tokenizer import CharTokenizer

TOKENIZER = CharTokenizer()


def examples(count, seed=0):
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(list("abcdef"), rng.integers(1, 12))) for _ in range(2 * count)]
    return datasets.Dataset.from_dict({"prompt": texts[:count], "answer": texts[count:]})


def texts_of(arrays):
    """Reads prompt and answer of every text back out of the arrays."""
    found = []
    names = ("tokens", "positions", "segment_ids", "loss_mask")
    for tokens, positions, segments, mask in zip(*(arrays[name] for name in names), strict=True):
        for segment in range(1, segments.max() + 1):
            where = segments == segment
            assert (positions[where] == np.arange(where.sum())).all()
            assert tokens[where][0] == TOKENIZER.bos_id
            assert tokens[where][-1] == TOKENIZER.eos_id
            found.append(
                (TOKENIZER.decode(tokens[where & ~mask].tolist()), TOKENIZER.decode(tokens[where & mask].tolist()))
            )
        assert (tokens[segments == 0] == TOKENIZER.pad_id).all()
        assert not mask[segments == 0].any()
    return found


@pytest.mark.parametrize("lay_out", [pack, pad])
def test_every_text_is_there_once_with_its_answer_marked(lay_out):
    data = examples(200)
    arrays = lay_out(encode(data, TOKENIZER, max_length=32), length=32, pad_id=TOKENIZER.pad_id).arrays()
    expected = sorted(zip(data["prompt"][:], data["answer"][:], strict=True))
    assert sorted(texts_of(arrays)) == expected
    assert all(array.shape == (len(arrays["tokens"]), 32) for array in arrays.values())


def test_packing_wastes_little():
    arrays = pack(encode(examples(500), TOKENIZER, max_length=64), length=64, pad_id=0).arrays()
    assert (arrays["segment_ids"] > 0).mean() > 0.9


def test_too_long_examples_are_counted_not_cut():
    data = datasets.Dataset.from_dict({"prompt": ["ab", "abcdefgh"], "answer": ["c", "d"]})
    encoded = encode(data, TOKENIZER, max_length=6)
    assert encoded.kept.tolist() == [0]
    with pytest.raises(ValueError, match=r"max_length \(data.length\) must leave at least one example, got 4"):
        encode(data, TOKENIZER, max_length=4)


@pytest.mark.parametrize("length", [6, 7, 20])
def test_bare_texts_are_cut_and_every_token_is_learned_once(length):
    texts = ["abcdefghijklm", "ab", "abcde"]
    data = datasets.Dataset.from_dict({"prompt": ["", "", ""], "answer": texts})
    encoded = encode(data, TOKENIZER, max_length=length)
    assert max(map(len, encoded.tokens)) <= length
    assert not any(learned[0] for learned in encoded.learned)
    for index, text in enumerate(texts):
        pieces = [k for k, owner in enumerate(encoded.kept) if owner == index]
        learned = np.concatenate([encoded.tokens[k][encoded.learned[k]] for k in pieces])
        assert TOKENIZER.decode(learned.tolist()) == text
        assert learned[-1] == TOKENIZER.eos_id
        for before, after in itertools.pairwise(pieces):
            assert encoded.tokens[before][-1] == encoded.tokens[after][0]


def test_rows_can_be_taken_apart():
    rows = pack(encode(examples(100), TOKENIZER, max_length=32), length=32, pad_id=TOKENIZER.pad_id)
    arrays = rows.arrays()
    some = rows[3:7]
    assert len(some) == 4
    np.testing.assert_array_equal(some.arrays()["tokens"], arrays["tokens"][3:7])
    np.testing.assert_array_equal(some[-1]["positions"], arrays["positions"][6])
    for index in (len(rows), -len(rows) - 1):
        with pytest.raises(IndexError, match=f"there are {len(rows)} rows, got the index {index}"):
            rows[index]


def numbered(count):
    return [{"tokens": np.array([i]), "other": np.array([10 * i])} for i in range(count)]


def drawn(iterator, count):
    return [next(iterator)["tokens"][:, 0].tolist() for _ in range(count)]


def test_prompts_end_together():
    tokens, segment_ids = pad_left([[5, 6], np.array([7, 9, 8]), [9]], pad_id=9)
    assert tokens.tolist() == [[9, 5, 6], [7, 9, 8], [9, 9, 9]]
    assert segment_ids.tolist() == [[0, 1, 1], [1, 1, 1], [0, 0, 1]]
    assert tokens.dtype == segment_ids.dtype == np.int32
    with pytest.raises(ValueError, match="at least one token"):
        pad_left([[5], []], pad_id=9)


def test_batches_are_full_shuffled_and_keep_rows_together():
    iterator = batches(numbered(10), batch_size=4, seed=0)
    parts = [next(iterator) for _ in range(5)]
    for part in parts:
        np.testing.assert_array_equal(part["other"], 10 * part["tokens"])
    flat = [row for part in parts for row in part["tokens"][:, 0].tolist()]
    assert sorted(flat[:10]) == list(range(10))
    assert sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:], "every epoch has its own order"


def test_order_depends_on_the_seed_alone():
    assert drawn(batches(numbered(50), batch_size=5, seed=1), 20) == drawn(
        batches(numbered(50), batch_size=5, seed=1), 20
    )
    assert drawn(batches(numbered(50), batch_size=5, seed=1), 9) != drawn(
        batches(numbered(50), batch_size=5, seed=2), 9
    )


def test_iterator_state_restores_exactly():
    iterator = batches(numbered(50), batch_size=7, seed=1)
    drawn(iterator, 9)
    state = iterator.get_state()
    rest = drawn(iterator, 9)
    fresh = batches(numbered(50), batch_size=7, seed=1)
    fresh.set_state(state)
    assert drawn(fresh, 9) == rest
