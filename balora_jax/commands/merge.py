"""`balora-jax merge`: an adapter added to the weights of its base."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from balora_jax.commands.arguments import parse
from balora_jax.commands.folders import check_free, check_peft, explained
from balora_jax.console import PlainConsole
from balora_jax.errors import ConfigError
from balora_jax.models.folders import model_folder


@dataclass(frozen=True)
class Options:
    """Adds a PEFT adapter to the weights of its base model, and writes a plain folder in Hugging Face's format.

    Attributes:
        model: the base: a folder, or the name of a model that ships with the package.
        adapter: a PEFT folder.
        out: a new folder; config.json, the tokenizer and the other small files of the base are copied along. If the
            adapter's folder holds a tokenizer, that one is taken.
        dtype: of the weights that are written; default that of each in the base. Sums are formed in float32.
        tensor: devices that share the weights.
    """

    model: Annotated[str, Positional, arg(metavar="MODEL")]
    adapter: Annotated[Path, Positional, arg(metavar="ADAPTER")]
    out: Annotated[Path, Positional, arg(metavar="OUT")]
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    tensor: int = 1


def main(arguments: list[str]) -> int:
    """Runs the command."""
    options = parse(Options, arguments, prog="balora-jax merge")
    check_free(options.out)
    check_peft("ADAPTER", options.adapter)
    with explained("MODEL"):
        folder = model_folder(options.model)
    import jax.numpy as jnp  # heavy, as what follows: after the cheap mistakes

    from balora_jax.adapters import load_adapters, read_peft
    from balora_jax.casting import WRITABLE
    from balora_jax.commands.merged import write_merged
    from balora_jax.models.weights import abstract_decoder, load_decoder, stored_dtypes
    from balora_jax.training.layout import tensor_layout

    with explained("ADAPTER"):
        adapter = read_peft(options.adapter)
    with explained("MODEL"):
        stored = stored_dtypes(folder)
        if options.dtype is None and "float64" in stored:
            raise ConfigError(
                f"MODEL: {folder} holds weights in float64; choose one of {', '.join(WRITABLE)} (--dtype)"
            )
        layout = tensor_layout(abstract_decoder(folder), options.tensor)
        where = layout.weight if layout else None
        model = load_decoder(folder, param_dtype=options.dtype or jnp.result_type(*stored).name, sharding=where)
    with explained("ADAPTER"):
        load_adapters(model, adapter)
    notes = write_merged(model, folder, options.out, dtype=options.dtype, tokenizer=options.adapter)
    done = f"merged {len(adapter.modules())} modules of {options.adapter} into {options.model}: {options.out}"
    PlainConsole(soft_wrap=True).print(done, *notes, sep="\n")
    return 0
