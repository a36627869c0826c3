"""The cross-entropy of a decoder's tokens, without the logits of all of them at once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_derivatives import SymbolicZero

from balora_jax.models.decoder import Decoder, head_logits
from balora_jax.platforms import with_choice
from balora_jax.sharding import entries_at

_MOST_LOGITS = 2**26
"""Logits that are held at once: 256 MiB."""

_TOKENS_ON_CPUS = 512
"""Tokens that are worth a pass over the head on CPUs, where fewer cost more passes, and more the cache."""


def token_cross_entropy(
    model: Decoder, hidden: jax.Array, labels: jax.Array, *, logits_at_once: int | None = None
) -> jax.Array:
    """Returns the cross-entropy (nats) of every label, `(rows, length)`.

    If there are more than `logits_at_once` logits, the length is cut into pieces, one after the other. The rows stay
    together, so that they may be sharded.

    Args:
        model: whose head maps hidden states to logits.
        hidden: `(rows, length, hidden_size)`, of `model.hidden_states`.
        labels: `(rows, length)` int, the token to be predicted from each.
        logits_at_once: about how many logits, or `rows * vocab_size` if that is more, are held at once; by default as
            the device likes it.

    Notes:
        With a frozen head the derivative by the hidden states is computed in the forward pass, while the logits of a
        piece are there: it costs the two products with the head that it must. If the head is differentiated too,
        the backward pass computes the logits of each piece again.
    """
    most = _MOST_LOGITS if logits_at_once is None else logits_at_once
    on_cpus = min(_TOKENS_ON_CPUS * model.config.vocab_size, most) if logits_at_once is None else most
    widths = _width(labels, model.config.vocab_size, on_cpus), _width(labels, model.config.vocab_size, most)
    graph, state = nnx.split(model.head)
    if not jax.tree.leaves(nnx.state(model.head, nnx.RngState)):
        return _pure_losses(graph, state, widths, hidden, labels)
    losses, streams = _by_width(_losses, graph, widths, state, hidden, labels)
    nnx.update(model.head, streams)
    return losses


def _width(labels: jax.Array, vocab_size: int, logits_at_once: int) -> int:
    """The width of as few equal pieces as there may be."""
    rows, length = labels.shape
    width = max(1, min(length, logits_at_once // (rows * vocab_size)))
    return -(-length // -(-length // width))


def _by_width(function: Callable, graph, widths: tuple[int, int], state, hidden, labels):
    """What a function makes of a head, with one width of the pieces on CPUs and one elsewhere."""

    def of_width(width, state, hidden, labels):
        return function(nnx.merge(graph, state, copy=True), width, hidden, labels)

    return with_choice(of_width, state, hidden, labels, cpu=widths[0], default=widths[1])


def _losses(head: nnx.Module, width: int, hidden: jax.Array, labels: jax.Array) -> tuple[jax.Array, nnx.State]:
    """The losses, and the random streams of the head (an adapter with dropout) after them; has all derivatives."""
    # the streams go on from piece to piece; the rest of the head is the same for all
    axes: dict[Any, Any] = {nnx.RngState: nnx.Carry, ...: None}
    scan = nnx.scan(nnx.remat(_piece), in_axes=(nnx.StateAxes(axes), 0, 0), out_axes=0)
    losses = _joined(scan(head, _cut(hidden, width), _cut(labels, width)), labels.shape[1])
    return losses, nnx.state(head, nnx.RngState)


def _piece(head, hidden, labels):
    logits = head_logits(head, hidden)
    logits -= jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    return jnp.log(jnp.exp(logits).sum(-1)) - entries_at(logits, labels)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 2))
def _pure_losses(graph, state, widths, hidden, labels):
    """The losses as a function of arrays, of a head without random streams."""
    return _by_width(_losses, graph, widths, state, hidden, labels)[0]


@functools.partial(_pure_losses.defjvp, symbolic_zeros=True)
def _pure_losses_jvp(graph, widths, primals, tangents):
    state, hidden, labels = primals
    if all(isinstance(tangent, SymbolicZero) for tangent in jax.tree.leaves(tangents[0])):
        losses, gradients = _by_width(_losses_and_gradients, graph, widths, state, hidden, labels)
        return losses, (gradients.astype(jnp.float32) * tangents[1].astype(jnp.float32)).sum(-1)

    def function(state, hidden):
        return _by_width(_losses, graph, widths, state, hidden, labels)[0]

    given = jax.tree.map(lambda t: jnp.zeros_like(t) if isinstance(t, SymbolicZero) else t, tangents[:2])
    return jax.jvp(function, (state, hidden), given)


def _losses_and_gradients(head, width, hidden, labels):
    """The losses `(rows, length)`, and the gradient of each by its own hidden state, `(rows, length, hidden_size)`."""

    @jax.checkpoint  # for second derivatives
    def piece(hidden, labels):
        logits, backward = jax.vjp(lambda hidden: head_logits(head, hidden), hidden)
        highest = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
        exponentials = jnp.exp(logits - highest)
        total = exponentials.sum(-1, keepdims=True)
        losses = jnp.log(total[..., 0]) - (entries_at(logits, labels) - highest[..., 0])
        is_label = jnp.arange(logits.shape[-1]) == labels[..., None]
        return losses, *backward(exponentials / total - is_label)

    _, found = jax.lax.scan(lambda _, x: (None, piece(*x)), None, (_cut(hidden, width), _cut(labels, width)))
    return tuple(_joined(x, labels.shape[1]) for x in found)


def _cut(x: jax.Array, width: int) -> jax.Array:
    """`(rows, length, ...)` as pieces `(count, rows, width, ...)`, the last filled with zeros."""
    rows, length = x.shape[:2]
    count = -(-length // width)
    padding = [(0, 0), (0, count * width - length), *[(0, 0)] * (x.ndim - 2)]
    return jnp.moveaxis(jnp.pad(x, padding).reshape(rows, count, width, *x.shape[2:]), 1, 0)


def _joined(pieces: jax.Array, length: int) -> jax.Array:
    """The inverse of `_cut`."""
    count, rows, width = pieces.shape[:3]
    return jnp.moveaxis(pieces, 0, 1).reshape(rows, count * width, *pieces.shape[3:])[:, :length]
