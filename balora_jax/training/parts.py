"""A sweep in parts, each in a run directory of its own, and how their records become that of one run."""

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from balora_jax.errors import RunError
from balora_jax.files import read_json, whole_file
from balora_jax.training.populations import Members, Populations, everyone
from balora_jax.training.progress import counted
from balora_jax.training.records import Record, RunDirectory, as_json, parse_line

_ORDER = ("train", "evaluation", "result")
"""Kinds of records of one step as one process writes them."""


@dataclass
class Part:
    """Members of a sweep that are trained by one job.

    Attributes:
        folder: their run directory.
        populations: their configs, by the names that they have in the whole sweep.
        job: the id of the last job that was to train them; None before the first.
    """

    folder: Path
    populations: Populations
    job: str | None = None

    def __str__(self) -> str:
        said = [f"{name} ({counted(len(members), 'run')})" for name, members in self.populations.items()]
        return f"{self.folder.parent.name}/{self.folder.name}: {', '.join(said)}"

    def is_finished(self) -> bool:
        """Whether all its members have results, of the configs that are asked for."""
        members = everyone(self.populations)
        config = self.folder / "config.json"
        if not config.is_file() or read_json(config) != as_json(members):
            return False
        return {record["member"] for record in self.records() if record["kind"] == "result"} == set(members)

    def records(self, name: str = "metrics.jsonl") -> list[Record]:
        """The lines of a file of its run directory, but for a last one that a kill has cut off.

        Raises:
            RunError: a line is broken.
        """
        file, found = self.folder / name, []
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
        for number, line in enumerate(lines, start=1):
            if line.endswith("\n"):
                try:
                    found.append(parse_line(line))
                except ValueError as error:
                    raise RunError(f"{file}, line {number} is {error}; the record is broken") from None
        return found


def cut(populations: Populations, jobs: int | None = None) -> list[Populations]:
    """Cuts a sweep into parts.

    Members are independent: how they are cut changes numbers by rounding alone, and not at all where populations stay
    whole. Of fewer parts than populations some have several; of more, the populations with the most members are cut
    into groups of them, in the order of the sweep. One with `training.patience` stays whole, as it ends with its last
    member.

    Args:
        populations: the sweep.
        jobs: number of parts; None for one a population.

    Returns:
        The parts; fewer than `jobs` where there is no more to cut.
    """
    jobs = jobs or len(populations)
    most = {name: len(own) if _settings(own).patience is None else 1 for name, own in populations.items()}
    groups = dict.fromkeys(populations, 1)
    while sum(groups.values()) < jobs:
        left = [name for name in groups if groups[name] < most[name]]
        if not left:
            break
        groups[max(left, key=lambda name: len(populations[name]) / groups[name])] += 1
    pieces = [(name, group) for name, count in groups.items() for group in _groups(populations[name], count)]
    parts: list[Populations] = [{} for _ in range(min(jobs, len(pieces)))]
    loads = [0] * len(parts)
    for name, group in sorted(pieces, key=lambda piece: -_work(piece[1])):
        lightest = loads.index(min(loads))
        parts[lightest][name] = group
        loads[lightest] += _work(group)
    place = list(everyone(populations)).index
    ordered = [dict(sorted(part.items(), key=lambda item: place(next(iter(item[1]))))) for part in parts]
    return sorted(ordered, key=lambda part: place(next(iter(everyone(part)))))


def _settings(members: Members) -> Any:
    return next(iter(members.values())).training


def _work(members: Members) -> int:
    return len(members) * _settings(members).steps


def _groups(members: Members, count: int) -> list[Members]:
    """Members one after the other in groups whose sizes differ by one at the most."""
    items = list(members.items())
    bounds = [round(len(items) * i / count) for i in range(count + 1)]
    return [dict(items[start:stop]) for start, stop in itertools.pairwise(bounds)]


def read_parts(output: Path, populations: Populations) -> list[Part] | None:
    """Returns the parts into which a run directory's sweep has been cut; None if it has not.

    Raises:
        RunError: its parts.json is broken, or is not of this sweep.
    """
    file = output / "parts.json"
    if not file.is_file():
        return None
    try:
        entries = [(set(entry["members"]), entry["job"]) for entry in read_json(file)]
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(
            f"{file} must list members and jobs ({error}); delete the run directory to start again"
        ) from None
    if sorted(name for names, _ in entries for name in names) != sorted(everyone(populations)):
        raise RunError(f"{file} is not of this sweep; delete the run directory to start again")
    return [Part(_folder(output, i), _of(populations, names), job) for i, (names, job) in enumerate(entries)]


def new_parts(output: Path, populations: Populations, jobs: int | None) -> list[Part]:
    """Cuts a sweep into parts of a run directory; see `cut`."""
    return [Part(_folder(output, i), part) for i, part in enumerate(cut(populations, jobs))]


def write_parts(output: Path, parts: Iterable[Part]) -> None:
    """Writes down who trains what, for `read_parts`."""
    with whole_file(output / "parts.json") as file:
        entries = [{"members": list(everyone(part.populations)), "job": part.job} for part in parts]
        file.write(json.dumps(entries, indent=2) + "\n")


def home(run: Path, populations: Populations, population: str, member: str) -> tuple[Path, Members]:
    """Returns the run directory that has a member's checkpoints, and who was trained there together with it."""
    for part in read_parts(run, populations) or ():
        if member in part.populations.get(population, ()):
            return part.folder, part.populations[population]
    return run, populations[population]


def check_whole(directory: RunDirectory) -> None:
    """Raises `RunError` if the sweep of a run directory is cut into parts, which have not come together yet."""
    if (directory.path / "parts.json").is_file() and not directory.of("result"):
        raise RunError(
            f"the sweep in {directory.path} is cut into parts, of which some are missing; the same command with "
            "--launcher goes on, or choose another --output"
        )


def check_begins_here(directory: RunDirectory) -> None:
    """Raises `RunError` if a run directory has a run that one process has begun, and whose sweep is therefore whole."""
    if directory.records:
        raise RunError(
            f"the run in {directory.path} was begun without --launcher, and goes on without; or choose another --output"
        )


def collect(directory: RunDirectory, populations: Populations, parts: Iterable[Part]) -> None:
    """Makes the record of a run of those of its finished parts, in the order in which one process writes it.

    The seconds of a step of a population are those of all its parts together.
    """
    parts = list(parts)
    records = [record for part in parts for record in part.records()]
    directory.forget(directory.records)
    for name, members in populations.items():
        place = list(members).index
        own = [r for r in records if r["population"] == name and r["kind"] in _ORDER]
        own.sort(key=lambda r: (r["step"], _ORDER.index(r["kind"]), place(r["member"])))
        directory.append(_with_common_seconds(own, sum(name in part.populations for part in parts)))
        for file in ("answers.jsonl", "spectra.jsonl"):
            lines = [line for part in parts for line in part.records(file) if line["population"] == name]
            if lines:
                directory.write_lines(file, name, lines)
    command = {"command": _environments(directory.path)[-1]["command"]}  # the jobs' own are submitit's
    starts = [start | command for part in parts for start in _environments(part.folder)]
    directory.write_environments(sorted(starts, key=lambda start: start["time"]))


def _environments(run: Path) -> list[Record]:
    """The starts of a run, as its environment.json has them."""
    return read_json(run / "environment.json")


def _with_common_seconds(records: list[Record], parts: int) -> list[Record]:
    """Records of a population with the time of a step once: the sum over its parts, where all of them have it."""
    seconds: dict[int, list[float]] = {}
    for record in records:
        if "seconds" in record:
            seconds.setdefault(record["step"], []).append(record["seconds"])
    first, out = records[0]["member"], []
    for record in records:
        kept = {key: value for key, value in record.items() if key != "seconds"}
        found = seconds.get(record["step"], ())
        if record["kind"] == "train" and record["member"] == first and len(found) == parts:
            kept["seconds"] = sum(found)
        out.append(kept)
    return out


def _folder(output: Path, index: int) -> Path:
    return output / "parts" / str(index)


def _of(populations: Populations, names: set[str]) -> Populations:
    """The populations of some members alone."""
    found = {p: {name: c for name, c in own.items() if name in names} for p, own in populations.items()}
    return {population: own for population, own in found.items() if own}
