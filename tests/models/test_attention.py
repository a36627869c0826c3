"""Attention in blocks against jax's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balora_jax.models.attention import grouped_attention


def arrays(dtype, length=100, keys=None, heads=6, kv_heads=2, width=8):
    """Queries, keys, values and the gradient of the output."""
    own = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, length, heads, width), *[(2, keys or length, kv_heads, width)] * 2, (2, length, heads, width)]
    return [2 * jax.random.normal(key, shape, dtype) for key, shape in zip(own, shapes, strict=True)]


def causal_mask(length):
    """Causal, and of three texts in one row."""
    texts = np.arange(length) // 37
    return jnp.asarray(np.tril(np.ones((2, length, length), bool)) & (texts[:, None] == texts))


def output_and_gradients(attend, queries, keys, values, cotangent):
    @jax.jit
    def both(*inputs):
        output, backward = jax.vjp(attend, *inputs)
        return (output, *backward(cotangent))

    return both(queries, keys, values)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("width", [None, 40, 100])
def test_outputs_and_gradients_are_those_of_jax(width, dtype, tolerance):
    mask = causal_mask(100)
    *inputs, cotangent = arrays(jnp.float32)
    rounded = [x.astype(dtype) for x in (*inputs, cotangent)]
    found = output_and_gradients(lambda *x: grouped_attention(*x, mask, causal=True, width=width), *rounded)
    expected = output_and_gradients(
        lambda *x: jax.nn.dot_product_attention(*x, mask=mask[:, None]), *(x.astype(jnp.float32) for x in rounded)
    )
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=tolerance * np.abs(other).max())


def test_masks_that_are_not_causal():
    """As with a cache: more keys than queries, at any places."""
    *inputs, cotangent = arrays(jnp.float32, length=70, keys=90)
    mask = jax.random.bernoulli(jax.random.key(1), 0.3, (2, 70, 90)).at[:, :, 80].set(True)
    found = output_and_gradients(lambda *x: grouped_attention(*x, mask, causal=False), *inputs, cotangent)
    expected = output_and_gradients(lambda *x: jax.nn.dot_product_attention(*x, mask=mask[:, None]), *inputs, cotangent)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6 * np.abs(other).max())


def test_second_derivatives_by_forward_over_reverse():
    mask, (*inputs, cotangent) = causal_mask(40), arrays(jnp.float32, length=40)

    def curvature(attend):
        gradient = jax.grad(lambda *x: (attend(*x) * cotangent).sum(), argnums=(0, 1, 2))
        return jax.jit(lambda *x: jax.jvp(gradient, x, x)[1])(*inputs)

    found = curvature(lambda *x: grouped_attention(*x, mask, causal=True, width=16))
    expected = curvature(lambda *x: jax.nn.dot_product_attention(*x, mask=mask[:, None]))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


def test_the_backward_pass_keeps_nothing_quadratic(capsys):
    *inputs, cotangent = arrays(jnp.float32, length=96)
    mask = causal_mask(96)
    jax.ad_checkpoint.print_saved_residuals(
        lambda *x: (grouped_attention(*x, mask, causal=True, width=32) * cotangent).sum(), *inputs
    )
    kept = [line for line in capsys.readouterr().out.splitlines() if line.startswith("f32")]
    assert kept
    assert not any("96,96" in line or "32,96" in line for line in kept), kept
