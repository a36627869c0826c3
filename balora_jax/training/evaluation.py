"""Evaluation of a population: loss per example, and answers by batched greedy generation."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from balora_jax.data.batches import Arrays, Encoded, Tokenizer, pad
from balora_jax.models import Decoder
from balora_jax.training.step import Program, TrainState


class EvaluationSet(NamedTuple):
    """Examples to evaluate on.

    Attributes:
        encoded: their tokens.
        modules: `(n,)` the part of the data set each belongs to.
        answers: `(n,)` the right answers, as text.
        arrays: one row per example.
        tokenizer: the tokenizer.
    """

    encoded: Encoded
    modules: np.ndarray
    answers: np.ndarray
    arrays: Arrays
    tokenizer: Tokenizer

    @classmethod
    def build(cls, encoded: Encoded, modules, answers, tokenizer: Tokenizer) -> "EvaluationSet":
        """Lays out the examples, in rows as long as the longest of them."""
        length = max(map(len, encoded.tokens))
        arrays = pad(encoded, length=length, pad_id=tokenizer.pad_id)
        return cls(encoded, np.asarray(modules), np.asarray(answers), arrays, tokenizer)


class Losses(NamedTuple):
    """Evaluation losses of a population.

    Attributes:
        total: `(members,)` mean over all predicted tokens, in nats.
        by_module: for each module, `(members,)`.
    """

    total: np.ndarray
    by_module: dict[str, np.ndarray]


def evaluate_loss(program: Program, state: TrainState, examples: EvaluationSet, *, batch_size: int) -> Losses:
    """Returns the evaluation losses of every member.

    Args:
        program: the population's functions.
        state: the population's state.
        examples: what to evaluate on.
        batch_size: examples per call.
    """
    losses, tokens = [], []
    for part, rows in _chunks(len(examples.modules), batch_size):
        batch = {name: array[rows] for name, array in examples.arrays.items()}
        loss, count = program.evaluate(state, program.base, batch)
        losses.append(np.asarray(loss, np.float64)[:, part])
        tokens.append(np.asarray(count)[:, part])
    loss, count = np.concatenate(losses, axis=1), np.concatenate(tokens, axis=1)

    def mean(where):
        return loss[:, where].sum(axis=1) / count[:, where].sum(axis=1)

    names = sorted(set(examples.modules.tolist()))
    return Losses(mean(slice(None)), {name: mean(examples.modules == name) for name in names})


def generate_greedily(model: Decoder, prompts: jax.Array, segment_ids: jax.Array, *, new_tokens: int, eos_id: int):
    """Continues prompts with the most likely token at each step, until all have ended.

    Args:
        model: the decoder.
        prompts: `(batch, length)` int, padded on the left.
        segment_ids: `(batch, length)` int, 0 where a prompt is padded and 1 where it is not.
        new_tokens: largest number of tokens to generate.
        eos_id: token that ends a text.

    Returns:
        `(batch, new_tokens)` int, `eos_id` from the first end on.
    """
    batch, length = prompts.shape
    positions = jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)
    cache = model.empty_cache(batch, length + new_tokens)

    def next_token(model, hidden):
        return model.logits(hidden[:, -1]).argmax(-1).astype(jnp.int32)

    hidden, cache = model.hidden_states(prompts, positions=positions, segment_ids=segment_ids, cache=cache)
    token, position = next_token(model, hidden), positions[:, -1:] + 1
    out = jnp.full((batch, new_tokens), eos_id, jnp.int32).at[:, 0].set(token)

    def unfinished(carry):
        i, _, ended, *_ = carry
        return (i < new_tokens) & ~ended.all()

    graph, parameters = nnx.split(model)  # a loop's body may not touch a module from outside

    def extend(carry):
        i, token, ended, position, cache, out = carry
        model = nnx.merge(graph, parameters, copy=True)
        ones = jnp.ones((batch, 1), jnp.int32)
        hidden, cache = model.hidden_states(token[:, None], positions=position, segment_ids=ones, cache=cache)
        token = jnp.where(ended, eos_id, next_token(model, hidden))
        return i + 1, token, ended | (token == eos_id), position + 1, cache, out.at[:, i].set(token)

    start = (jnp.int32(1), token, token == eos_id, position, cache, out)
    return jax.lax.while_loop(unfinished, extend, start)[-1]


def generate_answers(
    program: Program, state: TrainState, examples: EvaluationSet, *, batch_size: int
) -> list[list[str]]:
    """Returns every member's answers to the examples' prompts, as text.

    Generation stops at the length of the longest right answer; what is longer is wrong anyway.
    """
    encoded, tokenizer = examples.encoded, examples.tokenizer
    prompts = [t[:n] for t, n in zip(encoded.tokens, encoded.prompt_lengths, strict=True)]
    new_tokens = max(len(t) - n for t, n in zip(encoded.tokens, encoded.prompt_lengths, strict=True))
    length = max(map(len, prompts))
    tokens = np.full((len(prompts), length), tokenizer.pad_id, np.int32)
    segment_ids = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        segment_ids[row, length - len(prompt) :] = 1

    @jax.jit
    def answer(states, base, tokens, segment_ids):
        def member(state):
            model = program.member_model(state, base)
            return generate_greedily(model, tokens, segment_ids, new_tokens=new_tokens, eos_id=tokenizer.eos_id)

        return program.over_members(member, states)

    members: list[list[str]] = [[] for _ in range(state.step.shape[0])]
    for part, rows in _chunks(len(prompts), batch_size):
        out = np.asarray(answer(state, program.base, tokens[rows], segment_ids[rows]))[:, part]
        for texts, generated in zip(members, out, strict=True):
            texts += [tokenizer.decode(row.tolist()) for row in generated]
    return members


def accuracies(texts: Sequence[str], examples: EvaluationSet) -> dict[str, float]:
    """Returns the share of exactly right answers per module, and over all under the key `all`."""
    right = np.asarray(texts) == examples.answers
    names = sorted(set(examples.modules.tolist()))
    return {"all": float(right.mean()), **{n: float(right[examples.modules == n].mean()) for n in names}}


def _chunks(count: int, size: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Row indices of equally large batches; the last is filled up, and the slice says which rows of it are new."""
    size = min(size, count)
    for start in range(0, count, size):
        rows = np.arange(start, min(start + size, count))
        yield slice(0, len(rows)), np.resize(rows, size)
