"""Which program attends: the blocks of `balora_jax.models.attention`, or a kernel that a platform has for it."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from balora_jax.models.attention import grouped_attention
from balora_jax.models.splash import can_splash, splash_attention
from balora_jax.settings import ATTENTIONS


def attend(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    segment_ids: jax.Array,
    *,
    kind: str = "auto",
    window: int | None = None,
    sharding: NamedSharding | None = None,
) -> jax.Array:
    """Returns the causal attention of rows to themselves, by the program that suits the platform it will run on.

    Args:
        queries: `(batch, length, heads, head_dim)`.
        keys: `(batch, length, kv_heads, head_dim)`; query head h sees key head `h // (heads / kv_heads)`.
        values: like `keys`.
        mask: `(batch, length, length)` bool, which query may look at which key: those of its segment, none behind it.
        segment_ids: `(batch, length)` int, from which the mask was made.
        kind: `"blocks"` for `grouped_attention`; `"cudnn"` for cuDNN's kernel on GPUs, `"splash"` for JAX's on TPUs,
            and blocks elsewhere; `"auto"` for both kernels where they fit.
        window: how many tokens, its own included, a token looks back on, as the mask says.
        sharding: of arrays `(batch, length, ...)`; None for one device, or to leave it to the compiler, for which
            `"auto"` takes blocks on TPUs where there are several devices.

    Returns:
        `(batch, length, heads, head_dim)` in the dtype of the values.

    Raises:
        ValueError: there is no such kind, the named kernel takes no such arrays, or cuDNN is not installed.

    Notes:
        The kernels multiply in half precision, so arrays in float32 take blocks. They have first derivatives of reverse
        mode alone.
    """
    if kind not in ATTENTIONS:
        raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {kind!r}")
    arrays = queries, keys, values, mask, segment_ids
    unknown = sharding is None and jax.device_count() > 1  # the compiler cannot cut the kernel for TPUs by itself
    programs: dict[str, Callable[..., jax.Array]] = {}
    for platform, name, program, why_not in (
        ("cuda", "cudnn", _by_cudnn, _why_not_cudnn),
        ("tpu", "splash", functools.partial(_by_splash, window=window, sharding=sharding), _why_not_splash),
    ):
        if kind not in ("auto", name) or (kind == "auto" and name == "splash" and unknown):
            continue
        reason = why_not(*arrays, sharding)
        if reason is None:
            programs[platform] = program
        elif kind == name:
            raise ValueError(f"attention {name!r} {reason}")
    if not programs:
        return _by_blocks(*arrays)
    return lax.platform_dependent(*arrays, **programs, default=_by_blocks)


def _by_blocks(queries, keys, values, mask, segment_ids):
    return grouped_attention(queries, keys, values, mask, causal=True)


def _by_splash(queries, keys, values, mask, segment_ids, *, window, sharding):
    return splash_attention(queries, keys, values, segment_ids, window=window, sharding=sharding)


@jax.custom_vjp
def _by_cudnn(queries, keys, values, mask, segment_ids):
    return _rows_together(_cudnn)(queries, keys, values, mask)


def _backward_by_cudnn(inputs, cotangent):
    *inputs, mask, _ = inputs
    return (*_rows_together(_cudnn_gradients)(*inputs, mask, cotangent), None, None)


_by_cudnn.defvjp(lambda *inputs: (_by_cudnn(*inputs), inputs), _backward_by_cudnn)


def _cudnn_gradients(queries, keys, values, mask, cotangent):
    return jax.vjp(lambda q, k, v: _cudnn(q, k, v, mask), queries, keys, values)[1](cotangent)


def _cudnn(queries, keys, values, mask):
    length = queries.shape[1]
    odd = length % 2  # of a mask cuDNN wants an even number of queries and keys

    def even(x, axes):
        return jnp.pad(x, [(0, odd * (axis in axes)) for axis in range(x.ndim)])

    queries, keys, values = (even(x, (1,)) for x in (queries, keys, values))
    mask = even(mask, (1, 2))[:, None]
    out = jax.nn.dot_product_attention(queries, keys, values, mask=mask, is_causal=True, implementation="cudnn")
    return out[:, :length]


def _rows_together(function):
    """A function of rows that sees those of all members of a population at once: jax's own `vmap` of cuDNN's attention
    takes no mask that its heads share."""

    @jax.custom_batching.custom_vmap
    def run(*inputs):
        return function(*inputs)

    @run.def_vmap
    def _(axis_size, in_batched, *inputs):
        stacked = [
            x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            for x, batched in zip(inputs, in_batched, strict=True)
        ]
        out = run(*(x.reshape(-1, *x.shape[2:]) for x in stacked))
        out = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return run


def _why_not_splash(queries, keys, values, mask, segment_ids, sharding) -> str | None:
    if values.dtype != jnp.bfloat16:
        return f"takes bfloat16, got {values.dtype}; set model.dtype"
    if not can_splash(sharding):
        return f"takes rows that are cut along all axes of the mesh but tensor, got {sharding.spec}"
    return None


def _why_not_cudnn(queries, keys, values, mask, segment_ids, sharding) -> str | None:
    if values.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16, got {values.dtype}; set model.dtype"
    if queries.shape[-1] % 8 or queries.shape[-1] > 128:
        return f"takes a head_dim that is a multiple of 8, up to 128, got {queries.shape[-1]}"
    try:
        jax.eval_shape(_cudnn, queries, keys, values, mask)
    except RuntimeError as error:
        return f"needs cuDNN: {error}"
    return None
