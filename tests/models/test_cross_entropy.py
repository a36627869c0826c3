"""The cross-entropy in pieces is the plain one, and needs the memory of a piece."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compilation import OPTIMIZED
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


def by_hidden_states(losses_of, model, labels, weights):
    return jax.grad(lambda hidden: (weights * losses_of(model, hidden, labels)).sum())


@pytest.mark.parametrize("pieces", [*PIECES, None])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_with_a_frozen_head(dtype, pieces):
    model, hidden, labels, weights = case(tied=False)
    head = jax.tree.map(lambda x: x.astype(dtype), nnx.state(model.lm_head))
    nnx.update(model.lm_head, head)
    model.lm_head.dtype = jnp.dtype(dtype)
    ours = by_hidden_states(functools.partial(token_cross_entropy, logits_at_once=pieces), model, labels, weights)
    found, expected = jax.jit(ours)(hidden.astype(dtype)), by_hidden_states(plain, model, labels, weights)(hidden)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == "float32" else 0.02
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("pieces", PIECES)
def test_second_derivatives(pieces):
    model, hidden, labels, weights = case(tied=True)
    ours = functools.partial(token_cross_entropy, logits_at_once=pieces)
    along = jax.random.normal(jax.random.key(0), hidden.shape)
    found, expected = (
        jax.jit(lambda h, f=f: jax.jvp(by_hidden_states(f, model, labels, weights), (h,), (along,))[1])(hidden)
        for f in (ours, plain)
    )
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_head_is_multiplied_with_twice_only(frozen):
    model, hidden, labels, weights = case(tied=True)
    graph, state = nnx.split(model)

    def loss(state, hidden):
        losses = token_cross_entropy(nnx.merge(graph, state), hidden, labels, logits_at_once=ROWS * VOCAB)
        return (weights * losses).sum()

    program = jax.make_jaxpr(jax.grad(loss, argnums=1 if frozen else (0, 1)))(state, hidden)
    assert str(program).count("dot_general[") == (2 if frozen else 4)


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

        program = jax.jit(jax.grad(loss)).lower(hidden, parameters, labels).compile(OPTIMIZED)
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
