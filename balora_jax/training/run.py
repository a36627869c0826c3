"""A whole run: its populations one after the other, and what is made of their records at the end."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console

from balora_jax.console import PlainConsole
from balora_jax.errors import ConfigError
from balora_jax.files import whole_file
from balora_jax.settings import Config
from balora_jax.training import results
from balora_jax.training.config import NUMERIC_FIELDS, Sweep, expand
from balora_jax.training.layout import layout_of
from balora_jax.training.live import LiveLog
from balora_jax.training.loading import base_model, load_data, load_evaluations, load_shapes
from balora_jax.training.memory import check_evaluation, check_step, memory_limit
from balora_jax.training.parts import check_whole
from balora_jax.training.plan import plan
from balora_jax.training.populations import Populations, everyone, sort_into_populations
from balora_jax.training.processes import is_first
from balora_jax.training.program import Program
from balora_jax.training.progress import phase
from balora_jax.training.records import RunDirectory, RunError
from balora_jax.training.trainer import Trainer


def run(config: Config, sweep: Sweep, output: Path, console: Console, *, log: str | None = None) -> list[dict]:
    """Trains every member of a sweep, or goes on where an earlier call was stopped.

    Args:
        config: what the members have in common.
        sweep: the fields in which they differ.
        output: the run directory.
        console: where progress is shown.
        log: a name in `balora_jax.training.live.LIBRARIES`: where the metrics are shown while the run goes on.

    Returns:
        The rows of the result's table, which is also written to the run directory.

    Raises:
        ConfigError: the config cannot be run, or the directory belongs to another config.
        RunError: the directory cannot be used: broken, or in use, or its sweep is in parts; or the disk is full.
        Interrupted: a signal came; the message says from where the same call goes on.
    """
    populations = sort_into_populations(expand(config, sweep))
    with trained(populations, output, console, log=log) as directory:
        return finish(directory, populations)


@contextlib.contextmanager
def trained(
    populations: Populations, output: Path, console: Console, *, log: str | None = None, log_folder: Path | None = None
) -> Iterator[RunDirectory]:
    """Trains populations, and yields their run directory, which is open in the block.

    Args:
        populations: the configs of the members by name.
        output: the run directory.
        console: where progress is shown.
        log: as for `run`.
        log_folder: the folder that the log is of; default the run directory.

    Raises:
        ConfigError, RunError, Interrupted: as `run`.
    """
    members = everyone(populations)
    programs = {}  # fails before files are made
    for name, own in populations.items():
        with phase(console, f"{name}: reading the base and the data"):
            programs[name] = _program(name, own)
    with opened(output, members) as directory:
        check_whole(directory)
        if log is not None and is_first():
            identity, resumed = f"{output.resolve()} {directory.started}", bool(directory.records)
            directory.watch(LiveLog(log, log_folder or output, members, identity=identity, resumed=resumed))
        for line in plan(populations, programs, output, len(directory.of("result"))):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        for name, own in populations.items():
            if len(directory.of("result", population=name)) < len(own):
                Trainer(name, own, programs[name], directory, console).train()
            directory.check_complete(name, own, programs[name].config.training)
        yield directory


@contextlib.contextmanager
def opened(output: Path, members: dict[str, Config]) -> Iterator[RunDirectory]:
    """As `RunDirectory`, which is closed after the block; a disk on which the block cannot write is a `RunError`."""
    directory = RunDirectory(output, members)
    try:
        yield directory
    except OSError as error:
        raise RunError(
            f"cannot write to {output} ({error.strerror or error}); once that is mended, the same command goes on"
        ) from error
    finally:
        directory.close()


def finish(directory: RunDirectory, populations: Populations) -> list[dict]:
    """Makes the table, the figure and the report of what is recorded, and returns the table's rows.

    Args:
        directory: with the results of all members.
        populations: the configs of the members by name.
    """
    axes = {name: results.numeric_axes(members.values(), NUMERIC_FIELDS) for name, members in populations.items()}
    rows = results.summarise(directory, everyone(populations), axes)
    if is_first():
        _write_results(directory, rows)
    return rows


def _write_results(directory: RunDirectory, rows: list[dict]) -> None:
    from balora_jax.training import figures, report  # heavy: not before the first step

    output = directory.path
    with whole_file(output / "results.json") as file:
        file.write(json.dumps(rows, indent=2) + "\n")
    with whole_file(output / "results.txt") as file:
        PlainConsole(file=file, width=results.TABLE_WIDTH).print(results.table(rows))
    with whole_file(output / "figure.png", "wb") as file:
        figures.loss_curves(directory, rows, file)
    report.write_if_possible(output)


def _program(name: str, members: Mapping[str, Config]) -> Program:
    config = next(iter(members.values()))
    try:
        layout = layout_of(config, load_shapes(config.model), members=len(members))
        program = Program(config, base_model(config.model, layout.mesh if layout else None), layout)
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"{name}: {error}") from error
    rows, examples, _ = load_data(config.data, config.model.path)
    model, limit = load_shapes(config.model).config, memory_limit()
    check_step(config, model, members=len(members), length=rows.length, limit=limit)
    for found in (examples, *load_evaluations(config)[0].values()):
        check_evaluation(config.training, model, found, limit=limit)
    return program
