"""Where the experiments of this folder leave their outcome: NAME.json and NAME.png beside the scripts."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from balora_jax.training.comparison import paired_ratio
from balora_jax.training.records import environment

HERE = Path(__file__).parent
ROUNDING = 1e-11
"""Losses of some hundred in float64, less the optimum, are rounding below this: they rank nothing."""


def write(name: str, results: dict, figure=None) -> None:
    """Writes the numbers, with the environment that made them, and the figure."""
    record = {"environment": environment(), "results": results}
    (HERE / f"{name}.json").write_text(json.dumps(record, indent=1, default=np.ndarray.tolist) + "\n")
    if figure is not None:
        figure.savefig(HERE / f"{name}.png", dpi=110, bbox_inches="tight", metadata={"Software": None})


def against(values: np.ndarray, references: np.ndarray) -> dict[str, float | int]:
    """By what factor excess losses differ from a reference's, seed by seed, with its 95 % interval."""
    return dataclasses.asdict(paired_ratio(values.tolist(), references.tolist(), floor=ROUNDING))


def table(header: str, rows: Iterable[Iterable[str]]) -> None:
    """Prints Markdown: a header such as `a | b`, and rows of cells."""
    print(f"| {header} |\n|{'---|' * (header.count('|') + 1)}")
    for cells in rows:
        print(f"| {' | '.join(cells)} |")


def quantiles(values: np.ndarray) -> dict[str, float | int]:
    """Median and quartiles, a diverged run counting as infinite; how many there were, and how many diverged."""
    values = np.where(np.isfinite(values), values, np.inf)
    low, median, high = (float(x) for x in np.quantile(values, (0.25, 0.5, 0.75), method="median_unbiased"))
    return {"median": median, "low": low, "high": high, "n": values.size, "diverged": int(np.isinf(values).sum())}
