"""The decoder written from its definition in NumPy float64, one text, layer and head at a time; and configs to test."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from balora_jax.models import Decoder, DecoderConfig, RopeScaling

SIZES = {"vocab_size": 29, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
# With a head of 8 and theta 500 the four wavelengths are 6, 30, 140 and 664: kept, kept, blended and divided.
LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=256)
CONFIGS = {
    "llama": DecoderConfig(**SIZES, **HEADS, rms_norm_eps=1e-5, tie_word_embeddings=False),
    "llama3": DecoderConfig(**SIZES, **HEADS, rope_theta=500.0, rope_scaling=LLAMA3),
    "qwen2": DecoderConfig(**SIZES, **{**HEADS, "num_key_value_heads": 1, "head_dim": 4}, qkv_bias=True),
    "mistral": DecoderConfig(**SIZES, **HEADS, sliding_window=7),
    "qwen3": DecoderConfig(
        **SIZES, **{**HEADS, "num_key_value_heads": 4}, rope_theta=1e6, qk_norm=True, tie_word_embeddings=False
    ),
}


def random_decoder(config: DecoderConfig, seed: int = 0) -> Decoder:
    """A decoder all of whose parameters are random, so that no bias is zero and no norm is one."""
    rng = np.random.default_rng(seed)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    state = nnx.state(model)
    for path, variable in nnx.to_flat_state(state):
        shape = variable.shape
        size = 1.0 if path[-1] == "embedding" else 1.5 / np.sqrt(shape[-2]) if path[-1] == "kernel" else 0.3
        values = (path[-1] == "scale") + size * rng.standard_normal(shape)
        variable.set_value(jnp.asarray(values, variable.dtype))
    nnx.update(model, state)
    return model


def reference_logits(model, tokens, positions=None, segment_ids=None):
    """Logits `(batch, length, vocab_size)` of a decoder, from its parameters."""
    config, params = model.config, nnx.to_pure_dict(nnx.state(model, nnx.Param))
    tokens = np.asarray(tokens)
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    if segment_ids is None:
        segment_ids = np.ones_like(tokens)
    return np.stack([_one_text(config, params, *row) for row in zip(tokens, positions, segment_ids, strict=True)])


def _one_text(config, params, tokens, positions, segment_ids):
    x = _wide(params["embed_tokens"]["embedding"])[tokens]
    for index in range(config.num_hidden_layers):
        layer = _nth(params["layers"], index)
        normed = _rms_norm(x, layer["input_layernorm"], config)
        x = x + _attention(normed, layer["self_attn"], positions, segment_ids, config)
        normed = _rms_norm(x, layer["post_attention_layernorm"], config)
        gate, up, down = (_wide(layer["mlp"][f"{name}_proj"]["kernel"]) for name in ("gate", "up", "down"))
        z = normed @ gate
        x = x + (z / (1 + np.exp(-z)) * (normed @ up)) @ down
    x = _rms_norm(x, params["norm"], config)
    if config.tie_word_embeddings:
        return x @ _wide(params["embed_tokens"]["embedding"]).T
    return x @ _wide(params["lm_head"]["kernel"])


def _attention(x, layer, positions, segment_ids, config):
    length, width = len(x), config.head_dim
    angles = positions[:, None] * _frequencies(config)
    visible = np.tril(np.ones((length, length), bool))
    if config.sliding_window is not None:
        visible &= ~np.tril(visible, -config.sliding_window)
    visible &= segment_ids[:, None] == segment_ids[None, :]
    group = config.num_attention_heads // config.num_key_value_heads
    heads = []
    for head in range(config.num_attention_heads):
        columns = {"q": head, "k": head // group, "v": head // group}
        q, k, v = (_projection(x, layer[f"{n}_proj"])[:, c * width : (c + 1) * width] for n, c in columns.items())
        if config.qk_norm:
            q, k = _rms_norm(q, layer["q_norm"], config), _rms_norm(k, layer["k_norm"], config)
        scores = np.where(visible, _rotate(q, angles) @ _rotate(k, angles).T / np.sqrt(width), -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        heads.append(weights / weights.sum(axis=1, keepdims=True) @ v)
    return np.concatenate(heads, axis=1) @ _wide(layer["o_proj"]["kernel"])


def _frequencies(config):
    """Angle per position of each pair of coordinates, after Llama 3's `apply_scaling`."""
    frequencies = []
    for pair in range(config.head_dim // 2):
        frequency = config.rope_theta ** (-2 * pair / config.head_dim)
        scaling = config.rope_scaling
        if scaling is not None:
            wavelength, context = 2 * np.pi / frequency, scaling.original_max_position_embeddings
            if wavelength > context / scaling.low_freq_factor:
                frequency /= scaling.factor
            elif wavelength >= context / scaling.high_freq_factor:
                smooth = (context / wavelength - scaling.low_freq_factor) / (
                    scaling.high_freq_factor - scaling.low_freq_factor
                )
                frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        frequencies.append(frequency)
    return np.array(frequencies)


def _rotate(x, angles):
    """Turns the pairs of coordinates `(i, i + width / 2)` by their angles, as complex numbers."""
    half = x.shape[1] // 2
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=1)


def _rms_norm(x, layer, config):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.rms_norm_eps) * _wide(layer["scale"])


def _projection(x, layer):
    return x @ _wide(layer["kernel"]) + (_wide(layer["bias"]) if "bias" in layer else 0.0)


def _nth(tree, index):
    """The parameters of one layer of a stack."""
    return {k: _nth(v, index) for k, v in tree.items()} if isinstance(tree, dict) else tree[index]


def _wide(array):
    return np.asarray(array, np.float64)
