"""`balora-jax merge`: an adapter added to the weights of its base."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from balora_jax.adapters import load_adapters, read_peft, remove_adapters
from balora_jax.commands.arguments import parse
from balora_jax.commands.folders import check_free, copy_other_files, explained, whole_folder
from balora_jax.models import Decoder
from balora_jax.models.folders import model_folder
from balora_jax.models.weights import load_decoder, save_decoder, stored_dtype
from balora_jax.training.config import ConfigError

_DTYPE_FIELDS = "dtype", "torch_dtype"  # of transformers 5 and 4


@dataclass(frozen=True)
class Options:
    """Adds a PEFT adapter to the weights of its base model, and writes a plain folder in Hugging Face's format.

    Attributes:
        model: the base: a folder, or the name of a model that ships with the package.
        adapter: a PEFT folder.
        out: a new folder; config.json, the tokenizer and the other small files of the base are copied along.
        dtype: of the weights that are written; default that of the base. Sums are formed in float32.
    """

    model: Annotated[str, Positional, arg(metavar="MODEL")]
    adapter: Annotated[Path, Positional, arg(metavar="ADAPTER")]
    out: Annotated[Path, Positional, arg(metavar="OUT")]
    dtype: Literal["float32", "bfloat16", "float16"] | None = None


def main(arguments: list[str]) -> int:
    """Runs the command."""
    options = parse(Options, arguments, prog="balora-jax merge")
    check_free(options.out)
    with explained("ADAPTER"):
        adapter = read_peft(options.adapter)
    with explained("MODEL"):
        folder = model_folder(options.model)
        model = load_decoder(folder, param_dtype=options.dtype or _declared_dtype(folder) or stored_dtype(folder))
    with explained("ADAPTER"):
        load_adapters(model, adapter)
    write_merged(model, folder, options.out)
    print(f"merged {len(adapter.modules())} modules of {options.adapter} into {options.model}: {options.out}")
    return 0


def write_merged(model: Decoder, base: Path, out: Path) -> None:
    """Merges a model's adapters into its weights, in place, and writes the folder of the base with them.

    Args:
        model: with adapters.
        base: the folder that the model came from.
        out: a new folder.

    Raises:
        ConfigError: the folder is not new, or cannot be written.
    """
    if out.resolve() == base.resolve():
        raise ConfigError("OUT must not be the folder of the base")
    remove_adapters(model, merge=True)
    with whole_folder(out) as folder:
        save_decoder(model, folder)
        copy_other_files(base, folder)  # its config.json too, which says more than the decoder needs
        if _declared_dtype(folder):
            file = folder / "config.json"
            fields = json.loads(file.read_text())
            fields |= {name: model.config.param_dtype for name in _DTYPE_FIELDS if name in fields}
            file.write_text(json.dumps(fields, indent=2) + "\n")


def _declared_dtype(folder: Path) -> str | None:
    """The dtype of the weights, as config.json tells it."""
    fields = json.loads((folder / "config.json").read_text())
    return next((fields[name] for name in _DTYPE_FIELDS if fields.get(name) not in (None, "auto")), None)
