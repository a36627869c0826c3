"""Reading and writing a decoder as a folder in Hugging Face's format: `config.json` and `model.safetensors`."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from balora_jax.models.decoder import SIZES, Decoder, DecoderConfig, RopeScaling

PRETRAINED = Path(__file__).parent / "pretrained"

# What each family does that its config.json does not say.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}
_SAME_NAME = (*(name for name in SIZES if name != "head_dim"), "rms_norm_eps")
# Fields that must have this value, if they are there at all.
_REQUIRED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "quantization_config": None,
}


def read_config(folder: str | Path) -> DecoderConfig:
    """Reads a `config.json` of the Llama/Qwen family.

    Args:
        folder: holds `config.json`.

    Returns:
        The config, in float32 and without rematerialisation.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a field has a value that `Decoder` does not implement, or is missing; the message names it.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a model folder must hold config.json and model.safetensors")
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    family = fields.get("model_type")
    if family not in _FAMILIES:
        raise ValueError(f"{path}: model_type must be one of {', '.join(_FAMILIES)}, got {family!r}")
    for name, required in _REQUIRED.items():
        if fields.get(name, required) != required:
            raise ValueError(f"{path}: {name} must be {required!r}, got {fields[name]!r}: not implemented")
    if fields.get("sliding_window") and family == "mistral":
        raise ValueError(f"{path}: sliding_window must be null, got {fields['sliding_window']!r}: not implemented")
    fields.setdefault("num_key_value_heads", fields.get("num_attention_heads"))
    missing = [name for name in _SAME_NAME if fields.get(name) is None]
    if missing:
        raise ValueError(f"{path}: the field {missing[0]} is missing")
    rope = {**(fields.get("rope_scaling") or {}), **(fields.get("rope_parameters") or {})}
    return DecoderConfig(
        **{name: fields[name] for name in _SAME_NAME},
        **_FAMILIES[family],
        head_dim=fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"],
        rope_theta=float(rope.get("rope_theta", fields.get("rope_theta", 10_000.0))),
        rope_scaling=_rope_scaling(rope, path),
        tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
    )


def _rope_scaling(rope: dict, path: Path) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"{path}: rope_scaling must be of type llama3 or absent, got {kind!r}: not implemented")
    names = [field.name for field in dataclasses.fields(RopeScaling)]
    missing = [name for name in names if name not in rope]
    if missing:
        raise ValueError(f"{path}: rope_scaling lacks the field {missing[0]}")
    return RopeScaling(**{name: rope[name] for name in names})


def load_decoder(
    folder: str | Path, *, dtype: str = "float32", param_dtype: str = "float32", remat: bool = False
) -> Decoder:
    """Reads a decoder with its weights.

    Args:
        folder: holds `config.json` and `model.safetensors`; or the name of a model that ships with this package.
        dtype: dtype of activations and products.
        param_dtype: dtype to which the weights are converted.
        remat: whether activations are recomputed in the backward pass.

    Returns:
        The model.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the config is not supported, a tensor is missing or has the wrong shape, or the file is broken.
    """
    shipped = PRETRAINED / str(folder)
    if not Path(folder).exists() and shipped.is_dir():
        folder = shipped
    elif not Path(folder).is_dir():
        names = ", ".join(sorted(p.name for p in PRETRAINED.glob("*") if p.is_dir()))
        raise FileNotFoundError(f"{folder} must be a model folder or the name of a shipped model ({names})")
    config = dataclasses.replace(read_config(folder), dtype=dtype, param_dtype=param_dtype, remat=remat)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a model folder must hold config.json and model.safetensors")
    state = nnx.state(model, nnx.Param)
    flat = dict(nnx.to_flat_state(state))
    try:
        with safe_open(path, framework="numpy") as tensors:
            _check_used(tensors.keys(), flat, config, path)
            for key, variable in flat.items():
                expected = variable.get_value()
                array = _read(tensors, key, expected, config, path)
                variable.set_value(jnp.asarray(array, expected.dtype))
    except SafetensorError as error:
        raise ValueError(f"{path} is broken or not a safetensors file: {error}") from error
    nnx.update(model, state)
    return model


def save_decoder(model: Decoder, folder: str | Path) -> None:
    """Writes a decoder in Hugging Face's format; `load_decoder` and `transformers` read it.

    Args:
        model: a decoder without adapters.
        folder: is made if it does not exist.
    """
    config = model.config
    if jax.tree.leaves(nnx.state(model, nnx.LoRAParam)):
        raise ValueError("model must have no adapters; merge them with remove_adapters(model, merge=True) first")
    if config.qkv_bias and config.qk_norm:
        raise ValueError("a config with both qkv_bias and qk_norm belongs to no family and cannot be saved")
    family = "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "llama"
    architecture = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}[family]
    fields = {
        "architectures": [architecture],
        "model_type": family,
        **{name: getattr(config, name) for name in _SAME_NAME},
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    if config.rope_scaling is not None:
        fields["rope_scaling"] = {"rope_type": "llama3", **dataclasses.asdict(config.rope_scaling)}
    tensors = {}
    for key, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        array = np.asarray(jax.device_get(variable[...]))
        layers = range(config.num_hidden_layers) if key[0] == "layers" else (None,)
        for layer in layers:
            name, transposed = _tensor_name(key, layer)
            tensor = array if layer is None else array[layer]
            tensors[name] = np.ascontiguousarray(tensor.T if transposed else tensor)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _tensor_name(key: tuple, layer: int | None) -> tuple[str, bool]:
    """Hugging Face's name of a parameter of one layer, and whether its tensor is the transpose of ours."""
    *parents, leaf = map(str, key)
    if layer is not None:
        parents[0] = f"layers.{layer}"
    prefix = "" if parents[0] == "lm_head" else "model."
    return f"{prefix}{'.'.join(parents)}.{'bias' if leaf == 'bias' else 'weight'}", leaf == "kernel"


def _check_used(present, keys, config: DecoderConfig, path: Path) -> None:
    """Raises if the file holds a tensor that the config has no place for."""
    layers = range(config.num_hidden_layers)
    used = {_tensor_name(key, n)[0] for key in keys for n in (layers if key[0] == "layers" else (None,))}
    used.add("lm_head.weight")  # some files hold it though it is tied
    unused = sorted(name for name in present if name not in used and not name.endswith("rotary_emb.inv_freq"))
    if unused:
        raise ValueError(f"{path} holds the tensor {unused[0]}, which a model of this config does not have")


def _read(tensors, key: tuple, expected: jax.ShapeDtypeStruct, config: DecoderConfig, path: Path) -> np.ndarray:
    """One parameter from the file, its layers stacked."""
    stacked = key[0] == "layers"
    present = set(tensors.keys())
    parts = []
    for layer in range(config.num_hidden_layers) if stacked else (None,):
        name, transposed = _tensor_name(key, layer)
        if name not in present:
            raise ValueError(f"{path} lacks the tensor {name}")
        tensor = tensors.get_tensor(name)
        tensor = tensor.T if transposed else tensor
        shape = expected.shape[1:] if stacked else expected.shape
        if tensor.shape != shape:
            wanted = shape[::-1] if transposed else shape
            found = tensor.shape[::-1] if transposed else tensor.shape
            raise ValueError(f"{path}: the tensor {name} must have shape {wanted}, got {found}")
        parts.append(tensor)
    return np.stack(parts) if stacked else parts[0]
