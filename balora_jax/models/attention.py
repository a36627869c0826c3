"""Softmax attention of grouped heads, in blocks of queries and without keeping its weights."""

import functools

import jax
import jax.numpy as jnp

from balora_jax.platforms import with_choice

MOST_BLOCKS = 8
"""Blocks of queries at the most: with as many, 9/16 of the scores are computed, and half of them must be."""

_LEAST_WIDTH_ON_CPUS, _LEAST_WIDTH = 64, 512
"""Queries that a block must have to keep the device busy; a small kernel costs a launch on accelerators."""

_PRODUCTS = {jnp.dtype("bfloat16"): jax.lax.DotAlgorithmPreset.BF16_BF16_F32}
"""Products that take half precision and give float32, in the backward pass too; float16 has none on CPUs and TPUs."""


def grouped_attention(
    queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array, *, causal: bool, width: int | None = None
) -> jax.Array:
    """Returns `softmax(q k^T / sqrt(head_dim)) v` for every head.

    Args:
        queries: `(batch, length, heads, head_dim)`.
        keys: `(batch, keys, kv_heads, head_dim)`; query head h sees key head `h // (heads / kv_heads)`.
        values: like `keys`.
        mask: `(batch, length, keys)` bool, which query may look at which key; each at one at least.
        causal: a promise that the mask lets no query look behind its own index, so that half of the scores need not be
            computed.
        width: queries in a block; by default as the device likes it. Without `causal` there is a single block.

    Returns:
        `(batch, length, heads, head_dim)` in the dtype of the values.

    Notes:
        Scores are float32. The backward pass keeps queries, keys and values alone and computes the scores again: one
        product in seven, for memory that grows with the length and not with its square. In plain JAX, so that it has
        derivatives of both modes and of any order.
    """
    length = queries.shape[1]
    on_cpus, elsewhere = (_width(length, least) for least in (_LEAST_WIDTH_ON_CPUS, _LEAST_WIDTH))
    if not causal:
        on_cpus = elsewhere = length
    elif width is not None:
        on_cpus = elsewhere = width
    attend = functools.partial(_in_blocks, causal)
    return with_choice(attend, queries, keys, values, mask, cpu=on_cpus, default=elsewhere)


def _width(length: int, least: int) -> int:
    """The width of as many equal blocks as there may be."""
    return -(-length // max(1, min(MOST_BLOCKS, length // least)))


def _in_blocks(causal, width, queries, keys, values, mask):
    """The attention, in blocks of some width."""
    batch, length, heads, head_dim = queries.shape
    kv_heads = keys.shape[2]
    # (batch, kv_heads, group, length, head_dim): the queries that share a key head are the rows of one matrix
    queries = queries.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    # (batch, kv_heads, head_dim, keys), behind barriers that their gradients meet too: XLA would make them w^T g, which
    # takes up to three times as long on CPUs as g^T w. Values of a cache, which has no gradient, are faster upright.
    keys = jax.lax.optimization_barrier(keys.transpose(0, 2, 3, 1))
    values = jax.lax.optimization_barrier(values.transpose((0, 2, 3, 1) if causal else (0, 2, 1, 3)))
    blocks = [
        _block(queries, keys, values, mask, start, min(start + width, length), causal)
        for start in range(0, length, width)
    ]
    attended = jnp.concatenate(blocks, axis=3)
    return attended.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


@functools.partial(jax.checkpoint, static_argnums=(4, 5, 6))
def _block(queries, keys, values, mask, start, end, causal):
    """The attention of the queries from `start` to `end`; they are cut out in here so that no slice is kept."""
    queries, mask = queries[..., start:end, :], mask[:, start:end]
    if causal:
        keys, values, mask = keys[..., :end], values[..., :end], mask[..., :end]
    batch, kv_heads, group, length, head_dim = queries.shape
    # one axis of rows: for several, XLA would transpose the weights in the backward pass
    rows = queries.reshape(batch, kv_heads, group * length, head_dim)
    scores = _product("bkth,bkhs->bkts", rows, keys) * head_dim**-0.5
    scores = scores.reshape(batch, kv_heads, group, length, -1)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min).reshape(*rows.shape[:3], -1)
    # the maximum cancels, so it has no derivative; dividing after the product saves passes over the weights
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    by_values = "bkts,bkhs->bkth" if causal else "bkts,bksh->bkth"
    attended = _product(by_values, weights.astype(values.dtype), values)
    attended = (attended / weights.sum(axis=-1, keepdims=True)).astype(values.dtype)
    return attended.reshape(batch, kv_heads, group, length, head_dim)


def _product(subscripts, left, right):
    """The product of two arrays of one dtype, in float32 at least."""
    wide = jnp.promote_types(left.dtype, jnp.float32)
    precision = _PRODUCTS.get(left.dtype)
    if precision is None:
        left, right = left.astype(wide), right.astype(wide)
    return jnp.einsum(subscripts, left, right, precision=precision, preferred_element_type=wide)
