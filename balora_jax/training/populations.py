"""Which runs of a sweep train together, and what they are called."""

import re
import zlib
from collections.abc import Sequence

from balora_jax.errors import ConfigError
from balora_jax.settings import Config
from balora_jax.training.config import NUMERIC_FIELDS
from balora_jax.training.fields import field_names, get_field

Members = dict[str, Config]
"""The configs of a population, by the names of its members."""

Populations = dict[str, Members]
"""Populations by name."""


def sort_into_populations(configs: Sequence[Config]) -> Populations:
    """Returns the members by name, sorted into those that differ in numeric fields alone.

    Populations are named by the structural fields that differ in the sweep, members by these and the numeric ones.
    """
    differing = [name for name in field_names() if len({get_field(config, name) for config in configs}) > 1]
    structural = [name for name in differing if name not in NUMERIC_FIELDS]
    numeric = sorted((name for name in differing if name in NUMERIC_FIELDS), key="seed".__eq__)  # the seed last
    populations: Populations = {}
    for config in configs:
        parts = [_label(config, name) for name in structural if name != "method"]
        population = "-".join([config.method, *parts])
        member = "-".join([population, *(_label(config, name) for name in numeric)])
        if member in populations.setdefault(population, {}):
            raise ConfigError(f"sweep: two runs would have the name {member}; their values differ too little to tell")
        populations[population][member] = config
    return populations


def everyone(populations: Populations) -> Members:
    """Returns the members of all populations."""
    return {name: config for members in populations.values() for name, config in members.items()}


def _label(config: Config, field: str) -> str:
    value = get_field(config, field)
    if field == "options":
        return "-".join(f"{name}={number:g}" for name, number in value.items()) or "no_options"
    text = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
    text = re.sub(r"[^\w.+-]+", "_", text)
    if len(text) > 40 or (isinstance(value, str) and text != value):
        text = f"{text[:24]}~{zlib.crc32(repr(value).encode()):08x}"
    return f"{field.rsplit('.', 1)[-1]}={text}"
