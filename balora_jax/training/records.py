"""What a run leaves on disk: the resolved config, the environment, and one line of JSON per event.

config.json        the config of every member, as it was resolved
environment.json   versions, device, commit and command of every start
metrics.jsonl      the record: training steps, evaluations, checkpoints, results
checkpoints/       per population
results.json, results.txt, figure.png    made from metrics.jsonl at the end
"""

import dataclasses
import fcntl
import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from balora_jax.errors import ConfigError, RunError
from balora_jax.training.config import Config

_PACKAGES = ("balora-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "datasets", "grain", "numpy")

_KINDS = ("train", "evaluation", "result")  # of records of members; there are checkpoints too

Record = dict[str, Any]


class RunDirectory:
    """One run directory, locked for this process while it is open.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path, members: dict[str, Config]):
        """Opens the directory of a run, new or to be resumed.

        Args:
            path: the folder; is made if it does not exist.
            members: the run's configs by name.

        Raises:
            ConfigError: the folder holds a run of another config, or files that are no run.
            RunError: another process is working in it, or its record is broken.
        """
        self.path = path
        resolved = {name: dataclasses.asdict(config) for name, config in members.items()}
        config_file = path / "config.json"
        if path.exists() and not path.is_dir():
            raise ConfigError(f"the output {path} must be a folder, but it is a file")
        left_by_a_kill = {".lock", "config.json.tmp"}
        if not config_file.exists() and path.is_dir() and {p.name for p in path.iterdir()} - left_by_a_kill:
            raise ConfigError(f"the output folder {path} holds files but no config.json; choose an empty folder")
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / ".lock").open("w")
        except OSError as error:
            raise ConfigError(f"cannot write to the output folder {path}: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"another process is working in {path}; wait for it or choose another --output") from None
        if config_file.exists():
            self._check_same(_parse(config_file, dict), json.loads(json.dumps(resolved)))
        else:
            _write_whole(config_file, json.dumps(resolved, indent=2) + "\n")
        self._metrics, self._members = path / "metrics.jsonl", set(members)
        self.records = self._read()
        self._write_environment()

    def close(self) -> None:
        """Lets other processes use the directory."""
        self._lock.close()

    def append(self, records: Iterable[Record]) -> None:
        """Adds lines to the record and waits until they are on disk."""
        records = list(records)
        with self._metrics.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
        self.records += records

    def rewind(self, population: str, step: int) -> None:
        """Forgets what a population recorded after a step: it is about to be done again."""
        self.forget([r for r in self.records if r["population"] == population and r["step"] > step])

    def forget(self, records: list[Record]) -> None:
        """Forgets records, those of `of` say."""
        if records:
            forgotten = set(map(id, records))
            self.records = [record for record in self.records if id(record) not in forgotten]
            _write_whole(self._metrics, "".join(json.dumps(record) + "\n" for record in self.records))

    def of(self, kind: str, **equal: Any) -> list[Record]:
        """Returns the records of a kind whose fields have the given values."""
        return [r for r in self.records if r["kind"] == kind and all(r[k] == v for k, v in equal.items())]

    def check_complete(
        self, population: str, members: Iterable[str], *, step: int, eval_every: int, finished: bool = False
    ) -> None:
        """Raises `RunError` if the record of a population lacks something up to a step, or holds it twice.

        Args:
            population: its name.
            members: those of its members.
            step: the step, of a checkpoint or the last.
            eval_every: steps between evaluations.
            finished: whether it is the last one, so that it has been evaluated, and there are results.
        """
        expected = [("evaluation", at) for at in range(0, step, eval_every)]
        expected += [("train", at) for at in range(1, step + 1)]
        expected += [("evaluation", step), ("result", step)] if finished else []
        records = [r for r in self.records if r["population"] == population and "member" in r and r["step"] <= step]
        found = Counter((r["member"], r["kind"], r["step"]) for r in records)
        until = f"up to its {'last' if finished else 'checkpoint of'} step {step}"
        for member, (kind, at) in itertools.product(members, expected):
            if found[member, kind, at] != 1:
                wrong = "holds twice" if found[member, kind, at] else "lacks"
                raise RunError(
                    f"{self._metrics} {wrong} records of {population} {until}: the {kind} record of step {at} of "
                    f"{member}; put the file back, or delete the run directory to start again"
                )

    def _check_same(self, old: Any, new: Any) -> None:
        for name in sorted(set(old) | set(new)):
            before, after = _flat(old.get(name, {})), _flat(new.get(name, {}))
            for field in sorted(set(before) | set(after)):
                if before.get(field) != after.get(field):
                    what = "a run with other members" if name not in old or name not in new else (
                        f"a run with {field} = {before.get(field)!r}, and not {after.get(field)!r},"
                    )  # fmt: skip
                    raise ConfigError(
                        f"{self.path} holds {what} in {name}; choose another --output, or delete the folder"
                    )

    def _read(self) -> list[Record]:
        if not self._metrics.exists():
            return []
        lines = self._metrics.read_text(errors="replace").splitlines(keepends=True)
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                if not isinstance(record, dict) or not self._is_record(record):
                    raise RunError(f"{self._metrics}, line {number} is no record of a run; the record is broken")
                records.append(record)
            except json.JSONDecodeError as error:
                if number == len(lines):  # the process was killed while it wrote the line
                    _write_whole(self._metrics, "".join(lines[:-1]))
                    break
                raise RunError(f"{self._metrics}, line {number} is not JSON ({error}); the record is broken") from None
        return records

    def _is_record(self, record: Record) -> bool:
        """Whether a line is one that this run writes."""
        kind, member = record.get("kind"), record.get("member")
        own = kind == "checkpoint" or (kind in _KINDS and isinstance(member, str) and member in self._members)
        return own and isinstance(record.get("population"), str) and isinstance(record.get("step"), int)

    def _write_environment(self) -> None:
        file = self.path / "environment.json"
        starts = _parse(file, list) if file.exists() else []
        starts.append(environment())
        _write_whole(file, json.dumps(starts, indent=2) + "\n")


def environment() -> Record:
    """Returns what a result depends on beside its config: versions, device, commit, command and time."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    devices = jax.devices()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "cpu_count": os.cpu_count(),
    }


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one with dotted keys."""
    if not isinstance(value, dict):
        return {prefix[:-1]: value}
    return {key: leaf for name, item in value.items() for key, leaf in _flat(item, f"{prefix}{name}.").items()}


def _parse(file: Path, kind: type) -> Any:
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise RunError(f"{file} is not JSON ({error}); the run directory is broken") from None
    if not isinstance(content, kind):
        raise RunError(f"{file} must hold a JSON {kind.__name__}, got {content!r}; the run directory is broken")
    return content


def _write_whole(file: Path, text: str) -> None:
    """Writes a file so that a kill leaves either the old or the new one."""
    temporary = file.with_suffix(f"{file.suffix}.tmp")
    with temporary.open("w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(file)
