"""Full fine-tuning as an adapter: the trained kernel is the layer's, in every layout and dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from balora_jax.adapters import FullLinear, add_adapters, iter_adapters, merge_adapters, remove_adapters

LAYERS = {
    "linear": (lambda **k: nnx.Linear(8, 6, **k), (5, 8), "ti,io->to"),
    "general": (lambda **k: nnx.LinearGeneral((2, 4), (3, 5), axis=(-2, -1), **k), (5, 2, 4), "tij,ijkl->tkl"),
    "experts": (lambda **k: nnx.Einsum("becd,edf->becf", (3, 6, 8), (3, 1, 8), **k), (2, 3, 4, 6), "becd,edf->becf"),
}


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def make(case, dtype="float32"):
    build, shape, output = LAYERS[case]
    base = build(dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    base.bias[...] = jnp.asarray(normal(base.bias.shape, 5), dtype)
    return base, jnp.asarray(normal(shape, 1), dtype), output


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", LAYERS)
def test_is_the_layer_with_the_trained_kernel(case, dtype):
    base, x, output = make(case, dtype)
    kernel, before = np.asarray(base.kernel[...]), base(x)
    layer = FullLinear(base)
    assert layer.kernel[...].dtype == jnp.float32
    np.testing.assert_array_equal(layer(x), before)
    new = kernel.astype(np.float32) + 0.3 * normal(kernel.shape, 2)
    layer.kernel[...] = new
    expected = np.einsum(output, np.asarray(x, float), np.asarray(new, float)) + np.asarray(base.bias[...], float)
    after = layer(x)
    assert after.dtype == before.dtype
    np.testing.assert_allclose(np.asarray(after, float), expected, atol=1e-5 if dtype == "float32" else 0.1)
    np.testing.assert_allclose(layer.weight_update(), new - kernel.astype(np.float32))
    np.testing.assert_array_equal(base.kernel[...], kernel)  # the shared base stays
    layer.merge()
    np.testing.assert_array_equal(base.kernel[...], jnp.asarray(new, dtype))
    np.testing.assert_array_equal(layer(x), after)
    layer.unmerge()
    np.testing.assert_array_equal(base.kernel[...], kernel)


def test_gradient_is_that_of_the_weight():
    base, x, _ = make("linear")
    layer = FullLinear(base)
    grads = nnx.grad(lambda m: (m(x) ** 2).sum(), argnums=nnx.DiffState(0, nnx.LoRAParam))(layer)
    expected = 2 * np.asarray(x).T @ np.asarray(base(x))
    assert set(grads) == {"kernel"}
    np.testing.assert_allclose(grads["kernel"][...], expected, atol=1e-4)


class Stack(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def layers(rngs):
            return nnx.Dict(proj=nnx.Linear(4, 4, rngs=rngs))

        self.layers = layers(rngs)

    def __call__(self, x):
        return nnx.scan(lambda layer, x: jnp.tanh(layer["proj"](x)), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(
            self.layers, x
        )


def test_on_stacked_layers_of_a_model():
    model, x = Stack(nnx.Rngs(0)), normal((2, 4))
    before = model(x)
    add_adapters(model, targets=["proj"], rank=2, layer=FullLinear, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(model(x), before)
    ((path, layer),) = iter_adapters(model)
    assert (path, layer.kernel.shape) == ("layers.proj", (3, 4, 4))
    layer.kernel[...] *= 1.5
    after = jax.jit(lambda state, x: nnx.merge(nnx.graphdef(model), state)(x))(nnx.state(model), x)
    assert np.abs(after - before).max() > 1e-2
    merge_adapters(model)
    np.testing.assert_allclose(model(x), after, atol=1e-6)
    remove_adapters(model, merge=True)
    np.testing.assert_allclose(model(x), after, atol=1e-6)
    assert not list(iter_adapters(model))


def test_dropout_has_no_meaning_here():
    with pytest.raises(ValueError, match=r"dropout must be 0 where the weight itself is trained, got 0\.1"):
        FullLinear(make("linear")[0], dropout=0.1)
