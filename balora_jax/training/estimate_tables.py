"""Estimates as tables: what is trained, and what a step takes on each device."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

from balora_jax.training.estimate import Estimate
from balora_jax.training.memory import shown
from balora_jax.training.roofline import Roofline
from balora_jax.training.targets import Target

RECKONED = (
    "reckoned, not measured: every part at the peak that the vendor states, and the parts of a step at once "
    "(the faster number) or one after the other"
)
"""What every table of times says."""


def report(found: Mapping[str, Estimate], target: Target | None = None) -> list[Table]:
    """Returns estimates as tables: what is trained, once for populations that train the same, and what each takes.

    Args:
        found: the estimates by the names of their populations.
        target: for which they were made; None for the device that is there.
    """
    trained: dict[Any, list[str]] = {}
    for name, one in found.items():
        trained.setdefault((one.base, tuple(one.adapters.items())), []).append(name)
    return [*(_trained(names, found[names[0]]) for names in trained.values()), step_table(found, target)]


def step_table(found: Mapping[str, Estimate], target: Target | None = None) -> Table:
    """Returns what a step takes on each device, a column each.

    Args:
        found: the estimates by what stands above them.
        target: for which they were made; None for the device that is there.
    """
    ones = list(found.values())
    table = Table(title=f"a step on {ones[0].device}, for each device", title_justify="left")
    table.add_column()
    for name in found:
        table.add_column(name, justify="right", overflow="fold")

    def row(title: str, cell: Callable[[Estimate], str], *, last: bool = False) -> None:
        table.add_row(title, *map(cell, ones), end_section=last)

    row("runs together", lambda one: str(one.members))
    if any(math.prod(one.mesh) > 1 for one in ones):
        row("data x fsdp x tensor", lambda one: " x ".join(map(str, one.mesh)))
    for part in ones[0].held:
        row(part, lambda one, part=part: shown(one.held[part]))  # type: ignore[misc]
    row("temporaries", lambda one: shown(one.step.temporaries))
    has = target.chip.memory if target else math.inf
    row(f"peak, of {shown(has)}" if target else "peak", lambda one: _peak(one.step.peak, has), last=target is not None)
    if any(one.narrow_step for one in ones):
        row("peak without float32 copies", lambda one: shown(one.narrow_step.peak) if one.narrow_step else "")
        table.caption = "float32 copies: of all weights, which compilers for CPUs alone make of those in bfloat16"
    if target:
        for title, of in _WORK.items():
            row(title, lambda one, of=of: of(one.whole) if one.whole else "")  # type: ignore[misc]
        kinds = sorted({sent for one in ones if one.whole for sent in one.whole.work.sent})
        for kind, far in kinds:
            title = f"sent by {kind}{', between nodes' if far else ''}"
            row(title, lambda one, key=(kind, far): shown(one.whole.work.sent.get(key, 0)) if one.whole else "")  # type: ignore[misc]
        for title, tell in _TIMES.items():
            row(title, lambda one, tell=tell: tell(one, one.whole) if one.whole else "")  # type: ignore[misc]
        table.caption = RECKONED
    row("compiled in", lambda one: f"{one.seconds:.0f} s")
    table.caption_justify = "left"
    return table


_WORK: Mapping[str, Callable[[Roofline], str]] = {
    "operations of products": lambda whole: f"{sum(whole.work.products.values()):.3g}",
    "traffic with the memory": lambda whole: shown(whole.work.bytes),
}

_TIMES: Mapping[str, Callable[[Estimate, Roofline], str]] = {
    **{
        f"time of {part}": lambda _, whole, part=part: seconds(whole.parts[part])  # type: ignore[misc]
        for part in ("compute", "memory", "network", "launches")
    },
    "a step": lambda _, whole: f"{seconds(whole.fastest)} to {seconds(whole.slowest)}",
    "bound by": lambda _, whole: whole.bound,
    "tokens per second": lambda one, whole: f"{one.tokens / whole.slowest:,.0f} to {one.tokens / whole.fastest:,.0f}",
    "balancing, of a step": lambda one, whole: (
        f"{one.projection.slowest / whole.slowest:.2%}" if one.projection else ""
    ),
}


def search_table(found: Mapping[tuple[int, ...], Estimate], target: Target) -> Table:
    """Returns the meshes that were tried, in order.

    Args:
        found: the estimates by the parts along `data`, `fsdp` and `tensor`.
        target: for which they were made.
    """
    table = Table(title=f"meshes of {target}, the fastest first", title_justify="left")
    for title in ("data x fsdp x tensor", "peak", "sent in a step", "a step", "bound by", "tokens per second"):
        table.add_column(title, justify="right")
    for mesh, one in found.items():
        cells = [" x ".join(map(str, mesh)), _peak(one.step.peak, target.chip.memory)]
        if one.whole:
            cells.append(shown(sum(one.whole.work.sent.values())))
            cells += [_TIMES[title](one, one.whole) for title in ("a step", "bound by", "tokens per second")]
        table.add_row(*cells)
    table.caption, table.caption_justify = RECKONED, "left"
    return table


def seconds(number: float) -> str:
    """Returns a time as people write it."""
    for unit, size in (("s", 1), ("ms", 1e-3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e-6:.3g} us"


def _peak(peak: float, has: float) -> str:
    return shown(peak) if peak <= has else f"{shown(peak)}, does not fit"


def _trained(names: Sequence[str], found: Estimate) -> Table:
    table = Table(title=", ".join(names), title_justify="left", show_header=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_row("parameters of the base", f"{found.base[0]:,}", shown(found.base[1]), end_section=True)
    for path, shapes in found.adapters.items():
        size = sum(map(math.prod, shapes))
        table.add_row(f"{path}: {' + '.join(map(str, shapes))}", f"{size:,}", shown(4 * size))  # float32
    share = f"trained parameters of a run ({found.trained[0] / found.base[0]:.2%} of the base)"
    table.add_row(share, f"{found.trained[0]:,}", shown(found.trained[1]))
    table.add_row("optimizer state of a run", f"{found.opt_state[0]:,}", shown(found.opt_state[1]))
    return table
