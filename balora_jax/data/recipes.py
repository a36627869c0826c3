"""Data sets by name: each recipe turns settings into examples for training and for evaluation.

Examples have the columns `module`, `prompt` and `answer` (and `choices`), or `module` and `messages`.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import datasets
import numpy as np
import pyarrow.compute

from balora_jax.data import mathematics, rows
from balora_jax.data.cache import mapped, written
from balora_jax.data.mathematics.published import read_file
from balora_jax.data.rows import Reader
from balora_jax.data.scores import Score, exact_match, same_final_answer
from balora_jax.data.sources import read_source, split
from balora_jax.errors import not_among
from balora_jax.settings import DataSettings

MOST_GENERATED = 10_000_000
"""Examples that are generated at the most, for training and for evaluation."""


class Splits(NamedTuple):
    """A recipe's outcome.

    Attributes:
        train: the training examples.
        evaluation: the evaluation examples; none is also a training example.
        score: whether an answer is right; None where answers are only judged by their loss.
        left_out: how much was left out, by what it is ("training examples that ...").
    """

    train: datasets.Dataset
    evaluation: datasets.Dataset
    score: Score | None
    left_out: dict[str, int]


def load(settings: DataSettings) -> Splits:
    """Loads a data set by its recipe.

    Args:
        settings: what to load; with `train_examples` 0 there are evaluation examples alone, which may then be all of
            data without splits.

    Raises:
        ValueError: no such recipe, or settings or data that it cannot serve.
        FileNotFoundError: the data are missing.
    """
    if settings.recipe not in RECIPES:
        raise ValueError(not_among("data.recipe", settings.recipe, RECIPES))
    if twice := [name for name in settings.modules if settings.modules.count(name) > 1]:
        raise ValueError(f"data.modules must name each module once, got {twice[0]!r} more often")
    splits = RECIPES[settings.recipe](settings)
    if settings.train_examples == 0:
        if not len(splits.evaluation):
            raise ValueError(f"{settings.recipe} must have examples to evaluate on, got none")
        return splits._replace(left_out={what: n for what, n in splits.left_out.items() if n})
    train, repeated = _without_prompts_of(splits.evaluation, splits.train)
    left_out = {**splits.left_out, "training examples that are also evaluation examples": repeated}
    left_out = {what: n for what, n in left_out.items() if n}
    if not len(train) or not len(splits.evaluation):
        reasons = "".join(f"; skipped: {n} {what}" for what, n in left_out.items())
        raise ValueError(
            f"{settings.recipe} must have examples to train and to evaluate on, "
            f"got {len(train)} and {len(splits.evaluation)}{reasons}"
        )
    return splits._replace(train=train, left_out=left_out)


def _without_prompts_of(evaluation: datasets.Dataset, train: datasets.Dataset) -> tuple[datasets.Dataset, int]:
    """The training examples whose prompt is no evaluation example's, and how many others there are."""
    shared = _is_among(train, evaluation)
    return (train.select(np.flatnonzero(~shared)) if shared.any() else train), int(shared.sum())


def count_shared(evaluation: datasets.Dataset, train: datasets.Dataset) -> int:
    """Returns how many evaluation examples have the prompt of a training example."""
    return int(_is_among(evaluation, train).sum())


def _is_among(examples: datasets.Dataset, others: datasets.Dataset) -> np.ndarray:
    """Which examples have a prompt of the others'; none whose prompt is empty, as bare text's is."""
    known = set(_prompts(others)) - {""}
    return np.fromiter((prompt in known for prompt in _prompts(examples)), bool, len(examples))


def _prompts(examples: datasets.Dataset) -> Iterator[str]:
    for batch in examples.iter(1000):
        if "messages" in batch:
            for messages in batch["messages"]:
                yield "\0".join(m["content"] for m in messages if m["role"] != "assistant")
        else:
            yield from batch["prompt"]


def check_lengths(
    settings: DataSettings, examples: datasets.Dataset, kept: np.ndarray, what: Literal["training", "evaluation"]
) -> dict[str, int]:
    """Says which examples were left out because of their length.

    Args:
        settings: of the data.
        examples: the examples.
        kept: which of them were kept, by their places.
        what: what they are for.

    Returns:
        The number of those that were left out, by what they are; empty if there are none.

    Raises:
        ValueError: no example is left of a module that the settings name.
    """
    kept = np.unique(kept)
    if len(kept) == len(examples) and not settings.modules:
        return {}
    modules = examples.select_columns(["module"]).with_format("arrow")[:]["module"]
    before, after = (set(pyarrow.compute.unique(column).to_pylist()) for column in (modules, modules.take(kept)))
    for name in settings.modules:
        if not any(_is_of(module, name) for module in after):
            long = any(_is_of(module, name) for module in before)
            why = f"of at most {settings.length} tokens (data.length)" if long else "among those drawn"
            raise ValueError(f"data.modules: {name} has no {what} example {why}")
    gone = sorted(before - after)
    all_of = f", all of {', '.join(gone)} among them" if gone else ""
    count = len(examples) - len(kept)
    return {f"{what} examples of more than {settings.length} tokens{all_of}": count} if count else {}


def _is_of(module: str, name: str) -> bool:
    """Whether a module is the one of a name, perhaps with harder questions."""
    return re.fullmatch(re.escape(name) + "(_big|_longer|_more|_more_samples)?", module) is not None


_TEXT = datasets.Value("string")
_ANSWERS = {"module": _TEXT, "prompt": _TEXT, "answer": _TEXT}
_ANSWER_FEATURES = datasets.Features(_ANSWERS)
_CHOICES = {**_ANSWERS, "choices": datasets.List(_TEXT)}
_CONVERSATIONS = {"module": _TEXT, "messages": datasets.List({"role": _TEXT, "content": _TEXT})}


class Frames(NamedTuple):
    """How a question and an answer of mathematics are put: what stands around each."""

    prompt: str = "{} "
    answer: str = "{}"

    def row(self, example: mathematics.Example) -> dict[str, str]:
        """Returns an example with the columns of recipes."""
        prompt, answer = self.prompt.format(example.question), self.answer.format(example.answer)
        return {"module": example.module, "prompt": prompt, "answer": answer}


_BARE = Frames()


@dataclass(frozen=True)
class Published:
    """The recipe of a published data set of rows.

    Attributes:
        hub: name of its repository on the Hub; None for a format that many data sets have.
        read: from a row to an example.
        columns: columns of the examples, with their types.
        score: whether an answer is right.
        parts: names of the configurations that are used; they are the modules, if there are several.
    """

    hub: str | None
    read: Reader
    columns: dict = field(default_factory=lambda: _CONVERSATIONS)
    score: Score | None = None
    parts: tuple[str, ...] = ()

    def __call__(self, settings: DataSettings) -> Splits:
        """Loads the data set; raises like `load`."""
        examples: dict[str, list[datasets.Dataset]] = {"training": [], "evaluation": []}
        unusable = dict.fromkeys((f"{what} examples without a question or an answer" for what in examples), 0)
        parts = self._parts(settings)
        shares = (_shares(count, len(parts)) for count in (settings.train_examples, settings.eval_examples))
        for part, train_examples, eval_examples in zip(parts, *shares, strict=True):
            drawn = split(
                read_source(settings.path, hub=self.hub, part=part),
                train_examples=train_examples,
                eval_examples=eval_examples,
                eval_split=settings.eval_split,
                seed=settings.seed,
            )
            module = part if part and len(self.parts) > 1 else settings.recipe
            for source, found, what in zip(drawn, examples.values(), unusable, strict=True):
                found.append(self._examples(source, module, f"rows of {module} in {settings.path or self.hub}"))
                unusable[what] += len(source) - len(found[-1])
        return Splits(_joined(examples["training"]), _joined(examples["evaluation"]), self.score, unusable)

    def _parts(self, settings: DataSettings) -> list[str] | list[None]:
        """The configurations to read; None for a place that is not divided into them."""
        modules = self.parts if len(self.parts) > 1 else ()
        if wrong := [name for name in settings.modules if name not in modules]:
            known = f"be among {', '.join(modules)}" if modules else "be empty"
            raise ValueError(f"data.modules must {known} for {settings.recipe}, got {wrong[0]!r}")
        wanted = list(settings.modules or self.parts)
        if settings.path is None:
            return wanted or [None]
        there = [part for part in wanted if (Path(settings.path) / part).is_dir()]
        if settings.modules and there != wanted:
            raise FileNotFoundError(f"data.path: {settings.path} must hold the folders {', '.join(wanted)}")
        return there or [None]

    def _examples(self, source: datasets.Dataset, module: str, where: str) -> datasets.Dataset:
        def read(row):
            try:
                return self.read(row)
            except KeyError as error:
                raise ValueError(f"{where} must have the column {error}, got the columns {', '.join(row)}") from error
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error

        def examples(batch):
            names = list(batch)
            found = [read(dict(zip(names, row, strict=True))) for row in zip(*batch.values(), strict=True)]
            kept = [{"module": module, **example} for example in found if example is not None]
            return {name: [example[name] for example in kept] for name in self.columns}

        features = datasets.Features(self.columns)
        try:
            return mapped(source, examples, features=features, key=(self.read.__name__, module), description=module)
        except UnicodeDecodeError as error:  # of parquet and of what save_to_disk wrote
            raise ValueError(f"{where} must be texts in UTF-8: {error}") from error


def _joined(parts: list[datasets.Dataset]) -> datasets.Dataset:
    """The rows of all parts, which may all be empty."""
    return datasets.concatenate_datasets([part for part in parts if len(part)]) if any(map(len, parts)) else parts[0]


def _shares(count: int | None, parts: int) -> list[int | None]:
    """A number divided evenly, what is over spread out; None for all of every part."""
    return [None if count is None else (i + 1) * count // parts - i * count // parts for i in range(parts)]


def as_dataset(examples: Iterable[mathematics.Example], frames: Frames = _BARE) -> datasets.Dataset:
    """Returns mathematics examples with the columns of recipes, in memory."""
    rows = [frames.row(example) for example in examples]
    return datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in _ANSWERS}, _ANSWER_FEATURES)


def _mathematics(settings: DataSettings, frames: Frames = _BARE) -> Splits:
    """School mathematics: generated, or the DeepMind Mathematics data set (arXiv 1904.01557) from a folder.

    From a folder, training takes `train-easy`, `train-medium` and `train-hard`, evaluation takes `interpolate` or the
    split that the settings name.
    """
    if settings.path is None:
        if settings.train_examples is None or settings.eval_examples is None:
            raise ValueError("data.train_examples and data.eval_examples must be numbers where examples are generated")
        for name in ("train_examples", "eval_examples"):
            if getattr(settings, name) > MOST_GENERATED:
                raise ValueError(
                    f"data.{name} must be at most {MOST_GENERATED} where examples are generated, in memory, "
                    f"got {getattr(settings, name)}"
                )
        if settings.eval_split is not None:
            raise ValueError(f"data.eval_split must be None for {settings.recipe}, got {settings.eval_split!r}")
        modules = settings.modules or mathematics.MODULES
        draw = partial(mathematics.generate, modules, difficulty=settings.difficulty, seed=settings.seed)
        train = as_dataset(draw(settings.train_examples, split="train"), frames)
        evaluation = as_dataset(draw(settings.eval_examples, split="evaluation"), frames)
        return Splits(train, evaluation, exact_match, {})
    if settings.eval_split in _TRAIN_SPLITS:
        raise ValueError(f"data.eval_split must be none of those for training, got {settings.eval_split!r}")
    evaluation, unread = _read_evenly(settings, (settings.eval_split or "interpolate",), settings.eval_examples, frames)
    train, unread_train = _read_evenly(settings, _TRAIN_SPLITS, settings.train_examples, frames)
    left_out = {
        "training files, as data.train_examples is below their number": unread_train,
        "evaluation files, as data.eval_examples is below their number": unread,
    }
    return Splits(train, evaluation, exact_match, left_out)


_TRAIN_SPLITS = "train-easy", "train-medium", "train-hard"


def _dm_mathematics(settings: DataSettings) -> Splits:
    """The published files of the DeepMind Mathematics data set, asked as other questions are."""
    if settings.path is None:
        raise ValueError("data.path must be the folder of the published text files for dm_mathematics, got None")
    return _mathematics(settings, Frames("Question: {}\nAnswer:", " {}"))


def _read_evenly(
    settings: DataSettings, splits: tuple[str, ...], count: int | None, frames: Frames
) -> tuple[datasets.Dataset, int]:
    """At most `count` published examples, as many from each file or one less; and how many files give none."""
    assert settings.path is not None
    if count == 0:
        return as_dataset(()), 0
    try:
        files = [
            file
            for part in splits
            for file in mathematics.list_files(settings.path, _modules_of(settings, part), split=part)
        ]
    except OSError as error:
        raise FileNotFoundError(f"data.path: {error}") from error
    shares = _shares(count, len(files))
    examples = written(
        lambda: (frames.row(example) for pair in zip(files, shares, strict=True) for example in read_file(*pair)),
        files=files,
        features=_ANSWER_FEATURES,
        key=("mathematics", [(file.parent.name, file.stem) for file in files], count, frames),
    )
    return examples, shares.count(0)


def _modules_of(settings: DataSettings, part: str) -> list[str]:
    """The modules that are read of a published split: all, or those that the settings name."""
    assert settings.path is not None
    there = sorted(path.stem for path in (Path(settings.path) / part).glob("*.txt"))
    if not settings.modules:
        return there
    found = {name: [module for module in there if _is_of(module, name)] for name in settings.modules}
    return [module for name, modules in found.items() for module in modules or [name]]


RECIPES: dict[str, Callable[[DataSettings], Splits]] = {
    "mathematics": _mathematics,
    "dm_mathematics": _dm_mathematics,
    "alpaca": Published("tatsu-lab/alpaca", rows.alpaca),
    "codefeedback": Published("m-a-p/CodeFeedback-Filtered-Instruction", rows.codefeedback),
    "openhermes": Published("teknium/openhermes", rows.openhermes),
    "openorca": Published("Open-Orca/OpenOrca", rows.openorca),
    "wizardlm": Published("WizardLMTeam/WizardLM_evol_instruct_70k", rows.wizardlm),
    "metamathqa": Published("meta-math/MetaMathQA", rows.metamathqa, _ANSWERS, same_final_answer),
    "gsm8k": Published("openai/gsm8k", rows.gsm8k, _ANSWERS, same_final_answer, ("main",)),
    "wikitext": Published("Salesforce/wikitext", rows.text, _ANSWERS, None, ("wikitext-2-raw-v1",)),
    "arxiv": Published("ccdv/arxiv-summarization", rows.arxiv, _ANSWERS, None, ("document",)),
    "text": Published(None, rows.text, _ANSWERS),
    "arc": Published("allenai/ai2_arc", rows.arc, _CHOICES, exact_match, ("ARC-Challenge", "ARC-Easy")),
}
"""The recipes by name."""
