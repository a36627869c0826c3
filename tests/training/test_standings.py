"""Standings of methods: cells, groups, and differences corrected for their number."""

import re

import numpy as np
import pytest
from recorded_runs import LOSSES, write_run
from scipy import stats

from balora_jax.methods import METHODS
from balora_jax.training import ConfigError
from balora_jax.training.colors import METHOD_COLORS, looks
from balora_jax.training.comparison import load_runs
from balora_jax.training.standings import holm, settings, standings, verdict

RANKS = {  # method, rank: by seed
    ("lora", 4): (1.0, 1.1, 1.2, 1.4),
    ("balora", 4): (0.5, 0.62, 0.7, 0.9),
    ("dora", 4): (1.1, 1.0, 1.3, 1.3),
    ("lora", 8): (0.8, 0.9, 1.0, 1.1),
    ("balora", 8): (1.8, 1.95, 2.0, 2.1),
    ("dora", 8): ("nan", 1.0, 1.0, 1.0),
}


def runs_of(folder, losses=RANKS, **options):
    return load_runs([write_run(folder, losses, **options)])[0]


def test_differences_by_a_field_are_paired_t_tests_corrected_together(tmp_path):
    rows = standings(runs_of(tmp_path / "x", field="adapter.rank"), by=["adapter.rank"])
    assert [(row.group["adapter.rank"], row.method) for row in rows] == [
        *((4, "balora"), (4, "lora"), (4, "dora")),
        *((8, "lora"), (8, "balora"), (8, "dora")),
    ]
    compared = [row for row in rows if row.difference]
    tests = [
        stats.ttest_rel(RANKS[row.method, row.group["adapter.rank"]], RANKS["lora", row.group["adapter.rank"]])
        for row in compared
    ]
    for row, test in zip(compared, tests, strict=True):
        low, high = test.confidence_interval(0.95)
        assert row.difference.mean - row.difference.half_width == pytest.approx(low)
        assert row.difference.mean + row.difference.half_width == pytest.approx(high)
        assert row.difference.p_value == pytest.approx(test.pvalue)
    p = sorted(test.pvalue for test in tests)
    expected = dict(zip(p, np.maximum.accumulate([3 * p[0], 2 * p[1], p[2]]), strict=True))
    assert [row.corrected for row in compared] == pytest.approx([expected[test.pvalue] for test in tests])
    assert [row.verdict for row in rows] == ["better", "", "undecided", "", "worse", ""]
    lost = rows[-1]
    assert lost.cell is None
    assert lost.cells == (1, 1)
    said = verdict(rows, "lora")
    better = compared[0].difference
    assert f"Better than lora: balora at rank 4 ({better.mean:+.4f} ± {better.half_width:.4f}); worse than" in said
    assert "not told apart from" in said
    assert "5 % in all 3 comparisons" in said
    assert re.search(r"With this spread \d seeds show a difference of .* of the loss\) in 4 cases of 5", said)


def test_fields_that_are_no_group_are_searched_and_edges_said(tmp_path):
    rows = standings(runs_of(tmp_path / "x", LOSSES))
    balora, lora = rows
    assert (balora.method, lora.method, lora.verdict) == ("balora", "lora", "")
    assert settings(balora.cell.values, balora.cell.on_edge) == "learning rate 0.1 (edge of the grid)"
    assert settings(lora.cell.values, lora.cell.on_edge) == "learning rate 0.2"
    assert (lora.cells, balora.cells) == ((3, 1), (3, 0))


@pytest.mark.parametrize("values", [(0.01, 0.04, 0.03, 0.005), (0.5, 0.9, 0.9), (0.2,), (), (0.0, 0.0, 1.0)])
def test_corrected_p_values_reject_what_the_steps_of_holm_reject(values):
    corrected = holm(values)
    for level in np.linspace(0.001, 0.999, 200):
        rejected = set()
        for count, index in enumerate(np.argsort(values, kind="stable")):
            if values[index] > level / (len(values) - count):
                break
            rejected.add(int(index))
        assert {i for i, p in enumerate(corrected) if p <= level} == rejected


def test_losses_of_other_data_are_never_searched(tmp_path):
    losses = {("lora", value): (1.0, 1.1) for value in (100, 200)} | {("balora", 100): (2.0, 2.0)}
    rows = standings(runs_of(tmp_path / "x", losses, field="training.steps"))
    assert [(row.group, row.method) for row in rows] == [
        ({"training.steps": 100}, "lora"),
        ({"training.steps": 100}, "balora"),
        ({"training.steps": 200}, "lora"),
    ]


def test_only_common_seeds_are_compared(tmp_path):
    rows = standings(runs_of(tmp_path / "x", {("lora", 0.1): (1.0, 1.1, 1.3), ("balora", 0.1): (0.5, 0.7)}))
    assert (rows[0].method, rows[0].seeds, rows[0].difference.n) == ("balora", (0, 1), 2)
    rows = standings(runs_of(tmp_path / "y", {("lora", 0.1): (1.0, 1.1, 1.3), ("balora", 0.1): (0.5,)}))
    assert (rows[0].difference, rows[0].verdict) == (None, "")
    assert verdict(rows, "lora").startswith("Nothing can be said about differences from lora")


def test_what_cannot_be_compared_is_said(tmp_path):
    runs = runs_of(tmp_path / "x", LOSSES)
    with pytest.raises(ConfigError, match=r"--reference must be a method of the runs \(lora, balora\), got 'dora'"):
        standings(runs, reference="dora")
    with pytest.raises(ConfigError, match=r"--by must be .* \(optimizer\.learning_rate\), got 'adapter\.rank'"):
        standings(runs, by=["adapter.rank"])


def test_bookkeeping_is_searched_only_where_runs_differ_in_nothing_else(tmp_path):
    parts = {100: [("lora", 0.1), ("lora", 0.2)], 7: [("lora", 0.2), ("lora", 0.4)]}
    runs = [
        run
        for every, keys in parts.items()
        for run in runs_of(
            tmp_path / str(every), {key: (1.0, 2.0) for key in keys}, changes={"training.log_every": every}
        )
    ]
    apart = [run for run in runs if run.field("training.log_every") == 7 or run.field("optimizer.learning_rate") == 0.1]
    assert standings(apart)[0].cells == (3, 0)
    assert standings(runs)[0].cells == (4, 0)


def test_every_method_has_a_color_of_its_own():
    assert set(METHOD_COLORS) == set(METHODS)
    assert len(set(METHOD_COLORS.values())) == len(METHODS)
    lines = looks(["lora", "balora", "lora", "unknown"])
    assert lines[0][0] == lines[2][0] == METHOD_COLORS["lora"]
    assert len(set(lines)) == 4
