import string

import numpy as np
import pytest

from balora_jax.data.tokenizer import CharTokenizer

TOKENIZER = CharTokenizer()
PRINTABLE = "".join(chr(code) for code in range(32, 127))


def test_every_printable_character_has_its_own_token():
    tokens = TOKENIZER.encode(PRINTABLE)
    assert len(set(tokens)) == 95
    assert max(tokens) == TOKENIZER.vocab_size - 1
    assert not {TOKENIZER.pad_id, TOKENIZER.bos_id, TOKENIZER.eos_id} & set(tokens)
    assert len({TOKENIZER.pad_id, TOKENIZER.bos_id, TOKENIZER.eos_id}) == 3
    assert TOKENIZER.decode(tokens) == PRINTABLE


def test_vocabulary_does_not_move():
    assert TOKENIZER.vocab_size == 98
    assert TOKENIZER.encode(" 0Aa~") == [3, 19, 36, 68, 97]


@pytest.mark.parametrize("text", ["", "3", "What is 3 + 4?", string.ascii_letters])
def test_round_trip(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_decode_stops_at_the_end_and_skips_padding():
    seven, eight = TOKENIZER.encode("78")
    pad, bos, eos = TOKENIZER.pad_id, TOKENIZER.bos_id, TOKENIZER.eos_id
    assert TOKENIZER.decode([pad, bos, seven, pad, seven, eos, eight, pad]) == "77"
    assert TOKENIZER.decode(np.array([bos, seven, eight, pad, pad], dtype=np.int32)) == "78"


@pytest.mark.parametrize(
    ("text", "character", "position"), [("3 é 4", "é", 2), ("a\n", "\\n", 1), ("\x7f", "\\x7f", 0)]
)
def test_unknown_character(text, character, position):
    with pytest.raises(ValueError, match="position") as error:
        TOKENIZER.encode(text)
    assert f"'{character}' at position {position}" in str(error.value)


@pytest.mark.parametrize("token", [-1, 98])
def test_unknown_token(token):
    with pytest.raises(ValueError, match=f"from 0 to 97, got {token} at position 1"):
        TOKENIZER.decode([3, token])
