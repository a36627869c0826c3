"""The base and the data of a run, read once a process."""

from functools import cache

from balora_jax.data import recipes
from balora_jax.data.batches import Rows, encode, pack, pad
from balora_jax.data.hub_tokenizer import load_tokenizer
from balora_jax.errors import ConfigError
from balora_jax.models import Decoder
from balora_jax.models.weights import load_decoder
from balora_jax.settings import DataSettings, ModelSettings
from balora_jax.training.evaluation import EvaluationSet


@cache
def base_model(settings: ModelSettings) -> Decoder:
    """As `load_model`, of a model that was read before the same."""
    return load_model(settings)


def load_model(settings: ModelSettings) -> Decoder:
    """Returns a new decoder; raises `ConfigError` if it cannot be loaded."""
    try:
        return load_decoder(settings.path, dtype=settings.dtype, param_dtype=settings.param_dtype, remat=settings.remat)
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
    try:
        tokenizer = load_tokenizer(model, settings.tokenizer)
    except (OSError, ImportError, ValueError) as error:
        raise ConfigError(f"{'data.tokenizer' if settings.tokenizer else 'model.path'}: {error}") from error
    try:
        splits = recipes.load(settings)
        train, held_out = (
            encode(split, tokenizer, max_length=settings.length) for split in (splits.train, splits.evaluation)
        )
        left_out = (
            splits.left_out
            | recipes.check_lengths(settings, splits.train, train.kept, "training")
            | recipes.check_lengths(settings, splits.evaluation, held_out.kept, "evaluation")
        )
    except (OSError, ValueError) as error:
        raise ConfigError(str(error) if str(error).startswith("data.") else f"data: {error}") from error
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


def _lacking(settings: DataSettings, kind: str, there: int) -> list[str]:
    """Says where a data set holds fewer examples than the settings ask for."""
    field = {"training": "train_examples", "evaluation": "eval_examples"}[kind]
    asked = getattr(settings, field)
    return [f"{asked:,} {kind} examples asked for (data.{field}), {there:,} there"] if there < (asked or 0) else []
