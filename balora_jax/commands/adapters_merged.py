"""An adapter between two others, as a folder."""

from pathlib import Path

import numpy as np
from rich.console import Console

from balora_jax.adapters import PeftAdapter, interpolate_adapters, read_peft, write_peft
from balora_jax.adapters.diagnosis import product_singular_values
from balora_jax.adapters.interpolation import How
from balora_jax.commands.folders import copy_other_files, explained, whole_folder


def write_between(first: Path, second: Path, out: Path, weight: float, how: How, console: Console) -> None:
    """Writes the adapter between those of two PEFT folders, and prints how far it is from both.

    Args:
        first: at weight 0; its config and other files are copied.
        second: at weight 1.
        out: a new folder.
        weight: from 0 to 1.
        how: as for `interpolate_adapters`.
        console: where it is printed.

    Raises:
        ConfigError: the adapters do not fit each other, or the folder cannot be written.
    """
    adapters = []
    for argument, folder in (("FIRST", first), ("SECOND", second)):
        with explained(argument):
            adapters.append(read_peft(folder))
            adapters[-1].modules()
    with explained("FIRST and SECOND"):
        new = interpolate_adapters(adapters[0], adapters[1], weight, how=how)
    with whole_folder(out) as folder:
        write_peft(new, folder)
        copy_other_files(first, folder)  # the config among them
    apart = " and ".join(f"{_difference(new, old):.2f}" for old in adapters)
    console.print(
        f"{len(new.modules())} pairs, {how} at weight {weight:g}; the updates differ from those of FIRST and of SECOND "
        f"by {apart} of their norms: {out}"
    )


def _difference(new: PeftAdapter, old: PeftAdapter) -> float:
    """The norm of the difference of all updates, relative to that of the old ones."""
    squares = np.zeros(2)
    modules = old.modules()
    for name, x in new.modules().items():
        y = modules[name]
        left = np.concatenate([x.scale * np.asarray(x.lora_a, float), y.scale * np.asarray(y.lora_a, float)], 1)
        right = np.concatenate([np.asarray(x.lora_b, float), -np.asarray(y.lora_b, float)], 0)
        rank = x.lora_a.shape[1]
        both = (left, right), (left[:, rank:], right[rank:])
        squares += [np.sum(product_singular_values(*pair) ** 2) for pair in both]
    return float(np.sqrt(squares[0] / squares[1])) if squares[1] else 0.0
