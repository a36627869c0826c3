"""Models: a decoder for the Llama/Qwen family and the loading of weights."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from balora_jax.models.decoder import Cache, Decoder, DecoderConfig, RopeScaling
    from balora_jax.models.generation import generate
    from balora_jax.models.weights import load_decoder

__all__ = ["Cache", "Decoder", "DecoderConfig", "RopeScaling", "generate", "load_decoder"]

_HOMES = {"generate": "generation", "load_decoder": "weights"}


def __getattr__(name: str) -> Any:
    """Imports flax when a public name is asked for, so that a folder that is missing is told of before."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'decoder')}"), name)
