"""The cross-entropy in pieces is the plain one, and needs the memory of a piece."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from decoder_reference import CONFIGS, random_decoder
from flax import nnx

from balora_jax.adapters import add_adapters
from balora_jax.models import Decoder
from balora_jax.models.cross_entropy import token_cross_entropy

ROWS, LENGTH = 3, 11
VOCAB = CONFIGS["llama"].vocab_size
PIECES = [1, ROWS * VOCAB, 3 * ROWS * VOCAB, 7 * ROWS * VOCAB, ROWS * LENGTH * VOCAB]  # 1, 1, 3, 6 and 11 tokens wide


def plain(model, hidden, labels):
    return optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden), labels)


def case(tied):
    model = random_decoder(dataclasses.replace(CONFIGS["llama"], tie_word_embeddings=tied))
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((ROWS, LENGTH, 16)), jnp.float32)
    return model, hidden, rng.integers(0, VOCAB, (ROWS, LENGTH)), rng.random((ROWS, LENGTH))


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("tied", [True, False])
def test_values_and_gradients_are_those_of_the_plain_form(tied, pieces):
    model, hidden, labels, weights = case(tied)

    def weighted(losses_of):
        def function(model, hidden):
            losses = losses_of(model, hidden, labels)
            return (weights * losses).sum(), losses

        (_, losses), grads = nnx.jit(nnx.value_and_grad(function, argnums=(0, 1), has_aux=True))(model, hidden)
        return losses, grads

    found = weighted(functools.partial(token_cross_entropy, logits_at_once=pieces))
    expected = weighted(plain)
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_in_one_piece_the_program_is_the_plain_one():
    model, hidden, labels, _ = case(tied=True)
    programs = [str(jax.make_jaxpr(lambda h, f=f: f(model, h, labels))(hidden)) for f in (plain, token_cross_entropy)]
    assert programs[0] == programs[1]


@pytest.mark.parametrize("tied", [True, False])
def test_memory_is_that_of_a_piece(tied):
    """Of a gradient by hidden states and factors, at a size whose logits would be 2 GB; nothing is run."""
    rows, length, vocab = 4, 1023, 128_000
    config = dataclasses.replace(CONFIGS["llama"], vocab_size=vocab, tie_word_embeddings=tied)
    graph, parameters = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    hidden = jax.ShapeDtypeStruct((rows, length, 16), jnp.float32)
    labels = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def temporary(function):
        def loss(hidden, parameters, labels):
            return function(nnx.merge(graph, parameters, copy=True), hidden, labels).sum()

        program = jax.jit(jax.grad(loss)).lower(hidden, parameters, labels).compile()
        return program.memory_analysis().temp_size_in_bytes

    logits = 4 * rows * length * vocab
    assert temporary(plain) > logits
    assert temporary(functools.partial(token_cross_entropy, logits_at_once=rows * 16 * vocab)) < logits / 20


def test_each_piece_drops_by_itself():
    model, hidden, labels, _ = case(tied=False)
    add_adapters(model, targets=["lm_head"], rank=2, dropout=0.5, rngs=nnx.Rngs(0))
    model.lm_head.lora_b[...] = jax.random.normal(jax.random.key(0), (2, VOCAB))
    same = jnp.broadcast_to(hidden[:1, :1], (ROWS, LENGTH, 16)), np.full_like(labels, 3)

    @nnx.jit
    def losses(model):
        return token_cross_entropy(model, *same, logits_at_once=ROWS * VOCAB)

    first, second = losses(model), losses(model)
    assert len(np.unique(first)) > LENGTH, "the pieces are one token wide"
    assert (first != second).any()
