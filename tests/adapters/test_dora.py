"""DoRA against its definition with the weight formed, `W'[:, j] = m_j V[:, j] / ||V[:, j]||`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from balora_jax import balance
from balora_jax.adapters import OLORA, DoRALinear

LAYERS = {
    # the layer, the shape of its input, the einsum of an input and a kernel; CONTRACTED has the kernel's inner axes
    "linear": (lambda **k: nnx.Linear(8, 6, **k), (5, 8), "ti,io->to"),
    "no bias": (lambda **k: nnx.Linear(8, 6, use_bias=False, **k), (5, 8), "ti,io->to"),
    "general": (lambda **k: nnx.LinearGeneral((2, 4), (3, 5), axis=(-2, -1), **k), (5, 2, 4), "tij,ijkl->tkl"),
    "experts": (lambda **k: nnx.Einsum("becd,edf->becf", (3, 6, 8), (3, 1, 8), **k), (2, 3, 4, 6), "becd,edf->becf"),
    "transposed": (lambda **k: nnx.Einsum("btd,hd->bth", (6, 8), (6,), **k), (2, 3, 8), "btd,hd->bth"),
}
CONTRACTED = {"linear": 0, "no bias": 0, "general": (0, 1), "experts": 1, "transposed": 1}


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def trained(case, **options):
    """A layer whose factors, magnitude and bias are not what they started as."""
    make, shape, output = LAYERS[case]
    base = make(rngs=nnx.Rngs(0))
    if getattr(base, "bias", None) is not None:
        base.bias[...] = normal(base.bias.shape, 5)
    layer = DoRALinear(base, rank=2, alpha=3.0, rngs=nnx.Rngs(1), **options)
    for seed, part in enumerate((layer.lora_a, layer.lora_b, layer.magnitude), start=2):
        part[...] += 0.3 * normal(part.shape, seed)
    return layer, normal(shape, 1), output


def definition(case, layer, output, x, magnitude, fixed, v):
    """The output from the formed weight; the norms are those of `fixed`, constants."""
    axes = CONTRACTED[case]
    norms = jnp.sqrt((fixed**2).sum(axes, keepdims=True))
    ratio = jnp.expand_dims(magnitude, axes) / norms
    bias = getattr(layer.base, "bias", None)
    return jnp.einsum(output, x, v * ratio) + (0 if bias is None else bias[...])


def formed(layer, lora_a, lora_b, offset=()):
    product = layer.contraction.product(lora_a, lora_b)
    if offset:
        product = product - layer.contraction.product(*offset)
    return layer.base.kernel[...] + layer.scale[...] * product


@pytest.mark.parametrize("options", [{}, {"initialisation": OLORA}], ids=["lora", "olora"])
@pytest.mark.parametrize("case", LAYERS)
def test_output_and_gradients(case, options):
    layer, x, output = trained(case, **options)
    offset = (layer.offset_a[...], layer.offset_b[...]) if options else ()
    fixed = formed(layer, layer.lora_a[...], layer.lora_b[...], offset)

    def expected(parts):
        v = formed(layer, parts["lora_a"], parts["lora_b"], offset)
        return definition(case, layer, output, x, parts["magnitude"], fixed, v)

    parts = {name: getattr(layer, name)[...] for name in ("lora_a", "lora_b", "magnitude")}
    np.testing.assert_allclose(layer(x), expected(parts), atol=2e-5)
    grads = nnx.grad(lambda m: (m(x) ** 2).sum(), argnums=nnx.DiffState(0, nnx.LoRAParam))(layer)
    for name, gradient in jax.grad(lambda parts: (expected(parts) ** 2).sum())(parts).items():
        np.testing.assert_allclose(grads[name][...], gradient, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("case", LAYERS)
def test_merging_gives_the_same_output(case):
    layer, x, _ = trained(case)
    before, kernel = layer(x), np.asarray(layer.base.kernel[...])
    layer.merge()
    np.testing.assert_allclose(layer(x), before, atol=2e-5)
    layer.unmerge()
    np.testing.assert_array_equal(layer.base.kernel[...], kernel)


def test_balancing_leaves_the_output():
    layer, x, _ = trained("linear")
    before = layer(x)
    layer.lora_a[...], layer.lora_b[...] = balance(layer.lora_a[...], layer.lora_b[...])
    np.testing.assert_allclose(layer(x), before, atol=1e-5)


def test_a_column_of_zeros_stays():
    base = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    base.kernel[...] = base.kernel[...].at[:, 1].set(0)
    x = normal((2, 4))
    before = base(x)
    np.testing.assert_array_equal(DoRALinear(base, rank=2, rngs=nnx.Rngs(1))(x), before)
