"""Data sets by name: each recipe turns settings into two data sets with columns `module`, `prompt` and `answer`."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import datasets

from balora_jax.data import mathematics
from balora_jax.data.tokenizer import CharTokenizer


@dataclass(frozen=True)
class DataSettings:
    """What is learned and how it is laid out.

    Attributes:
        recipe: name of the data set, see `RECIPES`.
        path: folder of the published files, for recipes that can read them; None to generate.
        modules: parts of the data set to use; empty for all.
        difficulty: difficulties of generated questions, mixed evenly.
        train_examples: number of training examples.
        eval_examples: number of evaluation examples.
        length: tokens per row; longer examples are left out, and counted.
        packing: whether several examples share a row in training.
        seed: of the draw of the examples; the same for all runs that are compared.
    """

    recipe: str = "mathematics"
    path: str | None = None
    modules: tuple[str, ...] = ()
    difficulty: tuple[int, ...] = (1, 2)
    train_examples: int = 10_000
    eval_examples: int = 500
    length: int = 128
    packing: bool = True
    seed: int = 0


class Splits(NamedTuple):
    """A recipe's outcome."""

    train: datasets.Dataset
    evaluation: datasets.Dataset
    tokenizer: CharTokenizer


def load(settings: DataSettings) -> Splits:
    """Loads a data set by its recipe.

    Raises:
        ValueError: no such recipe, or settings that it cannot serve.
        FileNotFoundError: the folder or one of its files is missing.
    """
    if settings.recipe not in RECIPES:
        near = difflib.get_close_matches(settings.recipe, RECIPES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"data.recipe must be one of {', '.join(RECIPES)}, got {settings.recipe!r}{hint}")
    return RECIPES[settings.recipe](settings)


def _mathematics(settings: DataSettings) -> Splits:
    """School mathematics: generated, or the DeepMind Mathematics data set (arXiv 1904.01557) from a folder.

    From a folder, training takes `train-easy`, `train-medium` and `train-hard`, evaluation takes `interpolate`.
    """
    if settings.path is None:
        modules = settings.modules or mathematics.MODULES
        draw = partial(mathematics.generate, modules, difficulty=settings.difficulty, seed=settings.seed)
        train = draw(settings.train_examples, split="train")
        evaluation = draw(settings.eval_examples, split="evaluation")
    else:
        evaluation = _read_evenly(settings, ("interpolate",), settings.eval_examples)
        held_out = {example.question for example in evaluation}
        train = _read_evenly(settings, ("train-easy", "train-medium", "train-hard"), settings.train_examples)
        train = [example for example in train if example.question not in held_out]
    return Splits(as_dataset(train), as_dataset(evaluation), CharTokenizer())


def _read_evenly(settings: DataSettings, splits: tuple[str, ...], count: int) -> list[mathematics.Example]:
    """At most `count` published examples, as many from each file."""
    assert settings.path is not None
    names = sorted(path.stem for path in (Path(settings.path) / splits[0]).glob("*.txt"))
    modules = settings.modules or tuple(names)
    per_file = -(-count // max(len(modules) * len(splits), 1))
    return mathematics.read_folder(settings.path, modules, split=splits, limit=per_file)[:count]


def as_dataset(examples: list[mathematics.Example]) -> datasets.Dataset:
    """Returns mathematics examples with the columns that all recipes give."""
    return datasets.Dataset.from_dict(
        {
            "module": [example.module for example in examples],
            "prompt": [f"{example.question} " for example in examples],
            "answer": [example.answer for example in examples],
        }
    )


RECIPES: dict[str, Callable[[DataSettings], Splits]] = {"mathematics": _mathematics}
