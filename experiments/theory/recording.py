"""Where the experiments of this folder leave their outcome: NAME.json and NAME.png beside the scripts."""

import json
from pathlib import Path

import numpy as np

from balora_jax.training.records import environment

HERE = Path(__file__).parent


def write(name: str, results: dict, figure=None) -> None:
    """Writes the numbers, with the environment that made them, and the figure."""
    record = {"environment": environment(), "results": results}
    (HERE / f"{name}.json").write_text(json.dumps(record, indent=1, default=np.ndarray.tolist) + "\n")
    if figure is not None:
        figure.savefig(HERE / f"{name}.png", dpi=110, bbox_inches="tight", metadata={"Software": None})


def quantiles(values: np.ndarray) -> dict[str, float | int]:
    """Median, quartiles and count of the finite values, and how many were not."""
    finite = np.sort(values[np.isfinite(values)])
    low, median, high = np.quantile(finite, (0.25, 0.5, 0.75)) if finite.size else 3 * (np.nan,)
    return {"median": median, "low": low, "high": high, "n": values.size, "diverged": values.size - finite.size}
