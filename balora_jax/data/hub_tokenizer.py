"""The tokenizer that a published model comes with, and its chat template."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from balora_jax.data import chat_template
from balora_jax.data.batches import Tokenizer
from balora_jax.data.conversations import Message, learned_spans
from balora_jax.data.tokenizer import CharTokenizer
from balora_jax.files import read_object
from balora_jax.models.config_json import read_config
from balora_jax.models.folders import model_folder


def load_tokenizer(model: str | Path, source: str | Path | None = None) -> Tokenizer:
    """Returns the tokenizer of a model, or for a model.

    Args:
        model: a model folder, the name of a model that ships with the package, or `owner/model` on the hub.
        source: another such model whose tokenizer and chat template are taken; or a folder of tokenizer files alone.

    Returns:
        What the `tokenizer.json` of the source says. A folder without this file whose model has as many tokens as
        `CharTokenizer` is read character by character.

    Raises:
        FileNotFoundError: the folder holds no tokenizer.
        ValueError: the tokenizer cannot be read, has no end token, or has a token whose id the model does not have.
        ImportError: `transformers` is not installed.
    """
    folder = model_folder(model, weights=False)
    vocab_size = read_config(folder).vocab_size
    if source is not None:
        folder = model_folder(source, weights=False)
    if (folder / "tokenizer.json").is_file():
        return HubTokenizer(folder, vocab_size=vocab_size)
    if vocab_size == CharTokenizer.vocab_size:
        return CharTokenizer()
    raise FileNotFoundError(
        f"{folder} holds no tokenizer.json; a model of {vocab_size} tokens needs the tokenizer that it was trained with"
    )


def tokenizer_files(folder: str | Path) -> list[Path]:
    """Returns the files of a folder that its tokenizer consists of; none if it holds no `tokenizer.json`."""
    beginnings = ("tokenizer", "chat_template", "special_tokens", "added_tokens", "vocab", "merges")
    files = [file for file in sorted(Path(folder).iterdir()) if file.name.startswith(beginnings) and file.is_file()]
    return files if any(file.name == "tokenizer.json" for file in files) else []


def files_fingerprint(folder: str | Path) -> str:
    """Returns a hash of a tokenizer's files."""
    digest = hashlib.sha256()
    for file in tokenizer_files(folder):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


class HubTokenizer:
    """A tokenizer in Hugging Face's format, read through `transformers`.

    Attributes:
        fingerprint: a hash of its files.

    Args:
        folder: holds `tokenizer.json`, and what belongs to it (`tokenizer_config.json`, `chat_template.jinja`, ...).
        vocab_size: number of tokens that the model has.

    Raises:
        ValueError: the files cannot be read, there is no end token, or a token has an id that the model does not have.
        ImportError: `transformers` is not installed.
    """

    def __init__(self, folder: str | Path, *, vocab_size: int):
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ImportError(
                f"the tokenizer of {folder} is read by the package transformers; pip install 'balora-jax[hf]'"
            ) from error
        for file in (*tokenizer_files(folder), Path(folder) / "config.json"):
            if file.suffix == ".json" and file.is_file():
                read_object(file)  # named if it is broken
        try:
            # neither asks whether code of the folder may run, nor the hub for what is missing
            options = {"trust_remote_code": False, "local_files_only": True}
            tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), **options)
        except Exception as error:  # of many types, from several libraries
            raise ValueError(f"the tokenizer of {folder} cannot be read: {type(error).__name__}: {error}") from error
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {folder} must have an eos_token; tokenizer_config.json names none")
        ids = tokenizer.get_vocab() | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        last = max(ids, key=ids.__getitem__)
        if ids[last] >= vocab_size:  # there may be fewer tokens than ids
            raise ValueError(
                f"the tokenizer of {folder} gives the token {last!r} the id {ids[last]}, but its model has only "
                f"{vocab_size} tokens, 0 to {vocab_size - 1}"
            )
        self._folder, self._tokenizer = folder, tokenizer
        self._special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        # Some tokenizers (SentencePiece's) put a space before every text that they are given. What follows other text
        # has none, and must be read behind a text that no token joins it to.
        newline = self.encode("\n")
        self._lead = [] if self.encode("\nx")[len(newline) :] == self.encode("x") else newline

    @cached_property
    def fingerprint(self) -> str:  # noqa: D102
        return files_fingerprint(self._folder)

    @property
    def pad_id(self) -> int:
        """Token that fills a row; nothing is computed from it."""
        return self.eos_id if self._tokenizer.pad_token_id is None else self._tokenizer.pad_token_id

    @cached_property
    def bos_id(self) -> int | None:
        """Token that begins a text; None if the tokenizer begins texts with none."""
        first = next(iter(self._tokenizer.encode("x")), None)
        return first if first == self._tokenizer.bos_token_id else None

    @property
    def eos_id(self) -> int:
        """Token that ends a text."""
        return self._tokenizer.eos_token_id

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end what a model says: that of a text, and that of an assistant's turn in the chat template."""
        turns: list[Message] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
        try:
            tokens, _ = self.encode_conversation(turns)
        except ValueError:  # no template, or one that cannot be learned
            return (self.eos_id,)
        return tuple(dict.fromkeys([self.eos_id, tokens[-1]]))

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text, without those that begin and end it."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def encode_continuation(self, text: str) -> list[int]:
        """Returns the tokens of a text that follows another, none of them shared with it."""
        if self._lead:
            tokens = self.encode("\n" + text)
            if tokens[: len(self._lead)] == self._lead:
                return tokens[len(self._lead) :]
        return self.encode(text)

    def encode_conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Returns the tokens of a conversation under the chat template, and which of them the assistant says.

        Every assistant turn is learned with its end token, and nothing else. The text is cut where turns begin, so that
        a prompt has the tokens that it has when the model is asked; what follows the last learned token is left out.
        (Text of an earlier turn that a tokenizer would join with the template's around it stays cut, such as a new line
        at its beginning.)

        Args:
            messages: the turns, each with `role` and `content`.

        Raises:
            ValueError: there is no chat template, it fails, it does not render the beginning of a conversation as the
                beginning of the conversation's rendering, or its assistant turns end in no special token.
        """
        self._require_template()
        text, spans = learned_spans(self._render, messages)
        tokens: list[int] = []
        learned: list[bool] = []
        place, behind = 0, ""  # how far the text is encoded, and the special token that it is encoded up to
        for start, stop in spans:
            before = self.encode(behind + text[place:start])[1 if behind else 0 :]
            turn = self.encode_continuation(text[start:stop])
            end = max((i for i, token in enumerate(turn) if token in self._special), default=None)
            if end is not None:
                behind = self._special[turn[end]]
                place = text.rindex(behind, start, stop) + len(behind)
            if end is None or text[place:stop].strip():
                raise ValueError(
                    f"the chat template of {self._folder} must end assistant turns in a special token, "
                    f"got {text[start:stop]!r}"
                )
            tokens += before + turn[: end + 1]
            learned += [False] * len(before) + [True] * (end + 1)
        return tokens, learned

    def encode_question(self, messages: Sequence[Message]) -> list[int]:
        """Returns the tokens of a conversation up to where the assistant is to speak next.

        Args:
            messages: the turns, each with `role` and `content`.

        Raises:
            ValueError: there is no chat template, or it fails.
        """
        self._require_template()
        return self.encode(self._render(messages, prompt=True))

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of tokens, up to the first end token."""
        ids = list(ids)
        end = ids.index(self.eos_id) if self.eos_id in ids else len(ids)
        return self._tokenizer.decode(ids[:end], skip_special_tokens=True)

    def spell(self, ids: Sequence[int]) -> str:
        """Returns the text of tokens, special ones by their names, none left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def _require_template(self) -> None:
        if self._tokenizer.chat_template is None:
            raise ValueError(
                f"the tokenizer of {self._folder} has no chat template, which conversations need; "
                "take an instruct model's: data.tokenizer, --tokenizer"
            )

    def _render(self, messages: Sequence[Message], prompt: bool) -> str:
        return chat_template.render(
            self._tokenizer.get_chat_template(),
            messages,
            prompt=prompt,
            special_tokens=self._tokenizer.special_tokens_map,
            name=f"the chat template of {self._folder}",
        )
