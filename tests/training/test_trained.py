"""Members of a run read back from its directory, for every kind of adapter."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from balora_jax.adapters import AdapterScale, export_adapters, iter_adapters, load_adapters
from balora_jax.errors import RunError
from balora_jax.methods import get_method
from balora_jax.models.weights import load_decoder
from balora_jax.training import Config, ConfigError
from balora_jax.training.checkpoints import Checkpoints
from balora_jax.training.program import Program
from balora_jax.training.trained import load_trained, read_members


def checkpointed(folder, members):
    """Writes a run directory as after three steps, with random numbers in the state; returns the adapters' tree."""
    program = Program(next(iter(members.values())), load_decoder(next(iter(members.values())).model.path))
    like = program.abstract_state(list(members.values()))
    rng = np.random.default_rng(0)

    def values(leaf):
        random = rng.standard_normal(leaf.shape) if leaf.dtype == np.float32 else np.full(leaf.shape, -1)
        return jax.numpy.asarray(random, leaf.dtype)

    state = jax.tree.map(values, like)
    scales = np.array([program.scale(member) for member in members.values()], np.float32)

    def scaled(variable):
        scale = isinstance(variable, AdapterScale)
        return variable.replace(np.broadcast_to(scales[:, None], variable.shape)) if scale else variable

    frozen = jax.tree.map(scaled, state.frozen, is_leaf=lambda leaf: isinstance(leaf, AdapterScale))
    state = state._replace(frozen=jax.tree.map(jax.numpy.asarray, frozen))
    checkpoints = Checkpoints(folder / "checkpoints" / next(iter(members.values())).method, keep=1)
    checkpoints.save(3, state)
    checkpoints.close()
    (folder / "config.json").write_text(json.dumps({name: dataclasses.asdict(m) for name, m in members.items()}))
    return state.adapters


@pytest.mark.parametrize("method", ["balora_rslora", "balora_dora", "olora", "balora_ga"])
def test_member_is_read_and_exported(method, members, tmp_path, monkeypatch):
    names = {"a": 6.0, "b": 2.0}
    configs = {name: members(method=method, adapter__alpha=alpha) for name, alpha in names.items()}
    configs = {f"{method}-alpha={config.adapter.alpha:g}": config for config in configs.values()}
    adapters = checkpointed(tmp_path, configs)
    assert read_members(tmp_path) == configs
    name = f"{method}-alpha=2"
    trained = load_trained(tmp_path, name)
    assert (trained.name, trained.config, trained.step, trained.diverged_at) == (name, configs[name], 3, -1)
    expected = jax.tree.map(lambda x: x[1], adapters)
    found = nnx.state(trained.model, nnx.LoRAParam)
    assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(expected)))
    scaling = get_method(method).scaling
    exported = export_adapters(trained.model, scaling=scaling)
    rank = 6 if get_method(method).initialisation.offset else 3
    assert (exported.config["r"], exported.config["lora_alpha"]) == (rank, 2 * rank // 3)
    again = load_decoder(configs[name].model.path)
    load_adapters(again, exported)
    for (path, ours), (_, theirs) in zip(iter_adapters(trained.model), iter_adapters(again), strict=True):
        size = np.abs(ours.weight_update()).max()
        np.testing.assert_allclose(theirs.weight_update(), ours.weight_update(), atol=1e-5 * size, err_msg=path)
    monkeypatch.delattr("balora_jax.training.trained.load_model")
    without_base = export_adapters(load_trained(tmp_path, name, weights=False).model, scaling=scaling)
    assert without_base.config == exported.config
    assert without_base.tensors.keys() == exported.tensors.keys()
    assert all(np.array_equal(without_base.tensors[key], tensor) for key, tensor in exported.tensors.items())


def test_only_member_needs_no_name(members, tmp_path):
    config = members()
    checkpointed(tmp_path, {"lora": config})
    assert load_trained(tmp_path).name == "lora"
    with pytest.raises(ConfigError, match="has no member loro; did you mean lora"):
        load_trained(tmp_path, "loro")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": ' * 100_000 + "1" + "}" * 100_000, "config.json must be JSON that is nested at most 100 deep"),
        ("[1]", r"config.json must hold a JSON object, got \[1\]"),
        ("{}", "it holds no run"),
        ('{"a": 5}', "Config must be an object, got 5"),
        ('{"a": {"name": "x", "training": []}}', r"TrainingSettings must be an object, got \[\]"),
        ('{"a": {"name": "x", "training": {"steps": "3"}}}', "training.steps must be of type int, got '3'"),
        ('{"a": {"name": "x", "seed": 1e400}}', "seed must be of type int, got inf"),
        (
            '{"a": {"name": "x", "options": [["b", 1]]}}',
            r"options must be of type .*Mapping\[str, float\], got \[\['b'",
        ),
        ('{"a": {"name": "x", "options": {"b": "1"}}}', r"options must be of type .*, got {'b': '1'}"),
        ('{"a": {"name": "x", "data": {"modules": 5}}}', "data.modules must be of type .*, got 5"),
        ('{"a": {"seed": 1}}', "missing 1 required positional argument: 'name'"),
    ],
)
def test_configs_of_broken_runs(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RunError, match=f"config.json.*{message}|{message}"):
        read_members(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "must be JSON that is nested at most 100 deep"),
        ("5", "is broken: its rows must have members, and an evaluation loss of each"),
        ('[{"best": {}, "members": ["a"], "evaluation_loss": {"values": []}}]', "is broken: its rows"),
        ('[{"best": {}, "members": [["a"]], "evaluation_loss": {"values": [1]}}]', "is broken: its rows"),
        ('[{"best": {}, "members": ["a"], "evaluation_loss": {"values": ["x"]}}]', "is broken: its rows"),
    ],
)
def test_results_of_broken_runs(text, message, tmp_path):
    configs = {name: dataclasses.asdict(Config(name=name)) for name in ("a", "b")}
    (tmp_path / "config.json").write_text(json.dumps(configs))
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(RunError, match=f"results.json {message}"):
        load_trained(tmp_path)
