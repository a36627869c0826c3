"""Reading and writing PEFT's folders of `adapter_config.json` and `adapter_model.safetensors`."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from balora_jax.adapters.peft import CONFIG_FILE, TENSOR_FILE, PeftAdapter
from balora_jax.files import read_object

_READABLE = re.compile(r"BOOL|BF16|F(16|32|64)|[IU](8|16|32|64)")  # dtypes that NumPy has, or ml_dtypes gives it
_FLOATING = re.compile(r"BF16|F(16|32|64)")


def read_peft(folder: str | Path) -> PeftAdapter:
    """Reads a PEFT folder with a LoRA adapter of any kind.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is broken, a field or a tensor has not the form it must have, or the adapter is not LoRA.
    """
    config_file, tensor_file = Path(folder) / CONFIG_FILE, Path(folder) / TENSOR_FILE
    for file in (config_file, tensor_file):
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist; a PEFT folder must hold {CONFIG_FILE} and {TENSOR_FILE}")
    config = read_object(config_file)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{config_file}: peft_type must be 'LORA', got {config.get('peft_type')!r}")
    try:
        with safe_open(tensor_file, framework="numpy") as tensors:
            found = {name: _tensor(tensors, name) for name in tensors.keys()}  # noqa: SIM118
            metadata = tensors.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{tensor_file} is broken or not a safetensors file: {error}") from error
    if not found:
        raise ValueError(f"{tensor_file} holds no tensors")
    return PeftAdapter(config, found, metadata)


def write_peft(adapter: PeftAdapter, folder: str | Path) -> None:
    """Writes a PEFT folder.

    Args:
        adapter: what to write.
        folder: is made if it does not exist.

    Raises:
        ValueError: a factor is not finite.
    """
    tensors = {name: np.asarray(tensor, order="C") for name, tensor in adapter.tensors.items()}
    for name, tensor in tensors.items():
        if ".lora_" in name and not np.isfinite(tensor).all():
            raise ValueError(f"the tensor {name} must be finite to be written, got a NaN or an infinity")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(dict(adapter.config), indent=2) + "\n")
    save_file(tensors, folder / TENSOR_FILE, metadata=dict(adapter.metadata))


def _tensor(file: Any, name: str) -> np.ndarray:
    dtype = file.get_slice(name).get_dtype()
    if not (_FLOATING if ".lora_" in name else _READABLE).fullmatch(dtype):
        raise ValueError(f"{TENSOR_FILE}: the tensor {name} must be of dtype F32, F16 or BF16, got {dtype}")
    tensor = file.get_tensor(name)
    if ".lora_" in name and not tensor.size:
        raise ValueError(f"{TENSOR_FILE}: the tensor {name} must have entries, got the shape {tensor.shape}")
    return tensor
