"""What a run will take, from shapes alone: parameters, optimizer state, and the memory of the compiled step."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from rich.table import Table

from balora_jax.errors import ConfigError
from balora_jax.settings import Config
from balora_jax.training.loading import load_shapes
from balora_jax.training.memory import NO_MACHINE, StepMemory, check_step, shown, step_memory
from balora_jax.training.program import Program, abstract_batch

# Keeps the compiler from widening all bfloat16 weights to float32 at once, which it does for CPUs.
_NARROW: dict[str, str | bool] = {
    "xla_disable_hlo_passes": "while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion"
}


@dataclass(frozen=True)
class Estimate:
    """What a population of runs will take.

    Attributes:
        base: number and bytes of the frozen parameters.
        adapters: the shapes of the trained parameters of every adapted layer, by its dotted path, of one run.
        trained: number and bytes of the trained parameters of one run.
        opt_state: number and bytes of the numbers in the optimizer's state of one run.
        members: number of runs that are trained together.
        step: memory of a step of all of them, as compiled for this device.
        narrow_step: for a base or activations in bfloat16 on a CPU: the same without the float32 copies of all weights
            that only CPUs make; else None.
        device: for which the step was compiled.
        seconds: that compiling it took.
    """

    base: tuple[int, int]
    adapters: dict[str, tuple[tuple[int, ...], ...]]
    trained: tuple[int, int]
    opt_state: tuple[int, int]
    members: int
    step: StepMemory
    narrow_step: StepMemory | None
    device: str
    seconds: float


def estimate(members: Sequence[Config]) -> Estimate:
    """Estimates what runs that are trained together will take; no weight is read, and nothing is computed.

    Args:
        members: their configs, which differ in numeric fields alone. Their model's folder need hold `config.json` only.

    Raises:
        ConfigError: there is no such model, or adapters do not go on it.

    Notes:
        The compiler's figures are those of one device without sharding. What evaluation and generation take is not
        among them, nor is what the device itself reserves.
    """
    config = members[0]
    model = load_shapes(config.model)
    check_step(config, model.config, members=len(members), length=config.data.length, limit=NO_MACHINE)
    try:
        program = Program(config, model)
        states = program.abstract_state(members)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    training = config.training
    rows = (len(members), training.accumulate, training.batch_size)
    start = time.perf_counter()
    lowered = program.step.lower(states, program.base, abstract_batch(*rows, config.data.length))
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    device = jax.devices()[0]
    widened = device.platform == "cpu" and "bfloat16" in (config.model.dtype, config.model.param_dtype)
    adapters: dict[str, tuple[tuple[int, ...], ...]] = {}
    for key, leaf in nnx.to_flat_state(states.adapters):
        path = ".".join(map(str, key[:-1]))
        adapters[path] = (*adapters.get(path, ()), leaf.shape[1:])
    return Estimate(
        base=_size(program.base),
        adapters=adapters,
        trained=_size(states.adapters, len(members)),
        opt_state=_size(states.opt_state, len(members)),
        members=len(members),
        step=_memory(compiled),
        narrow_step=_memory(lowered.compile(compiler_options=_NARROW)) if widened else None,
        device=device.device_kind,
        seconds=seconds,
    )


def report(found: Mapping[str, Estimate]) -> list[Table]:
    """Returns estimates as tables: what is trained, once for populations that train the same, and what each takes.

    Args:
        found: the estimates by the names of their populations.
    """
    trained: dict[Any, list[str]] = {}
    for name, one in found.items():
        trained.setdefault((one.base, tuple(one.adapters.items())), []).append(name)
    return [*(_trained_table(names, found[names[0]]) for names in trained.values()), _memory_table(found)]


def _trained_table(names: Sequence[str], found: Estimate) -> Table:
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
    return table


def _memory_table(found: Mapping[str, Estimate]) -> Table:
    device = next(iter(found.values())).device
    table = Table(title=f"memory of a step on {device}; optimizer state: of one run", title_justify="left")
    table.add_column("population", overflow="fold")
    narrow = any(one.narrow_step for one in found.values())
    names = "runs together", "optimizer state", "base, states, batch", "temporaries", "peak"
    for name in (*names, *["peak without float32 copies"] * narrow, "compiled in"):
        table.add_column(name, justify="right")
    for population, one in found.items():
        sizes = [one.opt_state[1], one.step.arguments, one.step.temporaries, one.step.peak]
        sizes += [one.narrow_step.peak] if one.narrow_step else []
        table.add_row(population, str(one.members), *map(shown, sizes), f"{one.seconds:.0f} s")
    if narrow:
        table.caption = "float32 copies: of all weights, which compilers for CPUs alone make of those in bfloat16"
        table.caption_justify = "left"
    return table


def _size(tree: Any, members: int = 1) -> tuple[int, int]:
    """Number of numbers and bytes of a tree, of one member."""
    leaves = jax.tree.leaves(tree)
    return sum(x.size for x in leaves) // members, sum(x.size * x.dtype.itemsize for x in leaves) // members


def _memory(compiled: jax.stages.Compiled) -> StepMemory:
    found = step_memory(compiled)
    if found is None:
        raise ConfigError(f"the compiler for {jax.devices()[0].device_kind} does not tell the memory of a program")
    return found
