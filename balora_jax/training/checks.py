"""What a config must hold: the right types, values that can be run, and a method that takes them."""

import math
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from balora_jax.errors import ConfigError, not_among, shown_value
from balora_jax.settings import METHOD_NAMES, Config, OptimizerSettings
from balora_jax.training.fields import field_names, field_types, get_field, hints

if TYPE_CHECKING:
    from balora_jax.methods import Method

_LARGEST_COUNT = 2**31 - 1  # as steps and places are 32-bit integers on a device
_SEEDS = "seed", "data.seed"
_NOTHING = object()


def check(config: Config, *, like: Config | None = None) -> None:
    """Raises `ConfigError` if a field has the wrong type or a value that cannot be run.

    Args:
        config: the config.
        like: one that was checked before; types of what both share are not checked again.
    """
    check_types(config, like=like)
    may_be_own = "balora_jax.methods" in sys.modules  # where a config file may have added some
    if config.method not in METHOD_NAMES and not may_be_own:
        raise ConfigError(not_among("method", config.method, METHOD_NAMES))
    if not config.name.isprintable() or "/" in config.name or config.name in ("", ".", ".."):
        raise ConfigError(f"name must do as that of a folder, got {shown_value(config.name)}")
    for name in ("training.steps", "training.batch_size", "training.accumulate", "training.eval_every",
                 "training.eval_batch_size", "training.checkpoint_every", "training.keep_checkpoints",
                 "training.log_every", "adapter.rank", "balance.every", "data.length", "parallel.fsdp",
                 "parallel.tensor"):  # fmt: skip
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
    for name in ("training.members_at_once", "training.max_new_tokens", "training.patience", "data.train_examples",
                 "data.eval_examples"):  # fmt: skip
        if get_field(config, name) is not None and get_field(config, name) < 1:
            raise ConfigError(f"{name} must be at least 1 or None, got {get_field(config, name)}")
    for name in _counts():
        if (get_field(config, name) or 0) > _LARGEST_COUNT:
            raise ConfigError(f"{name} must be at most {_LARGEST_COUNT:,}, got {get_field(config, name):,}")
    if not math.isfinite(config.adapter.alpha):
        raise ConfigError(f"adapter.alpha must be finite, got {config.adapter.alpha}")
    if config.optimizer.clip_norm is not None and not config.optimizer.clip_norm > 0:
        raise ConfigError(f"optimizer.clip_norm must be positive or None, got {config.optimizer.clip_norm}")
    for name in _SEEDS:
        if not 0 <= get_field(config, name) < 2**32:
            raise ConfigError(f"{name} must be from 0 to 2**32 - 1, got {get_field(config, name)}")
    if config.parallel.data < 1 and config.parallel.data != -1:
        raise ConfigError(f"parallel.data must be at least 1, or -1 for all devices, got {config.parallel.data}")
    _check_evaluations(config)
    modules = config.data.modules
    if twice := [name for name in modules if modules.count(name) > 1]:
        raise ConfigError(f"data.modules must name everything once, got {twice[0]!r} {modules.count(twice[0])} times")
    for name, value in config.options.items():
        if not math.isfinite(value):
            raise ConfigError(f"options: {name} must be finite, got {value}")
    from balora_jax.adapters import adapter_scale  # imports JAX: after the cheap mistakes

    try:
        method = method_of(config)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    try:
        scale = adapter_scale(config.adapter.alpha, config.adapter.rank, method.scaling)
        steps = config.training.steps
        method.transformation(config.optimizer, config.balance, steps=steps, scale=scale, options=config.options)
    except (ArithmeticError, ValueError) as error:
        raise ConfigError(_full_name(config, method, str(error))) from None
    for name in method.unused_settings:
        value, default = getattr(config.optimizer, name), getattr(OptimizerSettings(), name)
        if value != default and (name, value) != ("weight_decay", 0):
            own = f"; its own {name} is among its options" if name in method.all_options else ""
            raise ConfigError(
                f"optimizer.{name} plays no part in {config.method} and must be left at {default}, got {value}{own}"
            )


@cache
def _counts() -> list[str]:
    """The fields that are whole numbers, but for seeds."""
    return [n for n, hint in field_types(Config).items() if hint in (int, int | None) and n not in _SEEDS]


def _check_evaluations(config: Config) -> None:
    names = [settings.name for settings in config.evaluations]
    for number, settings in enumerate(config.evaluations):
        place = f"evaluations[{number}]"
        if not settings.name or not settings.name.isprintable() or "/" in settings.name:
            raise ConfigError(f"{place}.name must be a word without `/`, got {shown_value(settings.name)}")
        if names.count(settings.name) > 1:
            raise ConfigError(f"{place}.name must be of this one alone, got {settings.name!r} more often")
        if settings.examples is not None and not 1 <= settings.examples <= _LARGEST_COUNT:
            raise ConfigError(f"{place}.examples must be from 1 to {_LARGEST_COUNT:,} or None, got {settings.examples}")
        if not 0 <= settings.seed < 2**32:
            raise ConfigError(f"{place}.seed must be from 0 to 2**32 - 1, got {settings.seed}")


def method_of(config: Config) -> "Method":
    """Returns the method of a config; raises `ConfigError` if there is none of the name."""
    from balora_jax.methods import get_method  # imports JAX: after the cheap mistakes

    return get_method(config.method)


def _full_name(config: Config, method: "Method", message: str) -> str:
    """A method's message about one of its arguments, with the name that this has in a config."""
    name = message.split(" ", 1)[0]
    if name in config.options:
        return f"options: {message}"
    part = next((part for part in ("optimizer", "balance") if f"{part}.{name}" in field_names()), None)
    if part is None and name in method.all_options:
        return f"options: {message}"
    return f"{part}.{message}" if part else message


def check_types(value: Any, prefix: str = "", *, like: Any = None) -> None:
    """Raises `ConfigError` if a field of a config, or of a part of one, has the wrong type or a number of no machine.

    Args:
        value: the config, or the part.
        prefix: of the names of its fields in messages.
        like: one whose fields have been checked; those that are the same objects are not checked again.
    """
    for field, hint in hints(value.__class__).items():
        content, known = getattr(value, field), getattr(like, field, _NOTHING)
        if content is known:
            continue
        name = f"{prefix}{field}"
        if not _type_test(hint)(content):
            shown = getattr(hint, "__name__", None) if get_origin(hint) is None else None
            raise ConfigError(
                f"{name} must be of type {shown or str(hint).replace('typing.', '')}, got {shown_value(content)}"
            )
        if isinstance(content, int | float | tuple | Mapping):
            if not _has_size(content):
                bounds = "within 2**63, or 2**128 if it has a point"
                raise ConfigError(f"{name} must be {bounds}, got {shown_value(content)}")
            parts = enumerate(content) if isinstance(content, tuple) else ()
            for part_name, part in ((f"{name}[{at}]", part) for at, part in parts if is_dataclass(part)):
                check_types(part, f"{part_name}.")
        elif is_dataclass(content):
            check_types(content, f"{name}.", like=known)


@cache
def _type_test(hint: Any) -> Callable[[Any], bool]:
    """What says whether a value is of a type."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        tests = [_type_test(arg) for arg in args]
        return lambda value: any(test(value) for test in tests)
    if origin is Literal:
        return lambda value: isinstance(value, str) and value in args
    if origin is tuple and args[-1] is ...:
        test = _type_test(args[0])
        return lambda value: isinstance(value, tuple) and all(map(test, value))
    if origin is tuple:
        tests = [_type_test(arg) for arg in args]
        return lambda value: (
            isinstance(value, tuple)
            and len(value) == len(tests)
            and all(test(item) for test, item in zip(tests, value, strict=True))
        )
    if origin is Mapping:
        of_name, of_part = (_type_test(arg) for arg in args)
        return lambda value: (
            isinstance(value, Mapping) and all(of_name(name) and of_part(part) for name, part in value.items())
        )
    if hint in (int, float):
        kinds = (int, float) if hint is float else (int,)
        return lambda value: isinstance(value, kinds) and not isinstance(value, bool)
    return lambda value: isinstance(value, hint)


def _has_size(value: Any) -> bool:
    """Whether numbers are of a size that arrays can hold; what must be finite is told where it must be positive too."""
    if isinstance(value, tuple | Mapping):
        return all(map(_has_size, value.values() if isinstance(value, Mapping) else value))
    if isinstance(value, int):
        return abs(value) < 2**63
    return not isinstance(value, float) or abs(value) < 2.0**128 or not math.isfinite(value)
