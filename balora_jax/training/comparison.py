"""Comparing finished runs: the best cell of every method, and its difference from a reference, seed by seed."""

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import special

from balora_jax.files import is_number, read_json, read_object
from balora_jax.training.records import Record, RunError, is_record, parse_line


@dataclass(frozen=True)
class Run:
    """One finished member of a run directory.

    Attributes:
        config: its config, nested, as in `config.json`.
        result: its result record.
        curve: its evaluation losses by step.
        steps: its records of training steps.
        evaluations: its records of evaluations.
        spectra: the singular values of its pairs at the end, as in `spectra.jsonl`.
    """

    config: Mapping[str, Any]
    result: Record
    curve: Mapping[int, float]
    steps: Sequence[Record] = ()
    evaluations: Sequence[Record] = ()
    spectra: Sequence[Record] = ()

    def field(self, name: str) -> Any:
        """Returns the config's value of a dotted name; a list becomes a tuple."""
        value: Any = self.config
        for part in name.split("."):
            value = value[part]
        return _hashable(value)

    def fields(self) -> dict[str, Any]:
        """Returns all values of the config by dotted names."""
        names = dotted_names(self.config)
        return {name: self.field(name) for name in names}

    @property
    def loss(self) -> float:
        """The final evaluation loss; infinite if the run diverged."""
        return float(self.result["evaluation_loss"]) if self.result["diverged_at"] < 0 else math.inf


@dataclass(frozen=True)
class Cell:
    """The runs of one method that differ in their seed alone.

    Attributes:
        values: of the fields that were searched.
        runs: by seed.
        on_edge: the searched fields whose value is the least or greatest of three or more that were tried.
        searched: number of runs in all cells of the search, and how many of them diverged.
    """

    values: Mapping[str, Any]
    runs: Mapping[int, Run]
    on_edge: tuple[str, ...]
    searched: tuple[int, int]

    @property
    def losses(self) -> list[float]:
        """The final losses, in the order of the seeds."""
        return [self.runs[seed].loss for seed in sorted(self.runs)]

    @property
    def mean(self) -> float:
        """The mean of the final losses."""
        return statistics.fmean(self.losses)

    @property
    def deviation(self) -> float | None:
        """The standard deviation of the final losses over the seeds; None for one seed."""
        return statistics.stdev(self.losses) if len(self.runs) > 1 else None


@dataclass(frozen=True)
class Difference:
    """The mean difference of paired values and its confidence interval.

    Attributes:
        mean: of the differences.
        half_width: of the 95 % confidence interval by Student's t.
        better: in how many pairs the value is below the reference.
        n: number of pairs.
        p_value: of the paired t-test, two-sided.
    """

    mean: float
    half_width: float
    better: int
    n: int
    p_value: float

    @property
    def deviation(self) -> float:
        """The standard deviation of the differences."""
        return float(self.half_width * math.sqrt(self.n) / special.stdtrit(self.n - 1, 0.975))

    @property
    def verdict(self) -> str:
        """`"better"` or `"worse"` where the interval excludes 0, else `"undecided"`."""
        if abs(self.mean) <= self.half_width:
            return "undecided"
        return "better" if self.mean < 0 else "worse"


@dataclass(frozen=True)
class Ratio:
    """The geometric mean of paired ratios and its confidence interval.

    Attributes:
        mean: of the ratios, `exp` of the mean of their logarithms.
        low: end of the 95 % confidence interval, by Student's t of the logarithms.
        high: its other end.
        n: number of pairs.
        left_out: pairs that do not count, as one of the two is not finite.
    """

    mean: float
    low: float
    high: float
    n: int
    left_out: int


def load_runs(folders: Iterable[str | Path]) -> tuple[list[Run], list[Record]]:
    """Reads finished run directories.

    Args:
        folders: outputs of `balora-jax run`, of a whole sweep or of parts of it.

    Returns:
        All members, and the environments in which they ran.

    Raises:
        RunError: a folder holds no run, or members that have not finished.
        ValueError: two folders hold the same member.
    """
    runs: list[Run] = []
    environments: list[Record] = []
    known: set[str] = set()
    for folder in map(Path, folders):
        configs, records, starts = _read_folder(folder)
        spectra = _read_spectra(folder / "spectra.jsonl")
        environments += starts
        results = {r["member"]: r for r in records if r["kind"] == "result"}
        curves: dict[str, dict[int, float]] = {member: {} for member in configs}
        steps: dict[str, list[Record]] = {member: [] for member in configs}
        evaluations: dict[str, list[Record]] = {member: [] for member in configs}
        for record in records:
            if record["kind"] == "evaluation":
                curves[record["member"]][record["step"]] = float(record["evaluation_loss"])
                evaluations[record["member"]].append(record)
            elif record["kind"] == "train":
                steps[record["member"]].append(record)
        missing = [member for member in configs if member not in results]
        if missing:
            raise RunError(f"{folder} has not finished: {missing[0]} has no result; run the same command again")
        for member, config in configs.items():
            key = json.dumps(config, sort_keys=True)
            if key in known:
                raise ValueError(f"{folder} holds {member}, which another folder holds too")
            known.add(key)
            own = curves[member], steps[member], evaluations[member], spectra.get(member, [])
            runs.append(Run(config, results[member], *own))
    return runs, environments


def _read_folder(folder: Path) -> tuple[dict[str, dict], list[Record], list[Record]]:
    """The configs, the records of members, and the environments; raises `RunError` for what no run leaves."""
    try:
        configs = read_object(folder / "config.json")
        records = [parse_line(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        environments = read_json(folder / "environment.json")
    except (OSError, ValueError) as error:
        raise RunError(f"{folder} must be the output of a finished run: {error}") from error
    if not configs or not all(_is_config(config) for config in configs.values()):
        raise RunError(f"{folder / 'config.json'} must hold the configs of a run by the names of its members")
    if not isinstance(environments, list) or not all(map(_is_environment, environments)):
        raise RunError(f"{folder / 'environment.json'} must hold a list of the environments of a run")
    for number, record in enumerate(records, start=1):
        if not is_record(record) or (record["kind"] != "checkpoint" and not _is_of_member(record, configs)):
            raise RunError(f"{folder / 'metrics.jsonl'} holds a line that is no record of a run (line {number})")
    records = [record for record in records if record["kind"] != "checkpoint"]
    for (kind, member, step), count in Counter((r["kind"], r["member"], r["step"]) for r in records).items():
        if count > 1:
            raise RunError(f"{folder / 'metrics.jsonl'} holds {count} {kind} records of step {step} of {member}")
    return configs, records, environments


def _read_spectra(file: Path) -> dict[str, list[Record]]:
    """The lines of a run's spectra by member, none if it has no such file; raises `RunError` if one is broken."""
    spectra: dict[str, list[Record]] = {}
    for number, line in enumerate(file.read_text().splitlines() if file.is_file() else (), start=1):
        try:
            one = parse_line(line)
            good = all(map(is_number, one["singular_values"])) and isinstance(one["pair"], str)
            spectra.setdefault(one["member"], []).append(one)
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{file}, line {number} is broken: {error}") from error
        if not good:
            raise RunError(f"{file}, line {number} must have a text under pair and numbers under singular_values")
    return spectra


def _is_config(config: Any) -> bool:
    names = {"name": str, "method": str, "seed": int}
    return isinstance(config, dict) and all(isinstance(config.get(name), kind) for name, kind in names.items())


def _is_environment(environment: Any) -> bool:
    return isinstance(environment, dict) and isinstance(environment.get("packages", {}), dict)


def _is_of_member(record: Record, configs: Mapping[str, Any]) -> bool:
    """Whether the record is of a member, and its numbers are numbers, or in text what JSON has no number for."""
    if not isinstance(record.get("member"), str) or record["member"] not in configs:
        return False
    needed = {"evaluation": ("evaluation_loss",), "result": ("evaluation_loss", "diverged_at")}.get(record["kind"], ())
    numbers = [name for name in ("evaluation_loss", "loss", "gap_mean", "condition", "diverged_at") if name in record]
    if not record.keys() >= set(needed) or not all(is_number(record[name]) for name in numbers):
        return False
    return isinstance(record.get("diverged_at", 0), int)


def sorted_by(runs: Iterable[Run], key: Callable[[Run], Hashable]) -> dict[Any, list[Run]]:
    """Returns the runs in groups, in the order in which they first appear."""
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def best_cell(runs: Sequence[Run], fields: Sequence[str]) -> Cell | None:
    """Returns the cell with the lowest mean final loss.

    Args:
        runs: of one method.
        fields: the fields that were searched, by dotted names.

    Returns:
        The cell; None if every cell has a diverged run.

    Raises:
        ValueError: two runs of a cell have the same seed.
    """
    cells = sorted_by(runs, lambda run: tuple(run.field(name) for name in fields))
    best = min(cells, key=lambda cell: statistics.fmean(run.loss for run in cells[cell]))
    by_seed = {run.field("seed"): run for run in cells[best]}
    if len(by_seed) < len(cells[best]):
        raise ValueError(f"runs must differ in {', '.join(fields)} and the seed alone, got two of one seed at {best}")
    if not all(math.isfinite(run.loss) for run in cells[best]):
        return None
    edges = []
    for index, name in enumerate(fields):
        tried = {cell[index] for cell in cells}
        numbers = all(isinstance(value, int | float) for value in tried)
        if numbers and len(tried) > 2 and best[index] in (min(tried), max(tried)):
            edges.append(name)
    diverged = sum(not math.isfinite(run.loss) for run in runs)
    return Cell(dict(zip(fields, best, strict=True)), by_seed, tuple(edges), (len(runs), diverged))


def paired_difference(values: Sequence[float], references: Sequence[float]) -> Difference:
    """Returns the mean of `values - references` with its 95 % confidence interval (Student's t, paired).

    Args:
        values: one number for each seed.
        references: those of the reference, in the same order.

    Raises:
        ValueError: the lengths differ, or there are fewer than two.
    """
    if len(values) != len(references) or len(values) < 2:
        raise ValueError(f"values and references must be as many, at least 2, got {len(values)} and {len(references)}")
    differences = [x - y for x, y in zip(values, references, strict=True)]
    n, mean = len(differences), statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(n)
    p_value = 2 * float(special.stdtr(n - 1, -abs(mean) / error)) if error else float(mean == 0)
    half_width = float(special.stdtrit(n - 1, 0.975)) * error
    return Difference(mean, float(half_width), sum(d < 0 for d in differences), n, float(p_value))


def paired_ratio(values: Sequence[float], references: Sequence[float], *, floor: float) -> Ratio:
    """Returns by what factor values differ from a reference with the same seeds.

    For values whose spread is of factors, which a difference of means would leave to the largest of them.

    Args:
        values: one number for each seed.
        references: those of the reference, in the same order.
        floor: what lies below is rounding, and counts as this; so a ratio of two such values is 1.

    Raises:
        ValueError: the lengths differ, there are fewer than two pairs of finite values, or the floor is not positive.
    """
    if not floor > 0:
        raise ValueError(f"floor must be positive, got {floor}")
    pairs = [pair for pair in zip(values, references, strict=True) if all(map(math.isfinite, pair))]
    logs = [[math.log(max(value, floor)) for value in side] for side in zip(*pairs, strict=True)] or [[], []]
    found = paired_difference(*logs)
    mean, low, high = (math.exp(found.mean + sign * found.half_width) for sign in (0, -1, 1))
    return Ratio(mean, low, high, found.n, len(values) - len(pairs))


def compare(cell: Cell, reference: Cell) -> Difference:
    """Returns `paired_difference` of the final losses of two cells over their common seeds.

    Raises:
        ValueError: the cells have other seeds.
    """
    if cell.runs.keys() != reference.runs.keys():
        raise ValueError(f"cells must have the same seeds, got {sorted(cell.runs)} and {sorted(reference.runs)}")
    return paired_difference(cell.losses, reference.losses)


def dotted_names(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Returns the dotted names of the values in nested mappings."""
    names: list[str] = []
    for name, value in config.items():
        names += dotted_names(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [prefix + name]
    return names


def _hashable(value: Any) -> Any:
    if isinstance(value, dict):
        value = list(value.items())
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value
