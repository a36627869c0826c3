"""A character-level tokenizer with a fixed vocabulary."""

from collections.abc import Iterable, Sequence
from typing import NoReturn

from balora_jax.data.conversations import Message

_FIRST, _LAST = 32, 126
_SPECIALS = 3


class CharTokenizer:
    """Tokens are the printable ASCII characters, after three special ones.

    Token 0 is padding, 1 begins and 2 ends a sequence, and character `c` is token `ord(c) - 29`. Nothing is
    learned and nothing can be configured, so the vocabulary is the same in every run.

    Examples:
        >>> tokenizer = CharTokenizer()
        >>> tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("3 + 4"), tokenizer.eos_id])
        '3 + 4'
    """

    vocab_size: int = _LAST - _FIRST + 1 + _SPECIALS
    fingerprint: str = "CharTokenizer"

    @property
    def pad_id(self) -> int:
        """Token that fills a sequence up to a fixed length."""
        return 0

    @property
    def bos_id(self) -> int:
        """Token that begins a sequence."""
        return 1

    @property
    def eos_id(self) -> int:
        """Token that ends a sequence."""
        return 2

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end what a model says."""
        return (self.eos_id,)

    def encode(self, text: str) -> list[int]:
        """Turn text into tokens, one for each character, without special ones.

        Args:
            text: Printable ASCII characters.

        Returns:
            The tokens.

        Raises:
            ValueError: If a character is not in the vocabulary.
        """
        tokens = [ord(character) - _FIRST + _SPECIALS for character in text]
        if tokens and not (min(tokens) >= _SPECIALS and max(tokens) < self.vocab_size):
            position = next(i for i, c in enumerate(text) if not _FIRST <= ord(c) <= _LAST)
            raise ValueError(
                f"`text` must be printable ASCII characters, got {text[position]!r} at position {position}"
            )
        return tokens

    def encode_continuation(self, text: str) -> list[int]:
        """Turn text that follows other text into tokens, as `encode` does."""
        return self.encode(text)

    def encode_conversation(self, messages: Sequence[Message]) -> NoReturn:
        """Refuse conversations.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "the tokenizer of single characters has no chat template, which conversations need; take another model's"
        )

    encode_question = encode_conversation

    def decode(self, ids: Iterable[int]) -> str:
        """Turn tokens into text, up to the first end token, leaving out padding and begin tokens.

        Args:
            ids: Tokens, as integers or a one-dimensional array.

        Returns:
            The text.

        Raises:
            ValueError: If a token is not in the vocabulary.
        """
        characters = []
        for position, token in enumerate(map(int, ids)):
            if token == self.eos_id:
                break
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"`ids` must be from 0 to {self.vocab_size - 1}, got {token} at position {position}")
            if token >= _SPECIALS:
                characters.append(chr(token - _SPECIALS + _FIRST))
        return "".join(characters)

    def spell(self, ids: Iterable[int]) -> str:
        """Turn tokens into text, special ones into their names.

        Args:
            ids: Tokens.

        Returns:
            The text, in which no token is left out.
        """
        names = "<pad>", "<bos>", "<eos>"
        return "".join(names[i] if i < _SPECIALS else chr(i - _SPECIALS + _FIRST) for i in map(int, ids))
