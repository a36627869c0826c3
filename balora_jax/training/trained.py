"""Models of a run that has been trained, from its directory alone."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax

from balora_jax.errors import ConfigError
from balora_jax.files import read_json, read_object
from balora_jax.models import Decoder
from balora_jax.settings import Config
from balora_jax.training.checkpoints import Checkpoints
from balora_jax.training.checks import check_types
from balora_jax.training.fields import from_json
from balora_jax.training.layout import tensor_layout
from balora_jax.training.loading import load_model, load_shapes
from balora_jax.training.parts import home
from balora_jax.training.populations import sort_into_populations
from balora_jax.training.program import Program
from balora_jax.training.records import RunError


class Trained(NamedTuple):
    """A member of a run.

    Attributes:
        name: its name.
        config: its config.
        model: base and adapters.
        step: that these adapters are of: of the checkpoint, or the best until then if the run ends with that.
        diverged_at: the step at which its loss was no longer finite, after which nothing changed, or -1.
    """

    name: str
    config: Config
    model: Decoder
    step: int
    diverged_at: int


def load_trained(run: Path, member: str | None = None, *, weights: bool = True, tensor: int = 1) -> Trained:
    """Reads a member of a run from its latest checkpoint.

    Args:
        run: a run directory.
        member: its name; default the only one, or the only one of the best cells of the table.
        weights: whether those of the base are read. Otherwise the model has shapes in their place, and its adapters.
        tensor: devices that share the weights.

    Raises:
        ConfigError: this is no run directory, there is no such member, or it is not clear which is meant.
        RunError: there is no checkpoint, or a file is broken.
    """
    members = read_members(run)
    name = _only_best(run, members) if member is None else member
    if name not in members:
        near = difflib.get_close_matches(name, members, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(members)}"
        raise ConfigError(f"{run} has no member {name}{hint}")
    populations = sort_into_populations(list(members.values()))
    population = next(key for key, group in populations.items() if name in group)
    directory, together = home(run, populations, population, name)
    folder = directory / "checkpoints" / population
    if not folder.is_dir():
        raise RunError(f"{run} has no checkpoint of {name}; let the run go on first")
    checkpoints = Checkpoints(folder, keep=None)
    try:
        step = checkpoints.latest_step()
        if step is None:
            raise RunError(f"{run} has no checkpoint of {name}; let the run go on first")
        program = _program(together, weights=weights, tensor=tensor)
        states = checkpoints.restore(step, program.abstract_state(list(together.values())))
    finally:
        checkpoints.close()
    index = list(together).index(name)
    state = jax.tree.map(lambda x: x[index], states.selected)
    model = program.member_model(state, program.base)
    if state.selection is not None and members[name].training.select == "best":
        step = int(state.selection.step)
    return Trained(name, members[name], model, step, int(state.diverged_at))


def _program(members: Mapping[str, Config], *, weights: bool, tensor: int) -> Program:
    """The program of a population; without weights no more than the config.json of the base is read."""
    config = next(iter(members.values()))
    shapes = load_shapes(config.model)
    layout = tensor_layout(shapes, tensor)
    if not weights:
        return Program(config, shapes)
    return Program(config, load_model(config.model, layout.mesh if layout else None), layout)


def read_members(run: Path) -> dict[str, Config]:
    """Returns the configs of a run by the names of its members.

    Args:
        run: a run directory.

    Raises:
        ConfigError: this is no run directory.
        RunError: its config.json is broken.
    """
    file = run / "config.json"
    if not file.is_file():
        raise ConfigError(f"{run} must be a run directory, but {file} does not exist")
    members = {}
    try:
        for name, values in read_object(file).items():
            members[name] = from_json(Config, values)
            check_types(members[name])
    except (ValueError, TypeError) as error:
        raise RunError(f"{file} is broken, or written by another version: {error}") from error
    if not members:
        raise RunError(f"{file} is broken: it holds no run")
    return members


def _only_best(run: Path, members: Mapping[str, Config]) -> str:
    if len(members) == 1:
        return next(iter(members))
    file = run / "results.json"
    if not file.is_file():
        raise ConfigError(f"{run} is not finished; name one of its members with --member: {', '.join(members)}")
    try:
        rows = read_json(file)
    except ValueError as error:
        raise RunError(str(error)) from error
    try:
        best = {
            member: float(loss)
            for row in rows
            if "best" in row
            for member, loss in zip(row["members"], row["evaluation_loss"]["values"], strict=True)
        }
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(f"{file} is broken: its rows must have members, and an evaluation loss of each") from error
    if len(best) == 1:
        return next(iter(best))
    shown = ", ".join(f"{name} ({loss:.4f})" for name, loss in sorted(best.items(), key=lambda item: item[1]))
    raise ConfigError(
        f"name one member of {run} with --member; those of the best cells, with their evaluation losses, are "
        f"{shown or 'none, because every cell diverged'}"
    )
