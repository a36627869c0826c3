"""Figures of runs: which lines they hold, their colors, and names beside lines."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression

from balora_jax.training.colors import METHOD_COLORS
from balora_jax.training.figures import MOST_IN_LEGEND, apart, draw_standings, label_ends, loss_curves
from balora_jax.training.records import RunDirectory


def row(method, mean, **group):
    values = {**group, "method": method, "n": 3, "loss_mean": mean, "loss_std": 0.1, "verdict": "undecided"}
    difference = {"difference": mean - 1, "low": mean - 1.1, "high": mean - 0.9}
    return values | (difference if method != "lora" else {"difference": None, "verdict": ""})


def test_differences_of_one_group_are_points_with_intervals():
    records = [row("balora", 0.5) | {"verdict": "better"}, row("lora", 1.0), row("dora", 0.98)]
    (axes,) = draw_standings(records, "lora").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["balora", "dora"]
    intervals, points = axes.lines[:-1:2], axes.lines[1:-1:2]
    assert [list(line.get_xdata()) for line in intervals] == [pytest.approx(x) for x in ([-0.6, -0.4], [-0.12, 0.08])]
    assert [line.get_color() for line in points] == [METHOD_COLORS["balora"], METHOD_COLORS["dora"]]
    assert [line.get_markerfacecolor() for line in points] == [METHOD_COLORS["balora"], "w"]


def test_groups_by_a_number_are_lines_with_bands():
    records = [row(m, mean / rank, rank=rank) for rank in (4, 8, 32) for m, mean in (("lora", 1.0), ("balora", 0.9))]
    losses, differences = draw_standings(records, "lora").axes
    assert [line.get_label() for line in losses.lines] == ["lora", "balora"]
    assert list(losses.lines[1].get_ydata()) == pytest.approx([0.9 / 4, 0.9 / 8, 0.9 / 32])
    assert len(losses.collections) == 2
    assert [label.get_text() for label in losses.get_xticklabels()] == ["4", "8", "32"]
    assert differences.lines[1].get_color() == METHOD_COLORS["balora"]


def test_groups_by_names_are_a_panel_each():
    records = [row(m, 0.9, path=path) for path in ("$a$", "b") for m in ("lora", "balora")]
    titles = [axes.get_title() for axes in draw_standings(records, "lora").axes]
    assert titles == [r"\$a\$", "b"]


@pytest.mark.parametrize("count", [2, MOST_IN_LEGEND + 1])
def test_many_lines_have_their_names_at_their_ends(count, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, *args, **options: drawn.append(self))
    directory = RunDirectory(tmp_path / "run", {})
    names = list(METHOD_COLORS)[:count]
    directory.append(
        {"kind": "evaluation", "population": name, "member": name, "step": step, "evaluation_loss": 1.0 / (1 + step)}
        for name in names
        for step in range(3)
    )
    loss_curves(directory, [{"population": x, "best": {}, "members": [x], "n": 1, "runs": 1} for x in names], "x.png")
    directory.close()
    whole, zoomed = drawn[0].axes
    assert (whole.get_legend() is None) == (count > MOST_IN_LEGEND)
    assert {text.get_text() for text in zoomed.texts} == (set(names) if count > MOST_IN_LEGEND else set())
    assert [line.get_color() for line in whole.lines] == [METHOD_COLORS[name] for name in names]
    assert zoomed.get_ylim()[1] < 1.0 < whole.get_ylim()[1]


def test_places_are_the_nearest_that_are_apart():
    rng = np.random.default_rng(0)
    for count in (1, 2, 7, 30):
        places = np.sort(rng.random(count)).tolist()
        offsets = 0.03 * np.arange(count)
        expected = isotonic_regression(np.array(places) - offsets).x + offsets
        np.testing.assert_allclose(apart(places, 0.03), expected, atol=1e-12)


def test_names_stay_beside_the_axes():
    axes = Figure().subplots()
    axes.set_ylim(0, 1)
    label_ends(axes, [(0.0, f"name {index}", "k") for index in range(20)])
    heights = [text.get_position()[1] for text in axes.texts]
    assert min(heights) >= -1e-9
    assert max(heights) <= 1
