"""Choosing the best cell of finished runs, and comparing it with a reference."""

import dataclasses

import numpy as np
import pytest
from recorded_runs import LOSSES, write_run
from scipy import stats

from balora_jax.training import RunError
from balora_jax.training.comparison import best_cell, compare, load_runs, paired_difference, paired_ratio, sorted_by


def test_the_best_cell_has_the_lowest_mean_and_no_diverged_run(tmp_path):
    runs, environments = load_runs([write_run(tmp_path / "one")])
    assert environments == [{"commit": "one"}]
    groups = sorted_by(runs, lambda run: run.field("method"))
    assert list(groups) == ["lora", "balora"]
    lora, balora = (best_cell(group, ["optimizer.learning_rate"]) for group in groups.values())
    assert (lora.values, lora.losses, lora.on_edge) == ({"optimizer.learning_rate": 0.2}, [1.0, 1.1, 1.2], ())
    assert (lora.searched, balora.searched) == ((9, 1), (9, 0))
    assert balora.on_edge == ("optimizer.learning_rate",)
    assert lora.runs[1].curve == {0: 3.0, 5: 1.1}
    difference = compare(balora, lora)
    assert difference.mean == pytest.approx(-0.2)
    assert (difference.better, difference.n) == (3, 3)


def test_every_cell_diverged(tmp_path):
    runs, _ = load_runs([write_run(tmp_path / "one", {("lora", 0.1): ("nan",), ("lora", 0.2): (1.0, "nan")})])
    assert best_cell(runs, ["optimizer.learning_rate"]) is None


def test_parts_of_a_sweep_are_read_together(tmp_path):
    parts = [{key: x for key, x in LOSSES.items() if key[0] == method} for method in ("lora", "balora")]
    folders = [write_run(tmp_path / str(i), part) for i, part in enumerate(parts)]
    together, environments = load_runs(folders)
    assert len(together) == 18
    assert len(environments) == 2
    with pytest.raises(ValueError, match="which another folder holds too"):
        load_runs([*folders, write_run(tmp_path / "again", parts[0])])


def test_differences_are_those_of_a_paired_t_test():
    rng = np.random.default_rng(0)
    values, references = rng.standard_normal(6), rng.standard_normal(6)
    difference = paired_difference(values.tolist(), references.tolist())
    low, high = stats.ttest_rel(values, references).confidence_interval(0.95)
    np.testing.assert_allclose([difference.mean - difference.half_width, difference.mean + difference.half_width],
                               [low, high])  # fmt: skip
    assert difference.verdict == "undecided"
    assert paired_difference([1.0, 1.1, 0.9], [2.0, 2.0, 2.0]).verdict == "better"
    assert paired_difference([2.0, 2.0, 2.1], [1.0, 1.1, 0.9]).verdict == "worse"


def test_what_cannot_be_compared_raises(tmp_path):
    with pytest.raises(RunError, match="must be the output of a finished run"):
        load_runs([tmp_path])
    with pytest.raises(RunError, match=r"lora-0\.1-1 has no result"):
        load_runs([write_run(tmp_path / "part", unfinished=["lora-0.1-1"])])
    twice = write_run(tmp_path / "twice") / "metrics.jsonl"
    twice.write_text(twice.read_text() + twice.read_text().splitlines()[-1] + "\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl holds 2 result records of step 5 of balora-0\.4-2"):
        load_runs([tmp_path / "twice"])
    runs, _ = load_runs([write_run(tmp_path / "one")])
    with pytest.raises(ValueError, match="two of one seed"):
        best_cell(runs, ["optimizer.learning_rate"])
    lora = best_cell([run for run in runs if run.field("method") == "lora"], ["optimizer.learning_rate"])
    fewer = dataclasses.replace(lora, runs={0: lora.runs[0]})
    with pytest.raises(ValueError, match=r"same seeds, got \[0\] and \[0, 1, 2\]"):
        compare(fewer, lora)
    with pytest.raises(ValueError, match="at least 2, got 1 and 1"):
        paired_difference([1.0], [2.0])


BROKEN = {  # file, what replaces what, what is said
    "config of no run": ("config.json", '"method": "lora"', '"method": 3', "must hold the configs of a run"),
    "no configs": ("config.json", None, "{}", "must hold the configs of a run"),
    "environment": ("environment.json", None, '{"packages": {}}', "must hold a list of the environments"),
    "packages": ("environment.json", None, '[{"packages": 3}]', "must hold a list of the environments"),
    "no loss": ("metrics.jsonl", '"evaluation_loss": 3.0', '"evaluation_lss": 3.0', r"no record of a run \(line 1\)"),
    "loss": ("metrics.jsonl", '"loss": 2.9', '"loss": "much"', r"no record of a run \(line 2\)"),
    "member": ("metrics.jsonl", '"member": "lora-0.1-0"', '"member": "other"', r"no record of a run \(line 1\)"),
}


@pytest.mark.parametrize(("name", "old", "new", "said"), BROKEN.values(), ids=BROKEN)
def test_broken_directories_are_said(name, old, new, said, tmp_path):
    file = write_run(tmp_path / "x") / name
    text = file.read_text()
    file.write_text(new if old is None else text.replace(old, new, 1))
    assert file.read_text() != text
    with pytest.raises(RunError, match=said):
        load_runs([tmp_path / "x"])


def test_paired_ratio_is_the_geometric_mean_with_its_interval():
    references = [1e-6, 3.0, 2e3, 5e-2]
    logs = np.array([-1.0, -2.0, -1.5, -0.5])
    found = paired_ratio([r * 10**x for r, x in zip(references, logs, strict=True)], references, floor=1e-12)
    width = stats.t.ppf(0.975, 3) * logs.std(ddof=1) / 2
    np.testing.assert_allclose([found.mean, found.low, found.high], 10 ** (logs.mean() + np.array([0, -1, 1]) * width))
    assert (found.n, found.left_out) == (4, 0)


def test_paired_ratio_of_what_is_not_finite_or_is_rounding():
    found = paired_ratio([1e-15, -1e-14, np.inf, 2.0], [3e-13, 1e-16, 1.0, np.nan], floor=1e-11)
    assert (found.mean, found.low, found.high, found.n, found.left_out) == (1, 1, 1, 2, 2)
    with pytest.raises(ValueError, match="floor must be positive, got 0"):
        paired_ratio([1.0, 2.0], [1.0, 2.0], floor=0.0)
    with pytest.raises(ValueError, match="at least 2"):
        paired_ratio([1.0, np.inf], [1.0, 2.0], floor=1e-11)
    with pytest.raises(ValueError, match="argument 2 is"):
        paired_ratio([1.0, 2.0, 3.0], [1.0, 2.0], floor=1e-11)
