"""Models: a decoder for the Llama/Qwen family and the loading of weights."""

from balora_jax.models.decoder import Cache, Decoder, DecoderConfig, RopeScaling

__all__ = ["Cache", "Decoder", "DecoderConfig", "RopeScaling"]
