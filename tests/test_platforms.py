"""Choices by device are made for the device that a program is for, and change no number."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_reference import CONFIGS, random_decoder
from flax import nnx

from balora_jax.adapters import add_adapters
from balora_jax.adapters.contraction import Contraction
from balora_jax.models.attention import grouped_attention
from balora_jax.models.cross_entropy import token_cross_entropy
from balora_jax.platforms import with_choice

WIDE = dataclasses.replace(CONFIGS["llama"], vocab_size=100)


def attention(queries, keys, values):
    mask = jnp.tril(jnp.ones((1, 200, 200), bool))
    return grouped_attention(queries, keys, values, mask, causal=True)


def low_rank(x, lora_a, lora_b):
    return Contraction("...a", "ab", "...b").low_rank(x, lora_a, lora_b)


def losses(hidden):
    return token_cross_entropy(random_decoder(WIDE), hidden, jnp.full((2, 600), 3))


def losses_with_dropout(hidden):
    """With random streams in the head. Its adapter starts at zero, so that they change no number."""
    model = random_decoder(dataclasses.replace(WIDE, tie_word_embeddings=False))
    add_adapters(model, targets=["lm_head"], rank=2, dropout=0.5, rngs=nnx.Rngs(0))
    return token_cross_entropy(model, hidden, jnp.full((2, 600), 3))


CASES = {
    "attention": (attention, [(1, 200, 2, 4), (1, 200, 1, 4), (1, 200, 1, 4)]),
    "low_rank": (low_rank, [(2, 3, 8), (8, 2), (2, 5)]),
    "cross_entropy": (losses, [(2, 600, 16)]),
    "cross_entropy, dropout": (losses_with_dropout, [(2, 600, 16)]),
}


def products(function, platform, arguments):
    """The types of the matrix products of a program for a platform."""
    # a new function, as programs are cached
    program = jax.jit(lambda *x: function(*x)).trace(*arguments).lower(lowering_platforms=(platform,))
    return set(re.findall(r"stablehlo.dot_general.* : (.*)", program.as_text()))


def arguments(shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize(("function", "shapes"), CASES.values(), ids=CASES)
def test_the_program_is_that_of_its_device(function, shapes):
    inputs = arguments(shapes)
    cpu, tpu = (products(function, platform, inputs) for platform in ("cpu", "tpu"))
    assert cpu
    assert tpu
    assert not cpu & tpu


@pytest.mark.parametrize(("function", "shapes"), CASES.values(), ids=CASES)
def test_both_choices_give_the_same_derivatives(function, shapes, monkeypatch):
    inputs = arguments(shapes)

    def results():
        def value(*inputs):
            return (function(*inputs) ** 2).sum()

        gradient = jax.grad(value, argnums=tuple(range(len(inputs))))
        return jax.jit(lambda: (gradient(*inputs), jax.jvp(gradient, inputs, inputs)[1]))()

    found = results()
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arguments, cpu, default: default(*arguments))
    for ours, theirs in zip(*map(jax.tree.leaves, (found, results())), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


def test_equal_choices_are_made_at_once():
    program = jax.make_jaxpr(functools.partial(with_choice, lambda c, x: c * x, cpu=2, default=2))(1.0)
    assert "cond" not in str(program)
