"""The kernels give what blocks give, to the rounding of half precision, and run where they should."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import run_alone

from balora_jax.models import DecoderConfig
from balora_jax.models.attention import grouped_attention
from balora_jax.models.kernels import attend
from balora_jax.models.splash import splash_attention


def packed_rows(dtype, *, window=None, length=150, heads=4, kv_heads=2, head_dim=32):
    """Queries, keys, values, the mask and the segments of two rows, with texts in each and padding at the end."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(2, length, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    queries, key, value = (jax.random.normal(k, shape).astype(dtype) for k, shape in zip(keys, shapes, strict=True))
    ends = jnp.array([[20, 100, 140], [64, 65, 149]])
    segments = 1 + (jnp.arange(length) >= ends[:, :, None]).sum(1, dtype=jnp.int32)
    segments = jnp.where(segments == 4, 0, segments)
    mask = jnp.tril(jnp.ones((length, length), bool)) & (segments[:, :, None] == segments[:, None, :])
    if window is not None:
        mask &= jnp.arange(length) > jnp.arange(length)[:, None] - window
    return queries, key, value, mask, segments


def output_and_gradients(function, *inputs):
    cotangent = jax.random.normal(jax.random.key(1), inputs[0].shape)
    out, pull = jax.vjp(function, *inputs)
    return out, *pull(cotangent.astype(out.dtype))


def distance(found, expected):
    found, expected = (np.asarray(x, np.float32) for x in (found, expected))
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(("dtype", "window", "tolerance"), [("float32", 40, 2e-6), ("bfloat16", None, 6e-3)])
def test_splash_gives_what_blocks_give(dtype, window, tolerance):
    *inputs, mask, segments = packed_rows(dtype, window=window)
    found = output_and_gradients(lambda *x: splash_attention(*x, segments, window=window, interpret=True), *inputs)
    expected = output_and_gradients(lambda *x: grouped_attention(*x, mask, causal=True), *inputs)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert distance(one, other) < tolerance


def test_splash_on_a_mesh_leaves_rows_and_heads_where_they_are():
    run_alone(
        """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from balora_jax.models.splash import can_splash, splash_attention

        mesh = jax.make_mesh((1, 2, 2), ("data", "fsdp", "tensor"), axis_types=3 * (AxisType.Auto,))
        rows = NamedSharding(mesh, P(("data", "fsdp")))
        by_head = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor"))
        draw = [jax.random.normal(jax.random.key(i), (2, 130, n, 16)) for i, n in enumerate((4, 2, 2))]
        segments = jnp.ones((2, 130), jnp.int32)
        alone = splash_attention(*draw, segments, interpret=True)
        put = [jax.device_put(x, by_head) for x in draw], jax.device_put(segments, rows)
        step = jax.jit(lambda x, s: splash_attention(*x, s, sharding=rows, interpret=True)).lower(*put).compile()
        np.testing.assert_allclose(step(*put), alone, rtol=1e-5, atol=1e-6)
        text = step.as_text()
        assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute", "all-reduce"))
        assert can_splash(None) and can_splash(rows) and not can_splash(NamedSharding(mesh, P("data")))
        """,
        flags="--xla_force_host_platform_device_count=4",
    )


@pytest.mark.parametrize(
    ("kind", "dtype", "kernel"),
    [
        ("auto", "bfloat16", True),
        ("splash", "bfloat16", True),
        ("blocks", "bfloat16", False),
        ("auto", "float32", False),
    ],
)
def test_which_program_tpus_run(kind, dtype, kernel):
    arrays = packed_rows(dtype)
    traced = jax.jit(lambda *x: attend(*x, kind=kind)).trace(*arrays)
    assert ("tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()) == kernel
    assert "tpu_custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert distance(traced.lower().compile()(*arrays), grouped_attention(*arrays[:4], causal=True)) < 1e-3


@pytest.mark.parametrize("odd", [0, 1])
def test_which_program_gpus_run(odd, monkeypatch):
    """Lowered as if cuDNN were there, of which nothing else can be asked on other machines."""
    from jax._src.cudnn import fused_attention_stablehlo

    arrays = packed_rows("bfloat16", length=150 + odd)

    members = [jnp.stack([x, x, x]) for x in arrays]

    def text(kind):
        def loss(queries, keys, values, mask, segments):
            return jax.vmap(lambda *x: attend(*x, kind=kind))(queries, keys, values, mask, segments).sum()

        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*members)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    for kind in ("auto", "cudnn"):
        assert "__cudnn$fmhaScaleBiasSoftmax" in text(kind)
        assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in text(kind)
    assert "__cudnn$fmha" not in text("blocks")


def test_tpus_take_blocks_where_the_compiler_is_to_cut_rows(monkeypatch):
    arrays = packed_rows("bfloat16")
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    traced = jax.jit(lambda *x: attend(*x)).trace(*arrays)
    assert "tpu_custom_call" not in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_a_kernel_that_does_not_fit_is_told(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo

    def missing():
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", missing)
    half = packed_rows("bfloat16")
    for kind, arrays, message in (
        ("splash", packed_rows("float32"), "'splash' takes bfloat16, got float32; set model.dtype"),
        ("cudnn", packed_rows("float32"), "'cudnn' takes bfloat16, got float32"),
        ("cudnn", packed_rows("bfloat16", head_dim=12), "a multiple of 8, up to 128, got 12"),
        ("cudnn", half, "needs cuDNN: cuDNN is not detected"),
        ("flash", half, "attention must be one of auto, blocks, cudnn, splash, got 'flash'"),
    ):
        with pytest.raises(ValueError, match=message):
            attend(*arrays, kind=kind)
    attend(*half)  # takes blocks


def test_a_decoder_names_its_attention():
    sizes = dict.fromkeys([field.name for field in dataclasses.fields(DecoderConfig)][:7], 2)
    with pytest.raises(ValueError, match="attention must be one of auto, blocks, cudnn, splash, got 'flash'"):
        DecoderConfig(**sizes, attention="flash")
