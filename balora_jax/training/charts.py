"""The charts of a report, as figures of plotly.js: plain mappings, for which plotly need not be imported."""

import html
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from balora_jax.errors import printable
from balora_jax.training.colors import looks
from balora_jax.training.comparison import Run, sorted_by
from balora_jax.training.standings import Standing, described

MOST_POINTS = 400
"""Points of a line; longer ones are thinned out."""

_DASHES = {"solid": "solid", "dashed": "dash", "dotted": "dot", "dashdot": "dashdot"}
_AXIS = {"gridcolor": "#e5e5e5", "zeroline": False, "automargin": True, "tickformat": "~g"}

Chart = dict[str, Any]


def loss_curves(rows: Sequence[Standing]) -> Chart | None:
    """Returns the evaluation losses of the best cells over the steps: the median over the seeds, and their range."""
    return _over_steps(rows, lambda run: run.curve, "evaluation loss")


def training_curves(rows: Sequence[Standing]) -> Chart | None:
    """Returns the losses of the batches over the steps, as means over a twentieth of the run."""
    return _over_steps(
        rows, lambda run: running_mean(_recorded(run, "loss")), "loss of the batches, running mean", logarithmic=False
    )


def gap_curves(rows: Sequence[Standing]) -> Chart | None:
    """Returns the mean relative balancing gap of the pairs over the steps; None without pairs."""
    return _over_steps(rows, lambda run: _recorded(run, "gap_mean"), "relative balancing gap")


def condition_curves(rows: Sequence[Standing]) -> Chart | None:
    """Returns the condition number of the pairs over the steps, the median pair's; None without pairs."""
    return _over_steps(rows, lambda run: _evaluated(run, "condition"), "condition number")


def other_loss_curves(rows: Sequence[Standing], name: str) -> Chart | None:
    """Returns the losses on a further evaluation set over the steps."""

    def curve(run: Run) -> dict[int, float]:
        found = {record["step"]: record.get("others", {}).get(name) for record in run.evaluations}
        return {step: float(loss) for step, loss in found.items() if loss is not None}

    return _over_steps(rows, curve, f"loss on {shown(name)}")


def spectra(rows: Sequence[Standing]) -> Chart | None:
    """Returns the singular values of every pair at the end: the middle one, and a bar from the least to the greatest.

    They are of the first seed of the best cells; None without pairs.
    """
    traces = []
    for row, look in _with_looks(rows):
        lines = next((run.spectra for run in (row.cell.runs.values() if row.cell else ())), ())
        if not lines:
            continue
        names = [shown(str(line["pair"])) for line in lines]
        values = [sorted(map(float, line["singular_values"])) for line in lines]
        least, greatest = ([one[at] for one in values] for at in (0, -1))
        middle = [statistics.median(one) for one in values]
        ends = {"array": [y - x for x, y in zip(middle, greatest, strict=True)]}
        ends |= {"arrayminus": [x - y for x, y in zip(middle, least, strict=True)]}
        traces.append(
            {
                "x": names,
                "y": middle,
                "error_y": {"type": "data", "symmetric": False, "thickness": 1.5, **ends},
                "mode": "markers",
                "marker": {"color": look["color"], "size": 7},
                "name": shown(described(row)),
            }
        )
    if not traces:
        return None
    chart = _chart(traces, "layer", "singular values of the product", logarithmic=True)
    chart["layout"]["xaxis"] |= {"type": "category", "tickangle": -45, "tickfont": {"size": 10}}
    chart["layout"]["margin"] |= {"b": 160}
    return chart


def losses_over_rate(rows: Sequence[Standing]) -> Chart | None:
    """Returns the final loss over the learning rate, at the best values of all else; None if one rate was tried."""
    field, traces = "optimizer.learning_rate", []
    if len({run.field(field) for row in rows for run in row.runs}) < 2:
        return None
    for row, look in _with_looks(rows):
        found = {rate: _least(runs) for rate, runs in sorted_by(row.runs, lambda run: run.field(field)).items()}
        rates = sorted(rate for rate, losses in found.items() if losses)
        errors = [statistics.stdev(found[rate]) if len(found[rate]) > 1 else 0.0 for rate in rates]
        lost = sum(not losses for losses in found.values())
        traces.append(
            {
                "x": rates,
                "y": [statistics.fmean(found[rate]) for rate in rates],
                "error_y": {"type": "data", "array": errors, "thickness": 1},
                "mode": "lines+markers",
                "line": look,
                "name": shown(described(row) + (f" ({lost} diverged)" if lost else "")),
            }
        )
    chart = _chart(traces, "learning rate", "final evaluation loss", logarithmic=True)
    rates = sorted({rate for trace in traces for rate in trace["x"]})
    chart["layout"]["xaxis"] |= {"type": "log", "tickvals": rates, "ticktext": [f"{rate:g}" for rate in rates]}
    return chart


def height(chart: Chart) -> int:
    """Returns how high a chart is in pixels: it gets room for its names, two in a row on a phone."""
    names = sum(trace.get("showlegend", True) for trace in chart["data"])
    return 400 + 12 * names


def running_mean(values: Mapping[int, float]) -> dict[int, float]:
    """Returns the means of the last values, of a twentieth of all; those that are not finite stay out."""
    width, steps = max(1, len(values) // 20), sorted(values)
    means = {}
    for index, step in enumerate(steps):
        window = [values[at] for at in steps[max(0, index + 1 - width) : index + 1] if math.isfinite(values[at])]
        means[step] = statistics.fmean(window) if window else math.nan
    return means


def shown(text: str) -> str:
    """Returns a text as plotly.js shows it as it is, and takes none of it for markup."""
    return html.escape(printable(text))


def _over_steps(
    rows: Sequence[Standing],
    curve: Callable[[Run], Mapping[int, float]],
    title: str,
    *,
    logarithmic: bool = True,
) -> Chart | None:
    """A line and a band for every row; None if there is nothing to draw."""
    traces = []
    for row, look in _with_looks(rows):
        curves = [found for run in (row.cell.runs.values() if row.cell else ()) if (found := curve(run))]
        steps = _thinned(sorted(set.intersection(*map(set, curves)))) if curves else []
        if not steps:
            continue
        values = [[found[step] for found in curves] for step in steps]
        middle, least, greatest = ([choose(v) for v in values] for choose in (statistics.median, min, max))
        name = shown(f"{described(row)} (n = {len(curves)})")
        traces += _line_with_band(steps, middle, (least, greatest), name, look)
    return _chart(traces, "step", title, logarithmic=logarithmic) if traces else None


def _line_with_band(
    x: Sequence, middle: Sequence[float], ends: tuple[Sequence[float], Sequence[float]], name: str, look: Mapping
) -> list[dict]:
    """The traces of a line and of the band around it."""
    shared = {"x": x, "legendgroup": name, "mode": "lines"}
    band = {"line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
    filled = {"fill": "tonexty", "fillcolor": _faint(look["color"])}
    least, greatest = ([_number(y) for y in end] for end in ends)
    return [
        {**shared, **band, "y": least},
        {**shared, **band, **filled, "y": greatest},
        {**shared, "y": [_number(y) for y in middle], "line": look, "name": name},
    ]


def _chart(traces: list[dict], x: str, y: str, *, logarithmic: bool) -> Chart:
    buttons: list[Chart] = [
        {"label": kind, "method": "relayout", "args": [{"yaxis.type": kind, "yaxis.autorange": True}]}
        for kind in ("linear", "log")
    ]
    if (ends := _ends(traces)) is not None:
        buttons.append(
            {"label": "enlarged", "method": "relayout", "args": [{"yaxis.type": "linear", "yaxis.range": ends}]}
        )
    menu = {"type": "buttons", "direction": "right", "active": int(logarithmic), "buttons": buttons}
    menu |= {"x": 0, "xanchor": "left", "y": 1.01, "yanchor": "bottom", "font": {"size": 11}}
    layout = {
        "xaxis": {"title": {"text": x, "standoff": 12}, **_AXIS},
        "yaxis": {"title": {"text": y, "standoff": 12}, "type": "log" if logarithmic else "linear", **_AXIS},
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "maxheight": 0.6},
        "margin": {"l": 60, "r": 10, "t": 36, "b": 50},
        "hovermode": "x unified",
        "plot_bgcolor": "#fff",
        "paper_bgcolor": "#fff",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#222"},
        "updatemenus": [menu],
    }
    return {"data": [{"type": "scatter", **trace} for trace in traces], "layout": layout}


def _ends(traces: Sequence[Mapping]) -> list[float] | None:
    """The range of the second half of all lines, where methods differ; None if it is empty."""
    values = [y for trace in traces for y in trace["y"][len(trace["y"]) // 2 :] if y is not None]
    if not values or min(values) == max(values):
        return None
    margin = 0.05 * (max(values) - min(values))
    return [min(values) - margin, max(values) + margin]


def _least(runs: Iterable[Run]) -> list[float]:
    """The losses of the best of the cells; empty if each has a diverged run."""
    cells = sorted_by(runs, lambda run: repr(run.fields() | {"seed": None}))
    losses = ([run.loss for run in members] for members in cells.values())
    return min((found for found in losses if all(map(math.isfinite, found))), key=statistics.fmean, default=[])


def _with_looks(rows: Sequence[Standing]) -> list[tuple[Standing, dict[str, Any]]]:
    return [
        (row, {"color": color, "dash": _DASHES[dashes], "width": 2})
        for row, (color, dashes) in zip(rows, looks(row.method for row in rows), strict=True)
    ]


def _recorded(run: Run, name: str) -> dict[int, float]:
    return {record["step"]: float(record[name]) for record in run.steps if name in record}


def _evaluated(run: Run, name: str) -> dict[int, float]:
    return {record["step"]: float(record[name]) for record in run.evaluations if name in record}


def _thinned(steps: list[int]) -> list[int]:
    stride = -(-len(steps) // MOST_POINTS)
    return sorted({*steps[::stride], *steps[-1:]}) if stride else steps


def _number(value: float) -> float | None:
    """What JSON can hold: a gap in the line where a number is not finite."""
    return value if math.isfinite(value) else None


def _faint(color: str) -> str:
    red, green, blue = (int(color[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"
