"""Hugging Face's `config.json` of the Llama/Qwen family, read as a `DecoderConfig` and written from one."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from balora_jax.files import read_object
from balora_jax.models.decoder import SIZES, DecoderConfig, RopeScaling

# What each family does that its config.json does not say.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}
# What a config.json that lacks the field means; null for the number of heads means as many as there are queries.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": None},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}
_SAME_NAME = (*(name for name in SIZES if name != "head_dim"), "rms_norm_eps")
# Fields that must have this value, if they are there at all: those of the families above, and those with which their
# relatives change the arithmetic. Other fields change nothing.
_REQUIRED = {
    "attention_bias": False,
    "attention_dropout": 0,
    "attention_multiplier": None,
    "attn_logit_softcapping": None,
    "auto_map": None,
    "embedding_multiplier": 1,
    "final_logit_softcapping": None,
    "hidden_act": "silu",
    "is_causal": True,
    "logits_scaling": 1,
    "mlp_bias": False,
    "no_rope_layers": None,
    "partial_rotary_factor": 1,
    "quantization_config": None,
    "residual_multiplier": 1,
    "use_mrope": False,
    "use_sliding_window": False,
}


def read_config(folder: str | Path) -> DecoderConfig:
    """Reads a `config.json` of the Llama/Qwen family, as transformers 4 or 5 writes it.

    Args:
        folder: holds `config.json`.

    Returns:
        The config, in float32 and without rematerialisation; the dtype of the file's weights plays no part.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a field has a value that `Decoder` does not implement, or is missing; the message names it.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a model folder must hold config.json")
    fields = read_object(path)
    try:
        return _config(fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _config(fields: dict[str, Any]) -> DecoderConfig:
    family = fields.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        raise ValueError(f"model_type must be one of {', '.join(_FAMILIES)}, got {family!r}")
    for name, required in _REQUIRED.items():
        if fields.get(name) not in (None, required):
            raise ValueError(f"{name} must be {required!r}, got {fields[name]!r}: not implemented")
    kinds = fields.get("layer_types")
    if kinds is not None and not isinstance(kinds, list):
        raise ValueError(f"layer_types must be a list, got {kinds!r}")
    if family != "mistral" and any(kind != "full_attention" for kind in kinds or ()):
        raise ValueError(f"layer_types must all be 'full_attention', got {kinds!r}: not implemented")
    fields = {**_DEFAULTS[family], **fields}
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = fields.get("num_attention_heads")
    missing = [name for name in _SAME_NAME if fields.get(name) is None]
    if missing:
        raise ValueError(f"the field {missing[0]} is missing")
    for name in ("head_dim", "sliding_window", *_SAME_NAME):
        if fields.get(name) is not None:
            _check_number(name, fields[name], integer=name != "rms_norm_eps")
    tied = fields.get("tie_word_embeddings")
    if not isinstance(tied, bool | None):
        raise ValueError(f"tie_word_embeddings must be true or false, got {tied!r}")
    if fields.get("head_dim") is None:
        width, heads = fields["hidden_size"], fields["num_attention_heads"]
        if heads < 1 or width % heads:
            raise ValueError(
                f"num_attention_heads must divide hidden_size ({width}) where there is no head_dim, got {heads}"
            )
        fields["head_dim"] = width // heads
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(fields.get(name), dict | None):
            raise ValueError(f"{name} must be an object, got {fields[name]!r}")
    # transformers 5 writes rope_parameters, with the base in it; 4 wrote rope_scaling and rope_theta beside it
    given = [fields[name] for name in ("rope_parameters", "rope_scaling") if fields.get(name)]
    scalings = [_rope_scaling(rope) for rope in given]
    if len(set(scalings)) > 1:
        raise ValueError(
            f"rope_scaling and rope_parameters must agree where both are there, got {given[1]} and {given[0]}"
        )
    theta = next((rope["rope_theta"] for rope in given if "rope_theta" in rope), fields.get("rope_theta", 10_000.0))
    _check_number("rope_theta", theta)
    return DecoderConfig(
        **{name: fields[name] for name in _SAME_NAME},
        **_FAMILIES[family],
        head_dim=fields["head_dim"],
        rope_theta=theta,
        rope_scaling=scalings[0] if scalings else None,
        sliding_window=fields.get("sliding_window") if family == "mistral" else None,
        tie_word_embeddings=bool(tied),
    )


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    for name, required in (("partial_rotary_factor", 1), ("mrope_section", None)):
        if rope.get(name) not in (None, required):
            raise ValueError(f"rope_parameters: {name} must be {required!r}, got {rope[name]!r}: not implemented")
    nested = [name for name, value in rope.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(f"rope_parameters must be those of all layers, got some for {nested[0]}: not implemented")
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"rope_scaling must be of type llama3 or absent, got {kind!r}: not implemented")
    names = [field.name for field in dataclasses.fields(RopeScaling)]
    missing = [name for name in names if name not in rope]
    if missing:
        raise ValueError(f"rope_scaling lacks the field {missing[0]}")
    for name in names:
        _check_number(f"rope_scaling: {name}", rope[name], integer=name == "original_max_position_embeddings")
    try:
        return RopeScaling(**{name: rope[name] for name in names})
    except ValueError as error:
        raise ValueError(f"rope_scaling: {error}") from error


def _check_number(name: str, value: Any, *, integer: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int if integer else int | float):
        raise ValueError(f"{name} must be {'an integer' if integer else 'a number'}, got {value!r}")


def write_config(config: DecoderConfig, folder: str | Path) -> None:
    """Writes a `config.json` that `read_config` and `transformers` read.

    Args:
        config: of a family that there is.
        folder: must exist.

    Raises:
        ValueError: no family has this combination of features.
    """
    features = {"mistral": "sliding_window", "qwen2": "qkv_bias", "qwen3": "qk_norm"}
    used = {family: feature for family, feature in features.items() if getattr(config, feature)}
    if len(used) > 1:
        raise ValueError(f"a config with {' and '.join(used.values())} belongs to no family and cannot be saved")
    family = next(iter(used), "llama")
    fields = {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family,
        **{name: getattr(config, name) for name in _SAME_NAME},
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    if config.sliding_window is not None:
        fields["sliding_window"] = config.sliding_window
    if config.rope_scaling is not None:
        fields["rope_scaling"] = {"rope_type": "llama3", **dataclasses.asdict(config.rope_scaling)}
    (Path(folder) / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
