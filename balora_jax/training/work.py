"""What a compiled program does: products, bytes of memory, bytes between devices.

XLA's own cost analysis counts the body of a loop once, and its compiler for GPUs gives none.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np

from balora_jax.in_place import SELDOM
from balora_jax.training.hlo import Array, Computation, Instruction, Program, match, numbers

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_PIECES = ("dynamic-slice", "slice", "gather")  # of which no more is read than they give
_SPLASH = {"fwd": 2, "dkv": 4, "dq": 3}  # products of queries and keys in the kernels of splash attention
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("opt-barrier", "add-dependency", "iota"),
    *("AllocateBuffer", "ConcatBitcast"),  # targets of custom calls
}


@dataclass
class Work:
    """What one device does.

    Attributes:
        products: operations of matrix products, by the names in `balora_jax.training.targets.Chip.peak`.
        bytes: between the device and its memory.
        sent: bytes that it sends to others, by the kind of the collective, and whether to other nodes.
        kernels: number of operations that are launched one by one.
        unseen: how often functions are called that the compiler does not see into, by their names.
    """

    products: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    bytes: float = 0
    sent: dict[tuple[str, bool], float] = field(default_factory=lambda: defaultdict(float))
    kernels: float = 0
    unseen: Counter[str] = field(default_factory=Counter)


def work(program: Program, *, loops: int, node: int, within: str = "") -> Work:
    """Returns what a device does in a run of a program.

    Args:
        program: as compiled.
        loops: rounds of loops whose number the data decide. Loops in the name scope `seldom` count nothing.
        node: devices of a node; they are numbered one node after the other.
        within: counts only what comes from this name scope.
    """
    total = Work()
    for instruction, inside, times in _launched(program, program.entry, 1, loops):
        if within not in instruction.scope:
            continue
        products = [_product(inside, instruction)]
        products += [_product(fused, part) for fused in program.fused(instruction) for part in fused.values()]
        for kind, amount in products:
            if amount:
                total.products[kind] += times * amount
        if instruction.opcode == "custom-call" and not products[0][1]:
            total.unseen[instruction.target] += times
        total.bytes += times * _bytes(program, inside, instruction)
        total.kernels += times
        collective = instruction.opcode.removesuffix("-start")
        if collective in _COLLECTIVES:
            size = sum(array.bytes for name in instruction.operands for array in inside[name].arrays)
            sent, far = _sent(collective, size, instruction.rest, node)
            total.sent[collective, far] += times * sent
    return total


def _launched(program: Program, name: str, times: int, loops: int) -> Iterator[tuple[Instruction, Computation, int]]:
    """All instructions that are launched, each with its computation, and how often; of a condition the longest way."""
    computation = program.computations[name]
    for instruction in computation.values():
        opcode = instruction.opcode
        if opcode == "while":
            rounds = _rounds(program, computation, instruction, loops)
            if rounds:
                yield from _launched(program, instruction.called("body"), times * rounds, loops)
        elif opcode == "conditional":
            ways = [list(_launched(program, branch, times, loops)) for branch in instruction.branches]
            yield from max(ways, key=len)
        elif opcode in ("call", "async-start"):
            called = instruction.called("to_apply") or instruction.called("calls")
            yield from _launched(program, called, times, loops)
        elif opcode not in _FREE and not opcode.endswith(("-done", "-update")) and instruction.target not in _FREE:
            yield instruction, computation, times


def _rounds(program: Program, computation: Computation, loop: Instruction, loops: int) -> int:
    """How often the body of a loop runs."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    body = program.computations[loop.called("body")].values()
    if SELDOM in loop.scope or (not loop.scope and any(SELDOM in line.scope for line in body)):
        return 0
    condition = program.computations[loop.called("condition")]
    root = list(condition.values())[-1]
    if root.opcode != "compare" or "direction=LT" not in root.rest:
        return loops
    counter, most = (condition[name] for name in root.operands)
    if counter.opcode != "get-tuple-element" or most.opcode != "constant":
        return loops
    start = computation[loop.operands[0]]
    index = int(match(r"index=(\d+)", counter.rest)[1])
    first = computation.get(start.operands[index]) if start.opcode == "tuple" else None
    return most.value - (first.value if first is not None and first.opcode == "constant" else 0)


def _bytes(program: Program, inside: Computation, instruction: Instruction) -> float:
    """Bytes of memory that an instruction reads and writes; slices are not all of what they are cut from."""
    opcode, operands, arrays = instruction.opcode, instruction.operands, instruction.arrays
    if opcode == "fusion":
        fused = program.computations[instruction.called("calls")]
        read = sum(_read(program, fused, i, _size(inside[name].arrays)) for i, name in enumerate(operands))
        return read + _written(program, fused, list(fused.values())[-1])
    if opcode in _PIECES:
        return 2 * _size(arrays)
    if opcode in ("dynamic-update-slice", "scatter"):  # which read the update, and write as much
        return 2 * _size(inside[operands[-1 if opcode == "scatter" else 1]].arrays)
    if opcode.endswith("-start"):  # the type holds what is read and what is written
        return _size(arrays)
    if instruction.target.startswith("__cublas"):  # beside its result a workspace
        arrays = arrays[:1]
    return _size(arrays) + sum(_size(inside[name].arrays) for name in operands)


def _size(arrays: Sequence[Array]) -> float:
    """The bytes that lie in the device's memory."""
    return sum(array.bytes for array in arrays if not array.on_chip)


def _read(program: Program, fused: Computation, number: int, whole: float) -> float:
    """Bytes that a fusion reads of one of its operands."""
    if not whole:
        return 0
    names = {line.name for line in fused.values() if line.opcode == "parameter" and line.value == number}
    read = 0.0
    for line in fused.values():
        places = [i for i, name in enumerate(line.operands) if name in names]
        if not places:
            continue
        if line.opcode == "bitcast":
            names.add(line.name)
        elif line.opcode in _PIECES and places == [0]:
            read += sum(array.bytes for array in line.arrays)
        elif line.opcode == "fusion":
            inner = program.computations[line.called("calls")]
            read += sum(_read(program, inner, place, whole) for place in places)
        elif line.opcode != "dynamic-update-slice" or places != [0]:
            return whole
    return min(read, whole)


def _written(program: Program, fused: Computation, root: Instruction) -> float:
    """Bytes that a fusion writes."""
    if not _size(root.arrays):
        return 0
    if root.opcode == "tuple":
        return sum(_written(program, fused, fused[name]) for name in root.operands)
    if root.opcode == "bitcast":
        return _written(program, fused, fused[root.operands[0]])
    if root.opcode == "fusion":
        inner = program.computations[root.called("calls")]
        return _written(program, inner, list(inner.values())[-1])
    if root.opcode == "dynamic-update-slice":
        return sum(array.bytes for array in fused[root.operands[1]].arrays)
    return _size(root.arrays)


def _product(inside: Computation, instruction: Instruction) -> tuple[str, float]:
    """The arithmetic and the number of operations of a matrix product; of others ("", 0)."""
    opcode, rest, target = instruction.opcode, instruction.rest, instruction.target
    if splash := re.match(r"splash_mha_(fwd|dkv|dq)", instruction.name):  # (batch, heads, length, head_dim), causal
        queries, keys = (inside[name].arrays[0] for name in instruction.operands[2:4])
        return "bfloat16", _SPLASH[splash[1]] * prod(queries.shape) * keys.shape[-2]
    attends = target.startswith("__cudnn$fmha")
    if opcode not in ("dot", "convolution") and not attends and not target.startswith("__cublas$"):
        return "", 0
    left, right = (inside[name].arrays[0] for name in instruction.operands[:2])
    out = instruction.arrays[0].shape
    if opcode == "convolution":
        amount: float = 2 * _multiplied(left.shape, right.shape, out, rest)
    elif attends:  # queries and keys (batch, length, heads, head_dim); backward there are five products for two
        products = 5 if "Backward" in target else 2
        amount = 2 * products * prod(left.shape) * right.shape[1] / (2 if "CAUSAL" in rest else 1)
    else:
        axes = numbers(match(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', rest)[1])
        amount = 2 * prod(out) * prod(left.shape[axis] for axis in axes)
    return _arithmetic({left.dtype, right.dtype}, rest), amount


def _arithmetic(dtypes: set[str], rest: str) -> str:
    """What a product of these dtypes is computed in."""
    if "f64" in dtypes:
        return "float64"
    if "f32" not in dtypes:
        return "bfloat16"
    in_full = re.search(r'operand_precision(?:=\{|":\[")highest|dot_f32_f32_f32\b', rest, re.IGNORECASE)
    return "highest" if in_full else "float32"


def _multiplied(left: Sequence[int], right: Sequence[int], out: Sequence[int], rest: str) -> int:
    """The multiplications of a convolution, as which the compiler for TPUs writes every product."""
    found = re.search(r"window=\{([^}]*)\}", rest)
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", found[1] if found else ""))
    of_left, of_right, of_out = match(r"dim_labels=(\w+)_(\w+)->(\w+)", rest).groups()
    count = out[of_out.index("b")] * out[of_out.index("f")] * right[of_right.index("i")]

    def of(name: str, axis: int) -> int:
        return int(window[name].split("x")[axis].split("_")[0]) if name in window else int(name != "pad")

    for axis, label in enumerate(sorted(filter(str.isdigit, of_out))):
        n, k, m = left[of_left.index(label)], right[of_right.index(label)], out[of_out.index(label)]
        widened = of("lhs_dilate", axis)
        places = np.arange(m)[:, None] * of("stride", axis) + np.arange(k) * of("rhs_dilate", axis) - of("pad", axis)
        count *= int(((places >= 0) & (places <= (n - 1) * widened) & (places % widened == 0)).sum())
    return count


def _sent(collective: str, size: float, rest: str, node: int) -> tuple[float, bool]:
    """The bytes that a device sends, given those that it gives, and whether any leave the node."""
    if collective == "collective-permute":
        pairs = np.reshape(numbers(match(r"source_target_pairs=\{(\{.*?\})\}", rest)[1]), (-1, 2)) // node
        return size, bool((pairs[:, 0] != pairs[:, 1]).any())
    members = _group(rest)
    n = len(members)
    share = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n}.get(collective, (n - 1) / n)
    return size * share, len({member // node for member in members}) > 1


def _group(rest: str) -> list[int]:
    """The devices of the first of the groups that exchange something."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return numbers(listed[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?\)?)\))? ?\{([^}]*)\}", rest):
        return _along_axes(dict(re.findall(r"'([^']*)'=(\d+)", named[1])), named[2] or "", named[3])
    shape, devices = match(r"replica_groups=\[([\d,]*)\]<=(\[[\d,]*\](?:T\([\d,]*\))?)", rest).groups()
    return _counted(devices).reshape(numbers(shape)[0], -1)[0].tolist()


def _counted(text: str) -> np.ndarray:
    """The devices `[2,4]T(1,0)`: counted in that shape, and its axes in that order; or a list of them."""
    shape, _, order = text.partition("T")
    if not shape.startswith("["):
        return np.array(numbers(text))
    devices = np.arange(prod(numbers(shape))).reshape(numbers(shape))
    return devices.transpose(numbers(order)) if order else devices


def _along_axes(sizes: dict[str, str], devices: str, axes: str) -> list[int]:
    """The devices along some axes of a mesh, or along a part of an axis, `'name':(parts before)parts`."""
    places = {name: [0] for name in sizes}
    for name, before, part in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", axes):
        count = int(part or sizes[name])
        step = int(sizes[name]) // (count * int(before or 1))
        places[name] = [step * place for place in range(count)]
    shape = [int(size) for size in sizes.values()]
    mesh = (_counted(devices) if devices else np.arange(prod(shape))).reshape(shape)
    return mesh[np.ix_(*places.values())].ravel().tolist()
