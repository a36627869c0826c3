"""One decoder-only transformer for the Llama/Qwen family, with its layers stacked and scanned."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from balora_jax.casting import largest
from balora_jax.models.attention import grouped_attention
from balora_jax.models.kernels import attend
from balora_jax.rematerialisation import KEEP_MARKED, KEEP_NOTHING, keep
from balora_jax.settings import ATTENTIONS
from balora_jax.sharding import rows_at

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
"""The fields of `DecoderConfig` that give its shape."""

_TINIEST = 2.0**-126  # of the numbers that float32 holds in full


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3's frequency scaling of the rotary embedding (`rope_type: llama3`).

    Raises:
        ValueError: a number is out of its range.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self):
        for name, least in (("factor", 1), ("low_freq_factor", 0), ("original_max_position_embeddings", 1)):
            if not least <= getattr(self, name) < 2**31:
                raise ValueError(f"{name} must be at least {least} and below 2**31, got {getattr(self, name)}")
        if not self.low_freq_factor < self.high_freq_factor < 2**31:
            raise ValueError(
                f"high_freq_factor must be above low_freq_factor ({self.low_freq_factor}) and below 2**31, "
                f"got {self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and arithmetic of a `Decoder`; the names of the sizes are those of Hugging Face's `config.json`.

    Attributes:
        vocab_size: number of tokens.
        hidden_size: width of the residual stream.
        intermediate_size: width of the gated MLP.
        num_hidden_layers: number of blocks.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads; divides `num_attention_heads`.
        head_dim: width of one head; even, for the rotary embedding.
        rope_theta: base of the rotary frequencies.
        rope_scaling: Llama-3 scaling of the frequencies, or None.
        rms_norm_eps: added to the mean square in every RMSNorm.
        qkv_bias: whether the query, key and value projections have a bias (Qwen2).
        qk_norm: whether queries and keys are RMS-normalized per head (Qwen3).
        sliding_window: how many tokens, its own included, a token looks back on (Mistral), or None for all.
        tie_word_embeddings: whether the output head is the transposed embedding.
        dtype: dtype of activations and products.
        param_dtype: dtype in which the base weights are stored.
        remat: whether the backward pass computes each block again from its input, or keeps the outputs of its products.
        attention: which program attends, see `balora_jax.models.kernels.attend`.

    Raises:
        ValueError: a number is out of its range.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    tie_word_embeddings: bool = True
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: bool = False
    attention: str = "auto"

    def __post_init__(self):
        for name in SIZES:
            if not 1 <= getattr(self, name) < 2**31:
                raise ValueError(f"{name} must be at least 1 and below 2**31, got {getattr(self, name)}")
        for name in ("rope_theta", "rms_norm_eps"):
            if not _TINIEST <= getattr(self, name) <= largest("float32"):
                raise ValueError(f"{name} must be a positive number that float32 holds, got {getattr(self, name)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads ({self.num_attention_heads}), "
                f"got {self.num_key_value_heads}"
            )
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {self.attention!r}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for the rotary embedding, got {self.head_dim}")
        if self.sliding_window is not None and not 1 <= self.sliding_window < 2**31:
            raise ValueError(f"sliding_window must be None, or at least 1 and below 2**31, got {self.sliding_window}")


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far, for generation.

    Attributes:
        keys: `(layers, batch, capacity, kv_heads, head_dim)`.
        values: like `keys`.
        segment_ids: `(batch, capacity)` int32, 0 where a slot is empty or padding.
        length: scalar int32, number of slots filled.
    """

    keys: jax.Array
    values: jax.Array
    segment_ids: jax.Array
    length: jax.Array


class _Past(NamedTuple):
    """The cache of all blocks on its way from block to block: what is carried through a loop is written in place."""

    keys: jax.Array  # of a `Cache`
    values: jax.Array
    offset: jax.Array  # of the slots for the new tokens
    layer: jax.Array  # whose turn it is

    def extended(self, keys: jax.Array, values: jax.Array) -> "tuple[jax.Array, jax.Array, _Past]":
        """Writes `(batch, length, kv_heads, head_dim)` of a block; returns all that it has, and what the next takes."""
        start = self.layer, 0, self.offset, 0, 0
        stacks = [
            jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), start)
            for old, new in ((self.keys, keys), (self.values, values))
        ]
        keys, values = (jax.lax.dynamic_index_in_dim(x, self.layer, keepdims=False) for x in stacks)
        return keys, values, _Past(stacks[0], stacks[1], self.offset, self.layer + 1)


class _Tokens(NamedTuple):
    """What a block needs to know of the tokens beside their hidden states."""

    rotation: tuple[jax.Array, jax.Array]  # of `_rotation`
    attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # of queries, keys, values


def rotary_frequencies(config: DecoderConfig) -> jax.Array:
    """Returns the `head_dim / 2` angular frequencies of the rotary embedding, with Llama-3 scaling if set."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = float(config.rope_theta) ** -exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * jnp.pi)
    # 1 keeps the frequency (fast rotations), 0 divides it by the factor (slow ones), linear in between.
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = jnp.clip(keep, 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def _rotation(angles: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The rotary embedding of angles `(batch, length, head_dim / 2)`: for the first and second halves of the heads,
    `(batch, length, 1, 2, head_dim / 2)`, what each and what the other is multiplied by."""
    cosines, sines = jnp.cos(angles), jnp.sin(angles)
    own, other = jnp.stack([cosines, cosines], axis=-2), jnp.stack([-sines, sines], axis=-2)
    return own[:, :, None], other[:, :, None]


def _rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Applies the rotary embedding to `x (batch, length, heads, head_dim)`."""
    own, other = (r.astype(x.dtype) for r in rotation)
    halves = x.reshape(*x.shape[:-1], 2, -1)
    # reversed, not cut and concatenated, which costs branches in XLA's loops on CPUs, and so in the gradient
    return (halves * own + jax.lax.rev(halves, (3,)) * other).reshape(x.shape)


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtypes: dict[str, Any] = {"dtype": config.dtype, "param_dtype": config.param_dtype, "rngs": rngs}
        heads, kv_heads = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nnx.Linear(config.hidden_size, heads, use_bias=config.qkv_bias, **dtypes)
        self.k_proj = nnx.Linear(config.hidden_size, kv_heads, use_bias=config.qkv_bias, **dtypes)
        self.v_proj = nnx.Linear(config.hidden_size, kv_heads, use_bias=config.qkv_bias, **dtypes)
        self.o_proj = nnx.Linear(heads, config.hidden_size, use_bias=False, **dtypes)
        if config.qk_norm:
            self.q_norm = nnx.RMSNorm(config.head_dim, epsilon=config.rms_norm_eps, **dtypes)
            self.k_norm = nnx.RMSNorm(config.head_dim, epsilon=config.rms_norm_eps, **dtypes)

    def __call__(self, x, tokens: _Tokens, past: _Past | None = None):
        """Returns the attended `x`, and `past` with the new keys and values."""
        batch, length, _ = x.shape
        heads = (batch, length, -1, self.config.head_dim)
        queries, keys, values = (keep(layer(x)).reshape(heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.qk_norm:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries, keys = _rotate(queries, tokens.rotation), _rotate(keys, tokens.rotation)
        if past is not None:
            keys, values, past = past.extended(keys, values)
        out = tokens.attend(queries, keys, values)
        return self.o_proj(keep(out.reshape(batch, length, -1))), past


class MLP(nnx.Module):
    """The gated SwiGLU MLP: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        dtypes: dict[str, Any] = {
            "dtype": config.dtype,
            "param_dtype": config.param_dtype,
            "use_bias": False,
            "rngs": rngs,
        }
        self.gate_proj = nnx.Linear(config.hidden_size, config.intermediate_size, **dtypes)
        self.up_proj = nnx.Linear(config.hidden_size, config.intermediate_size, **dtypes)
        self.down_proj = nnx.Linear(config.intermediate_size, config.hidden_size, **dtypes)

    def __call__(self, x):
        """Maps `x (..., hidden_size)` to the same shape."""
        return self.down_proj(nnx.silu(keep(self.gate_proj(x))) * keep(self.up_proj(x)))


class Block(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        norm: dict[str, Any] = {
            "epsilon": config.rms_norm_eps,
            "dtype": config.dtype,
            "param_dtype": config.param_dtype,
        }
        self.input_layernorm = nnx.RMSNorm(config.hidden_size, **norm, rngs=rngs)
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = nnx.RMSNorm(config.hidden_size, **norm, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x, tokens: _Tokens, past: _Past | None = None):
        """Returns the new residual stream, and `past` with this block's keys and values."""
        attended, past = self.self_attn(self.input_layernorm(x), tokens, past)
        x = keep(x + attended)
        return x + self.mlp(self.post_attention_layernorm(x)), past


class Decoder(nnx.Module):
    """A causal language model of the Llama/Qwen family.

    The blocks are one `Block` whose parameters carry a leading axis of length `num_hidden_layers`; the forward
    pass scans over it, so that compile time does not grow with depth.

    Attributes:
        config: its shapes.
        sharding: of the residual stream `(batch, length, hidden_size)` under a mesh with automatic axes; None to leave
            it to the compiler. Where rows are cut along an axis that weights are cut along too, it is the weights that
            are put together.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.sharding: NamedSharding | None = None
        dtypes: dict[str, Any] = {"dtype": config.dtype, "param_dtype": config.param_dtype, "rngs": rngs}
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, **dtypes)

        @nnx.split_rngs(splits=config.num_hidden_layers)
        @nnx.vmap
        def stack(rngs):
            return Block(config, rngs=rngs)

        self.layers = stack(rngs)
        self.norm = nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, **dtypes)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Linear(config.hidden_size, config.vocab_size, use_bias=False, **dtypes)

    def hidden_states(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Any]:
        """Runs the blocks.

        Args:
            tokens: `(batch, length)` int.
            positions: `(batch, length)` int, the position of each token in its own text; default `0, 1, ...`.
            segment_ids: `(batch, length)` int; tokens see only tokens of their own segment. 0 is padding.
                Default: one segment per row.
            cache: keys and values of earlier tokens; the new ones are written behind them, and must fit its capacity.

        Returns:
            `(batch, length, hidden_size)` normalized hidden states, and the new cache (None without one).
        """
        batch, length = tokens.shape
        if positions is None:
            first = 0 if cache is None else cache.length
            positions = jnp.broadcast_to(first + jnp.arange(length), (batch, length))
        if segment_ids is None:
            segment_ids = jnp.ones_like(positions)
        slots = jnp.arange(length)
        if cache is None:
            key_slots, key_segments, past = slots, segment_ids, None
        else:
            offset = cache.length
            past = _Past(cache.keys, cache.values, offset, jnp.zeros((), jnp.int32))
            key_segments = jax.lax.dynamic_update_slice_in_dim(
                cache.segment_ids, segment_ids.astype(jnp.int32), offset, axis=1
            )
            key_slots = jnp.arange(cache.keys.shape[2])
            slots = offset + slots
        mask = (key_slots[None, None, :] <= slots[None, :, None]) & (
            key_segments[:, None, :] == segment_ids[:, :, None]
        )
        if self.config.sliding_window is not None:
            mask &= key_slots[None, None, :] > slots[None, :, None] - self.config.sliding_window
        rotation = _rotation(positions[..., None] * rotary_frequencies(self.config))
        if cache is None:
            attention = partial(
                attend,
                mask=mask,
                segment_ids=segment_ids,
                kind=self.config.attention,
                window=self.config.sliding_window,
                sharding=self.sharding,
            )
        else:
            attention = partial(grouped_attention, mask=mask, causal=False)
        context = _Tokens(rotation, attention)

        def placed(x):
            return x if self.sharding is None else jax.lax.with_sharding_constraint(x, self.sharding)

        def block(carry, layer):
            x, past = carry
            x, past = layer(placed(x), context, past)
            return placed(x), past

        block = nnx.remat(block, policy=KEEP_NOTHING if self.config.remat else KEEP_MARKED, prevent_cse=False)
        scan = nnx.scan(block, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        x = rows_at(self.embed_tokens.embedding[...], tokens).astype(self.config.dtype)
        x, past = scan((x, past), self.layers)
        if past is not None:
            cache = Cache(past.keys, past.values, key_segments, past.offset + length)
        return placed(self.norm(x)), cache

    @property
    def head(self) -> nnx.Module:
        """The layer that `head_logits` takes."""
        return self.embed_tokens if self.config.tie_word_embeddings else self.lm_head

    def logits(self, hidden):
        """Maps hidden states `(..., hidden_size)` to float32 logits `(..., vocab_size)`."""
        return head_logits(self.head, hidden)

    def __call__(self, tokens, *, positions=None, segment_ids=None):
        """Returns float32 logits `(batch, length, vocab_size)`; arguments as for `hidden_states`."""
        hidden, _ = self.hidden_states(tokens, positions=positions, segment_ids=segment_ids)
        return self.logits(hidden)

    def empty_cache(self, batch: int, capacity: int) -> Cache:
        """Returns a cache with room for `capacity` tokens in each of `batch` rows."""
        config = self.config
        shape = (config.num_hidden_layers, batch, capacity, config.num_key_value_heads, config.head_dim)
        slots = jnp.zeros((batch, capacity), jnp.int32)
        zeros = jnp.zeros(shape, config.dtype)
        return Cache(zeros, zeros, slots, jnp.zeros((), jnp.int32))


def head_logits(head: Any, hidden: jax.Array) -> jax.Array:
    """Maps hidden states `(..., hidden_size)` to float32 logits with an embedding, or a layer of its own."""
    logits = head.attend(hidden) if isinstance(head, nnx.Embed) else head(hidden)
    return logits.astype(jnp.float32)
