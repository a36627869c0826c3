"""Attention on TPUs by the splash kernel that comes with JAX (`jax.experimental.pallas.ops.tpu.splash_attention`).

The kernel knows one example and one device. Here it is mapped over examples, and cut among devices by rows and heads.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

HEADS = "tensor"
"""The axis of a mesh along which heads are cut, where it divides the key heads."""

_BLOCK = 512  # queries and keys that are multiplied at a time, at the most
_LANES = 128  # of a TPU: what blocks are multiples of


def can_splash(sharding: NamedSharding | None) -> bool:
    """Whether rows of a sharding can be cut for the kernel: every device has some of the rows or of the heads."""
    if sharding is None:
        return True
    axes = {*_axes(sharding.spec[0]), HEADS}
    return all(size == 1 or name in axes for name, size in sharding.mesh.shape.items())


def splash_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    segment_ids: jax.Array,
    *,
    window: int | None = None,
    sharding: NamedSharding | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Returns causal softmax attention within segments.

    Args:
        queries: `(batch, length, heads, head_dim)`.
        keys: `(batch, length, kv_heads, head_dim)`; query head h sees key head `h // (heads / kv_heads)`.
        values: like `keys`.
        segment_ids: `(batch, length)` int; tokens see tokens of their own segment alone.
        window: how many tokens, its own included, a token looks back on; None for all.
        sharding: of arrays `(batch, length, ...)` under a mesh with automatic axes; None for one device.
        interpret: runs the kernel without a TPU, slowly.

    Returns:
        `(batch, length, heads, head_dim)` in the dtype of the queries.

    Notes:
        Has first derivatives of reverse mode alone.
    """
    attend = functools.partial(_on_one_device, window=window, interpret=interpret)
    if sharding is None:
        return attend(queries, keys, values, segment_ids)
    mesh, rows = sharding.mesh, sharding.spec[0]
    heads = HEADS if HEADS in mesh.shape and keys.shape[2] % mesh.shape[HEADS] == 0 else None
    by_head, by_row = P(rows, None, heads), P(rows)
    # the kernel does not tell along which axes its results vary
    cut = jax.shard_map(attend, mesh=mesh, in_specs=(*3 * (by_head,), by_row), out_specs=by_head, check_vma=False)
    return cut(queries, keys, values, segment_ids)


def _on_one_device(queries, keys, values, segment_ids, *, window, interpret):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    length, heads, head_dim = queries.shape[1:]
    block = min(_BLOCK, -(-length // _LANES) * _LANES)
    missing = -length % block

    def one(queries, keys, values, segment_ids):
        padded = (jnp.pad(x, ((0, missing), (0, 0), (0, 0))).swapaxes(0, 1) for x in (queries, keys, values))
        segments = jnp.pad(segment_ids, (0, missing), constant_values=-1)
        kernel = _kernel(length + missing, heads, block, window, interpret)
        return kernel(*padded, segment_ids=splash.SegmentIds(segments, segments)).swapaxes(0, 1)[:length]

    return jax.vmap(one)(queries * head_dim**-0.5, keys, values, segment_ids)


def _kernel(length: int, heads: int, block: int, window: int | None, interpret: bool) -> Any:
    """The kernel of one example."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (length, length)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    sizes: dict[str, Any] = dict.fromkeys(names, block)
    return splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes of a mesh in an entry of a `PartitionSpec`."""
    return () if entry is None else (entry,) if isinstance(entry, str) else entry
