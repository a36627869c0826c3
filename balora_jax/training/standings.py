"""Where the methods of finished runs stand: each one's best cell against a reference, corrected for their number."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from balora_jax.errors import ConfigError
from balora_jax.training.comparison import Cell, Difference, Run, best_cell, dotted_names, paired_difference, sorted_by
from balora_jax.training.power import seeds_needed, smallest_difference
from balora_jax.training.results import mean_and_spread

LEVEL = 0.05
"""The chance that, if no method differs from the reference, any verdict says that one does."""

_MEASURE = "model.", "data.", "training.steps"  # losses of other models, data and lengths are no choice of a method's

_NO_CHOICE = "method", "seed"  # compared, and averaged over

_BOOKKEEPING = (
    *("name", "training.checkpoint_every", "training.eval_batch_size", "training.eval_every"),
    *("training.keep_checkpoints", "training.log_every", "training.max_new_tokens", "training.members_at_once"),
)
"""Fields that change no loss: they are searched only where runs differ in nothing else."""


@dataclass(frozen=True)
class Standing:
    """A method's best cell, in one group of runs.

    Attributes:
        group: the values of the fields by which runs are grouped.
        method: its name.
        cell: the cell of lowest mean loss; None if each has a diverged run.
        runs: all runs of the method in this group.
        cells: the number of cells that were searched, and of those with a diverged run.
        difference: from the reference, over common seeds; None for the reference itself, and where there are fewer
            than two common seeds.
        corrected: the p-value of the difference after Holm's correction.
        seeds: the seeds that the cell and the reference have in common.
    """

    group: Mapping[str, Any]
    method: str
    cell: Cell | None
    runs: Sequence[Run]
    cells: tuple[int, int]
    difference: Difference | None = None
    corrected: float | None = None
    seeds: tuple[int, ...] = ()

    @property
    def verdict(self) -> str:
        """`"better"` or `"worse"` than the reference, `"undecided"`, or `""` where nothing was compared."""
        if self.difference is None or self.corrected is None:
            return ""
        if self.corrected > LEVEL:
            return "undecided"
        return "better" if self.difference.mean < 0 else "worse"


def standings(runs: Sequence[Run], *, reference: str = "lora", by: Iterable[str] = ()) -> list[Standing]:
    """Returns the best cell of every method in every group of runs, the lowest mean loss of a group first.

    A cell is what differs in its seed alone. The p-values of all comparisons are corrected together.

    Args:
        runs: from `balora_jax.training.comparison.load_runs`.
        reference: the method with which the others of its group are compared.
        by: the fields that make groups, by dotted names. Fields that change what is measured (the model, the data, the
            number of steps) always do; the others are searched.

    Raises:
        ConfigError: there is no such method, or no such swept field.
    """
    methods = list(dict.fromkeys(run.field("method") for run in runs))
    if reference not in methods:
        raise ConfigError(f"--reference must be a method of the runs ({', '.join(methods)}), got {reference!r}")
    swept = swept_fields(runs)
    by = list(dict.fromkeys(by))
    for name in by:
        if name not in swept:
            known = ", ".join(field for field in swept if field not in _NO_CHOICE) or "none"
            raise ConfigError(f"--by must be a field in which the runs differ ({known}), got {name!r}")
    by += [name for name in swept if name.startswith(_MEASURE) and name not in by]
    searched = [name for name in swept if name not in (*by, *_NO_CHOICE, *_BOOKKEEPING)]
    if len({tuple(map(run.field, ("method", "seed", *by, *searched))) for run in runs}) < len(runs):
        searched += [name for name in swept if name in _BOOKKEEPING and name not in by]
    found = []
    groups = sorted_by(runs, lambda run: tuple(run.field(name) for name in by))
    for values in sorted(groups, key=lambda values: [_sortable(value) for value in values]):
        named = dict(zip(by, values, strict=True))
        rows = [
            _standing(named, method, members, searched)
            for method, members in sorted_by(groups[values], lambda run: run.field("method")).items()
        ]
        rows.sort(key=lambda row: row.cell.mean if row.cell else math.inf)
        against = next((row.cell for row in rows if row.method == reference), None)
        found += [row if row.method == reference else _compared(row, against) for row in rows]
    return _corrected(found)


def swept_fields(runs: Sequence[Run]) -> list[str]:
    """Returns the dotted names of the fields in which runs differ; raises `ConfigError` if they have other fields."""
    names = dotted_names(runs[0].config)
    if any(dotted_names(run.config) != names for run in runs):
        raise ConfigError("the runs are of versions of this program whose configs have other fields")
    return [name for name in names if len({run.field(name) for run in runs}) > 1]


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values corrected for their number by Holm's step-down method (Scandinavian J. Statistics 6, 1979).

    Args:
        p_values: of hypotheses that are looked at together.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def record(row: Standing) -> dict[str, Any]:
    """Returns a standing in numbers, by name; None where there is none."""
    values: dict[str, Any] = {"method": row.method} | dict.fromkeys(("on_edge", "n", "loss_mean", "loss_std"))
    if row.cell is not None:
        values |= {"on_edge": " ".join(row.cell.on_edge), "n": len(row.cell.runs)}
        values |= {"loss_mean": row.cell.mean, "loss_std": row.cell.deviation}
    values |= dict.fromkeys(("difference", "low", "high", "lower_in", "pairs", "p_value", "p_value_holm"))
    if (found := row.difference) is not None:
        values |= {"difference": found.mean, "low": found.mean - found.half_width}
        values |= {"high": found.mean + found.half_width, "lower_in": found.better, "pairs": found.n}
        values |= {"p_value": found.p_value, "p_value_holm": row.corrected}
    values |= {"verdict": row.verdict, "cells": row.cells[0], "diverged_cells": row.cells[1], "runs": len(row.runs)}
    return values | {"diverged_runs": sum(not math.isfinite(run.loss) for run in row.runs)}


def verdict(rows: Sequence[Standing], reference: str) -> str:
    """Returns in a sentence which methods differ from the reference."""
    compared = [row for row in rows if row.verdict]
    if not compared:
        return f"Nothing can be said about differences from {reference}: that takes two methods and two common seeds."
    said = []
    for word in ("better", "worse"):
        names = [_with_difference(row) for row in compared if row.verdict == word]
        if names:
            said.append(f"{word} than {reference}: {', '.join(names)}")
    undecided = [_with_difference(row) for row in compared if row.verdict == "undecided"]
    if undecided:
        which = ", ".join(undecided) if len(undecided) < 5 else f"{len(undecided)} others"
        said.append(f"not told apart from {reference} by these seeds: {which}")
    text, count = "; ".join(said), len(compared)
    corrected = f", {100 * LEVEL:g} % in all {count} comparisons" if count > 1 else ""
    return (
        f"{text[0].upper()}{text[1:]} (evaluation loss of the best cells less {reference}'s, paired by seed, with 95 % "
        f"intervals{corrected}).{_could_show([row for row in compared if row.verdict == 'undecided'])}"
    )


def _could_show(undecided: Sequence[Standing]) -> str:
    """A sentence on what comparisons that decided nothing could have shown."""
    found = [row.difference for row in undecided if row.difference is not None and row.difference.deviation > 0]
    if not found:
        return ""
    typical = sorted(found, key=lambda difference: difference.deviation)[len(found) // 2]
    loss = next(row.cell.mean for row in undecided if row.cell is not None)
    seen = smallest_difference(typical.deviation, typical.n)
    needed = seeds_needed(loss / 100, typical.deviation)
    takes = f"{needed:,} seeds" if needed else "more than a million seeds"
    shown = f"{seen:.4f} ({seen / loss:.1%} of the loss)"
    return (
        f" With this spread {typical.n} seeds show a difference of {shown} in 4 cases of 5, before any correction; "
        f"to show 1 % takes {takes}."
    )


def _with_difference(row: Standing) -> str:
    assert row.difference is not None  # only compared rows have a verdict
    return f"{described(row)} ({row.difference.mean:+.4f} ± {row.difference.half_width:.4f})"


def described(row: Standing) -> str:
    """The method, and its group if it has one."""
    return f"{row.method} at {settings(row.group)}" if row.group else row.method


def settings(values: Mapping[str, Any], on_edge: Sequence[str] = ()) -> str:
    """Returns the values of fields as a person reads them; says which lie on the edge of what was tried."""
    return ", ".join(
        f"{name.rsplit('.', 1)[-1].replace('_', ' ')} {shown(value)}{' (edge of the grid)' * (name in on_edge)}"
        for name, value in values.items()
    )


def loss_text(cell: Cell) -> str:
    """Returns the mean loss of a cell and its standard deviation, of one seed that alone."""
    return mean_and_spread({"mean": cell.mean, "std": cell.deviation}, ".4f")


def shown(value: Any) -> str:
    """Returns the value of a field in short."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return " ".join(map(shown, value)) or "-"
    return str(value)


def _standing(group: Mapping[str, Any], method: str, runs: Sequence[Run], searched: Sequence[str]) -> Standing:
    cells = sorted_by(runs, lambda run: tuple(run.field(name) for name in searched))
    diverged = sum(not all(math.isfinite(run.loss) for run in members) for members in cells.values())
    own = [name for name in searched if len({run.field(name) for run in runs}) > 1]
    return Standing(group, method, best_cell(runs, own), runs, (len(cells), diverged))


def _compared(row: Standing, reference: Cell | None) -> Standing:
    if row.cell is None or reference is None:
        return row
    seeds = tuple(sorted(row.cell.runs.keys() & reference.runs.keys()))
    difference = None
    if len(seeds) > 1:
        difference = paired_difference(*([cell.runs[seed].loss for seed in seeds] for cell in (row.cell, reference)))
    return replace(row, difference=difference, seeds=seeds)


def _corrected(rows: Sequence[Standing]) -> list[Standing]:
    p_values = iter(holm([row.difference.p_value for row in rows if row.difference]))
    return [replace(row, corrected=next(p_values)) if row.difference else row for row in rows]


def _sortable(value: Any) -> tuple:
    return (0, value, "") if isinstance(value, int | float) else (1, 0, str(value))
