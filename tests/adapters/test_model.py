import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from balora_jax import balancing_gap, balora_project, find_pairs
from balora_jax.adapters import (
    LoRALinear,
    add_adapters,
    iter_adapters,
    merge_adapters,
    remove_adapters,
    unmerge_adapters,
)
from balora_jax.models import Decoder, DecoderConfig
from balora_jax.pairs import read_pairs


def drawn(key, shape, dtype):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), dtype)


def linear(d_in=4, d_out=4, kind=nnx.Linear, **options):
    return kind(d_in, d_out, **options, kernel_init=drawn, rngs=nnx.Rngs(0))


class Block(nnx.Module):
    def __init__(self):
        self.q_proj, self.v_proj = linear(), linear(kind=nnx.LinearGeneral)
        self.mlp = nnx.Sequential(linear(4, 6), nnx.relu, linear(6, 4))

    def __call__(self, x):
        return x + self.mlp(self.q_proj(x) * self.v_proj(x))


class Net(nnx.Module):
    """Layers in attributes, in lists, in a sequence and in a dict, and layers that adapters do not go on."""

    def __init__(self):
        self.embed = nnx.Embed(5, 4, rngs=nnx.Rngs(0))
        self.blocks = nnx.List([Block(), Block()])
        self.heads = nnx.Dict(main=linear(4, 3), value=linear(4, 1))

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.heads["main"](x) + self.heads["value"](x)


class Holder(nnx.Module):
    def __init__(self, held):
        self.held = held


TOKENS = np.arange(5)


def add(model, targets, *, rank=1, **options):
    return add_adapters(model, targets=targets, rank=rank, **options, rngs=nnx.Rngs(1))


def adapted_paths(model):
    return sorted(path for path, _ in iter_adapters(model))


def fill_right_factors(model):
    """Makes the adapters change something."""
    for seed, (_, adapter) in enumerate(iter_adapters(model)):
        draw = np.random.default_rng(seed).standard_normal(adapter.lora_b.shape)
        adapter.lora_b[...] = jnp.asarray(draw, jnp.float32)


def leaves(model, kind=...):
    """The values of the model's variables by their dotted paths."""
    flat = nnx.to_flat_state(nnx.state(model, kind))
    return {".".join(map(str, path)): np.asarray(variable[...]) for path, variable in flat}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for path in found:
        np.testing.assert_array_equal(found[path], expected[path], err_msg=path)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], ["blocks.0.q_proj", "blocks.1.q_proj"]),
        (["blocks.1.q_proj", "main"], ["blocks.1.q_proj", "heads.main"]),
        (("q_proj", "blocks.0.q_proj"), ["blocks.0.q_proj", "blocks.1.q_proj"]),
        (["mlp.layers.2"], ["blocks.0.mlp.layers.2", "blocks.1.mlp.layers.2"]),
        (r"blocks\.0\.[qv]_proj", ["blocks.0.q_proj", "blocks.0.v_proj"]),
        (r"blocks\.1\.mlp\..*", ["blocks.1.mlp.layers.0", "blocks.1.mlp.layers.2"]),
        (r"heads\..*", ["heads.main", "heads.value"]),
    ],
)
def test_targets_choose_layers(targets, expected):
    model = Net()
    before = model(TOKENS)
    assert sorted(add(model, targets)) == expected == adapted_paths(model)
    assert all(isinstance(adapter, LoRALinear) for _, adapter in iter_adapters(model))
    np.testing.assert_array_equal(model(TOKENS), before)
    fill_right_factors(model)
    assert np.abs(model(TOKENS) - before).max() > 1e-3


def test_options_reach_every_layer():
    model = Net()
    add(model, ["q_proj", "main"], rank=2, alpha=3.0, scaling="rslora", dropout=0.5)
    for path, adapter in iter_adapters(model):
        assert (adapter.rank, adapter.lora_a.shape[-1], adapter.dropout.rate) == (2, 2, 0.5), path
        np.testing.assert_allclose(adapter.scale[...], 3 / np.sqrt(2), rtol=1e-6)
    draws = [np.asarray(adapter.lora_a[...]) for _, adapter in iter_adapters(model)]
    assert not np.array_equal(draws[0], draws[1])


def test_another_adapter_layer_can_be_chosen():
    class Doubled(LoRALinear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    model = Net()
    before = model(TOKENS)
    add(model, r"heads\..*", layer=Doubled)
    np.testing.assert_allclose(model(TOKENS), 2 * before, rtol=1e-6)


CONTAINERS = {
    "list": lambda a, b: nnx.data([a, b]),
    "nnx-list": lambda a, b: nnx.List([a, b]),
    "tuple": lambda a, b: nnx.data((a, b)),
    "dict": lambda a, b: nnx.data({"first": a, "second": b}),
    "dict-of-lists": lambda a, b: nnx.data({"first": [a], "second": [{"deep": b}]}),
    "nnx-dict": lambda a, b: nnx.Dict(first=a, second=b),
    "digits": lambda a, b: nnx.Dict({"0": a, "1": b}),
    "dots": lambda a, b: nnx.Dict({"block.first": a, "block.second": b}),
    "sequential": lambda a, b: nnx.Sequential(a, b),
    "nested": lambda a, b: nnx.List([nnx.Dict(x=a), nnx.Dict(x=nnx.Sequential(nnx.relu, b))]),
}


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS.keys())
def test_layers_in_containers(container):
    layers = linear(4, 4), linear(4, 5)
    model = Holder(container(*layers))
    paths = add(model, "held.*")
    assert len(paths) == 2
    assert [adapter.base for _, adapter in sorted(iter_adapters(model))] == list(layers)
    remove_adapters(model, merge=False)
    remaining = [module for _, module in sorted(nnx.iter_modules(model)) if isinstance(module, nnx.Linear)]
    assert remaining == list(layers)
    assert adapted_paths(model) == []


def test_a_layer_used_twice_is_adapted_in_both_places():
    shared = linear()
    model = Holder(nnx.List([shared, shared]))
    add(model, "held.*")
    assert isinstance(model.held[0], LoRALinear)
    assert model.held[0] is model.held[1]


def test_a_bare_layer_has_no_place_for_an_adapter():
    layer = linear()
    with pytest.raises(ValueError, match="LoRALinear"):
        add(layer, ".*")
    assert vars(layer).keys() == vars(linear()).keys()


@pytest.mark.parametrize(
    ("targets", "options", "error", "message"),
    [
        ("q_proj", {}, ValueError, r"'q_proj' matches no layer; there are .*blocks\.0\.q_proj"),
        (r"blocks\.0\.q", {}, ValueError, "matches no layer"),  # the whole path must match
        ("(", {}, ValueError, r"must be a regular expression or names, got '\('"),
        (["q_porj"], {}, ValueError, "'q_porj' matches no layer; did you mean 'q_proj'?"),
        (["proj"], {}, ValueError, "'proj' matches no layer"),  # a name is not a part of a name
        (["q_proj", "zzz"], {}, ValueError, r"'zzz' matches no layer; there are .*heads\.main"),
        ([], {}, ValueError, "at least one layer, got none"),
        (["embed"], {}, TypeError, r"^embed: .* got Embed"),
        (["main"], {"rank": 4}, ValueError, "^heads.main: rank must be from 1 to 3 for a weight 4 x 3, got 4"),
        (["main"], {"rank": 0}, ValueError, "^heads.main: rank must .* got 0"),
        (["main"], {"rank": 1.0}, TypeError, "^heads.main: rank must be an integer, got 1.0"),
        (["main"], {"dropout": 2}, ValueError, "^heads.main: dropout must .* got 2"),
        (["main"], {"scaling": "x"}, ValueError, "^heads.main: scaling must .* got 'x'"),
        # Errors in a later layer.
        (["main", "value"], {"rank": 2}, ValueError, "^heads.value: rank must .* got 2"),
        (["q_proj", "embed"], {}, TypeError, "^embed: "),
        (["v_proj", "blocks.1.q_proj"], {"alpha": "x"}, TypeError, "^blocks.0.v_proj: "),
    ],
)
def test_errors_name_the_layer_and_leave_the_model_alone(targets, options, error, message):
    model = Net()
    before = leaves(model)
    with pytest.raises(error, match=message):
        add(model, targets, **options)
    assert adapted_paths(model) == []
    assert_same(leaves(model), before)


@pytest.mark.parametrize("targets", [["q_proj"], ["blocks.0.v_proj", "blocks.1.q_proj"], r"blocks\.\d\.._proj"])
def test_a_second_adapter_is_refused(targets):
    model = Net()
    add(model, ["blocks.1.q_proj"])
    with pytest.raises(ValueError, match=r"blocks\.1\.q_proj has an adapter already"):
        add(model, targets)
    assert adapted_paths(model) == ["blocks.1.q_proj"]
    with pytest.raises(ValueError, match="matches no layer"):
        add(model, r".*\.base")  # the layer inside is not offered


def test_adapters_of_two_calls_live_together():
    model = Net()
    add(model, ["q_proj"])
    add(model, ["v_proj"], rank=2)
    assert [adapter.rank for _, adapter in sorted(iter_adapters(model))] == [1, 2, 1, 2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merge_and_unmerge(dtype):
    model = Net()
    nnx.update(model, jax.tree.map(lambda x: x.astype(dtype), nnx.state(model, nnx.Param)))
    add(model, ["q_proj", "v_proj", "main"], rank=2)
    fill_right_factors(model)
    before, adapted = leaves(model), np.asarray(model(TOKENS), np.float64)
    merge_adapters(model)
    merged = np.asarray(model(TOKENS), np.float64)
    assert all(adapter.merged for _, adapter in iter_adapters(model))
    np.testing.assert_allclose(merged, adapted, atol=64 * float(jnp.finfo(dtype).eps) * np.abs(adapted).max())
    unmerge_adapters(model)
    assert_same(leaves(model), before)


@pytest.mark.parametrize("remove", [False, True])
@pytest.mark.parametrize(
    ("dtype", "factors", "message"),
    [
        (
            "float16",
            (300.0, 300.0),
            r"blocks\.1\.q_proj: the merged kernel holds \d{5}\S*, .* 65504; choose the dtype float32 or ",
        ),
        (
            "bfloat16",
            (1e19, 3.4e19),
            r"blocks\.1\.q_proj: the merged kernel holds 3.4e\+38, .* of bfloat16, .*; choose .* float32$",
        ),
        (
            "float32",
            (1e25, 1e25),
            r"blocks\.1\.q_proj: the merged kernel is not finite: its update is beyond float32; ",
        ),
    ],
)
def test_merges_beyond_a_dtype_are_refused_and_leave_the_model_as_it_was(dtype, factors, message, remove):
    model = Net()
    nnx.update(model, jax.tree.map(lambda x: x.astype(dtype), nnx.state(model, nnx.Param)))
    add(model, ["q_proj"])
    fill_right_factors(model)
    last = dict(iter_adapters(model))["blocks.1.q_proj"]
    last.lora_a[...], last.lora_b[...] = jnp.full((4, 1), factors[0]), jnp.full((1, 4), factors[1])
    before = leaves(model)
    with pytest.raises(ValueError, match=message):
        remove_adapters(model, merge=True) if remove else merge_adapters(model)
    assert_same(leaves(model), before)


@pytest.mark.parametrize("merged_before", [False, True])
@pytest.mark.parametrize("merge", [False, True])
def test_remove_adapters(merge, merged_before):
    model, plain = Net(), Net()
    add(model, ["q_proj", "main"], rank=2)
    fill_right_factors(model)
    adapted = model(TOKENS)
    if merged_before:
        merge_adapters(model)
    remove_adapters(model, merge=merge)
    assert [type(module) for _, module in nnx.iter_modules(model)] == [type(m) for _, m in nnx.iter_modules(plain)]
    if merge:
        assert leaves(model).keys() == leaves(plain).keys()
        np.testing.assert_allclose(model(TOKENS), adapted, rtol=1e-4, atol=1e-4)
        assert np.abs(model(TOKENS) - plain(TOKENS)).max() > 1e-3
    else:
        assert_same(leaves(model), leaves(plain))


@pytest.mark.parametrize(
    "function", [merge_adapters, unmerge_adapters, lambda model: remove_adapters(model, merge=True)]
)
def test_a_model_without_adapters_is_refused(function):
    with pytest.raises(ValueError, match="must have adapters, found none"):
        function(Net())


CONFIG = DecoderConfig(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=6,
)
TEXT = np.random.default_rng(0).integers(0, 11, (2, 7))


@functools.cache
def fresh_decoder():
    model = nnx.eval_shape(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0)))
    nnx.update(model, jax.tree.map(lambda leaf: drawn(None, leaf.shape, leaf.dtype) / 3, nnx.state(model)))
    return model


def adapted_decoder(**options):
    model = nnx.clone(fresh_decoder())
    paths = add(model, ["q_proj", "v_proj", "mlp.down_proj"], rank=2, **options)
    return model, paths


def factors(model):
    return nnx.state(model, nnx.LoRAParam)


def test_pairs_of_an_adapted_decoder():
    model, paths = adapted_decoder()
    assert sorted(paths) == ["layers.mlp.down_proj", "layers.self_attn.q_proj", "layers.self_attn.v_proj"]
    pairs = find_pairs(factors(model))
    assert {(pair.batch_axes, pair.transposed) for pair in pairs} == {(1, False)}  # the layers are stacked
    found = zip(pairs, read_pairs(factors(model), pairs), strict=True)
    assert {"/".join(pair.path_a): (a.shape, b.shape) for pair, (a, b) in found} == {
        "layers/mlp/down_proj/lora_a": ((3, 12, 2), (3, 2, 8)),
        "layers/self_attn/q_proj/lora_a": ((3, 8, 2), (3, 2, 12)),
        "layers/self_attn/v_proj/lora_a": ((3, 8, 2), (3, 2, 6)),
    }


def loss_of(model):
    return optax.softmax_cross_entropy_with_integer_labels(model(TEXT[:, :-1]), TEXT[:, 1:]).mean()


def test_projected_training_keeps_the_products_of_the_step():
    model, _ = adapted_decoder()
    base = leaves(model, nnx.Not(nnx.LoRAParam))
    pairs = find_pairs(factors(model))
    step, project = optax.sgd(0.5), balora_project(least_ratio=0.0)
    project_state = project.init(factors(model))

    @nnx.jit
    def train(model, project_state):
        loss, grads = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        params = factors(model)
        updates, _ = step.update(grads, step.init(params), params)
        stepped = optax.apply_updates(params, updates)
        updates, project_state = project.update(updates, project_state, params)
        nnx.update(model, optax.apply_updates(params, updates))
        return loss, stepped, project_state

    losses = []
    for step_index in range(4):
        loss, stepped, project_state = train(model, project_state)
        losses.append(float(loss))
        for wanted, found in zip(*(read_pairs(tree, pairs) for tree in (stepped, factors(model))), strict=True):
            (a, b), (c, d) = ((np.asarray(side, np.float64) for side in pair) for pair in (wanted, found))
            np.testing.assert_allclose(c @ d, a @ b, atol=1e-5 * np.abs(a @ b).max())
            assert np.all(balancing_gap(*found) < 1e-4)
            assert step_index > 0 or np.abs(a - c).max() > 1e-2  # fresh factors are far from balanced
    assert (int(project_state.untouched), int(project_state.waiting)) == (0, 0)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 1e-3
    assert_same(leaves(model, nnx.Not(nnx.LoRAParam)), base)


def test_dropout_in_a_scanned_decoder():
    model, _ = adapted_decoder(dropout=0.5)
    forward = nnx.jit(lambda model: model(TEXT))
    fill_right_factors(model)
    model.train()
    first, second = forward(model), forward(model)
    model.eval()
    third, fourth = forward(model), forward(model)
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(third, fourth)
    merge_adapters(model)
    np.testing.assert_allclose(forward(model), third, rtol=1e-4, atol=1e-4)
