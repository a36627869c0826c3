"""The pairs of a PEFT adapter in numbers: a summary, a table, JSON and a figure."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from balora_jax.adapters import PeftAdapter
from balora_jax.adapters.diagnosis import Diagnosis
from balora_jax.errors import printable

BALANCED = 1e-5
"""The largest relative gap of pairs that are said to be balanced: rounding in float32 leaves no more."""

Diagnoses = Mapping[str, Diagnosis]


def summary(diagnoses: Diagnoses) -> list[str]:
    """Returns what all pairs have in common, and what balancing them would gain, a sentence a line.

    Args:
        diagnoses: by name of the module.
    """
    found = _summary(diagnoses)
    ranks = " to ".join(dict.fromkeys((str(found["ranks"][0]), str(found["ranks"][-1]))))
    pairs = "1 pair" if found["pairs"] == 1 else f"{found['pairs']} pairs"
    worst_gap = f"the worst balancing gap is {found['worst_gap']:.1e}, of {found['worst_gap_module']}"
    lines = [f"{pairs} of rank {ranks}; {worst_gap}"]
    if found["lacking_rank"]:
        lines.append(f"the product of {found['lacking_rank']} of them lacks rank: no finite condition number")
    if found["lacking_rank"] == found["pairs"]:
        return lines
    median, worst = found["median_condition_number"], found["worst_condition_number"]
    least_median, least_worst = found["median_least_condition_number"], found["worst_least_condition_number"]
    lines.append(
        f"condition number: median {median:.3g}, worst {worst:.3g}; the least that pairs of these products can have: "
        f"median {least_median:.3g}, worst {least_worst:.3g}"
    )
    if found["worst_gap"] <= BALANCED:
        return [*lines, "the pairs are balanced: there is nothing to gain"]
    shares = f"{median / least_median:.3g} times smaller, the worst {worst / least_worst:.3g} times"
    return [*lines, f"balancing would make the median condition number {shares}"]


def as_json(diagnoses: Diagnoses) -> dict[str, Any]:
    """Returns the summary and every pair as values of JSON, which has no infinity: it is None.

    Args:
        diagnoses: by name of the module.
    """
    pairs = [
        {
            "module": name,
            "in": diagnosis.shape[0],
            "out": diagnosis.shape[1],
            "rank": diagnosis.rank,
            "singular_values": diagnosis.singular_values.tolist(),
            "norm": diagnosis.norm,
            "stable_rank": diagnosis.stable_rank,
            "gap": diagnosis.gap,
            "condition_number": _finite(diagnosis.condition_number),
            "least_condition_number": _finite(diagnosis.least_condition_number),
        }
        for name, diagnosis in diagnoses.items()
    ]
    return {"summary": _summary(diagnoses), "pairs": pairs}


def _summary(diagnoses: Diagnoses) -> dict[str, Any]:
    """The numbers of the summary; condition numbers, and the least ones, over the pairs where they are finite."""
    worst = max(diagnoses, key=lambda name: diagnoses[name].gap)
    finite = [diagnosis for diagnosis in diagnoses.values() if np.isfinite(diagnosis.condition_number)]
    found = {
        "pairs": len(diagnoses),
        "ranks": sorted({diagnosis.rank for diagnosis in diagnoses.values()}),
        "worst_gap": diagnoses[worst].gap,
        "worst_gap_module": worst,
        "lacking_rank": len(diagnoses) - len(finite),
    }
    for name in ("condition_number", "least_condition_number"):
        numbers = [float(getattr(diagnosis, name)) for diagnosis in finite]
        found[f"median_{name}"] = statistics.median(numbers) if numbers else None
        found[f"worst_{name}"] = max(numbers, default=None)
    return found


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def notes(adapter: PeftAdapter) -> list[str]:
    """Returns where the products of an adapter are not what was learned, a sentence a line.

    Args:
        adapter: the adapter.
    """
    found = []
    if adapter.config.get("use_dora"):
        found.append("DoRA: these are the updates of the direction, before the columns get their magnitudes")
    if adapter.takes_from_base:
        found.append(
            f"{adapter.config['init_lora_weights']}: what the pairs started with has been taken from the base, so that "
            "these are more than what was learned"
        )
    return found


def table(diagnoses: Diagnoses) -> Table:
    """Returns every pair as a row of a table.

    Args:
        diagnoses: by name of the module.
    """
    out = Table(
        box=box.SIMPLE_HEAD,
        caption_justify="left",
        caption="singular values, Frobenius norm and stable rank of the update; gap: relative balancing gap; "
        "condition: of the factorisation, and the least that a pair of this product has, which balanced pairs attain",
    )
    for name in ("module", "in x out", "rank", "singular values", "norm", "stable rank", "gap", "condition", "least"):
        out.add_column(name, justify="left" if name in ("module", "in x out") else "right", no_wrap=True)
    for name, diagnosis in diagnoses.items():
        values = diagnosis.singular_values
        out.add_row(
            name,
            "{} x {}".format(*diagnosis.shape),
            str(diagnosis.rank),
            f"{values[0]:.2e} to {values[-1]:.2e}",
            f"{diagnosis.norm:.3g}",
            f"{diagnosis.stable_rank:.2f}",
            f"{diagnosis.gap:.1e}",
            f"{diagnosis.condition_number:.3g}",
            f"{diagnosis.least_condition_number:.3g}",
        )
    return out


def draw(diagnoses: Diagnoses, path: Path) -> None:
    """Draws the spectrum of every update, and its norm, gap and condition number over depth.

    Args:
        diagnoses: by name of the module.
        path: file to write.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    kinds: dict[str, dict[str, Diagnosis]] = {}
    for name, diagnosis in diagnoses.items():
        kind = printable(name.rsplit(".", 1)[-1]).replace("$", r"\$")  # lest it be taken for a formula
        kinds.setdefault(kind, {})[name] = diagnosis
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    figure = Figure(figsize=(3.2 * max(columns, 3), 2.6 * rows + 2.8), layout="constrained")
    upper, lower = np.asarray(figure.subfigures(2, 1, height_ratios=(rows, 1.1)))
    panels = np.ravel(upper.subplots(rows, columns, sharey=True, squeeze=False))
    for panel, (kind, members) in zip(panels, kinds.items(), strict=False):
        colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(members)))
        for colour, diagnosis in zip(colours, members.values(), strict=True):
            values = np.where(diagnosis.singular_values > 0, diagnosis.singular_values, np.nan)
            panel.semilogy(1 + np.arange(len(values)), values, color=colour, marker=".", lw=1)
        panel.set_title(kind, fontsize=9)
        panel.set_xlabel("index")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    for panel in panels[len(kinds) :]:
        panel.remove()
    panels[0].set_ylabel("singular value")
    upper.suptitle("spectra of the updates, the first layer darkest", fontsize=10)
    quantities = {"norm of the update": "norm", "balancing gap": "gap", "condition number": "condition_number"}
    for panel, (title, attribute) in zip(np.ravel(lower.subplots(1, 3)), quantities.items(), strict=True):
        for kind, members in kinds.items():
            values = np.array([getattr(diagnosis, attribute) for diagnosis in members.values()])
            shown = np.where(np.isfinite(values) & (values > 0), values, np.nan)
            panel.semilogy(range(len(values)), shown, marker=".", lw=1, label=kind)
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("layer")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    lower.legend(*panel.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
