"""`balora-jax export`: what a run has trained, for other tools."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from balora_jax.commands.arguments import parse
from balora_jax.commands.folders import check_free, check_holds, explained, whole_folder
from balora_jax.console import PlainConsole
from balora_jax.errors import ConfigError
from balora_jax.models.folders import model_folder


@dataclass(frozen=True)
class Options:
    """Writes the trained adapter of a run, from its latest checkpoint, as a PEFT folder.

    Attributes:
        run: a run directory.
        out: a new folder.
        member: which of its runs; may be left out if there is one, or one in the best cells of its table.
        merged: write the base with the adapter added to its weights instead, in Hugging Face's format.
        tensor: devices that share the weights, with `--merged`.
    """

    run: Annotated[Path, Positional, arg(metavar="RUN")]
    out: Annotated[Path, Positional, arg(metavar="OUT")]
    member: str | None = None
    merged: bool = False
    tensor: int = 1


def main(arguments: list[str]) -> int:
    """Runs the command."""
    options = parse(Options, arguments, prog="balora-jax export")
    check_free(options.out)
    check_holds("RUN", options.run, "config.json", "a run directory")
    from balora_jax.adapters import export_adapters, write_peft  # heavy, as what follows: after the cheap mistakes
    from balora_jax.commands.merged import copy_tokenizer, write_merged
    from balora_jax.data.hub_tokenizer import tokenizer_files
    from balora_jax.methods import get_method
    from balora_jax.training.trained import load_trained

    trained = load_trained(options.run, options.member, weights=options.merged, tensor=options.tensor)
    config = trained.config
    notes = []
    with explained("the tokenizer of the run"):
        tokenizer = None if config.data.tokenizer is None else model_folder(config.data.tokenizer, weights=False)
    if options.merged:
        base, dtype = model_folder(config.model.path), config.model.param_dtype
        notes = write_merged(trained.model, base, options.out, dtype=dtype, tokenizer=tokenizer)
        form = f"{config.model.path} with its adapter"
    else:
        try:
            adapter = export_adapters(trained.model, scaling=get_method(config.method).scaling, base=config.model.path)
        except ValueError as error:
            raise ConfigError(
                f"{config.method} cannot be a PEFT adapter ({error}); --merged adds it to the base"
            ) from error
        with whole_folder(options.out) as folder:
            with explained("OUT"):
                write_peft(adapter, folder)
            if tokenizer is not None and tokenizer_files(tokenizer):
                copy_tokenizer(tokenizer, folder)
                notes.append(f"with the tokenizer of {config.data.tokenizer}, which it was trained with")
        form = f"PEFT adapter of rank {adapter.config['r']} for {config.model.path}"
    notes.insert(0, f"{trained.name}, step {trained.step} of {config.training.steps}: {form}: {options.out}")
    if trained.diverged_at >= 0:
        notes.append(f"this run diverged at step {trained.diverged_at}; its adapter is that of the step before")
    PlainConsole(soft_wrap=True).print(*notes, sep="\n")
    return 0
