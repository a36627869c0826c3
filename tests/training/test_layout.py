"""Runs on meshes of 8 devices give the numbers of one device, with the collectives that are meant."""

import dataclasses

import jax
import numpy as np
import pytest
from processes import run_alone

from balora_jax.settings import ParallelSettings
from balora_jax.training import ConfigError
from balora_jax.training.layout import layout_of
from balora_jax.training.loading import load_shapes

SETUP = """
import dataclasses, re
import jax, numpy as np
from balora_jax.models import Decoder, DecoderConfig
from balora_jax.settings import *
from balora_jax.training.feed import Feed
from balora_jax.training.layout import layout_of
from balora_jax.training.loading import base_model, load_data, load_shapes
from balora_jax.training.program import Program

def prepared(parallel, members=1, dropout=0.0, **changes):
    config = Config(
        name="x", model=ModelSettings(path=FOLDER), adapter=AdapterSettings(rank=4, alpha=8.0, dropout=dropout),
        data=DataSettings(modules=("arithmetic__add_or_sub",), train_examples=200, eval_examples=10, length=48),
        training=TrainingSettings(steps=20, batch_size=8, accumulate=2), parallel=parallel, **changes,
    )
    configs = [dataclasses.replace(config, seed=seed) for seed in range(members)]
    layout = layout_of(config, load_shapes(config.model), members=members)
    rows, _, _ = load_data(config.data, config.model.path)
    program = Program(config, base_model(config.model, layout and layout.mesh), layout)
    feed = Feed(rows, [config.seed for config in configs], config.training, layout)
    return program, feed, program.initial_state(configs, feed.first(*program.gradient_batches))

def losses(parallel, steps=20, **options):
    program, feed, state = prepared(parallel, **options)
    shardings, found = jax.tree.map(lambda x: x.sharding, state), []
    for step in range(1, steps + 1):
        state, metrics = program.step(state, program.base, feed(step)[0])
        found.append(np.asarray(metrics["loss"]))
    if program.layout is not None:
        same = jax.tree.map(lambda x, old: x.sharding.is_equivalent_to(old, x.ndim), state, shardings)
        assert all(jax.tree.leaves(same)), "a step leaves the state where it was"
    return np.array(found)

ONE = ParallelSettings(data=1)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from flax import nnx

    from balora_jax.models import Decoder, DecoderConfig
    from balora_jax.models.weights import save_decoder

    folder = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = DecoderConfig(vocab_size=98, num_hidden_layers=2, head_dim=8, **sizes)
    save_decoder(Decoder(config, rngs=nnx.Rngs(0)), folder)
    return folder


def on_8_devices(folder, program):
    return run_alone(
        f"FOLDER = {str(folder)!r}\n{SETUP}\n{program}", flags="--xla_force_host_platform_device_count=8", timeout=600
    )


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ({"data": 8}, {"method": "lora", "dropout": 0.1}),
        ({"fsdp": 4}, {"method": "balora", "dropout": 0.1}),
        ({"fsdp": 2, "tensor": 2}, {"method": "balora_dora"}),
        ({"data": 4, "tensor": 2}, {"method": "lora_rite"}),
        ({"fsdp": 2, "tensor": 2}, {"method": "galore", "options": {"rank": 4, "update_interval": 3}}),
        ({"fsdp": 2}, {"method": "balora", "members": 4}),
    ],
)
def test_losses_are_those_of_one_device(mesh, options, folder):
    on_8_devices(
        folder,
        f"""
options = {options!r}
found, alone = losses(ParallelSettings(**{mesh!r}), **options), losses(ONE, **options)
np.testing.assert_allclose(found, alone, rtol=2e-5)
""",
    )


def test_gradients_start_the_adapters_alike(folder):
    on_8_devices(
        folder,
        """
_, _, state = prepared(ParallelSettings(fsdp=2, tensor=2), method="balora_ga", options={"gradient_batches": 2})
_, _, alone = prepared(ONE, method="balora_ga", options={"gradient_batches": 2})
for found, expected in zip(jax.tree.leaves(state.adapters), jax.tree.leaves(alone.adapters), strict=True):
    np.testing.assert_allclose(abs(np.asarray(found)), abs(np.asarray(expected)), atol=2e-3)
""",
    )


def test_tokens_are_counted_once_where_processes_read_the_same_rows(folder):
    on_8_devices(
        folder,
        """
_, feed, _ = prepared(ParallelSettings(fsdp=2, tensor=2), method="lora")
_, alone, _ = prepared(ONE, method="lora")
jax.process_count = lambda: 2  # whose devices are all along tensor
assert feed(2)[1] == alone(2)[1]
""",
    )


def test_no_factor_is_put_together_for_the_projection(folder):
    """Layers are put together one at a time; of stacked factors the Gram matrices alone travel."""
    on_8_devices(
        folder,
        """
program, feed, state = prepared(ParallelSettings(fsdp=4, tensor=2), method="balora")
compiled = program.step.lower(state, program.base, feed(1)[0]).compile().as_text()
gathered = re.findall(r"= \\(?f(?:32|64)\\[([0-9,]+)\\]\\S* all-gather", compiled)
assert gathered, "layers are put together"
assert not [shape for shape in gathered if shape.startswith(("2,", "1,2,"))], gathered
for leaf in jax.tree.leaves((state.adapters, state.opt_state)):
    if leaf.ndim == 4 and leaf.size > 200:
        assert leaf.addressable_shards[0].data.size < leaf.size, leaf.shape
""",
    )


def laid_out(config, devices, members=1, **parallel):
    config = dataclasses.replace(config, parallel=ParallelSettings(**parallel))
    return layout_of(config, load_shapes(config.model), members=members, devices=devices * jax.devices())


@pytest.mark.parametrize(
    ("devices", "parallel", "message"),
    [
        (8, {"fsdp": 16}, r"= 1 x 16 x 1 must divide the 8 devices; 1, 2, 4 or 8 would"),
        (8, {"data": 3, "fsdp": 4}, r"= 3 x 4 x 1 must divide the 8 devices"),
        (8, {"fsdp": 3}, r"= 1 x 3 x 1 must divide the 8 devices; 1, 2, 4 or 8 would"),
        (8, {"data": 3}, r"= 3 x 1 x 1 must divide the 8 devices"),
        (8, {"data": 8}, r"training.batch_size must be a multiple of 8, .* got 2; parallel.data 1 or 2 would do"),
        (8, {"fsdp": 4}, r"training.batch_size must be a multiple of 4, .* got 2; a multiple of 4 would do"),
        (8, {"tensor": 4}, r"parallel.tensor must divide the 98 .* embed_tokens.embedding, got 4; 1 or 2 would"),
    ],
)  # fmt: skip
def test_meshes_that_do_not_divide(devices, parallel, message, config):
    with pytest.raises(ConfigError, match=message):
        laid_out(config, devices, **parallel)


def test_as_many_devices_as_the_rows_can_be_divided_by(config):
    assert laid_out(config, 1) is None
    assert dict(laid_out(config, 8).mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 1}
    along_members = laid_out(config, 8, members=24)
    assert dict(along_members.mesh.shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert along_members.batch().spec[0] == "data"
    assert np.prod(list(along_members.mesh.shape.values())) == 8
