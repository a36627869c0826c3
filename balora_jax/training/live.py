"""Metrics of a run for a dashboard while it goes on, beside its record and by the same names."""

import contextvars
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from balora_jax.errors import ConfigError, RunError
from balora_jax.files import is_number

if TYPE_CHECKING:
    from balora_jax.settings import Config
    from balora_jax.training.records import Record

LIBRARIES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
"""What `--log` takes, each also an extra of this package, and the library behind it."""


class Member(NamedTuple):
    """What is logged of one member, and where.

    Attributes:
        name: its name.
        project: that of its config.
        folder: the run directory.
        config: its config, nested.
        key: a text that this member of this run has for itself alone.
        resumed: whether the run goes on after an interruption.
    """

    name: str
    project: str
    folder: Path
    config: dict[str, Any]
    key: str
    resumed: bool


class Log(NamedTuple):
    """An open log of one member: `log(values, step)` and `finish()`."""

    log: Callable[[dict[str, float], int], Any]
    finish: Callable[[], Any]


class LiveLog:
    """Hands the records of a run to a library, where each member is a run of its own.

    Args of the constructor: a name in `LIBRARIES`, the run directory, the members' configs by name, a text that this
    run has for itself alone, and whether it goes on after an interruption.
    """

    def __init__(self, kind: str, folder: Path, members: "Mapping[str, Config]", *, identity: str, resumed: bool):
        check_log(kind)
        self._kind, self._folder, self._members = kind, folder, members
        self._identity, self._resumed = identity, resumed
        self._open: dict[str, Log] = {}

    def write(self, records: "Iterable[Record]") -> None:
        """Logs the numbers of some records; a member's log is finished with its result.

        Raises:
            RunError: the library has failed.
        """
        try:
            for record in records:
                if (member := record.get("member")) is None:
                    continue
                if member not in self._open:
                    self._open[member] = self._start(member)
                self._open[member].log(numbers(record), record["step"])
                if record["kind"] == "result":
                    self._open.pop(member).finish()
        except Exception as error:
            reason = str(error).rstrip(".")
            raise RunError(f"--log {self._kind}: {reason}; the record is kept, and the same command goes on") from error

    def close(self) -> None:
        """Finishes what is open."""
        while self._open:
            self._open.popitem()[1].finish()

    def _start(self, name: str) -> Log:
        config = self._members[name]
        key = hashlib.sha256(f"{self._identity} {name}".encode()).hexdigest()[:16]
        fields = dataclasses.asdict(config)
        member = Member(name, config.name, self._folder.resolve(), fields, key, self._resumed)
        return _STARTS[self._kind](importlib.import_module(LIBRARIES[self._kind]), member)


def check_log(kind: str) -> None:
    """Raises `ConfigError` if there is no such log, or its library is not installed."""
    if kind not in LIBRARIES:
        raise ConfigError(f"--log must be one of {', '.join(LIBRARIES)}, got {kind!r}")
    if importlib.util.find_spec(LIBRARIES[kind]) is None:
        raise ConfigError(f"--log {kind} needs {LIBRARIES[kind]}: pip install 'balora-jax[{kind}]'")


def numbers(record: "Record") -> dict[str, float]:
    """Returns the numbers of a record by their names in metrics.jsonl; those of modules are `NAME/MODULE`."""
    values: dict[str, Any] = {}
    for name, value in record.items():
        values |= {f"{name}/{part}": x for part, x in value.items()} if isinstance(value, Mapping) else {name: value}
    del values["step"]
    return {n: float(x) for n, x in values.items() if is_number(x)}


def _tensorboard(library: ModuleType, member: Member) -> Log:
    writer = library.SummaryWriter(str(member.folder / "tensorboard" / member.name))

    def log(values, step):
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Log(log, writer.close)


def _wandb(library: ModuleType, member: Member) -> Log:
    named = {"project": member.project, "group": member.folder.name, "name": member.name, "id": member.key}
    run = library.init(**named, config=member.config, resume="allow", reinit="create_new")
    return Log(lambda values, step: run.log(values, step=step), run.finish)


def _trackio(library: ModuleType, member: Member) -> Log:
    named = {"project": member.project, "group": member.folder.name, "name": member.name, "config": member.config}
    resume = "allow" if member.resumed else "never"
    start = functools.partial(library.init, **named, resume=resume, embed=False)
    run = contextvars.copy_context().run(start)  # in a context of its own: it would end the run that began before
    return Log(lambda values, step: run.log(values, step=step), run.finish)


_STARTS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
