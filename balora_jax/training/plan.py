"""What a run is about to do, in sentences for people."""

from collections.abc import Mapping
from pathlib import Path

import jax

from balora_jax.settings import Config
from balora_jax.training.memory import memory_limit, shown
from balora_jax.training.program import Program
from balora_jax.training.progress import counted


def plan(
    populations: Mapping[str, Mapping[str, Config]], programs: Mapping[str, Program], output: Path, finished: int
) -> list[str]:
    """Returns what a run will do, one line for all and one a population.

    Args:
        populations: the configs of every population.
        programs: that of every population.
        output: the run directory.
        finished: number of runs whose results are there.
    """
    count = sum(map(len, populations.values()))
    done = f", {finished} of them finished" if finished else ""
    devices = jax.devices()
    where = f"{len(devices)} x {devices[0].device_kind}, {shown(memory_limit())} of memory"
    lines = [f"{counted(count, 'run')} in {counted(len(populations), 'population')}{done}; {where}; writes to {output}"]
    for name, members in populations.items():
        program, settings = programs[name], programs[name].config.training
        base = jax.tree.leaves(program.member_model.bare)
        numbers, size = sum(leaf.size for leaf in base), sum(leaf.nbytes for leaf in base)
        rows, layout = settings.batch_size * settings.accumulate, program.layout
        axes = layout.mesh.shape.items() if layout else ()
        mesh = f"; mesh of {', '.join(f'{axis} {size}' for axis, size in axes)}" if layout else ""
        lines.append(
            f"{name}: {counted(len(members), 'run')} of {counted(settings.steps, 'step')} of {counted(rows, 'row')}; "
            f"{program.trained_parameters:,} trained parameters each, {program.trained_parameters / numbers:.2%} of "
            f"{program.config.model.path} ({numbers:,}, {shown(size)}){mesh}"
        )
    if jax.process_count() > 1:
        lines.append(
            f"{jax.process_count()} processes: when one ends, all end within some minutes, and the same command goes on"
        )
    return lines
