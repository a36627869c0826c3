"""The step of a population: members are independent, alone or together."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from balora_jax import balancing_gap, find_pairs
from balora_jax.adapters import add_adapters, iter_adapters
from balora_jax.models.weights import load_decoder
from balora_jax.pairs import read_pairs
from balora_jax.training import Config
from balora_jax.training.config import NUMERIC_FIELDS
from balora_jax.training.fields import get_field, with_field
from balora_jax.training.loading import load_data
from balora_jax.training.program import Program
from balora_jax.training.state import named_key
from balora_jax.training.step import token_losses


def batch_of(config, rows, micro=1):
    """The first rows of the training data, `(accumulate, rows, length)`."""
    arrays = load_data(config.data)[0][: rows * micro].arrays()
    return {k: jnp.asarray(v).reshape(micro, rows, -1) for k, v in arrays.items()}


@functools.cache
def program_of(structure):
    """One program, compiled once, for all tests of a structure."""
    return Program(structure, load_decoder(structure.model.path))


def train(configs, steps, batch):
    """Final states and the metrics of each step of a population."""
    structure = configs[0]
    for name in NUMERIC_FIELDS:
        structure = with_field(structure, name, get_field(Config(name=""), name))
    program = program_of(structure)
    state, history = program.initial_state(configs), []
    batches = {k: jnp.stack([v] * len(configs)) for k, v in batch.items()}
    for _ in range(steps):
        state, metrics = program.step(state, program.base, batches)
        history.append(jax.device_get(metrics))
    return program, state, history


def arrays(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


NUMBERS = [
    {"seed": 3},
    {"optimizer__learning_rate": 3e-2},
    {"adapter__alpha": 1.0},
    {"optimizer__weight_decay": 0.5, "optimizer__b1": 0.5, "optimizer__b2": 0.9},
]


@pytest.mark.parametrize("method", ["lora", "balora"])
def test_member_equals_the_run_alone(members, method):
    # With Adam's usual eps, entries whose gradient is all rounding would take full steps either way.
    configs = [members(method=method, **({"optimizer__eps": 1e-4} | numbers)) for numbers in ({}, *NUMBERS)]
    batch = batch_of(configs[0], 2)
    _, together, history = train(configs, 4, batch)
    losses = np.array([metrics["loss"] for metrics in history])
    assert len(np.unique(losses[-1])) == len(configs), "every number must matter"
    for index, config in enumerate(configs):
        _, alone, alone_history = train([config], 4, batch)
        np.testing.assert_allclose(losses[:, index], [m["loss"][0] for m in alone_history], rtol=2e-6)
        for joint, single in zip(arrays(together.adapters), arrays(alone.adapters), strict=True):
            np.testing.assert_allclose(joint[index], single[0], atol=2e-5)


def test_members_at_once_changes_nothing_but_memory(members):
    together, apart = ([members(training__members_at_once=n, seed=seed) for seed in range(3)] for n in (3, None))
    batch = batch_of(together[0], 2)
    for one, other in zip(
        *(arrays(train(configs, 3, batch)[1].adapters) for configs in (together, apart)), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_step_is_the_textbook_step(members):
    """One step of LoRA equals adamw on a model with adapters, written without any of the training code."""
    config = members(adapter__alpha=6.0, optimizer__learning_rate=1e-2)
    batch = batch_of(config, 3)
    _, state, history = train([config], 2, batch)
    model = load_decoder(config.model.path)
    rngs = nnx.Rngs(params=named_key(config.seed, "adapters"))
    add_adapters(model, targets=config.adapter.targets, rank=3, alpha=6.0, rngs=rngs)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.01))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    rows = {name: value[0] for name, value in batch.items()}

    def mean_loss(model):
        losses, mask = token_losses(model, rows)
        return losses.sum() / mask.sum()

    for step in range(2):
        loss, grads = nnx.value_and_grad(mean_loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        np.testing.assert_allclose(history[step]["loss"][0], loss, rtol=1e-6)
        optimizer.update(model, grads)
    for ours, theirs in zip(arrays(state.adapters), arrays(nnx.state(model, nnx.LoRAParam)), strict=True):
        np.testing.assert_allclose(ours[0], theirs, atol=1e-6)


def test_token_losses_count_answers_only(config, model_folder):
    model = load_decoder(model_folder)
    rows = {name: value[0] for name, value in batch_of(config, 2).items()}
    losses, mask = token_losses(model, rows)
    assert mask.sum() == rows["loss_mask"].sum()
    logits = np.asarray(model(**{k: rows[k][:, :-1] for k in ("tokens", "positions", "segment_ids")}), np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_probabilities, np.asarray(rows["tokens"])[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(losses, np.where(mask, expected, 0), atol=1e-5)


def test_accumulation_equals_one_large_batch(members):
    whole, parts = members(training__batch_size=4), members(training__batch_size=2, training__accumulate=2)
    _, one, _ = train([whole], 3, batch_of(whole, 4))
    _, two, _ = train([parts], 3, batch_of(parts, 2, micro=2))
    for a, b in zip(arrays(one.adapters), arrays(two.adapters), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "balora"])
def test_diverged_member_stops_and_the_others_go_on(members, method):
    good, bad = members(method=method), members(method=method, optimizer__learning_rate=1e12)
    batch = batch_of(good, 2)
    _, alone, _ = train([good], 5, batch)
    _, state, history = train([good, bad], 5, batch)
    diverged_at = np.asarray(state.diverged_at)
    assert diverged_at[0] == -1
    assert 2 <= diverged_at[1] <= 4
    assert not np.isfinite(history[diverged_at[1] - 1]["loss"][1])
    _, before, _ = train([good, bad], int(diverged_at[1]) - 1, batch)
    for joint, single, stopped in zip(
        arrays(state.adapters), arrays(alone.adapters), arrays(before.adapters), strict=True
    ):
        np.testing.assert_allclose(joint[0], single[0], atol=2e-5)
        np.testing.assert_array_equal(joint[1], stopped[1])
        assert np.isfinite(joint[1]).all()


def test_metrics_are_measured_on_the_new_state(members):
    _, state, history = train([members(method="balora", balance__least_ratio=0.0)], 3, batch_of(members(), 2))
    pairs = find_pairs(state.adapters)
    gaps = [float(g) for a, b in read_pairs(jax.tree.map(lambda x: x[0], state.adapters), _of_member(pairs))
            for g in balancing_gap(a, b)]  # fmt: skip
    np.testing.assert_allclose(history[-1]["gap_mean"][0], np.mean(gaps), rtol=1e-3)
    np.testing.assert_allclose(history[-1]["gap_worst"][0], np.max(gaps), rtol=1e-3)
    assert np.max(gaps) < 1e-5
    assert "untouched" in history[0]


def _of_member(pairs):
    """The pairs of a population, as they are in one member."""
    return [dataclasses.replace(pair, batch_axes=pair.batch_axes - 1) for pair in pairs]


def test_dropout_differs_between_steps_and_members_and_is_off_in_evaluation(members):
    config = members(adapter__dropout=0.5, optimizer__learning_rate=0.0)
    batch = batch_of(config, 2)
    program, state, _ = train([config, members(adapter__dropout=0.5, optimizer__learning_rate=0.0, seed=1)], 0, batch)
    state = state._replace(adapters=jax.tree.map(lambda x: jnp.ones_like(x) * 0.1, state.adapters))
    batches = {k: jnp.stack([v, v]) for k, v in batch.items()}
    rows = {k: v[0] for k, v in batch.items()}
    first_eval = np.asarray(program.evaluate(state, program.base, rows)[0])
    state, first = program.step(state, program.base, batches)
    state, second = program.step(state, program.base, batches)
    assert first["loss"][0] != second["loss"][0]
    assert first["loss"][0] != first["loss"][1]
    np.testing.assert_array_equal(first_eval, program.evaluate(state, program.base, rows)[0])


def test_no_recompilation_over_steps(members):
    program = Program(members(), load_decoder(members().model.path))
    state, batch = program.initial_state([members()]), batch_of(members(), 2)
    for _ in range(3):
        state, _ = program.step(state, program.base, {k: v[None] for k, v in batch.items()})
    assert program.step._cache_size() == 1


def test_base_is_shared_not_copied(members, model_folder):
    model = load_decoder(model_folder)
    program = Program(members(), model)
    ours = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(nnx.state(model))}
    base = [leaf for leaf in jax.tree.leaves(program.base) if leaf.size > 1000]
    assert base
    assert all(leaf.unsafe_buffer_pointer() in ours for leaf in base)
    assert not list(iter_adapters(model)), "the caller's model stays as it was"
