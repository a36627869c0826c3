"""The cross-entropy of a decoder's tokens, without the logits of all of them at once."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from balora_jax.models.decoder import Decoder, head_logits

LOGITS_AT_ONCE = 2**26
"""Logits that are worth computing at once: 256 MiB, some hundred tokens of the largest vocabularies."""


def token_cross_entropy(
    model: Decoder, hidden: jax.Array, labels: jax.Array, *, logits_at_once: int = LOGITS_AT_ONCE
) -> jax.Array:
    """Returns the cross-entropy (nats) of every label, `(rows, length)`.

    If there are more than `logits_at_once` logits, the length is cut into pieces, one after the other; the backward
    pass computes the logits of a piece again. The rows stay together, so that they may be sharded.

    Args:
        model: whose head maps hidden states to logits.
        hidden: `(rows, length, hidden_size)`, of `model.hidden_states`.
        labels: `(rows, length)` int, the token to be predicted from each.
        logits_at_once: about how many logits, or `rows * vocab_size` if that is more, are held at once.

    Notes:
        In pieces it costs one more product with the head in the backward pass; in one piece, nothing.
    """
    rows, length = labels.shape
    width = max(1, min(length, logits_at_once // (rows * model.config.vocab_size)))
    if width == length:
        return _losses(model.head, hidden, labels)
    count = -(-length // width)
    width = -(-length // count)

    def pieces(x: jax.Array) -> jax.Array:
        padding = [(0, 0), (0, count * width - length), *[(0, 0)] * (x.ndim - 2)]
        return jnp.moveaxis(jnp.pad(x, padding).reshape(rows, count, width, *x.shape[2:]), 1, 0)

    # the head may hold random streams, if it has an adapter with dropout; the rest of it is the same for all pieces
    axes: dict[Any, Any] = {nnx.RngState: nnx.Carry, ...: None}
    scan = nnx.scan(nnx.remat(_losses), in_axes=(nnx.StateAxes(axes), 0, 0), out_axes=0)
    losses = scan(model.head, pieces(hidden), pieces(labels))
    return jnp.moveaxis(losses, 0, 1).reshape(rows, -1)[:, :length]


def _losses(head: nnx.Module, hidden: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(head_logits(head, hidden), labels)
