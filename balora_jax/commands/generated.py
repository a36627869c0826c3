"""What a model, perhaps with an adapter, says after some texts."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from balora_jax.adapters import load_adapters, read_peft
from balora_jax.commands.folders import explained
from balora_jax.commands.generate import Options
from balora_jax.data.batches import Tokenizer, pad_left
from balora_jax.data.conversations import Message
from balora_jax.data.hub_tokenizer import load_tokenizer, tokenizer_files
from balora_jax.data.tokenizer import CharTokenizer
from balora_jax.errors import ConfigError
from balora_jax.models import Decoder
from balora_jax.models.generation import generate
from balora_jax.models.weights import abstract_decoder, load_decoder
from balora_jax.training.evaluation import what_is_not_finite
from balora_jax.training.layout import tensor_layout
from balora_jax.training.memory import check_answers, memory_limit


def continued(options: Options, folder: Path, prompts: tuple[str, ...]) -> list[tuple[str, str]]:
    """Returns each text as the model was given it, with what it says after it.

    Args:
        options: of the command.
        folder: of the model.
        prompts: the texts.

    Raises:
        ConfigError: model, adapter, tokenizer or a text do not do.
    """
    with explained("MODEL"):
        layout = tensor_layout(abstract_decoder(folder), options.tensor)
        where = layout.weight if layout else None
        model = load_decoder(folder, dtype=options.dtype, param_dtype=options.dtype, sharding=where)
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
    return list(zip(prompts, texts, strict=True))


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
