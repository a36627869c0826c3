"""The projection behind every optimizer of optax, as experiments/optimizers records it."""

import json
import runpy
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from balora_jax import balora_project

FOLDER = Path(__file__).parent.parent / "experiments" / "optimizers"
RECORD = json.loads((FOLDER / "optimizers.json").read_text())["results"]


@pytest.fixture(scope="module")
def study():
    """The script of the study."""
    return runpy.run_path(str(FOLDER / "optimizers.py"))


def test_every_optimizer_is_recorded_and_the_table_is_that_of_the_record(study):
    assert set(RECORD) == set(study["OPTIMIZERS"])
    assert (FOLDER / "optimizers.md").read_text() == study["table"](RECORD) + "\n"


@pytest.mark.parametrize("name", RECORD)
def test_trains_as_is_recorded(study, name):
    """With the waiting that the table names, and, behind prodigy, not without."""
    verdict, record = study["verdict"](RECORD[name]), RECORD[name]
    options = {"least_ratio": 0.0}
    if verdict.startswith("works with"):
        option, value = verdict.removeprefix("works with ").split("=")
        options = {"least_ratio": 0.0, option: float(value) if option == "least_ratio" else int(value)}
    cell = record["start_step=50" if "start_step" in options else f"least_ratio={options['least_ratio']:g}"]

    def loss(**options):
        tx = optax.chain(study["OPTIMIZERS"][name](cell["rate"]), balora_project(**options))
        return float(jax.jit(lambda: study["final_loss"](tx, 0))())

    # what works may also be as far from its record as the verdict allows: acprop divides by the moment of the step
    # before, which is zero at first, and how it goes on from there depends on rounding
    allowed = study["WORSE"] * record["alone"]["median"] if verdict.startswith("works") else 0
    assert loss(**options) < max(30 * max(cell["high"], study["ROUNDING"]), allowed)
    if name == "prodigy":
        assert loss(least_ratio=0.0) > 1
        assert loss() < 1e-3


def test_a_diverged_run_counts_as_infinite(study):
    losses = np.full((len(study["RATES"]), 5), np.nan)
    losses[3, :3] = 1.0, 2.0, 3.0
    cell = study["best"](losses)
    assert (cell["median"], cell["n"], cell["diverged"]) == (3.0, 5, 7 * 5 - 3)
