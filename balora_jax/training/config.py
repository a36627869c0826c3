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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from balora_jax.errors import ConfigError, shown_value
from balora_jax.settings import Config, Options
from balora_jax.training.checks import check, method_of
from balora_jax.training.fields import hints, suggestion, with_fields

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

MOST_RUNS = 100_000
"""Runs that a sweep may hold."""


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
            f"{path} must set `config` to a balora_jax.training.Config, got {shown_value(names.get('config'))}"
        )
    sweep = names.get("sweep", {})
    mappings = [sweep] if isinstance(sweep, Mapping) else sweep
    if not isinstance(mappings, Sequence) or not all(isinstance(mapping, Mapping) for mapping in mappings):
        raise ConfigError(
            f"{path}: sweep must map field names to values, or be a sequence of such, got {shown_value(sweep)}"
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
    run: Config | None = None
    for mapping in mappings or [{}]:
        if not isinstance(mapping, Mapping):
            raise ConfigError(f"sweep must map field names to values, got {shown_value(mapping)}")
        if parallel := [name for name in mapping if name.startswith("parallel.")]:
            raise ConfigError(f"sweep: {parallel[0]} has no part in what is computed; set it for all runs")
        for choice in combinations(mapping):
            before, run = run, with_fields(config, choice)
            check(run, like=before)
            if run in runs:
                raise ConfigError(f"sweep holds a run twice: {choice}")
            if len(runs) == MOST_RUNS:
                raise ConfigError(f"sweep must hold at most {MOST_RUNS} runs, got more")
            for name in method_of(run).unused_settings:
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
            raise ConfigError(f"sweep: {name} must have a sequence of values, got {shown_value(values)}")
    try:
        count = math.prod(map(len, mapping.values()))
    except OverflowError:  # of a range
        count = sys.maxsize
    if count > MOST_RUNS:
        raise ConfigError(f"sweep must hold at most {MOST_RUNS} runs, got {shown_value(count)} of {', '.join(mapping)}")
    for name, values in mapping.items():
        for value in values:
            try:
                hash(Options(value) if name == "options" and isinstance(value, Mapping) else value)
            except TypeError:
                raise ConfigError(
                    f"sweep: {name} must have texts, numbers or tuples, got {shown_value(value)}"
                ) from None
    for choice in itertools.product(*mapping.values()):
        yield dict(zip(mapping, choice, strict=True))


def _nearest_keyword(error: BaseException) -> str:
    """A suggestion for a dataclass's unexpected keyword argument."""
    match = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    kinds: dict[str, Any] = {
        kind.__name__: kind
        for kind in (Config, *hints(Config).values())
        if isinstance(kind, type) and is_dataclass(kind)
    }
    if not isinstance(error, TypeError) or match is None or match[1] not in kinds:
        return ""
    near = difflib.get_close_matches(match[2], [item.name for item in dataclasses.fields(kinds[match[1]])], n=1)
    return f"; did you mean {near[0]!r}?" if near else suggestion(match[2])
