import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from processes import run_alone

from balora_jax.adapters import LoRALinear, adapter_scale

RANK, ALPHA = 2, 3.0
SCALE = ALPHA / RANK


@dataclass(frozen=True)
class Case:
    """A layer and its low-rank update, written out for one input shape."""

    make: Callable[..., nnx.Module]
    x: tuple[int, ...]  # shape of the input
    lora_a: tuple[int, ...]
    lora_b: tuple[int, ...]
    product: str  # einsum of the factors that gives the kernel's update
    output: str  # einsum of the input and the kernel's update that gives the output's


def normal(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def drawn(key, shape, dtype):
    return jnp.asarray(normal(shape, len(shape), dtype))


linear = partial(partial, nnx.Linear, kernel_init=drawn, bias_init=drawn)
general = partial(partial, nnx.LinearGeneral, kernel_init=drawn, bias_init=drawn)
einsum = partial(partial, nnx.Einsum, kernel_init=drawn, bias_init=drawn)


CASES = {
    "linear": Case(linear(6, 5), (3, 4, 6), (6, 2), (2, 5), "ir,ro->io", "bti,io->bto"),
    "linear-no-bias": Case(linear(6, 5, use_bias=False), (6,), (6, 2), (2, 5), "ir,ro->io", "i,io->o"),
    "general": Case(
        general((2, 3), (4, 5), axis=(-2, -1)), (7, 2, 3), (2, 3, 2), (2, 4, 5), "ijr,rkl->ijkl", "bij,ijkl->bkl"
    ),
    "general-apart": Case(
        general((3, 5), (4, 2), axis=(1, -1)), (2, 3, 4, 5), (3, 5, 2), (2, 4, 2), "ijr,rkl->ijkl", "uivj,ijkl->uvkl"
    ),
    # Flax contracts a LinearGeneral's axes in ascending order, in whatever order they are given.
    "general-unsorted": Case(
        general((3, 3), (4, 2), axis=(-1, 1)), (2, 3, 4, 3), (3, 3, 2), (2, 4, 2), "ijr,rkl->ijkl", "uivj,ijkl->uvkl"
    ),
    "general-middle": Case(general(4, 6, axis=1), (2, 4, 3), (4, 2), (2, 6), "ir,ro->io", "uiv,io->uvo"),
    "einsum": Case(einsum("btd,dh->bth", (6, 5), (5,)), (3, 4, 6), (6, 2), (2, 5), "ir,ro->io", "bti,io->bto"),
    "einsum-ellipsis": Case(einsum("...d,dh->...h", (6, 5)), (3, 4, 6), (6, 2), (2, 5), "ir,ro->io", "bti,io->bto"),
    "einsum-transposed": Case(einsum("btd,hd->bth", (5, 6)), (3, 4, 6), (6, 2), (2, 5), "ir,ro->oi", "bti,oi->bto"),
    "einsum-heads": Case(
        einsum("btd,ndh->bnth", (3, 6, 4)), (2, 5, 6), (6, 2), (2, 3, 4), "dr,rnh->ndh", "btd,ndh->bnth"
    ),
    "einsum-joined-heads": Case(
        einsum("btnh,nhd->btd", (3, 4, 6), (6,)), (2, 5, 3, 4), (3, 4, 2), (2, 6), "nhr,rd->nhd", "btnh,nhd->btd"
    ),
    "einsum-experts": Case(
        einsum("becd,edf->becf", (3, 6, 4)), (2, 3, 5, 6), (3, 6, 2), (3, 2, 4), "edr,erf->edf", "becd,edf->becf"
    ),
    "einsum-ellipsis-inside": Case(
        einsum("a...b,bc->...ac", (6, 4)), (2, 3, 5, 2, 7, 2, 6), (6, 2), (2, 4), "br,rc->bc", "adefghb,bc->defghac"
    ),
    "einsum-experts-last": Case(
        einsum("...ed,fde->...ef", (4, 6, 3)), (2, 3, 6), (3, 6, 2), (3, 2, 4), "edr,erf->fde", "bed,fde->bef"
    ),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def adapted(make, *, dtypes=(None, jnp.float32), **options):
    """A layer with an adapter whose `lora_b` is not zero."""
    base = make(dtype=dtypes[0], param_dtype=dtypes[1], rngs=nnx.Rngs(0))
    layer = LoRALinear(base, **{"rank": RANK, "alpha": ALPHA, **options}, rngs=nnx.Rngs(1))
    layer.lora_b[...] = normal(layer.lora_b.shape)
    return layer


def wide(*arrays):
    """The arrays in float64."""
    return [np.asarray(array[...], np.float64) for array in arrays]


def exact_update(case, layer):
    """The kernel's update in float64, from the definition."""
    return SCALE * np.einsum(case.product, *wide(layer.lora_a, layer.lora_b))


@nnx.jit
def apply(layer, x):
    return layer(x)


@each_case
def test_adapter_adds_the_scaled_update(case):
    layer, x = adapted(case.make), normal(case.x)
    assert (layer.lora_a.shape, layer.lora_b.shape) == (case.lora_a, case.lora_b)
    update = exact_update(case, layer)
    np.testing.assert_allclose(layer.weight_update(), update, rtol=1e-5, atol=1e-6)
    expected = np.asarray(layer.base(x)) + np.einsum(case.output, x, update)
    np.testing.assert_allclose(apply(layer, x), expected, rtol=1e-5, atol=1e-5)


@each_case
def test_fresh_adapter_changes_nothing(case):
    base, x = case.make(rngs=nnx.Rngs(0)), normal(case.x)
    before = base(x)
    np.testing.assert_array_equal(LoRALinear(base, rank=RANK, rngs=nnx.Rngs(1))(x), before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["linear", "general-apart", "einsum-experts-last"])
def test_merge_adds_the_update_and_unmerge_is_exact(name, dtype):
    case = CASES[name]
    layer, x = adapted(case.make, dtypes=(dtype, dtype)), normal(case.x, 1, dtype)
    kernel, before = np.asarray(layer.base.kernel[...]), np.asarray(layer(x))
    eps = float(jnp.finfo(dtype).eps)
    expected = kernel.astype(np.float64) + exact_update(case, layer)
    for _ in range(2):  # the second time adds nothing
        layer.merge()
        np.testing.assert_allclose(*wide(layer.base.kernel, expected), rtol=eps, atol=eps)
    np.testing.assert_allclose(*wide(layer(x), before), atol=64 * eps)  # roundings of products of size ten or so
    factor = layer.lora_b[...]
    layer.lora_b[...] = factor + 1.0  # what happens to the factors meanwhile does not matter
    layer.unmerge()
    np.testing.assert_array_equal(layer.base.kernel[...], kernel)
    assert layer.base.kernel.dtype == dtype
    layer.lora_b[...] = factor
    np.testing.assert_array_equal(layer(x), before)


def stacked(make, count):
    """A layer, or `count` layers stacked along a leading axis."""
    if not count:
        return make(rngs=nnx.Rngs(0))
    layers = nnx.split_rngs(splits=count)(nnx.vmap(lambda rngs: make(rngs=rngs)))(nnx.Rngs(0))
    layers.kernel[...] = normal(layers.kernel.shape)
    return layers


@pytest.mark.parametrize(
    ("make", "count", "fan_in"),
    [
        (linear(64, 48), 0, 64),
        (linear(64, 48), 3, 64),
        (general((8, 8), (6, 8), axis=(-2, -1)), 0, 64),
        (einsum("bed,edf->bef", (4, 64, 48)), 0, 64),
        (einsum("...f,df->...d", (256, 100)), 0, 100),
    ],
    ids=["linear", "stacked", "general", "experts", "transposed"],
)
def test_left_factor_is_uniform_and_right_factor_zero(make, count, fan_in):
    layer = LoRALinear(stacked(make, count), rank=32, rngs=nnx.Rngs(0))
    (values,), bound = wide(layer.lora_a), 1 / math.sqrt(fan_in)
    assert bound * 0.99 < np.abs(values).max() <= bound
    tolerance = 5 / math.sqrt(values.size)  # of the relative error of the standard deviation, and of the mean
    assert abs(values.std() / (bound / math.sqrt(3)) - 1) < tolerance
    assert abs(values.mean() / bound) < tolerance
    assert np.unique(values).size > 0.99 * values.size  # neither layers nor experts repeat each other
    assert not layer.lora_b[...].any()


@pytest.mark.parametrize(
    ("alpha", "rank", "scaling", "expected"),
    [(16, 4, "lora", 4.0), (16, 4, "rslora", 8.0), (1, 2, "lora", 0.5), (None, 4, "lora", 1.0), (None, 4, "rslora", 2)],
)
def test_scale(alpha, rank, scaling, expected):
    layer = LoRALinear(nnx.Linear(6, 5, rngs=nnx.Rngs(0)), rank=rank, alpha=alpha, scaling=scaling, rngs=nnx.Rngs(0))
    assert (float(layer.scale[...]), layer.scale.dtype, layer.rank) == (expected, jnp.float32, rank)
    assert adapter_scale(rank if alpha is None else alpha, rank, scaling) == expected


@pytest.mark.parametrize(
    ("dtype", "param_dtype", "x_dtype", "expected"),
    [
        ("bfloat16", "bfloat16", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "float32", "bfloat16"),
        (None, "bfloat16", "bfloat16", "bfloat16"),
        (None, "bfloat16", "float32", "float32"),
        ("float32", "bfloat16", "bfloat16", "float32"),
    ],
)
def test_factors_are_float32_and_the_output_keeps_its_dtype(dtype, param_dtype, x_dtype, expected):
    case = CASES["linear"]
    layer, x = adapted(case.make, dtypes=(dtype, param_dtype)), normal(case.x, 1, x_dtype)
    assert {layer.lora_a.dtype, layer.lora_b.dtype, layer.weight_update().dtype} == {jnp.dtype("float32")}
    y, base = layer(x), layer.base(x)
    assert y.dtype == base.dtype == expected
    y, base, x = wide(y, base, x)
    exact = base + np.einsum(case.output, x, exact_update(case, layer))
    np.testing.assert_allclose(y, exact, atol=16 * float(jnp.finfo(expected).eps))


def test_only_the_factors_get_a_gradient():
    layer, x, weights = adapted(linear(6, 5)), normal((7, 6)), normal((7, 5), 1)
    grads = nnx.grad(lambda layer: (layer(x) * weights).sum(), argnums=nnx.DiffState(0, nnx.LoRAParam))(layer)
    found = {"/".join(map(str, path)): np.asarray(value[...]) for path, value in nnx.to_flat_state(grads)}
    lora_a, lora_b = np.asarray(layer.lora_a[...]), np.asarray(layer.lora_b[...])
    dense = SCALE * x.T @ weights
    assert found.keys() == {"lora_a", "lora_b"}
    np.testing.assert_allclose(found["lora_a"], dense @ lora_b.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["lora_b"], lora_a.T @ dense, rtol=1e-4, atol=1e-5)


STACKS = {
    "linear": Case(linear(6, 6), (3, 6), (6, 2), (2, 6), "ir,ro->io", "bi,io->bo"),
    "general": Case(
        general((2, 3), (2, 3), axis=(-2, -1)), (4, 2, 3), (2, 3, 2), (2, 2, 3), "ijr,rkl->ijkl", "bij,ijkl->bkl"
    ),
    "experts": Case(einsum("bed,edf->bef", (3, 4, 4)), (5, 3, 4), (3, 4, 2), (3, 2, 4), "edr,erf->edf", "bed,edf->bef"),
}


@nnx.jit
@nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
def run_through(x, layer):
    return layer(x)


@pytest.mark.parametrize("case", STACKS.values(), ids=STACKS.keys())
def test_scan_over_stacked_layers_is_the_loop(case):
    layers, x = LoRALinear(stacked(case.make, 3), rank=RANK, alpha=ALPHA, rngs=nnx.Rngs(1)), normal(case.x)
    layers.lora_b[...] = normal(layers.lora_b.shape)
    kernels, *factors = wide(layers.base.kernel, layers.lora_a, layers.lora_b)
    assert [f.shape for f in factors] == [(3, *case.lora_a), (3, *case.lora_b)]
    assert layers.scale.shape == (3,)
    layers.scale[...] = scales = np.array([0.5, 1.0, 2.0], np.float32)
    (expected,), biases = wide(x), wide(layers.base.bias)[0] if layers.base.bias is not None else np.zeros(3)
    for kernel, bias, lora_a, lora_b, scale in zip(kernels, biases, *factors, scales, strict=True):
        expected = np.einsum(case.output, expected, kernel + scale * np.einsum(case.product, lora_a, lora_b)) + bias
    tolerance = {"rtol": 1e-5, "atol": 1e-5 * np.abs(expected).max()}
    np.testing.assert_allclose(run_through(x, layers), expected, **tolerance)
    layers.merge()
    np.testing.assert_allclose(run_through(x, layers), expected, **tolerance)
    layers.unmerge()
    np.testing.assert_array_equal(layers.base.kernel[...], kernels)


@pytest.mark.parametrize("count", [0, 3], ids=["one", "stacked"])
def test_dropout_acts_in_training_only_and_keeps_the_mean(count):
    layer = LoRALinear(stacked(linear(6, 5), count), rank=RANK, dropout=0.25, rngs=nnx.Rngs(0, dropout=1))
    call = nnx.jit(nnx.vmap(apply, in_axes=(0, None)) if count else apply)
    x = np.zeros((4000, 6), np.float32)
    x[:, 2] = 1.0  # a row's update is dropped whole or kept
    layer.train()
    base = np.asarray(call(layer, x))
    assert (base == base[..., :1, :]).all()  # the base's input is not dropped
    layer.lora_b[...] = normal(layer.lora_b.shape)
    first, second = (np.asarray(call(layer, x)) - base for _ in range(2))
    layer.eval()
    exact = np.asarray(call(layer, x)) - base
    kept = np.abs(np.stack([first, second])).max(-1) > 1e-3
    np.testing.assert_allclose(kept.mean(-1), 0.75, atol=5 * math.sqrt(0.25 * 0.75 / 4000))
    np.testing.assert_allclose(first, exact / 0.75 * kept[0][..., None], rtol=1e-4, atol=1e-5)
    # Each call draws anew, and so does each layer.
    draws = kept.reshape(-1, 4000)
    assert len(np.unique(draws, axis=0)) == len(draws)


def test_without_dropout_there_is_no_random_state():
    assert not jax.tree.leaves(nnx.state(adapted(linear(6, 5)), nnx.RngState))
    assert jax.tree.leaves(nnx.state(adapted(linear(6, 5), dropout=0.5), nnx.RngState))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 0}, ValueError, "from 1 to 5 for a weight 6 x 5, got 0"),
        ({"rank": 6}, ValueError, "from 1 to 5 for a weight 6 x 5, got 6"),
        ({"rank": 2.0}, TypeError, "rank must be an integer, got 2.0"),
        ({"rank": True}, TypeError, "rank must be an integer, got True"),
        ({"dropout": 1.0}, ValueError, "dropout must be at least 0 and below 1, got 1.0"),
        ({"dropout": -0.1}, ValueError, "got -0.1"),
        ({"dropout": math.nan}, ValueError, "got nan"),
        ({"scaling": "sqrt"}, ValueError, "'lora' or 'rslora', got 'sqrt'"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        adapted(linear(6, 5), **options)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (partial(nnx.Conv, 3, 4, (2,)), TypeError, "got Conv"),
        (partial(nnx.Embed, 3, 4), TypeError, "got Embed"),
        (general(3, 4, batch_axis={0: 2}), ValueError, "batch_axis is not supported, got {0: 2}"),
        (einsum("bde,de->bde", (3, 4)), ValueError, "must sum over an axis .* got 'bde,de->bde'"),
        (einsum("bde,de->b", (3, 4)), ValueError, "must .* keep another, .* got 'bde,de->b'"),
        (einsum("...d,...df->...f", (3, 4)), ValueError, "plain labels in the kernel"),
        (einsum("bd,dR->bR", (3, 4)), ValueError, "without the label R"),
    ],
)
def test_unsupported_layers(make, error, message):
    with pytest.raises(error, match=message):
        adapted(make, rank=1)


def test_rank_is_bounded_by_one_matrix_of_a_stack_and_by_the_product_of_axes():
    assert adapted(general((2, 3), (4, 5), axis=(-2, -1)), rank=6).rank == 6
    with pytest.raises(ValueError, match="from 1 to 4 for a weight 6 x 4, got 5"):
        adapted(einsum("bed,edf->bef", (9, 6, 4)), rank=5)
    with pytest.raises(ValueError, match="from 1 to 5 for a weight 6 x 5, got 6"):
        LoRALinear(stacked(linear(6, 5), 9), rank=6, rngs=nnx.Rngs(0))


def test_sharded_inputs_stay_where_they_are():
    """In both modes of sharding, along any axes: outputs and the factors' gradients are those of one device."""
    run_alone(
        """
        import jax, jax.numpy as jnp, numpy as np
        from flax import nnx
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from balora_jax.adapters import LoRALinear

        layer = LoRALinear(nnx.Linear(8, 12, rngs=nnx.Rngs(0)), rank=2, rngs=nnx.Rngs(1))
        layer.lora_b[...] = jnp.ones((2, 12))
        graph, factors, rest = nnx.split(layer, nnx.LoRAParam, ...)
        x = jax.random.normal(jax.random.key(0), (4, 6, 8))

        @jax.jit
        def output_and_gradients(factors, rest, x):
            output, backward = jax.vjp(lambda factors: nnx.merge(graph, factors, rest, copy=True)(x), factors)
            return output, backward(jnp.cos(output))

        expected = output_and_gradients(factors, rest, x)
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind, kind))
            with jax.set_mesh(mesh):
                for spec in (P("x"), P("x", "y"), P(None, "y"), P("x", None, "y"), P(("x", "y"))):
                    there = jax.device_put(x, NamedSharding(mesh, spec))
                    found = output_and_gradients(factors, rest, there)
                    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
                        np.testing.assert_allclose(one, other, atol=1e-5)
                    assert found[0].sharding.is_equivalent_to(NamedSharding(mesh, P(*spec[:2])), 3), (kind, spec)
        """,
        flags="--xla_force_host_platform_device_count=4",
    )
