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
    """Median and quartiles, a diverged run counting as infinite; how many there were, and how many diverged."""
    values = np.where(np.isfinite(values), values, np.inf)
    low, median, high = (float(x) for x in np.quantile(values, (0.25, 0.5, 0.75), method="median_unbiased"))
    return {"median": median, "low": low, "high": high, "n": values.size, "diverged": int(np.isinf(values).sum())}
