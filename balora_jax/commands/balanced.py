"""A PEFT adapter whose pairs are balanced, as a folder."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from balora_jax.adapters import read_peft, write_peft
from balora_jax.adapters.diagnosis import Diagnosis, diagnose_adapter
from balora_jax.balance import Balanced, balance_pairs
from balora_jax.commands.folders import copy_other_files, explained, whole_folder
from balora_jax.pairs import ArrayPair, read_pairs, write_pairs
from balora_jax.settings import Gauge
from balora_jax.status import Status

_REASONS = {
    Status.RANK_DEFICIENT: "their product lacks rank",
    Status.OUT_OF_RANGE: "their dtype cannot hold the balanced factors",
    Status.CANCELLING: "their factors cancel in the product",
}

_ON_CPUS = {"xla_backend_optimization_level": 0}
"""How XLA compiles what runs once: in two thirds of the time. On CPUs, libraries multiply and decompose matrices."""


def write_balanced(source: Path, out: Path, gauge: Gauge, console: Console) -> None:
    """Balances the pairs of a PEFT folder, and prints what that has changed.

    Args:
        source: the folder.
        out: a new folder.
        gauge: which of the balanced pairs.
        console: where it is printed.

    Raises:
        ConfigError: the folder holds no LoRA adapter, or the new one cannot be written.
    """
    with console.status("reading the pairs") as progress:
        with explained("ADAPTER"):
            adapter = read_peft(source)
            before = diagnose_adapter(adapter)
        pairs = adapter.pairs()
        found = list(pairs.values())
        factors = read_pairs(adapter.tensors, found)
        progress.update(f"balancing {len(pairs)} pairs")
        balanced = _balanced(factors, gauge)
        new = replace(adapter, tensors=write_pairs(adapter.tensors, found, [pair[:2] for pair in balanced]))
        progress.update("writing the folder")
        with whole_folder(out) as folder:
            write_peft(new, folder)
            copy_other_files(source, folder)  # the config among them
        progress.update(f"measuring {len(pairs)} pairs")
        after = diagnose_adapter(new)
        change = max(_change(old, pair[:2]) for old, pair in zip(factors, balanced, strict=True))
    console.print(_table({"before": before, "after": after}))
    console.print(f"{len(pairs)} pairs; products changed by at most {change:.0e} of their norm: {out}")
    for status, why in _REASONS.items():
        names = [name for name, pair in zip(pairs, balanced, strict=True) if (pair.status == status).any()]
        if names:
            console.print(f"skipped, because {why}: {', '.join(names)}")


def _balanced(pairs: Sequence[ArrayPair], gauge: Gauge) -> list[Balanced]:
    """The outcomes on the host. Pairs of one shape go through as a stack: hundreds of single ones take a minute to
    compile."""
    alike: dict[tuple, list[int]] = {}
    for i, pair in enumerate(pairs):
        alike.setdefault(tuple((x.shape, x.dtype) for x in pair), []).append(i)
    stacks = [tuple(np.concatenate([pairs[i][side] for i in group]) for side in (0, 1)) for group in alike.values()]
    with jax.enable_x64(True):  # lest float64 tensors lose digits
        options = _ON_CPUS if jax.default_backend() == "cpu" else None
        balance = jax.jit(partial(balance_pairs, gauge=gauge), compiler_options=options)
        found = jax.device_get(balance(stacks))
    results: dict[int, Balanced] = {}
    for group, outcome in zip(alike.values(), found, strict=True):
        results |= {i: Balanced(*(x[k : k + 1] for x in outcome)) for k, i in enumerate(group)}
    return [results[i] for i in range(len(pairs))]


def _table(diagnoses: dict[str, dict[str, Diagnosis]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("", "gap, mean", "gap, worst", "condition number, median", "worst"):
        table.add_column(name, justify="right" if name else "left")
    for name, found in diagnoses.items():
        gaps = [diagnosis.gap for diagnosis in found.values()]
        numbers = [diagnosis.condition_number for diagnosis in found.values()]
        shown = (f"{np.mean(gaps):.1e}", f"{max(gaps):.1e}", f"{statistics.median(numbers):.3g}", f"{max(numbers):.3g}")
        table.add_row(name, *shown)
    return table


def _change(old, new) -> float:
    """By how much the product has changed, relative to its norm.

    With `S` the least squares solution of `A' S = A` (by its Gram matrix, as the new factor is well conditioned) the
    difference is `A' (B' - S B) + (A' S - A) B`: products of a large factor and a small one, which lose no digits.
    """
    if all(np.array_equal(x, y) for x, y in zip(old, new, strict=True)):
        return 0.0  # as what is skipped is, and its product may be zero
    (a, b), (new_a, new_b) = ([np.asarray(factor[0], float) for factor in pair] for pair in (old, new))
    size_a, size_b, new_size = (abs(x).max() for x in (a, b, new_a))
    a, b, new_a, new_b = a / size_a, b / size_b, new_a / new_size, new_b / size_b * (new_size / size_a)
    s = np.linalg.lstsq(new_a.T @ new_a, new_a.T @ a)[0]
    left, right = np.concatenate([new_a, new_a @ s - a], 1), np.concatenate([new_b - s @ b, b], 0)
    return _product_norm(left, right) / _product_norm(a, b)


def _product_norm(a, b) -> float:
    """The Frobenius norm of `A B`."""
    return math.sqrt(max(np.sum((a.T @ a) * (b @ b.T)), 0))
