"""`balora-jax generate`: a model, perhaps with an adapter, continues texts."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tyro.conf import Positional, arg

from balora_jax.adapters import load_adapters, read_peft
from balora_jax.commands.arguments import parse
from balora_jax.commands.folders import explained
from balora_jax.console import PlainConsole
from balora_jax.data.batches import Tokenizer, pad_left
from balora_jax.data.conversations import Message
from balora_jax.data.hub_tokenizer import load_tokenizer, tokenizer_files
from balora_jax.data.tokenizer import CharTokenizer
from balora_jax.models import Decoder
from balora_jax.models.folders import model_folder
from balora_jax.models.weights import load_decoder
from balora_jax.training.config import ConfigError
from balora_jax.training.evaluation import generate, what_is_not_finite
from balora_jax.training.memory import check_answers, memory_limit


@dataclass(frozen=True)
class Options:
    """Continues texts token by token, all texts at once.

    Attributes:
        model: a folder, or the name of a model that ships with the package.
        adapter: a PEFT folder.
        tokenizer: another model's folder or name, whose tokenizer is taken; default the adapter's, if its folder holds
            one, otherwise the model's.
        prompt: the texts; default the lines of the standard input.
        chat: puts each text to the assistant, as a user's turn in the tokenizer's chat template.
        system: the system prompt that goes before, with `--chat`; default that of the template, if it has one.
        max_new_tokens: the longest continuation.
        temperature: 0 takes the most likely token at each step; otherwise tokens are drawn, at 1 as the model has them.
        seed: of the draws.
        dtype: of the weights and the arithmetic.
    """

    model: Annotated[str, Positional, arg(metavar="MODEL")]
    adapter: Path | None = None
    tokenizer: str | None = None
    prompt: tuple[str, ...] = ()
    chat: bool = False
    system: str | None = None
    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"


def main(arguments: list[str]) -> int:
    """Runs the command."""
    options = parse(Options, arguments, prog="balora-jax generate")
    if options.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens must be at least 1, got {options.max_new_tokens}")
    if not 0 <= options.temperature < float("inf"):
        raise ConfigError(f"--temperature must be at least 0, got {options.temperature}")
    if options.system is not None and not options.chat:
        raise ConfigError("--system needs --chat, as only a conversation has a system prompt")
    if not -(2**63) <= options.seed < 2**63:
        raise ConfigError(f"--seed must be an integer of 64 bits, got {options.seed}")
    if not options.prompt and (sys.stdin is None or sys.stdin.isatty()):
        raise ConfigError("give --prompt TEXT ..., or texts on the standard input, one in a line")
    try:
        prompts = options.prompt or tuple(line for line in sys.stdin.read().splitlines() if line)
    except UnicodeDecodeError as error:
        raise ConfigError(f"the standard input must be text in UTF-8: {error}") from error
    if not prompts:
        raise ConfigError("the standard input holds no texts")
    with explained("MODEL"):
        folder = model_folder(options.model)
        model = load_decoder(folder, dtype=options.dtype, param_dtype=options.dtype)
    own = None
    if options.adapter is not None:
        with explained("--adapter"):
            load_adapters(model, read_peft(options.adapter))
        own = options.adapter if tokenizer_files(options.adapter) else None
    with explained("--tokenizer" if options.tokenizer else "--adapter" if own else "MODEL"):
        tokenizer = load_tokenizer(folder, options.tokenizer or own)
    if isinstance(tokenizer, CharTokenizer):  # its models have learned a space between a question and the answer
        prompts = tuple(f"{prompt.rstrip()} " for prompt in prompts)
    if options.chat:
        with explained("--chat"):
            encoded = [tokenizer.encode_question(_conversation(prompt, options.system)) for prompt in prompts]
    else:
        with explained("--prompt"):
            encoded = [_text(tokenizer, prompt) for prompt in prompts]
    room = {"rows": len(encoded), "prompt": max(map(len, encoded)), "new_tokens": options.max_new_tokens}
    check_answers(model.config, **room, field="--max-new-tokens or --prompt", limit=memory_limit())
    with explained("--prompt"):
        texts = continuations(
            model,
            tokenizer,
            encoded,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            key=jax.random.key(options.seed),
        )
    console = PlainConsole(soft_wrap=True)
    for prompt, text in zip(prompts, texts, strict=True):
        console.print(prompt, end="\n" if options.chat else "", style="dim")
        console.print(text)
    return 0


def _text(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The tokens of a text, with the one that begins texts, if there is one."""
    return ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(prompt)


def _conversation(question: str, system: str | None) -> list[Message]:
    """A conversation in which a question has been asked."""
    before: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": question}]


def continuations(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    key: jax.Array | None = None,
) -> list[str]:
    """Returns what a model says after each prompt, all in one batch.

    Args:
        model: with or without adapters.
        tokenizer: the model's.
        prompts: the tokens of each.
        max_new_tokens: the longest continuation.
        temperature: as for `generate`.
        key: as for `generate`.

    Raises:
        ValueError: a prompt has no tokens.
        ConfigError: the model's logits are not finite.
    """
    tokens, segment_ids = pad_left(prompts, pad_id=tokenizer.pad_id)

    @nnx.jit
    def said(model):
        return generate(
            model,
            jnp.asarray(tokens),
            jnp.asarray(segment_ids),
            new_tokens=max_new_tokens,
            eos_id=tokenizer.eos_id,
            end_ids=tokenizer.end_ids,
            temperature=temperature,
            key=key,
        )

    model.eval()
    found = np.asarray(said(model))
    if (found < 0).any():
        raise ConfigError(f"the logits of the model must be finite; {what_is_not_finite(nnx.state(model))}")
    return [_said(tokenizer, *row) for row in zip(prompts, found.tolist(), strict=True)]


def _said(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> str:
    """The text of tokens as it continues the prompt's: alone, many tokenizers drop the space before it."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *tokens])
    if whole.startswith(before) and len(whole) > len(before):
        return whole[len(before) :]
    return tokenizer.decode(tokens)
