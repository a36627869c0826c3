"""What compiles for accelerators that are not there; run by `make accelerators`, which installs the compilers."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from balora_jax import balora_project
from balora_jax.errors import ConfigError
from balora_jax.methods import METHODS
from balora_jax.models.kernels import attend
from balora_jax.settings import ParallelSettings
from balora_jax.training import AdapterSettings, BalanceSettings, Config, DataSettings, ModelSettings, TrainingSettings
from balora_jax.training.estimate import estimate
from balora_jax.training.hlo import Program
from balora_jax.training.hyperparameters import optimizer_of, stacked_numbers
from balora_jax.training.targets import parse_target
from balora_jax.training.work import work

FACTORIZATIONS = {"Cholesky", "QrDecompositionBlock", "EighTpu", "cusolver_potrf_ffi", "cusolver_gesvdj_ffi"}


def on_target(name):
    """A target and one of its devices; the test is skipped where its compiler is not installed."""
    target = parse_target(name)
    try:
        return target, target.devices()[0]
    except ConfigError as error:
        pytest.skip(str(error))


def compiled(name, function, *arguments):
    """A function's program for one device of a target."""
    target, device = on_target(name)
    sharding = SingleDeviceSharding(device)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    lowered = jax.jit(function).trace(*placed).lower(lowering_platforms=(target.chip.platform,))
    return lowered.compile(compiler_options=target.compiler_options)


def factors(rank, stacked=4, sizes=(512, 768)):
    shapes = {"lora_a": (stacked, sizes[0], rank), "lora_b": (stacked, rank, sizes[1])}
    return {"layer": {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}}


@pytest.mark.parametrize("rank", [8, 64, 256])
@pytest.mark.parametrize("route", ["auto", "exact"])
@pytest.mark.parametrize("name", ["h100", "v5e"])
def test_the_projection(name, route, rank):
    """On TPUs there is no float64; without the exact route, only the repair of ill-conditioned pairs factorizes."""
    tx, params = balora_project(route=route), factors(rank)
    text = compiled(name, tx.update, params, jax.eval_shape(tx.init, params), params).as_text()
    assert ("f64[" in text) == (name == "h100")
    launched = set(work(Program(text), loops=1, node=1).unseen)
    assert launched.isdisjoint(FACTORIZATIONS) == (route == "auto")
    assert FACTORIZATIONS & {line.target for lines in Program(text).computations.values() for line in lines.values()}


@pytest.mark.parametrize("rank", [8, 128])
def test_the_memory_of_the_projection(rank):
    """On the MLPs of Qwen2.5-3B: beside what comes in and goes out at most 2.2 copies of the factors."""
    sizes = {"gate": (2048, 11_008), "up": (2048, 11_008), "down": (11_008, 2048)}
    tx, params = balora_project(), {name: factors(rank, 36, size) for name, size in sizes.items()}
    program = compiled("h100", tx.update, params, jax.eval_shape(tx.init, params), params)
    copy = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    assert program.memory_analysis().temp_size_in_bytes < 2.2 * copy


@pytest.mark.parametrize("name", ["h100", "v5e"])
@pytest.mark.parametrize("method", METHODS)
def test_the_optimizer_of_every_method(method, name):
    config = Config(name="method", method=method, adapter=AdapterSettings(rank=4), balance=BalanceSettings())
    if method == "full":
        params = {"layer": {"kernel": jax.ShapeDtypeStruct((64, 96), jnp.float32)}}
    else:
        params = factors(4, stacked=2)
        if "dora" in method:
            params["layer"]["magnitude"] = jax.ShapeDtypeStruct((2, 768), jnp.float32)
        if method == "adalora":
            params["layer"]["lora_e"] = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    numbers = jax.tree.map(lambda x: x[0], stacked_numbers([config]))

    def update(numbers, grads, params):
        tx = optimizer_of(config)(numbers)
        return tx.update(grads, tx.init(params), params)

    text = compiled(name, update, numbers, params, params).as_text()
    if name == "v5e":
        assert "f64[" not in text


CONFIG = Config(
    name="step",
    method="balora",
    model=ModelSettings(dtype="bfloat16", param_dtype="bfloat16"),
    adapter=AdapterSettings(rank=8),
    data=DataSettings(length=256),
    training=TrainingSettings(batch_size=16),
)


@pytest.mark.parametrize("name", ["h100", "h200", "a100-40gb", "v5e", "v5p", "v6e"])
def test_the_step_of_a_run(name):
    target, _ = on_target(name)
    found = estimate([CONFIG], target)
    products = found.whole.work.products
    assert sum(products.values()) == pytest.approx(2.1e10, rel=0.1)  # the same for all
    assert products["bfloat16"] > 0.9 * sum(products.values())
    assert ("float64" in products) == (target.chip.platform == "cuda")
    assert FACTORIZATIONS.isdisjoint(found.whole.work.unseen)
    assert found.step.peak < 400 * 2**20
    assert 0 < found.projection.slowest < found.whole.slowest


@pytest.mark.parametrize("name", ["h100:8", "v5e:2x4", "v5p:2x2x2"])
def test_the_step_on_a_mesh(name):
    """Of the projection only r x r matrices travel, never a factor."""
    target, _ = on_target(name)
    parallel = ParallelSettings(data=2, fsdp=2, tensor=2)
    found = estimate([dataclasses.replace(CONFIG, parallel=parallel)], target)
    assert found.mesh == (2, 2, 2)
    assert found.whole.network > 0
    sent = found.projection.work.sent
    assert {kind for kind, _ in sent} <= {"all-reduce"}  # which GPUs do together with others, under no name
    pairs, factors_of_a_layer = 9, 4 * 8 * (160 + 448)
    assert sum(sent.values()) < 2 * pairs * 4 * 4 * 8**2 < pairs * factors_of_a_layer


@pytest.mark.parametrize(("name", "kernel"), [("h100", "__cudnn$fmha"), ("v5e", "tpu_custom_call")])
def test_attention_and_its_gradient(name, kernel):
    """As a population does it, in half precision and on rows whose length no block divides."""
    shapes = [(2, 4, 1023, heads, 64) for heads in (8, 2, 2)]
    queries, keys, values = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    mask, segments = jax.ShapeDtypeStruct((2, 4, 1023, 1023), bool), jax.ShapeDtypeStruct((2, 4, 1023), jnp.int32)

    def loss(*arrays):
        return jax.vmap(attend)(*arrays).sum()

    text = compiled(name, jax.grad(loss, argnums=(0, 1, 2)), queries, keys, values, mask, segments).as_text()
    assert text.count(kernel) >= 2
    # half of the products of causal attention forward twice and backward: four, and five
    products = sum(work(Program(text), loops=0, node=1).products.values())
    assert products == pytest.approx((2 + 2 + 5) * 2 * 4 * 8 * 1024**2 * 64, rel=0.25)


def test_what_does_not_fit_is_told():
    """The compiler for TPUs refuses it, and says by how much."""
    target, _ = on_target("v5e")
    training = dataclasses.replace(CONFIG.training, batch_size=512)
    data = dataclasses.replace(CONFIG.data, length=4096)
    found = estimate([dataclasses.replace(CONFIG, data=data, training=training)], target)
    assert found.step.peak > target.chip.memory
    assert found.whole is None
