"""What a run will take, from shapes alone: parameters, optimizer state, memory and time of the compiled step."""

import itertools
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
from flax import nnx
from jax.sharding import SingleDeviceSharding

from balora_jax.errors import ConfigError
from balora_jax.settings import Config
from balora_jax.training.hlo import Program as CompiledProgram
from balora_jax.training.layout import layout_of
from balora_jax.training.loading import load_shapes
from balora_jax.training.memory import NO_MACHINE, StepMemory, check_step, step_memory
from balora_jax.training.program import Program, abstract_batch
from balora_jax.training.roofline import Roofline, roofline
from balora_jax.training.targets import Target
from balora_jax.transform import PROJECTION

Options = dict[str, str | bool | int]

# Machine code is not run here, so it need not be fast; the memory is that of a program that is.
_QUICK: Options = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
# Keeps the compiler from widening all bfloat16 weights to float32 at once, which it does for CPUs.
_NARROW: Options = {
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
        held: bytes that each device holds between steps, by what they are, of all runs together.
        step: memory of a step on each device, as compiled for it. Of a program that does not fit as far as it is told,
            and without temporaries where even the arguments do not fit.
        narrow_step: for a base or activations in bfloat16 on a CPU: the same without the float32 copies of all weights
            that only CPUs make; else None.
        device: for which the step was compiled.
        mesh: the parts of the devices along `data`, `fsdp` and `tensor`.
        tokens: that a step takes, of all devices and runs together.
        whole: what a step does on each device of a target, and how long that takes; None without a target.
        projection: the same of the part that balances.
        seconds: that compiling it took.
    """

    base: tuple[int, int]
    adapters: dict[str, tuple[tuple[int, ...], ...]]
    trained: tuple[int, int]
    opt_state: tuple[int, int]
    members: int
    held: dict[str, int]
    step: StepMemory
    narrow_step: StepMemory | None
    device: str
    mesh: tuple[int, ...]
    tokens: int
    whole: Roofline | None
    projection: Roofline | None
    seconds: float


def estimate(members: Sequence[Config], target: Target | None = None) -> Estimate:
    """Estimates what runs that are trained together will take; no weight is read, and nothing is computed.

    Args:
        members: their configs, which differ in numeric fields alone. Their model's folder need hold `config.json` only.
        target: the accelerators to compile for, which need not be there; None for the first device that is.

    Raises:
        ConfigError: there is no such model, adapters do not go on it, or there is no compiler for the target.

    Notes:
        What evaluation and generation take is not among the figures, nor is what the device itself reserves.
    """
    config = members[0]
    devices = target.devices() if target else jax.devices()
    platform = target.chip.platform if target else devices[0].platform
    program, arguments = _traced(members, devices)
    states, base, batch = arguments
    parts = {"base": base, "adapters": states.adapters, "optimizer state": states.opt_state}
    held = {name: _held(part) for name, part in parts.items()}
    held["batch and counters"] = _held(arguments) - sum(held.values())
    on_cpu = platform == "cpu"
    options = target.compiler_options if target else _QUICK if on_cpu else {}
    start = time.perf_counter()
    lowered = program.step.trace(*arguments).lower(lowering_platforms=(platform,))
    if target and _held(arguments) > target.chip.memory:  # no need to know by how much more
        step, text = StepMemory(_held(arguments), 0), ""
    else:
        step, text = _compiled(lowered.compile, options, _held(arguments))
    seconds = time.perf_counter() - start
    narrow = None
    if on_cpu and "bfloat16" in (config.model.dtype, config.model.param_dtype):
        narrow, _ = _compiled(lowered.compile, options | _NARROW, 0)
    compiled = CompiledProgram(text) if text else None
    return Estimate(
        base=_size(base),
        adapters=_shapes(states.adapters),
        trained=_size(states.adapters, len(members)),
        opt_state=_size(states.opt_state, len(members)),
        members=len(members),
        held=held,
        step=step,
        narrow_step=narrow,
        device=str(target) if target else devices[0].device_kind,
        mesh=tuple(program.layout.mesh.shape.values()) if program.layout else (1, 1, 1),
        tokens=math.prod(batch["tokens"].shape),
        whole=roofline(compiled, target) if target and compiled else None,
        projection=roofline(compiled, target, within=PROJECTION) if target and compiled else None,
        seconds=seconds,
    )


def _traced(members: Sequence[Config], devices: Sequence[Any]) -> tuple[Program, tuple[Any, Any, Any]]:
    """The program of a population on some devices, and the shapes of the arguments of its step, with shardings."""
    config, training = members[0], members[0].training
    model = load_shapes(config.model)
    check_step(config, model.config, members=len(members), length=config.data.length, limit=NO_MACHINE)
    layout = layout_of(config, model, members=len(members), devices=devices)
    try:
        program = Program(config, model, layout)
        states = program.abstract_state(members)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    batch = abstract_batch(len(members), training.accumulate, training.batch_size, config.data.length)
    if layout is None:
        alone = SingleDeviceSharding(devices[0])
        return program, jax.tree.map(lambda x: x.update(sharding=alone), (states, program.base, batch))
    weights = [
        leaf.update(sharding=layout.weight(".".join(map(str, path)), leaf))
        for path, leaf in zip(
            (path for path, _ in nnx.to_flat_state(program.base)), jax.tree.leaves(program.base), strict=True
        )
    ]
    base = jax.tree.unflatten(jax.tree.structure(program.base), weights)
    return program, (states, base, jax.tree.map(lambda x: x.update(sharding=layout.batch()), batch))


def search(members: Sequence[Config], target: Target) -> dict[tuple[int, ...], Estimate]:
    """Estimates a step on every mesh that takes all devices of a target and divides the rows and the weights.

    Args:
        members: as for `estimate`; their own mesh plays no part.
        target: the accelerators.

    Returns:
        The estimates by the parts along `data`, `fsdp` and `tensor`: the fastest first, and last what does not fit.

    Raises:
        ConfigError: as `estimate`, or no mesh divides them.
    """
    config, devices = members[0], target.devices()
    model = load_shapes(config.model)
    found: dict[tuple[int, ...], Estimate] = {}
    refused: ConfigError | None = None
    for fsdp, tensor in itertools.product(_divisors(target.size), repeat=2):
        data, rest = divmod(target.size, fsdp * tensor)
        if rest:
            continue
        parallel = replace(config.parallel, data=data, fsdp=fsdp, tensor=tensor)
        tried = [replace(member, parallel=parallel) for member in members]
        try:
            layout_of(tried[0], model, members=len(members), devices=devices)
        except ConfigError as error:
            refused = error
        else:
            found[data, fsdp, tensor] = estimate(tried, target)
    if not found:
        raise ConfigError(f"no mesh of {target} does: {refused}")

    def slowness(mesh: tuple[int, ...]) -> tuple[bool, float]:
        one = found[mesh]
        fits = one.step.peak <= target.chip.memory and one.whole is not None
        return not fits, one.whole.slowest if one.whole else one.step.peak

    return {mesh: found[mesh] for mesh in sorted(found, key=slowness)}


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _shapes(adapters: nnx.State) -> dict[str, tuple[tuple[int, ...], ...]]:
    """The shapes of the trained parameters of every layer, of one run."""
    shapes: dict[str, tuple[tuple[int, ...], ...]] = {}
    for key, leaf in nnx.to_flat_state(adapters):
        path = ".".join(map(str, key[:-1]))
        shapes[path] = (*shapes.get(path, ()), leaf.shape[1:])
    return shapes


def _held(tree: Any) -> int:
    """The bytes of a tree on each device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _size(tree: Any, members: int = 1) -> tuple[int, int]:
    """Number of numbers and bytes of a tree, of one member."""
    leaves = jax.tree.leaves(tree)
    return sum(x.size for x in leaves) // members, sum(x.size * x.dtype.itemsize for x in leaves) // members


def _compiled(compile_: Callable[..., jax.stages.Compiled], options: Options, held: int) -> tuple[StepMemory, str]:
    """The memory of a step and the text of its program, which is empty if the program does not fit."""
    try:
        compiled = compile_(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:  # the compiler for TPUs refuses such programs
        found = re.search(r"(Used |temporaries \()([\d.]+)([KMG])", str(error))
        if found is None:
            raise
        used = int(float(found[2]) * 1024 ** " KMG".index(found[3]))
        return StepMemory(held, used - held if found[1] == "Used " else used), ""
    memory = step_memory(compiled)
    if memory is None:
        raise ConfigError("the compiler does not tell the memory of a program for this device")
    return memory, compiled.as_text() or ""
