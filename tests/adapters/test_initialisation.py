"""Where adapters start, against the definitions in NumPy; and that a fresh adapter changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from balora_jax import balancing_gap
from balora_jax.adapters import (
    KAIMING,
    LORA,
    OLORA,
    PISSA,
    XAVIER,
    DoRALinear,
    LoRALinear,
    initialisation,
    remove_adapters,
)
from balora_jax.adapters.initialisation import leading_svd

STARTS = {"lora": LORA, "olora": OLORA, "pissa": PISSA, "xavier": XAVIER, "kaiming": KAIMING}
SHAPES = {"wide": (6, 9), "tall": (9, 6), "square": (7, 7), "stacked": (2, 3, 8, 6)}
RANK, SCALE = 3, 1.5


def weight(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def start(name, shape, rank=RANK):
    given = weight(shape)
    factors = STARTS[name].factors(jax.random.key(1), jnp.asarray(given), rank, SCALE)
    assert [x.dtype for x in factors] == [jnp.float32] * 2
    assert [x.shape for x in factors] == [(*shape[:-1], rank), (*shape[:-2], rank, shape[-1])]
    return given.astype(float), *(np.asarray(x, float) for x in factors)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_olora(shape):
    """In torch's letters: `W_t = Q R`, `lora_B = Q[:, :r]`, `lora_A = R[:r]`."""
    w, lora_a, lora_b = start("olora", shape)
    q, upper = np.linalg.qr(w.mT)
    np.testing.assert_allclose(lora_b.mT, q[..., :RANK], atol=1e-5)
    np.testing.assert_allclose(lora_a.mT, upper[..., :RANK, :], atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_pissa(shape):
    w, lora_a, lora_b = start("pissa", shape)
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    best = (u[..., :RANK] * s[..., None, :RANK]) @ vt[..., :RANK, :]
    np.testing.assert_allclose(SCALE * lora_a @ lora_b, best, atol=1e-5)
    assert np.max(balancing_gap(lora_a, lora_b)) < 1e-6


def test_svd_of_a_large_weight_is_randomised_and_right(monkeypatch):
    monkeypatch.setattr(initialisation, "_EXACT_SIDE", 100)
    values = np.concatenate([[9, 8, 7, 6, 5], np.linspace(4, 0.1, 195)])
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, 200)))[0] for n in (200, 250))
    large = jnp.asarray((u * values) @ v.T, jnp.float32)
    left, s, right = leading_svd(large, 5, jax.random.key(0))
    np.testing.assert_allclose(s, values[:5], rtol=1e-4)
    best = (u[:, :5] * values[:5]) @ v[:, :5].T
    np.testing.assert_allclose((left * s) @ right, best, atol=2e-3)
    other = leading_svd(large, 5, jax.random.key(1))[0]
    assert not np.array_equal(left, other)  # so it was random


def test_xavier():
    _, lora_a, lora_b = start("xavier", (300, 200), rank=100)
    np.testing.assert_allclose(lora_a.std(), np.sqrt(2 / 400), rtol=0.02)
    np.testing.assert_allclose(lora_b.std(), np.sqrt(2 / 300), rtol=0.02)
    assert abs(np.corrcoef(lora_a[:100].ravel(), lora_b[:, :100].ravel())[0, 1]) < 0.05


def test_kaiming():
    """Uniform with the bounds of `torch.nn.init.kaiming_uniform_(lora_A or lora_B, a=sqrt(5))`, `1 / sqrt(fan in)`."""
    _, lora_a, lora_b = start("kaiming", (300, 200), rank=100)
    for factor, fan_in in ((lora_a, 300), (lora_b, 100)):
        assert 0.99 < np.abs(factor).max() * np.sqrt(fan_in) <= 1 + 1e-6
        np.testing.assert_allclose(factor.std(), 1 / np.sqrt(3 * fan_in), rtol=0.02)
    assert abs(np.corrcoef(lora_a[:100].ravel(), lora_b[:, :100].ravel())[0, 1]) < 0.05


LAYERS = {
    "linear": (lambda **k: nnx.Linear(8, 6, **k), (5, 8)),
    "general": (lambda **k: nnx.LinearGeneral((2, 4), (3, 5), axis=(-2, -1), **k), (5, 2, 4)),
    "experts": (lambda **k: nnx.Einsum("becd,edf->becf", (3, 6, 8), **k), (2, 3, 4, 6)),
    "transposed": (lambda **k: nnx.Einsum("btd,hd->bth", (6, 8), (6,), **k), (2, 3, 8)),
}


@pytest.mark.parametrize("layer", [LoRALinear, DoRALinear])
@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fresh_adapter_changes_nothing(case, name, layer, dtype):
    make, shape = LAYERS[case]
    base = make(dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    x = jnp.asarray(weight(shape, 1), dtype)
    before = base(x)
    adapter = layer(base, rank=2, alpha=3.0, initialisation=STARTS[name], rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(adapter(x), before)
    np.testing.assert_allclose(adapter.weight_update(), np.zeros(base.kernel.shape), atol=1e-6)


@pytest.mark.parametrize("name", ["olora", "pissa", "xavier", "kaiming"])
def test_start_is_taken_out_of_the_base_and_follows_the_kernel(name):
    """The effective weight is `W0 - s A0 B0 + s A B`; the gradient of the factors that of `s A B`."""
    base = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
    kernel, x = np.asarray(base.kernel[...], float), weight((5, 8), 1)
    adapter = LoRALinear(base, rank=2, alpha=3.0, initialisation=STARTS[name], rngs=nnx.Rngs(1))
    a0, b0 = (np.asarray(f[...], float) for f in (adapter.lora_a, adapter.lora_b))
    expected = STARTS[name].factors(nnx.Rngs(1).params(), base.kernel[...], 2, 1.5)
    np.testing.assert_allclose(a0 @ b0, expected[0] @ expected[1], atol=1e-6)
    adapter.lora_a[...] += 0.1
    a = a0 + 0.1
    np.testing.assert_allclose(adapter(x), x @ (kernel + 1.5 * (a @ b0 - a0 @ b0)), atol=1e-5)
    model = nnx.Dict(layer=adapter)
    grads = nnx.grad(lambda m: m["layer"](x).sum(), argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    np.testing.assert_allclose(grads["layer"]["lora_b"][...], 1.5 * a.T @ x.T @ np.ones((5, 6)), atol=1e-4)
    assert set(grads["layer"]) == {"lora_a", "lora_b"}
    remove_adapters(model, merge=True)
    np.testing.assert_allclose(model["layer"].kernel[...], kernel + 1.5 * (a - a0) @ b0, atol=1e-5)
