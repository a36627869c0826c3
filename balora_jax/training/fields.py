"""The fields of a config by their dotted names, `optimizer.learning_rate` say."""

import dataclasses
import difflib
import operator
import types
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from balora_jax.errors import ConfigError
from balora_jax.settings import Config


def get_field(config: Config, name: str) -> Any:
    """Returns the field of a dotted name.

    Raises:
        ConfigError: there is none; the message suggests the nearest.
    """
    getter = _getter(name)
    try:
        if getter is not None:
            return getter(config)
    except AttributeError:  # a part of another type is in its place
        pass
    raise ConfigError(f"there is no field {name}{suggestion(name)}")


@cache
def _getter(name: str) -> Callable[[Config], Any] | None:
    """What reads the field, or the part, of a dotted name; None if there is none."""
    known = any(f"{field}.".startswith(f"{name}.") for field in field_types(Config))
    return operator.attrgetter(name) if known else None


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
    return tuple(f"{prefix}{name}" for name in field_types(config))


@cache
def field_types(kind: Any) -> dict[str, Any]:
    """Returns the types of all fields that hold a value, by their dotted names."""
    found: dict[str, Any] = {}
    for name, hint in hints(kind).items():
        nested = field_types(hint) if isinstance(hint, type) and is_dataclass(hint) else None
        found |= {name: hint} if nested is None else {f"{name}.{inner}": nested[inner] for inner in nested}
    return found


@cache
def hints(kind: Any) -> dict[str, Any]:
    """Returns the types of the fields of a config, or of a part of one."""
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


def from_json(kind: Any, value: Any) -> Any:
    """Returns a value of JSON as the type of a config's field, if it fits.

    Dataclasses come from mappings, tuples from lists.

    Args:
        kind: the type, `Config` or that of one of its fields.
        value: what JSON holds; what does not fit `kind` is returned as it is, for `check_types` to tell.

    Raises:
        ValueError: a mapping is expected, or has a field that there is not.
    """
    if hasattr(kind, "__dataclass_fields__"):
        if not isinstance(value, dict):
            raise ValueError(f"{kind.__name__} must be an object, got {value!r:.80}")
        own = hints(kind)
        unknown = [name for name in value if name not in own]
        if unknown:
            raise ValueError(f"{kind.__name__} has no field {unknown[0]}")
        return kind(**{name: from_json(own[name], item) for name, item in value.items()})
    if get_origin(kind) in (Union, types.UnionType) and value is not None:
        return from_json(next(arg for arg in get_args(kind) if arg is not type(None)), value)
    if get_origin(kind) is tuple and isinstance(value, list):
        args = get_args(kind)
        kinds = args[:1] * len(value) if args[-1] is ... else args
        return (
            tuple(from_json(kind, item) for kind, item in zip(kinds, value, strict=True))
            if len(kinds) == len(value)
            else value
        )
    return value
