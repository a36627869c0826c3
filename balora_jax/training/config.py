"""What a run is made of: frozen dataclasses, files that build them, and sweeps over their fields.

A config file is Python: it sets `config = Config(...)` and may set `sweep`, a mapping from dotted field names to the
values to try (all combinations), or a sequence of such mappings (one after the other).
"""

import dataclasses
import difflib
import itertools
import math
import re
import runpy
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from balora_jax.errors import ConfigError
from balora_jax.settings import (
    AdapterSettings,
    BalanceSettings,
    DataSettings,
    ModelSettings,
    OptimizerSettings,
    TrainingSettings,
)

if TYPE_CHECKING:
    from balora_jax.methods import Method

NUMERIC_FIELDS = (
    "seed",
    "adapter.alpha",
    "optimizer.learning_rate",
    "optimizer.weight_decay",
    "optimizer.b1",
    "optimizer.b2",
    "optimizer.eps",
    "balance.least_ratio",
)
"""Fields that are numbers in a run's state: runs that differ in nothing else are trained together."""

MOST_RUNS = 10_000
"""Runs that a sweep may hold."""

_LARGEST_COUNT = 2**31 - 1  # as steps and places are 32-bit integers on a device
_SEEDS = "seed", "data.seed"


@dataclass(frozen=True)
class Config:
    """One run.

    Attributes:
        name: of the experiment, without `/`; the default output folder is `runs/<name>`.
        method: a name in `balora_jax.methods.METHODS`.
        options: names and values of the method's own numbers, where they differ from their defaults.
        seed: decides the adapters' start, the order of the data and the dropout.
        model: the frozen base.
        adapter: the adapters.
        optimizer: the optimizer.
        balance: how balanced methods balance.
        data: the data.
        training: the loop.
    """

    name: str
    method: str = "lora"
    options: tuple[tuple[str, float], ...] = ()
    seed: int = 0
    model: ModelSettings = field(default_factory=ModelSettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    balance: BalanceSettings = field(default_factory=BalanceSettings)
    data: DataSettings = field(default_factory=DataSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)


Sweep = Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Sequence[Any]]]


def load_config(path: str | Path) -> tuple[Config, Sweep]:
    """Runs a config file.

    Args:
        path: a Python file that sets `config` and perhaps `sweep`.

    Returns:
        The config and the sweep (empty if the file has none).

    Raises:
        ConfigError: there is no such file, it fails, or it does not set `config`.
    """
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, (p.name for p in path.parent.glob("*.py")), n=1)
        raise ConfigError(
            f"there is no config file {path}" + (f"; did you mean {path.parent / near[0]}?" if near else "")
        )
    try:
        names = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{path} fails: {type(error).__name__}: {error}{_nearest_keyword(error)}") from error
    if not isinstance(names.get("config"), Config):
        raise ConfigError(
            f"{path} must set `config` to a balora_jax.training.Config, got {_shown(names.get('config'))}"
        )
    sweep = names.get("sweep", {})
    mappings = [sweep] if isinstance(sweep, Mapping) else sweep
    if not isinstance(mappings, Sequence) or not all(isinstance(mapping, Mapping) for mapping in mappings):
        raise ConfigError(
            f"{path}: sweep must map field names to values, or be a sequence of such, got {_shown(sweep)}"
        )
    return names["config"], sweep


def expand(config: Config, sweep: Sweep) -> tuple[Config, ...]:
    """Returns the runs of a sweep, each checked.

    Args:
        config: what the runs have in common.
        sweep: dotted field names and their values; all combinations of a mapping, one mapping after the other.

    Raises:
        ConfigError: a field does not exist, a value is of the wrong type or out of range, or two runs are the same.
    """
    mappings = [sweep] if isinstance(sweep, Mapping) else sweep
    if len(mappings) > MOST_RUNS:
        raise ConfigError(f"sweep must hold at most {MOST_RUNS} runs, got {len(mappings)} mappings")
    runs: dict[Config, None] = {}  # in order
    for mapping in mappings or [{}]:
        if not isinstance(mapping, Mapping):
            raise ConfigError(f"sweep must map field names to values, got {_shown(mapping)}")
        for choice in combinations(mapping):
            run = with_fields(config, choice)
            check(run)
            if run in runs:
                raise ConfigError(f"sweep holds a run twice: {choice}")
            if len(runs) == MOST_RUNS:
                raise ConfigError(f"sweep must hold at most {MOST_RUNS} runs, got more")
            for name in _method(run).unused_settings:
                if len(mapping.get(f"optimizer.{name}", ())) > 1:
                    raise ConfigError(
                        f"sweep: optimizer.{name} plays no part in {run.method}, whose runs would be the same"
                    )
            runs[run] = None
    return tuple(runs)


def combinations(mapping: Mapping[str, Sequence]) -> Iterator[dict[str, Any]]:
    """All choices of one value for each field.

    Raises:
        ConfigError: something other than a sequence of values, or too many combinations.
    """
    for name, values in mapping.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ConfigError(f"sweep: {name} must have a sequence of values, got {_shown(values)}")
    try:
        count = math.prod(map(len, mapping.values()))
    except OverflowError:  # of a range
        count = sys.maxsize
    if count > MOST_RUNS:
        raise ConfigError(f"sweep must hold at most {MOST_RUNS} runs, got {_shown(count)} of {', '.join(mapping)}")
    for name, values in mapping.items():
        for value in values:
            try:
                hash(value)
            except TypeError:
                raise ConfigError(f"sweep: {name} must have texts, numbers or tuples, got {_shown(value)}") from None
    for choice in itertools.product(*mapping.values()):
        yield dict(zip(mapping, choice, strict=True))


def get_field(config: Config, name: str) -> Any:
    """Returns the field of a dotted name.

    Raises:
        ConfigError: there is none; the message suggests the nearest.
    """
    value: Any = config
    for part in name.split("."):
        if not is_dataclass(value) or part not in (f.name for f in dataclasses.fields(value)):
            raise ConfigError(f"there is no field {name}{suggestion(name)}")
        value = getattr(value, part)
    return value


def with_field(config: Any, name: str, value: Any) -> Any:
    """Returns a copy of a config with the field of a dotted name replaced; raises like `get_field`."""
    if isinstance(config, Config):
        get_field(config, name)
    first, _, rest = name.partition(".")
    return dataclasses.replace(config, **{first: with_field(getattr(config, first), rest, value) if rest else value})


def with_fields(config: Config, values: Mapping[str, Any]) -> Config:
    """As `with_field` for several fields."""
    for name, value in values.items():
        config = with_field(config, name, value)
    return config


def field_names(config: Any = Config, prefix: str = "") -> tuple[str, ...]:
    """Returns the dotted names of all fields that hold a value."""
    return tuple(f"{prefix}{name}" for name in _types(config))


@cache
def _types(kind: Any) -> dict[str, Any]:
    """The types of all fields that hold a value, by their dotted names."""
    types: dict[str, Any] = {}
    for name, hint in _hints(kind).items():
        nested = _types(hint) if _is_part(hint) else None
        types |= {name: hint} if nested is None else {f"{name}.{inner}": nested[inner] for inner in nested}
    return types


def _is_part(value: Any) -> bool:
    return is_dataclass(value)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def suggestion(name: str) -> str:
    """Returns `; did you mean X?` for the nearest field name, or nothing if none is near."""
    names = field_names()
    near = difflib.get_close_matches(name, names, n=1) or [
        full
        for last in difflib.get_close_matches(name.split(".")[-1], [n.split(".")[-1] for n in names], n=1)
        for full in names
        if full.split(".")[-1] == last
    ]
    return f"; did you mean {near[0]}?" if near else ""


def check(config: Config) -> None:
    """Raises `ConfigError` if a field has the wrong type or a value that cannot be run."""
    check_types(config)
    if not config.name.isprintable() or "/" in config.name or config.name in ("", ".", ".."):
        raise ConfigError(f"name must do as that of a folder, got {_shown(config.name)}")
    for name in ("training.steps", "training.batch_size", "training.accumulate", "training.eval_every",
                 "training.eval_batch_size", "training.checkpoint_every", "training.keep_checkpoints",
                 "training.log_every", "adapter.rank", "balance.every", "data.length"):  # fmt: skip
        if get_field(config, name) < 1:
            raise ConfigError(f"{name} must be at least 1, got {get_field(config, name)}")
    for name in (
        "optimizer.learning_rate",
        "optimizer.weight_decay",
        "optimizer.eps",
        "optimizer.warmup_steps",
        "balance.start_step",
    ):
        if not 0 <= get_field(config, name) < math.inf:
            raise ConfigError(f"{name} must be at least 0 and finite, got {get_field(config, name)}")
    for name in ("optimizer.b1", "optimizer.b2", "adapter.dropout"):
        if not 0 <= get_field(config, name) < 1:
            raise ConfigError(f"{name} must be at least 0 and below 1, got {get_field(config, name)}")
    if not 0 <= config.balance.least_ratio <= 1:
        raise ConfigError(f"balance.least_ratio must be from 0 to 1, got {config.balance.least_ratio}")
    if config.optimizer.warmup_steps >= config.training.steps:
        raise ConfigError(
            f"optimizer.warmup_steps must be below training.steps ({config.training.steps}), "
            f"got {config.optimizer.warmup_steps}"
        )
    for name in ("training.members_at_once", "training.max_new_tokens", "data.train_examples", "data.eval_examples"):
        if get_field(config, name) is not None and get_field(config, name) < 1:
            raise ConfigError(f"{name} must be at least 1 or None, got {get_field(config, name)}")
    for name, hint in _types(Config).items():
        if hint in (int, int | None) and name not in _SEEDS and (get_field(config, name) or 0) > _LARGEST_COUNT:
            raise ConfigError(f"{name} must be at most {_LARGEST_COUNT:,}, got {get_field(config, name):,}")
    if not math.isfinite(config.adapter.alpha):
        raise ConfigError(f"adapter.alpha must be finite, got {config.adapter.alpha}")
    if config.optimizer.clip_norm is not None and not config.optimizer.clip_norm > 0:
        raise ConfigError(f"optimizer.clip_norm must be positive or None, got {config.optimizer.clip_norm}")
    for name in _SEEDS:
        if not 0 <= get_field(config, name) < 2**32:
            raise ConfigError(f"{name} must be from 0 to 2**32 - 1, got {get_field(config, name)}")
    for name in ("options", "data.modules"):
        entries = [entry[0] if name == "options" else entry for entry in get_field(config, name)]
        if twice := [entry for entry in entries if entries.count(entry) > 1]:
            raise ConfigError(f"{name} must name everything once, got {twice[0]!r} {entries.count(twice[0])} times")
    for name, value in config.options:
        if not math.isfinite(value):
            raise ConfigError(f"options: {name} must be finite, got {value}")
    from balora_jax.adapters import adapter_scale  # imports JAX: after the cheap mistakes

    try:
        method = _method(config)
        scale = adapter_scale(config.adapter.alpha, config.adapter.rank, method.scaling)
        steps, options = config.training.steps, dict(config.options)
        method.transformation(config.optimizer, config.balance, steps=steps, scale=scale, options=options)
    except (ArithmeticError, ValueError) as error:
        raise ConfigError(_full_name(config, str(error))) from None
    for name in method.unused_settings:
        value, default = getattr(config.optimizer, name), getattr(OptimizerSettings(), name)
        if value != default and (name, value) != ("weight_decay", 0):
            own = f"; its own {name} is among its options" if name in method.options else ""
            raise ConfigError(
                f"optimizer.{name} plays no part in {config.method} and must be left at {default}, got {value}{own}"
            )


def _method(config: Config) -> "Method":
    from balora_jax.methods import get_method  # imports JAX: after the cheap mistakes

    return get_method(config.method)


def _full_name(config: Config, message: str) -> str:
    """A method's message about one of its arguments, with the name that this has in a config."""
    name = message.split(" ", 1)[0]
    if name in dict(config.options):
        return f"options: {message}"
    part = next((part for part in ("optimizer", "balance") if f"{part}.{name}" in field_names()), None)
    return f"{part}.{message}" if part else message


def check_types(value: Any, prefix: str = "") -> None:
    """Raises `ConfigError` if a field of a config, or of a part of one, has the wrong type or a number of no machine.

    Args:
        value: the config, or the part.
        prefix: of the names of its fields in messages.
    """
    hints = _hints(value.__class__)
    for item in dataclasses.fields(value):
        name, hint, content = f"{prefix}{item.name}", hints[item.name], getattr(value, item.name)
        if not _has_type(content, hint):
            shown = getattr(hint, "__name__", None) if get_origin(hint) is None else None
            raise ConfigError(
                f"{name} must be of type {shown or str(hint).replace('typing.', '')}, got {_shown(content)}"
            )
        if not _has_size(content):
            raise ConfigError(f"{name} must be within 2**63, or 2**128 if it has a point, got {_shown(content)}")
        if _is_part(content):
            check_types(content, f"{name}.")


def _has_type(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_has_type(value, arg) for arg in args)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        hints = args[:1] * len(value) if args[-1] is ... else args
        return len(value) == len(hints) and all(map(_has_type, value, hints))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _has_size(value: Any) -> bool:
    """Whether numbers are of a size that arrays can hold; what must be finite is told where it must be positive too."""
    if isinstance(value, tuple):
        return all(map(_has_size, value))
    if isinstance(value, int):
        return abs(value) < 2**63
    return not isinstance(value, float) or abs(value) < 2.0**128 or not math.isfinite(value)


def _shown(value: Any) -> str:
    """A value from outside, in short."""
    try:
        text = repr(value)
    except Exception as error:  # an integer of more than 4300 digits has no text, and other objects have code of theirs
        text = f"a {type(value).__name__} that has no text ({error})"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _nearest_keyword(error: BaseException) -> str:
    """A suggestion for a dataclass's unexpected keyword argument."""
    match = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    kinds: dict[str, Any] = {kind.__name__: kind for kind in (Config, *_hints(Config).values()) if _is_part(kind)}
    if not isinstance(error, TypeError) or match is None or match[1] not in kinds:
        return ""
    near = difflib.get_close_matches(match[2], [item.name for item in dataclasses.fields(kinds[match[1]])], n=1)
    return f"; did you mean {near[0]!r}?" if near else suggestion(match[2])
