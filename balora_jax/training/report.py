"""The report of finished runs: one HTML file that holds all it shows, and opens without a network."""

import html
import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from balora_jax.errors import ConfigError, printable
from balora_jax.files import whole_file
from balora_jax.training import charts
from balora_jax.training.colors import color_of
from balora_jax.training.comparison import load_runs
from balora_jax.training.records import Record
from balora_jax.training.standings import (
    LEVEL,
    Standing,
    loss_text,
    settings,
    shown,
    standings,
    swept_fields,
    verdict,
)

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

_NOTE = (
    "Mean ± standard deviation of the final evaluation loss over n seeds, at the cell of lowest mean. Difference: mean "
    "over common seeds ± half of its own 95 % interval (paired, Student's t); p and verdict: corrected for all "
    f"comparisons by Holm's method, {100 * LEVEL:g} % in all. Diverged: cells with a diverged run."
)

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1200px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin: 0.5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 0.3rem; }
p { max-width: 75ch; overflow-wrap: anywhere; } .verdict { font-size: 1.1rem; } 
.note { color: #555; font-size: 0.85rem; max-width: 95ch; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; text-align: left; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { border-bottom: 2px solid #888; }
.color { display: inline-block; width: 0.7em; height: 0.7em; margin-right: 0.4em; border-radius: 2px; }
pre { background: #f4f4f4; padding: 0.7rem; white-space: pre-wrap; overflow-wrap: anywhere; }
"""

_SCRIPT = """
for (const chart of JSON.parse(document.getElementById("charts").textContent))
  Plotly.newPlot(chart.id, chart.data, chart.layout, {
    responsive: true, displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]]
  });
"""


def is_available() -> bool:
    """Whether plotly, whose script draws the charts, is installed."""
    return importlib.util.find_spec("plotly") is not None


def write_if_possible(folder: Path) -> None:
    """Writes `report.html` into the directory of a finished run, if plotly is installed."""
    if is_available():
        page = report_page([folder])
        with whole_file(folder / "report.html") as file:
            file.write(page)


def report_page(folders: Sequence[Path], *, reference: str | None = None, by: Iterable[str] = ()) -> str:
    """Returns the report of finished runs, in HTML.

    Args:
        folders: run directories.
        reference: the method with which the others are compared; default lora, if it is among them, or the first.
        by: swept fields whose values are compared each by itself.

    Raises:
        ConfigError: plotly is not installed, or `reference` or `by` do not fit the runs.
        RunError: a folder holds no finished run.
        ValueError: two folders hold the same member.
    """
    if not is_available():
        raise ConfigError("a report needs plotly: pip install 'balora-jax[report]'")
    runs, environments = load_runs(folders)
    methods = list(dict.fromkeys(run.field("method") for run in runs))
    reference = reference or ("lora" if "lora" in methods else methods[0])
    rows = standings(runs, reference=reference, by=by)
    names = ", ".join(dict.fromkeys(run.field("name") for run in runs))
    parts = [
        f'<h1>{_text(names)}</h1><p class="verdict">{_text(verdict(rows, reference))}</p>',
        f"<p>{_text(_summary(rows))}</p>",
        f'<h2>Methods</h2><div class="wide">{_standings_table(rows, reference)}</div>',
        f'<p class="note">{_NOTE}</p>',
    ]
    figures: list[charts.Chart] = []
    for title, chart, note in _charts(rows):
        figures.append({"id": f"chart{len(figures)}", **chart})
        place = f'id="{figures[-1]["id"]}" style="height: {charts.height(chart)}px"'
        parts.append(f'<h2>{title}</h2><p class="note">{note}</p><div {place}></div>')
    swept = set(swept_fields(runs))
    shared = {name: value for name, value in runs[0].fields().items() if name not in swept}
    parts += [
        f"<h2>To repeat it</h2>{_commands(environments)}",
        f'<h2>Environment</h2><div class="wide">{_environment_table(environments)}</div>',
        f"<h2>Settings</h2><p>Swept: {_text(', '.join(sorted(swept)) or 'nothing')}.</p>",
        f'<details><summary>What all runs have in common</summary><div class="wide">{_pairs(shared)}</div></details>',
    ]
    return _page(names, parts, figures)


def _charts(rows: Sequence[Standing]) -> Iterator[tuple[str, charts.Chart, str]]:
    """Title, chart and note, of the charts for which there are records."""
    others = dict.fromkeys(name for row in rows for run in row.runs for name in run.result.get("others", {}))
    found = (
        (
            "Loss over steps",
            charts.loss_curves(rows),
            "Median and range over seeds, at the best cell. Drag to zoom, double-click to go back; a click on a name "
            "switches its line, a double click shows it alone.",
        ),
        *(
            (
                f"Loss on {_text(name)} over steps",
                charts.other_loss_curves(rows, name),
                "A further evaluation set, which has chosen nothing: neither a cell nor a step.",
            )
            for name in others
        ),
        (
            "Final loss over the learning rate",
            charts.losses_over_rate(rows),
            "At the best values of all else that was searched.",
        ),
        (
            "Balancing gap over steps",
            charts.gap_curves(rows),
            "How far the pairs are from AᵀA = BBᵀ, relative to their size: the mean over the pairs. Balanced pairs are "
            "the best conditioned of their product.",
        ),
        (
            "Condition number of the pairs over steps",
            charts.condition_curves(rows),
            "(σ₁(A)² + σ₁(B)²) / min(σᵣ(A), σᵣ(B))², the median over the pairs; a balanced pair has the least of its "
            "product, 2 σ₁ / σᵣ. Infinite, and not drawn, where a factor is still zero.",
        ),
        (
            "Singular values of every layer at the end",
            charts.spectra(rows),
            "Of s·A·B: the middle value, and a bar from the least to the greatest; first seed of the best cell.",
        ),
        (
            "Training loss over steps",
            charts.training_curves(rows),
            "Of the batches: the mean over the last twentieth of the run; median and range over seeds.",
        ),
    )
    for title, chart, note in found:
        if chart is not None:
            yield title, chart, note


def _page(title: str, parts: Iterable[str], figures: Sequence[Mapping]) -> str:
    from plotly.offline import get_plotlyjs

    data = json.dumps(figures, allow_nan=False).replace("<", r"\u003c")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + f'\n<script type="application/json" id="charts">{data}</script>\n<script>{get_plotlyjs()}</script>\n'
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


def _summary(rows: Sequence[Standing]) -> str:
    """The best cell of all, and how much was tried."""
    runs = sum(len(row.runs) for row in rows)
    diverged = sum(run.result["diverged_at"] >= 0 for row in rows for run in row.runs)
    best = min((row for row in rows if row.cell), key=lambda row: row.cell.mean if row.cell else 0, default=None)
    text = f"{runs} run{'s' * (runs != 1)}, {diverged} of them diverged."
    if best is None or best.cell is None:
        return f"{text} Every cell has a diverged run."
    before = [run.curve[0] for run in best.cell.runs.values() if 0 in run.curve]
    where = f" at {settings(best.cell.values)}" if best.cell.values else ""
    start = f", from {sum(before) / len(before):.4f} before training" if before else ""
    text += f" The lowest mean evaluation loss is that of {best.method}{where}: {loss_text(best.cell)}{start}."
    edges = sorted({row.method for row in rows if row.cell and row.cell.on_edge})
    if edges:
        text += f" On the edge of the grid, so that a wider one may do better: {', '.join(edges)}."
    return text


def _standings_table(rows: Sequence[Standing], reference: str) -> str:
    names = [name.rsplit(".", 1)[-1].replace("_", " ") for name in rows[0].group]
    names += ["method", "best cell", "n", "evaluation loss", f"less {reference}'s", "lower in", "p (Holm)", "verdict"]
    lines = []
    for row in rows:
        cell, found = row.cell, row.difference
        compared = ["", "", "", "reference" if row.method == reference else ""]
        if found is not None and row.corrected is not None:
            compared = [f"{found.mean:+.4f} ± {found.half_width:.4f}", f"{found.better} of {found.n}"]
            compared += [f"{row.corrected:.2g}", row.verdict]
        losses = ["every cell diverged", "0", ""]
        if cell is not None:
            losses = [settings(cell.values, cell.on_edge), str(len(cell.runs)), loss_text(cell)]
        color = f'<span class="color" style="background:{color_of(row.method)}"></span>'
        cells = [_text(shown(value)) for value in row.group.values()] + [color + _text(row.method)]
        cells += [_text(text) for text in (*losses, *compared, f"{row.cells[1]} of {row.cells[0]}")]
        lines.append(cells)
    return _table([*map(_text, names), "diverged"], lines)


def _environment_table(environments: Sequence[Record]) -> str:
    """What the runs were made with; several values where they differ."""
    values: dict[str, list[str]] = {}
    for environment in environments:
        own = {name: value for name, value in environment.items() if name not in ("packages", "command")}
        for name, value in (own | environment.get("packages", {})).items():
            if str(value) not in values.setdefault(name, []):
                values[name].append(str(value))
    return _pairs({name: ", ".join(found) for name, found in values.items()})


def _commands(environments: Sequence[Record]) -> str:
    commands = dict.fromkeys(str(environment["command"]) for environment in environments if "command" in environment)
    commits = dict.fromkeys(str(environment["commit"]) for environment in environments if environment.get("commit"))
    at = f"<p>At commit {_text(', '.join(commits))}:</p>" if commits else ""
    return f"{at}<pre>{_text(chr(10).join(commands))}</pre>"


def _pairs(values: Mapping[str, Any]) -> str:
    return _table((), [[_text(name.replace("_", " ")), _text(shown(value))] for name, value in values.items()])


def _table(names: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [f"<tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>"] if names else []
    rows += [f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines]
    return f"<table>{''.join(rows)}</table>"


def _text(text: str) -> str:
    return html.escape(printable(text, keep="\n"))
