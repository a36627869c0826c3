"""The base and the data of a run, read once a process."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial

from jax.sharding import Mesh

from balora_jax.data import recipes
from balora_jax.data.batches import Rows, Tokenizer, encode, pack, pad
from balora_jax.data.hub_tokenizer import load_tokenizer
from balora_jax.errors import ConfigError
from balora_jax.models import Decoder
from balora_jax.models.weights import abstract_decoder, load_decoder
from balora_jax.settings import Config, DataSettings, EvaluationSettings, ModelSettings
from balora_jax.training.evaluation import EvaluationSet
from balora_jax.training.layout import Layout


@cache
def base_model(settings: ModelSettings, mesh: Mesh | None = None) -> Decoder:
    """As `load_model`, of a model that was read before the same."""
    return load_model(settings, mesh)


def load_model(settings: ModelSettings, mesh: Mesh | None = None) -> Decoder:
    """Returns a new decoder; raises `ConfigError` if it cannot be loaded.

    Args:
        settings: of the model.
        mesh: of a `Layout`, over which the weights are spread; None for one device.
    """
    return _read(partial(load_decoder, sharding=Layout(mesh).weight) if mesh else load_decoder, settings)


def load_shapes(settings: ModelSettings) -> Decoder:
    """As `load_model`, with shapes in the place of the weights: no more than the folder's config.json is read."""
    return _read(abstract_decoder, settings)


def _read(reader: Callable[..., Decoder], settings: ModelSettings) -> Decoder:
    try:
        return reader(
            settings.path,
            dtype=settings.dtype,
            param_dtype=settings.param_dtype,
            remat=settings.remat,
            attention=settings.attention,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: {error}") from error


_LENGTH_MULTIPLE = 64


Notes = dict[str, list[str]]
"""Sentences about the `training` and the `evaluation` examples."""


@cache
def load_data(settings: DataSettings, model: str = ModelSettings.path) -> tuple[Rows, EvaluationSet, Notes]:
    """Training rows, evaluation examples, and notes of what is not as asked for: what was left out, and what lacks.

    Args:
        settings: what to load.
        model: path or name of the model that gets them, whose tokenizer is used if the settings name no other.

    Raises:
        ConfigError: the settings, the data or the tokenizer do not do.
    """
    tokenizer = _tokenizer(settings, model)
    with _explained():
        splits = recipes.load(settings)
        train, held_out = (
            encode(split, tokenizer, max_length=settings.length) for split in (splits.train, splits.evaluation)
        )
        left_out = (
            splits.left_out
            | recipes.check_lengths(settings, splits.train, train.kept, "training")
            | recipes.check_lengths(settings, splits.evaluation, held_out.kept, "evaluation")
        )
    if settings.packing:
        rows = pack(train, length=settings.length, pad_id=tokenizer.pad_id)
    else:  # no longer than they must be, in multiples that devices like
        longest = max(map(len, train.tokens))
        length = min(settings.length, -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE)
        rows = pad(train, length=length, pad_id=tokenizer.pad_id)
    examples = EvaluationSet.build(held_out, splits.evaluation, tokenizer, score=splits.score)
    notes: Notes = {"training": [], "evaluation": []}
    for (kind, said), split in zip(notes.items(), (splits.train, splits.evaluation), strict=True):
        gone = {what: count for what, count in left_out.items() if what.startswith(kind)}
        said += _lacking(settings, kind, len(split) + sum(splits.left_out.get(what, 0) for what in gone))
        said += [f"skipped {count} {what}" for what, count in gone.items()]
    return rows, examples, notes


@cache
def load_evaluation(
    settings: EvaluationSettings, data: DataSettings, model: str = ModelSettings.path
) -> tuple[EvaluationSet, list[str]]:
    """One more evaluation set of a run, and notes of what is not as asked for.

    Args:
        settings: of the set.
        data: of the run, whose tokenizer and length are used, and whose training examples are looked through.
        model: as for `load_data`.

    Raises:
        ConfigError: the settings or the data do not do.
    """
    own = replace(
        data,
        recipe=settings.recipe,
        path=settings.path,
        modules=settings.modules,
        difficulty=settings.difficulty,
        train_examples=0,
        eval_examples=settings.examples,
        eval_split=settings.split,
        seed=settings.seed,
    )
    tokenizer = _tokenizer(data, model)
    with _explained(f"evaluations, {settings.name}: "):
        splits, train = recipes.load(own), recipes.load(data).train
        encoded = encode(splits.evaluation, tokenizer, max_length=own.length)
        left_out = splits.left_out | recipes.check_lengths(own, splits.evaluation, encoded.kept, "evaluation")
    there = len(splits.evaluation)
    notes = []
    if there < (settings.examples or 0):
        notes.append(f"{settings.examples:,} examples asked for, {there:,} there")
    notes += [f"skipped {count} {what}" for what, count in left_out.items() if what.startswith("evaluation")]
    if shared := recipes.count_shared(splits.evaluation, train):
        notes.append(f"{shared:,} of its questions are training examples too")
    examples = EvaluationSet.build(encoded, splits.evaluation, tokenizer, score=splits.score)
    return examples, [f"{settings.name}: {note}" for note in notes]


def load_evaluations(config: Config) -> tuple[dict[str, EvaluationSet], list[str]]:
    """The evaluation sets that a config has beside its own, by name, and their notes; raises as `load_evaluation`."""
    found = {s.name: load_evaluation(s, config.data, config.model.path) for s in config.evaluations}
    return {name: examples for name, (examples, _) in found.items()}, [n for _, notes in found.values() for n in notes]


def _tokenizer(settings: DataSettings, model: str) -> Tokenizer:
    try:
        return load_tokenizer(model, settings.tokenizer)
    except (OSError, ImportError, ValueError) as error:
        raise ConfigError(f"{'data.tokenizer' if settings.tokenizer else 'model.path'}: {error}") from error


@contextlib.contextmanager
def _explained(prefix: str = "") -> Iterator[None]:
    """Turns the errors of data into one of the config, whose fields they name."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ConfigError(f"{prefix}{'' if str(error).startswith('data.') else 'data: '}{error}") from error


def _lacking(settings: DataSettings, kind: str, there: int) -> list[str]:
    """Says where a data set holds fewer examples than the settings ask for."""
    field = {"training": "train_examples", "evaluation": "eval_examples"}[kind]
    asked = getattr(settings, field)
    return [f"{asked:,} {kind} examples asked for (data.{field}), {there:,} there"] if there < (asked or 0) else []
