"""What every method of the table must do, and what it must not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balora_jax import balancing_gap, find_pairs
from balora_jax.methods import METHODS, get_method
from balora_jax.models.weights import load_decoder
from balora_jax.pairs import read_pairs
from balora_jax.settings import METHOD_NAMES
from balora_jax.training import ConfigError
from balora_jax.training.checkpoints import Checkpoints
from balora_jax.training.checks import check
from balora_jax.training.loading import load_data
from balora_jax.training.program import Program
from balora_jax.training.step import token_losses

STEPS = 3
OPTIONS = {
    "lora_ga": {"gradient_batches": 3},
    "balora_ga": {"gradient_batches": 3},
    "adalora": {"interval": 1, "initial_share": 0},
}


@pytest.fixture(scope="module", params=METHODS)
def trained(request, config):
    """A population of two, trained for some steps; its parts before and after."""
    config = dataclasses.replace(
        config,
        method=request.param,
        options=OPTIONS.get(request.param, {}),
        optimizer=dataclasses.replace(config.optimizer, eps=1e-4, learning_rate=1e-2),
    )
    slower = dataclasses.replace(config.optimizer, learning_rate=5e-3)
    adapter = dataclasses.replace(config.adapter, alpha=1.5)
    members = [config, dataclasses.replace(config, seed=5, adapter=adapter, optimizer=slower)]
    program = Program(config, load_decoder(config.model.path))
    rows, _, _ = load_data(config.data)
    batch = {name: jnp.asarray(x)[None] for name, x in rows[:4].arrays().items()}

    count, size = program.gradient_batches
    drawn = rows[: max(count * size, 1)].arrays()
    gradient = {name: jnp.asarray(x[: count * size]).reshape(count, size, x.shape[1]) for name, x in drawn.items()}

    def begin(members):
        return program.initial_state(members, {member.seed: gradient for member in members})

    def train(members):
        state = begin(members)
        start, history = jax.tree.map(jnp.copy, state), []
        for _ in range(STEPS):
            batches = jax.tree.map(lambda rows: jnp.stack([rows] * len(members)), batch)
            state, metrics = program.step(state, program.base, batches)
            history.append(jax.device_get(metrics))
        return start, state, history

    run = train(members)
    return {"program": program, "batch": batch, "members": members, "begin": begin, "train": train, "run": run}


def member(state, index):
    return jax.tree.map(lambda x: x[index], state)


def test_contract(trained, tmp_path):
    program, (start, state, history) = trained["program"], trained["run"]
    method = get_method(program.config.method)

    # an abstract start has the structure of the real one
    abstract = jax.eval_shape(lambda: trained["begin"](trained["members"]))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(lambda x: (x.shape, x.dtype), start)

    # the start changes nothing
    rows = {name: x[0] for name, x in trained["batch"].items()}
    before, mask = token_losses(load_decoder(program.config.model.path), rows)
    for index in (0, 1):
        after, _ = token_losses(program.member_model(member(start, index), program.base), rows)
        np.testing.assert_allclose(after, before, atol=2e-6)
    np.testing.assert_allclose(history[0]["loss"], before.sum() / mask.sum(), rtol=1e-5)

    # training lowers the loss of the batch it sees, in one program, and moves what is trained, in float32
    assert program.step._cache_size() == 1
    assert np.all(history[-1]["loss"] < history[0]["loss"])
    assert np.all(np.asarray(state.diverged_at) == -1)
    for path, (old, new) in enumerate(zip(*(jax.tree.leaves(s.adapters) for s in (start, state)), strict=True)):
        assert new.dtype == jnp.float32
        assert not np.array_equal(old, new), path
    jax.tree.map(np.testing.assert_array_equal, start.frozen, state.frozen)

    # the projection balances
    if method.has_pairs:
        pairs = find_pairs(state.adapters)
        gaps = [float(balancing_gap(*factors).max()) for factors in read_pairs(state.adapters, pairs)]
        assert (max(gaps) < 1e-5) == (
            method.balanced and method is not METHODS["balora_gd"]
        )  # whose B is too small yet
    assert ("gap_mean" in history[0]) == ("gap_worst" in history[0]) == method.has_pairs

    # a checkpoint holds all of it
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(STEPS, state)
    restored = checkpoints.restore(STEPS, start)
    checkpoints.close()
    for saved, read in zip(*map(jax.tree.leaves, (state, restored)), strict=True):
        np.testing.assert_array_equal(*(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
                                        for x in (saved, read)))  # fmt: skip


def test_members_do_not_touch_each_other(trained):
    """With another neighbour, in the same program; tests/training/test_step.py has members alone."""
    _, together, _ = trained["run"]
    _, twice, _ = trained["train"](trained["members"][1:] * 2)
    for joint, other in zip(*map(jax.tree.leaves, (together.adapters, twice.adapters)), strict=True):
        np.testing.assert_allclose(joint[1], other[0], atol=5e-5)
        np.testing.assert_allclose(joint[1], other[1], atol=5e-5)
        assert not np.array_equal(joint[0], joint[1])


def test_the_command_line_knows_their_names():
    assert tuple(METHODS) == METHOD_NAMES


def test_settings_that_a_method_does_not_read():
    assert {name: method.unused_settings for name, method in METHODS.items() if method.unused_settings} == {
        "scaled_gd": ("b1", "b2", "eps", "weight_decay"),
        "balora_gd": ("b1", "b2", "eps", "weight_decay"),
        "scaled_adamw": ("eps",),
        "lora_rite": ("eps", "clip_norm"),
        "loro": ("eps",),
        "galore": ("eps",),
    }


def test_options_are_checked(config):
    for method, option, message in (
        ("lora_plus", ("ratio", 0.5), "ratio must be at least 1 and finite, got 0.5"),
        ("galore", ("rank", 2.5), "options: rank must be an integer, got 2.5"),
        ("adalora", ("interval", float("inf")), "options: interval must be finite, got inf"),
        (
            "adalora",
            ("initial_share", 0.6),
            "options: initial_share and final_share must be below 1 together, got 0.6 and 0.5",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            check(dataclasses.replace(config, method=method, options=dict((option,))))
    with pytest.raises(ConfigError, match=r"options must be among those of the method \(none\), got 'ratio'"):
        check(dataclasses.replace(config, options={"ratio": 2.0}))
    with pytest.raises(ConfigError, match=r"options must be of type .*Mapping\[str, float\]"):
        check(dataclasses.replace(config, options={"ratio": "much"}))
