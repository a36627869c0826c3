"""Choices that depend on the device for which a program is compiled, which need not be the one that compiles it."""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import jax
from jax import lax


def has_one_cpu() -> bool:
    """Whether this process, and all that run with it, have one CPU device, so that no array of it is sharded."""
    try:
        return jax.device_count("cpu") == 1
    except RuntimeError:  # without the CPU's backend
        return False


def with_choice(function: Callable, *arguments: Any, cpu: Hashable, default: Hashable) -> Any:
    """Returns `function(choice, *arguments)` with one choice on CPUs and another elsewhere.

    The choice is made when the program is lowered, so that one that is exported, or compiled for a device that is not
    there, has the right one. Derivatives of both modes and of any order pass through.

    Args:
        function: of a static choice and arrays; its results have the same types for all choices.
        *arguments: trees of arrays.
        cpu: the choice on CPUs.
        default: the choice elsewhere.
    """
    if cpu == default:
        return function(default, *arguments)
    return lax.platform_dependent(*arguments, cpu=partial(function, cpu), default=partial(function, default))
