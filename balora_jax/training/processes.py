"""A run of several processes: all compute the same, and the first alone writes and shows."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from balora_jax.errors import ConfigError, RunError
from balora_jax.settings import ParallelSettings

_COUNTS = "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"
"""Where a cluster tells a process of how many it is one; `jax.distributed` finds the rest."""


def connect(settings: ParallelSettings) -> None:
    """Connects this process with the others of its run, before a device is used; does nothing if there are none.

    Args:
        settings: of the run.

    Raises:
        ConfigError: the settings are not all there, or the others are not found.
    """
    given: dict[str, Any] = {name: getattr(settings, name) for name in ("coordinator", "processes", "process")}
    if any(value is not None for value in given.values()):
        if missing := [name for name, value in given.items() if value is None]:
            raise ConfigError(f"parallel.{missing[0]} must be given beside the others of {', '.join(given)}")
        if not 0 <= given["process"] < given["processes"]:
            most = given["processes"] - 1
            raise ConfigError(f"parallel.process must be from 0 to {most}, got {given['process']}")
        if not given["coordinator"].rpartition(":")[2].isdecimal() or ":" not in given["coordinator"]:
            raise ConfigError(f"parallel.coordinator must be host:port, got {given['coordinator']!r}")
    elif not _is_one_of_several():
        return
    try:
        jax.distributed.initialize(given["coordinator"], given["processes"], given["process"])
    except (RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(
            f"the processes of this run must find each other ({first}); look at parallel.coordinator, and whether all "
            f"of them were started"
        ) from error


def _is_one_of_several() -> bool:
    """Whether a scheduler, or the TPU's own environment, says that this process is one of several."""
    if any(int(os.environ.get(name) or 1) > 1 for name in _COUNTS):
        return "SLURM_NTASKS" not in os.environ or "SLURM_STEP_NODELIST" in os.environ  # not within srun: one process
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Ends this process at once, with the reason, where another one of the run has ended."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise
        first = str(error).splitlines()[0]
        print(
            f"balora-jax: error: another process of this run has ended or cannot be reached ({first:.200}); the same "
            f"command goes on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # an orderly end would wait for the others


def is_first() -> bool:
    """Whether this process writes and shows."""
    return jax.process_index() == 0


def from_first(function: Callable[[], Any]) -> Any:
    """Calls a function in the first process, and returns its result in all.

    Args:
        function: returns values of JSON.

    Raises:
        ConfigError: in all processes what it raises in the first, as with `RunError`.
    """
    if jax.process_count() == 1:
        return function()
    told: dict[str, Any] = {}
    if is_first():
        try:
            told = {"result": function()}
        except (ConfigError, RunError) as error:
            told = {"error": str(error), "kind": type(error).__name__}
    told = _broadcast(told)
    if "error" in told:
        raise {"ConfigError": ConfigError, "RunError": RunError}[told["kind"]](told["error"])
    return told["result"]


def any_process(flag: int) -> int:
    """Returns the largest of the numbers that the processes give, in all of them at once."""
    if jax.process_count() == 1:
        return flag
    return int(np.max(multihost_utils.process_allgather(np.int32(flag))))


def _broadcast(value: Any) -> Any:
    """A value of JSON that the first process has, in all."""
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    padded = text if is_first() else np.zeros(length, np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))))
