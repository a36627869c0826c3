"""`balora-jax inspect`: the pairs of a PEFT adapter in numbers and as a figure."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from rich import box
from rich.table import Table
from tyro.conf import Positional, arg

from balora_jax.adapters import read_peft
from balora_jax.adapters.diagnosis import Diagnosis, diagnose_adapter
from balora_jax.commands.arguments import parse
from balora_jax.commands.folders import explained
from balora_jax.console import PlainConsole
from balora_jax.errors import printable
from balora_jax.training.config import ConfigError

TABLE_WIDTH = 130
"""Columns that the table needs."""


@dataclass(frozen=True)
class Options:
    """Shows the spectrum, balance and conditioning of every pair of a PEFT adapter; no base model is needed.

    Attributes:
        adapter: a PEFT folder.
        figure: file for a figure, .png or .pdf say; without an ending it gets .png.
    """

    adapter: Annotated[Path, Positional, arg(metavar="ADAPTER")]
    figure: Path | None = None


def main(arguments: list[str]) -> int:
    """Runs the command."""
    options = parse(Options, arguments, prog="balora-jax inspect")
    with explained("ADAPTER"):
        adapter = read_peft(options.adapter)
        diagnoses = diagnose_adapter(adapter, scaled=True)
    console = PlainConsole(soft_wrap=True)
    figure = options.figure
    if figure is not None:
        name, ending = os.path.splitext(figure)
        figure = Path(f"{name}.png") if ending in ("", ".") else figure
        try:
            draw(diagnoses, figure)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot write the figure {figure}: {error}") from error
    PlainConsole(width=max(console.width, TABLE_WIDTH)).print(_table(diagnoses))
    if adapter.config.get("use_dora"):
        console.print("DoRA: these are the updates of the direction, before the columns get their magnitudes")
    if adapter.takes_from_base:
        console.print(
            f"{adapter.config['init_lora_weights']}: what the pairs started with has been taken from the base, so that "
            "these are more than what was learned"
        )
    if figure is not None:
        console.print(f"figure: {figure}")
    return 0


def _table(diagnoses: dict[str, Diagnosis]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        caption_justify="left",
        caption="singular values, Frobenius norm and stable rank of the update; gap: relative balancing gap; "
        "condition: of the factorisation, and the least that a pair of this product has, which balanced pairs attain",
    )
    for name in ("module", "in x out", "rank", "singular values", "norm", "stable rank", "gap", "condition", "least"):
        table.add_column(name, justify="left" if name in ("module", "in x out") else "right", no_wrap=True)
    for name, diagnosis in diagnoses.items():
        values = diagnosis.singular_values
        table.add_row(
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
    return table


def draw(diagnoses: dict[str, Diagnosis], path: Path) -> None:
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
