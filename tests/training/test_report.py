"""The report: what it says and draws, and that it holds all it shows and nothing of others' markup."""

import json
import math
from html.parser import HTMLParser

import pytest
from recorded_runs import LOSSES, write_run

from balora_jax.training import ConfigError, charts
from balora_jax.training.comparison import load_runs
from balora_jax.training.report import report_page
from balora_jax.training.standings import standings

plotly = pytest.importorskip("plotly")
NASTY = "</script><img src=http://x.example/y onerror=alert(1)>&amp;"


class Page(HTMLParser):
    """The tags of a page, its text outside of scripts, and its scripts."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.scripts = [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script":
            self.scripts.append(data)
        elif self.tags and self.tags[-1][0] != "style":
            self.text += data

    @property
    def charts(self):
        (data,) = (script for script in self.scripts if script.startswith("[{"))
        return json.loads(data)


def test_page_says_what_was_found_and_needs_no_network(tmp_path):
    page = Page(report_page([write_run(tmp_path / "x")]))
    assert "Not told apart from lora by these seeds: balora" in page.text
    assert "18 runs, 1 of them diverged." in page.text
    assert "On the edge of the grid, so that a wider one may do better: balora." in page.text
    allowed = {"html", "head", "body", "meta", "title", "style", "script", "details", "summary", "div", "span"}
    assert {tag for tag, _ in page.tags} <= allowed | {"h1", "h2", "p", "pre", "table", "tr", "th", "td"}
    loading = ("src", "href", "srcset", "data", "action", "background", "poster")
    assert not [attribute for _, attributes in page.tags for attribute in attributes if attribute in loading]
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    for chart in page.charts:
        plotly.graph_objects.Figure(data=chart["data"], layout=chart["layout"])  # raises for what it does not know
        assert [tag for tag, attributes in page.tags if attributes.get("id") == chart["id"]] == ["div"]


def test_text_from_outside_is_shown_as_it_is(tmp_path):
    folder = write_run(tmp_path / "x", changes={"name": NASTY, "model.path": NASTY})
    start = {"commit": NASTY, "command": f"balora-jax run {NASTY}", "packages": {NASTY: NASTY}, NASTY: "\x1b[31m"}
    (folder / "environment.json").write_text(json.dumps([start]))
    html = report_page([folder])
    page = Page(html)
    assert "img" not in {tag for tag, _ in page.tags}
    assert page.text.count(NASTY) >= 6
    assert "\x1b" not in html
    assert charts.shown("<b>lora</b>") == "&lt;b&gt;lora&lt;/b&gt;"


def test_lines_are_medians_and_ranges_of_the_best_cells(tmp_path):
    rows = standings(load_runs([write_run(tmp_path / "x")])[0])
    low, high, median = charts.loss_curves(rows)["data"][:3]
    assert [low["y"][-1], median["y"][-1], high["y"][-1]] == [0.8, 0.9, 1.0]
    assert median["name"] == "balora (n = 3)"
    assert low["legendgroup"] == high["legendgroup"] == median["legendgroup"]
    balora, lora = charts.losses_over_rate(rows)["data"]
    assert balora["x"] == [0.1, 0.2, 0.4]
    assert balora["y"] == pytest.approx([0.9, 1.5, 1.6])
    assert (lora["x"], lora["name"]) == ([0.1, 0.2], "lora (1 diverged)")
    gaps = charts.gap_curves(rows)["data"]
    assert gaps[5]["y"] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_numbers_that_are_not_finite_are_gaps(tmp_path):
    assert charts.running_mean({1: math.inf, 2: 1.0}) == {1: pytest.approx(math.nan, nan_ok=True), 2: 1.0}
    assert charts.running_mean({step: float(step) for step in range(1, 41)})[40] == 39.5
    page = Page(report_page([write_run(tmp_path / "x", {("lora", 0.1): ("nan", 1.0)})]))
    assert "Every cell has a diverged run." in page.text


def test_one_method_needs_no_reference(tmp_path):
    page = Page(report_page([write_run(tmp_path / "x", {("dora", 0.1): LOSSES["lora", 0.1]})]))
    assert "Nothing can be said about differences from dora" in page.text
    assert len(page.charts) == 3  # without one over the learning rate


def test_long_lines_are_thinned_out():
    steps = list(range(100_000))
    assert len(charts._thinned(steps)) <= charts.MOST_POINTS + 1
    assert charts._thinned(steps)[-1] == steps[-1]


def test_without_plotly_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("balora_jax.training.report.is_available", lambda: False)
    with pytest.raises(ConfigError, match="pip install 'balora-jax\\[report\\]'"):
        report_page([write_run(tmp_path / "x")])
