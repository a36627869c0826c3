"""AdaLoRA's layer against its definition, `W + s P diag(E) Q`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from balora_jax.adapters import OLORA, AdaLoRALinear

LAYERS = {
    # the layer, the shape of its input, the einsum of P, E, Q to the kernel, and that of input and kernel
    "linear": (lambda **k: nnx.Linear(8, 6, **k), (5, 8), "ir,r,ro->io", "ti,io->to"),
    "general": (
        lambda **k: nnx.LinearGeneral((2, 4), (3, 5), axis=(-2, -1), **k),
        (5, 2, 4),
        "ijr,r,rkl->ijkl",
        "tij,ijkl->tkl",
    ),
    "experts": (
        lambda **k: nnx.Einsum("becd,edf->becf", (3, 6, 8), **k),
        (2, 3, 4, 6),
        "edr,er,erf->edf",
        "becd,edf->becf",
    ),
    "transposed": (lambda **k: nnx.Einsum("btd,hd->bth", (6, 8), **k), (2, 3, 8), "dr,r,rh->hd", "btd,hd->bth"),
}
NAMES = ("lora_a", "lora_e", "lora_b")


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("case", LAYERS)
def test_output_update_and_gradients(case):
    make, shape, product, output = LAYERS[case]
    base, x = make(rngs=nnx.Rngs(0)), normal(shape, 1)
    before = base(x)
    layer = AdaLoRALinear(base, rank=2, alpha=3.0, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(layer(x), before)
    for seed, name in enumerate(NAMES):
        part = getattr(layer, name)
        part[...] = normal(part.shape, seed)
    parts = [getattr(layer, name)[...] for name in NAMES]

    def expected(parts):
        return before + jnp.einsum(output, x, 1.5 * jnp.einsum(product, *parts))

    np.testing.assert_allclose(layer(x), expected(parts), atol=2e-5)
    np.testing.assert_allclose(layer.weight_update(), 1.5 * np.einsum(product, *parts), atol=2e-5)
    grads = nnx.grad(lambda m: (m(x) ** 2).sum(), argnums=nnx.DiffState(0, nnx.LoRAParam))(layer)
    assert set(grads) == set(NAMES)
    for name, gradient in zip(NAMES, jax.grad(lambda parts: (expected(parts) ** 2).sum())(parts), strict=True):
        np.testing.assert_allclose(grads[name][...], gradient, rtol=1e-4, atol=1e-3, err_msg=name)


def test_start():
    layer = AdaLoRALinear(nnx.Linear(300, 200, rngs=nnx.Rngs(0)), rank=100, rngs=nnx.Rngs(1))
    for factor in (layer.lora_a, layer.lora_b):
        np.testing.assert_allclose(np.std(factor[...]), 0.02, rtol=0.02)
    assert abs(np.corrcoef(layer.lora_a[:100].ravel(), layer.lora_b[:, :100].ravel())[0, 1]) < 0.05
    np.testing.assert_array_equal(layer.lora_e[...], np.zeros(100))


def test_starts_with_a_product_are_refused():
    with pytest.raises(ValueError, match="initialisation must be one without an offset"):
        AdaLoRALinear(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), rank=2, initialisation=OLORA, rngs=nnx.Rngs(1))
