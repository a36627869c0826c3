"""What a run leaves on disk: the resolved config, the environment, and one line of JSON per event.

config.json        the config of every member, as it was resolved
environment.json   versions, device, commit and command of every start
metrics.jsonl      the record: training steps, evaluations, checkpoints, results
answers.jsonl      some answers of the last evaluation, with what was asked and expected, to look at
spectra.jsonl      the singular values of every pair at the end
checkpoints/       per population
parts.json, parts/, jobs/    of a sweep in several jobs: who trains what, their run directories and their logs
results.json, results.txt, figure.png, report.html    made from metrics.jsonl at the end
"""

import dataclasses
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
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import jax

from balora_jax.errors import ConfigError, RunError
from balora_jax.files import MOST_NESTED, is_nested_too_deeply, open_to_append, read_json, whole_file
from balora_jax.methods import get_method
from balora_jax.settings import Config, TrainingSettings
from balora_jax.training.live import LiveLog
from balora_jax.training.processes import from_first, is_first

try:
    import fcntl
except ImportError:  # on Windows, where directories are not locked
    fcntl = None  # type: ignore[assignment]

_PACKAGES = ("balora-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "datasets", "grain", "numpy")

_KINDS = ("train", "evaluation", "result")  # of records of members; there are checkpoints too

Record = dict[str, Any]


class RunDirectory:
    """One run directory, locked for this process while it is open.

    Of a run of several processes the first alone reads and writes; the others have the same record in memory.

    Attributes:
        path: the folder.
        started: when the run in it was first started.
    """

    def __init__(self, path: Path, members: dict[str, Config]):
        """Opens the directory of a run, new or to be resumed.

        Args:
            path: the folder; is made if it does not exist.
            members: the run's configs by name. They may ask for more steps than those of the run that is there; its
                results are then forgotten, and it goes on.

        Raises:
            ConfigError: the folder cannot be written, holds a run of another config, or what is no run's; or the run
                there cannot go on to more steps, as its first ones depend on their number.
            RunError: another process is working in it, or its record is broken.
        """
        self.path = path
        self._lock: IO[str] | None = None
        self._watcher: LiveLog | None = None
        self._metrics, self._members = path / "metrics.jsonl", set(members)
        self.records: list[Record] = []
        self.started, self.records = from_first(lambda: self._open(members))

    def _open(self, members: dict[str, Config]) -> tuple[str, list[Record]]:
        """Makes or resumes the directory; returns when it was first started, and its record."""
        path, config_file = self.path, self.path / "config.json"
        resolved = as_json(members)
        try:
            if path.exists() and not path.is_dir():
                raise ConfigError(f"the output {path} must be a folder, but it is a file")
            path.mkdir(parents=True, exist_ok=True)
            self._check_entries()
            self._lock = lock = open_to_append(path / ".lock")
        except OSError as error:
            raise ConfigError(f"cannot write to the output folder {path}: {error.strerror}") from None
        if not _locked(lock):
            raise RunError(f"another process is working in {path}; wait for it or choose another --output")
        try:
            before = _parse(config_file, dict) if config_file.exists() else None
            goes_on = before is not None and _asks_for_more(before, resolved)
            if goes_on:
                self._check_goes_on(before, members)
            elif before is not None:
                self._check_same(before, resolved)
            self.records = self._read()
            if goes_on:  # first, lest a kill leave results of fewer steps than the config has
                self._forget_the_end(before)
            if before is None or goes_on:
                with whole_file(config_file) as file:
                    file.write(json.dumps(resolved, indent=2) + "\n")
            return self._write_environment(), self.records
        except (ConfigError, RunError):
            self.close()
            raise
        except OSError as error:
            raise RunError(f"cannot use the output folder {path}: {error.strerror or error}") from error

    def close(self) -> None:
        """Lets other processes use the directory."""
        if self._lock is not None:
            self._lock.close()
        if self._watcher is not None:
            self._watcher.close()

    def watch(self, watcher: LiveLog) -> None:
        """Hands what is added from now on to a log too, which is closed with the directory."""
        self._watcher = watcher

    def append(self, records: Iterable[Record]) -> None:
        """Adds lines to the record and waits until they are on disk."""
        records = list(records)
        if is_first():
            with open_to_append(self._metrics) as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
                file.flush()
                os.fsync(file.fileno())
        self.records += records
        if self._watcher is not None:
            self._watcher.write(records)

    def write_lines(self, name: str, population: str, records: Iterable[Record]) -> None:
        """Writes what a population has in a file beside the record, in the place of what it had there.

        Args:
            name: of the file, `answers.jsonl` say.
            population: its name.
            records: with the `member` that each is of; the population is added.

        Raises:
            RunError: a line of the file is broken.
        """
        if not is_first():
            return
        file, kept = self.path / name, []
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if file.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                other = parse_line(line)["population"] != population
            except (KeyError, TypeError, ValueError) as error:
                raise RunError(f"{file}, line {number} is none of its kind ({error}); delete it to go on") from None
            if other:
                kept.append(line)
        with whole_file(file) as out:
            out.writelines(kept)
            out.writelines(json.dumps({"population": population} | record) + "\n" for record in records)

    def write_environments(self, starts: list[Record]) -> None:
        """Writes where and when the run was started, the first start first."""
        with whole_file(self.path / "environment.json") as file:
            file.write(json.dumps(starts, indent=2) + "\n")

    def rewind(self, population: str, step: int) -> None:
        """Forgets what a population recorded after a step: it is about to be done again."""
        self.forget([r for r in self.records if r["population"] == population and r["step"] > step])

    def forget(self, records: list[Record]) -> None:
        """Forgets records, those of `of` say."""
        if records:
            forgotten = set(map(id, records))
            kept = [record for record in self.records if id(record) not in forgotten]
            if is_first():
                self._write(kept)
            self.records = kept

    def of(self, kind: str, **equal: Any) -> list[Record]:
        """Returns the records of a kind whose fields have the given values."""
        return [r for r in self.records if r["kind"] == kind and all(r[k] == v for k, v in equal.items())]

    def check_complete(
        self, population: str, members: Iterable[str], settings: TrainingSettings, *, checkpoint: int | None = None
    ) -> None:
        """Raises `RunError` if the record of a population lacks something, or holds it twice.

        Args:
            population: its name.
            members: those of its members.
            settings: of its training.
            checkpoint: the step up to which it must be there; None for a finished run, with its results.
        """
        step = self._last_step(population, settings) if checkpoint is None else checkpoint
        expected = [("evaluation", at) for at in range(0, step, settings.eval_every)]
        expected += [("train", at) for at in range(1, step + 1)]
        expected += [("evaluation", step), ("result", step)] if checkpoint is None else []
        records = [r for r in self.records if r["population"] == population and "member" in r and r["step"] <= step]
        found = Counter((r["member"], r["kind"], r["step"]) for r in records)
        until = f"up to its {'last' if checkpoint is None else 'checkpoint of'} step {step}"
        for member, (kind, at) in itertools.product(members, expected):
            if found[member, kind, at] != 1:
                wrong = "holds twice" if found[member, kind, at] else "lacks"
                raise RunError(
                    f"{self._metrics} {wrong} records of {population} {until}: the {kind} record of step {at} of "
                    f"{member}; put the file back, or delete the run directory to start again"
                )

    def _last_step(self, population: str, settings: TrainingSettings) -> int:
        """The step at which a population has ended, which is an earlier one where patience has run out."""
        results = [] if settings.patience is None else self.of("result", population=population)
        return max((record["step"] for record in results), default=settings.steps)

    def _check_entries(self) -> None:
        left_by_a_kill = {".lock", "config.json.tmp"}
        names = {entry.name for entry in self.path.iterdir()}
        if "config.json" not in names and names - left_by_a_kill:
            raise ConfigError(f"the output folder {self.path} holds files but no config.json; choose an empty folder")
        for folder, folders, files in os.walk(self.path):
            for entry in (Path(folder, name) for name in folders + files):
                if entry.is_symlink():
                    raise ConfigError(f"{entry} is a link, through which a run would write elsewhere; remove it")

    def _check_goes_on(self, before: Any, members: Mapping[str, Config]) -> None:
        """Raises if the first steps of a run depend on the number of all."""
        for name, config in members.items():
            schedule, steps = config.optimizer.schedule, config.training.steps
            if schedule != "constant":
                why = f"the learning rate falls to zero at its end (optimizer.schedule {schedule})"
            elif get_method(config.method).phased:
                why = f"the phases of {config.method} are shares of it"
            elif self._has_chosen_out_of_turn(before[name]["training"]):
                why = "its last evaluation, which came out of turn (training.eval_every), had a part in training.select"
            else:
                continue
            raise ConfigError(
                f"{self.path} holds a run of {before[name]['training']['steps']} steps, which cannot go on to {steps}: "
                f"{why}; choose another --output for a run of {steps} from the start"
            )

    def _has_chosen_out_of_turn(self, training: Any) -> bool:
        """Whether the state of a run knows an evaluation that a run of more steps does not have."""
        chooses = training.get("select") == "best" or training.get("patience") is not None
        return chooses and training["steps"] % training["eval_every"] != 0

    def _forget_the_end(self, before: Any) -> None:
        """Forgets what a run records at its last step alone: results, and an evaluation out of turn."""

        def is_end(record: Record) -> bool:
            if record["kind"] == "result":
                return True
            training = before[record["member"]]["training"] if record["kind"] == "evaluation" else {}
            return record["step"] == training.get("steps") and record["step"] % training["eval_every"] != 0

        self.forget([record for record in self.records if is_end(record)])

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
                record = parse_line(line)
            except ValueError as error:
                if number == len(lines):
                    break
                raise RunError(f"{self._metrics}, line {number} is {error}; the record is broken") from None
            if not self._is_own(record):
                raise RunError(f"{self._metrics}, line {number} is no record of a run; the record is broken")
            records.append(record)
        if len(records) < len(lines) or (lines and not lines[-1].endswith("\n")):
            self._write(records)  # the process was killed, or the disk was full, while it wrote the last line
        return records

    def _is_own(self, record: Any) -> bool:
        """Whether a line is one that this run writes."""
        if not is_record(record):
            return False
        kind, member = record["kind"], record.get("member")
        return kind == "checkpoint" or (kind in _KINDS and isinstance(member, str) and member in self._members)

    def _write(self, records: list[Record]) -> None:
        with whole_file(self._metrics) as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    def _write_environment(self) -> str:
        """Adds this start to the file; returns the time of the first."""
        environments = self.path / "environment.json"
        starts = _parse(environments, list) if environments.exists() else []
        starts.append(environment())
        self.write_environments(starts)
        return str(starts[0].get("time"))


def as_json(members: Mapping[str, Config]) -> dict[str, Any]:
    """Returns configs as config.json holds them: without the devices, which have no part in what is computed."""
    resolved = ((name, dataclasses.asdict(config).items()) for name, config in members.items())
    return json.loads(json.dumps({name: {k: v for k, v in items if k != "parallel"} for name, items in resolved}))


def is_in_use(path: Path) -> bool:
    """Whether a process works in a run directory."""
    if not (path / ".lock").exists():
        return False
    with open_to_append(path / ".lock") as file:
        return not _locked(file)


def parse_line(line: str) -> Any:
    """Returns what a line of metrics.jsonl holds; raises `ValueError`, with what it is, if it is not JSON."""
    if is_nested_too_deeply(line):
        raise ValueError(f"nested more than {MOST_NESTED} deep")
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error


def is_record(record: Any) -> bool:
    """Whether a line of metrics.jsonl is a record."""
    types = {"kind": str, "population": str, "step": int}
    return isinstance(record, dict) and all(isinstance(record.get(name), kind) for name, kind in types.items())


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


def _locked(file: IO[str]) -> bool:
    """Locks a file for this process until it is closed, and returns whether it could."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one with dotted keys."""
    if not isinstance(value, dict):
        return {prefix[:-1]: value}
    return {key: leaf for name, item in value.items() for key, leaf in _flat(item, f"{prefix}{name}.").items()}


def _asks_for_more(before: Any, after: Any) -> bool:
    """Whether the configs of a run differ from earlier ones in nothing but more steps."""
    if before.keys() != after.keys():
        return False
    for name, config in after.items():
        old, new = _flat(before[name]), _flat(config)
        if {field for field in old | new if old.get(field) != new.get(field)} != {"training.steps"}:
            return False
        if not isinstance(old["training.steps"], int) or old["training.steps"] > new["training.steps"]:
            return False
    return True


def _parse(file: Path, kind: type) -> Any:
    try:
        content = read_json(file)
    except ValueError as error:
        raise RunError(f"{error}; the run directory is broken") from None
    if not isinstance(content, kind):
        raise RunError(f"{file} must hold a JSON {kind.__name__}, got {content!r:.80}; the run directory is broken")
    return content
