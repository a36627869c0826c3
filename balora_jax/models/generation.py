"""Continuing texts with a decoder, token by token."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from balora_jax.models.decoder import Decoder


def generate(
    model: Decoder,
    prompts: jax.Array,
    segment_ids: jax.Array,
    *,
    new_tokens: int,
    eos_id: int,
    end_ids: Sequence[int] = (),
    temperature: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Continues prompts token by token until all have ended.

    Args:
        model: the decoder.
        prompts: `(batch, length)` int, padded on the left.
        segment_ids: `(batch, length)` int, 0 where a prompt is padded and 1 where it is not.
        new_tokens: largest number of tokens to generate.
        eos_id: token that ends a text.
        end_ids: others that do; `eos_id` is returned in their place.
        temperature: 0 takes the most likely token at each step; otherwise tokens are drawn from the softmax of the
            logits divided by it.
        key: source of the draws; needed where the temperature is not 0.

    Returns:
        `(batch, new_tokens)` int, `eos_id` from the first end on; -1, as an end, where the logits are not finite.

    Raises:
        ValueError: the temperature is negative, or has no key.
    """
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if temperature and key is None:
        raise ValueError(f"a temperature of {temperature} needs a key to draw with, got None")
    graph, parameters = nnx.split(model)  # a loop's body may not touch a module from outside
    # the scan over the layers puts copies of their parameters into the module; of this one nobody takes them
    model = nnx.merge(graph, parameters, copy=True)
    batch, length = prompts.shape
    positions = jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)
    cache = model.empty_cache(batch, length + new_tokens)

    def next_token(model, hidden, i):
        logits = model.logits(hidden[:, -1])
        if key is None or not temperature:
            token = logits.argmax(-1)
        else:
            token = jax.random.categorical(jax.random.fold_in(key, i), logits / temperature)
        ended = jnp.isin(token, jnp.asarray([eos_id, *end_ids]))
        token = jnp.where(jnp.isfinite(logits).all(-1), jnp.where(ended, eos_id, token), -1).astype(jnp.int32)
        return token, (token == eos_id) | (token < 0)

    hidden, cache = model.hidden_states(prompts, positions=positions, segment_ids=segment_ids, cache=cache)
    (token, ended), position = next_token(model, hidden, 0), positions[:, -1:] + 1
    out = jnp.full((batch, new_tokens), eos_id, jnp.int32).at[:, 0].set(token)

    def unfinished(carry):
        i, _, ended, *_ = carry
        return (i < new_tokens) & ~ended.all()

    def extend(carry):
        i, token, ended, position, cache, out = carry
        model = nnx.merge(graph, parameters, copy=True)
        ones = jnp.ones((batch, 1), jnp.int32)
        hidden, cache = model.hidden_states(token[:, None], positions=position, segment_ids=ones, cache=cache)
        new, ends = next_token(model, hidden, i)
        token = jnp.where(ended, eos_id, new)
        return i + 1, token, ended | ends, position + 1, cache, out.at[:, i].set(token)

    start = (jnp.int32(1), token, ended, position, cache, out)
    return jax.lax.while_loop(unfinished, extend, start)[-1]
