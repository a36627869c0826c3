"""A model with its adapter added to the weights, as a folder in Hugging Face's format."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from balora_jax.adapters import MergeError, iter_adapters, remove_adapters
from balora_jax.commands.folders import copy_file, copy_other_files, explained, whole_folder
from balora_jax.data.hub_tokenizer import files_fingerprint, load_tokenizer, tokenizer_files
from balora_jax.errors import ConfigError
from balora_jax.files import read_object
from balora_jax.models import Decoder
from balora_jax.models.weights import save_decoder, stored_dtypes, tensor_name

_DTYPE_FIELDS = "dtype", "torch_dtype"  # of transformers 5 and 4


def write_merged(
    model: Decoder, base: Path, out: Path, *, dtype: str | None = None, tokenizer: Path | None = None
) -> list[str]:
    """Merges a model's adapters into its weights, in place, and writes the folder of the base with them.

    Args:
        model: with adapters.
        base: the folder that the model came from.
        out: a new folder.
        dtype: of the weights; default that of each in the base.
        tokenizer: a folder whose tokenizer is taken in the place of the base's, if it holds one.

    Returns:
        What is otherwise than in the base, beside the merged weights, a line each.

    Raises:
        ConfigError: the folder is not new, or cannot be written, or a weight would not be finite.
    """
    if out.resolve() == base.resolve():
        raise ConfigError("OUT must not be the folder of the base")
    for path, adapter in iter_adapters(model):
        try:
            adapter.merge()
        except MergeError as error:
            name = tensor_name(f"{path}.kernel", error.index[0])
            raise ConfigError(f"the tensor {name}, with the adapter merged, {error.reason}") from error
    remove_adapters(model, merge=True)
    stored = sorted(stored_dtypes(base))
    written = stored if dtype is None else [dtype]
    notes = []
    if written != stored:
        notes.append(f"weights are written in {dtype}; those of the base are in {' and '.join(stored)}")
    with whole_folder(out) as folder:
        with explained("OUT"):
            save_decoder(model, folder, base=base, dtype=dtype)
        copy_other_files(base, folder)  # its config.json too, which says more than the decoder needs
        notes += _declare_dtype(folder / "config.json", written, stored)
        if tokenizer is not None:
            notes += _take_tokenizer(tokenizer, folder)
    return notes


def _declare_dtype(file: Path, written: list[str], stored: list[str]) -> list[str]:
    """Changes the dtype that a base's config.json declares, if no weight is written in it; says what was wrong."""
    fields = _fields(file)
    declared = {name: fields[name] for name in _DTYPE_FIELDS if fields.get(name) not in (None, "auto", *written)}
    if declared:
        fields |= dict.fromkeys(declared, jnp.result_type(*written).name)
        file.write_text(json.dumps(fields, indent=2) + "\n")
    return [
        f"config.json of the base declares the {name} {value}, but its weights are {' and '.join(stored)}"
        for name, value in declared.items()
        if value not in stored
    ]


def _take_tokenizer(source: Path, folder: Path) -> list[str]:
    """Puts a tokenizer in the place of that of a model's folder, and its end tokens into the configs there."""
    if not tokenizer_files(source) or files_fingerprint(source) == files_fingerprint(folder):
        return []
    with explained(f"the tokenizer of {source}"):
        ends = load_tokenizer(folder, source).end_ids
    for file in tokenizer_files(folder):
        file.unlink()
    copy_tokenizer(source, folder)
    notes = [f"the tokenizer is that of {source}"]
    for file in (folder / "config.json", folder / "generation_config.json"):
        fields = _fields(file) if file.is_file() else {}
        old = fields.get("eos_token_id")
        listed = old if isinstance(old, list) else [old]
        if old is not None and not (all(end in ends for end in listed) and all(end in listed for end in ends)):
            fields["eos_token_id"] = list(ends) if len(ends) > 1 else ends[0]
            file.write_text(json.dumps(fields, indent=2) + "\n")
            notes.append(f"the eos_token_id of {file.name} is its {fields['eos_token_id']}, in the base {old}")
    return notes


def _fields(file: Path) -> dict[str, Any]:
    with explained("MODEL"):
        return read_object(file)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies the files of a tokenizer, if there is one."""
    for file in tokenizer_files(source):
        copy_file(file, folder)
