"""The text of a compiled program (XLA's HLO), taken apart."""

import re
from collections.abc import Iterator
from math import prod
from typing import NamedTuple

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"%([\w.\-]+)")
_WIDTHS = {"pred": 8, "token": 0}  # bits of dtypes that do not tell


class Array(NamedTuple):
    """An array in a type.

    Attributes:
        dtype: as HLO has it, `"f32"` say.
        shape: on one device.
        on_chip: whether it lies in a memory on the chip (a memory space `S(1)`), and not in the device's large one.
    """

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool

    @property
    def bytes(self) -> float:
        """Its size."""
        bits = _WIDTHS.get(self.dtype)
        return prod(self.shape) * (int(match(r"[a-z]+(\d+)", self.dtype)[1]) if bits is None else bits) / 8


class Instruction(NamedTuple):
    """One line of a program.

    Attributes:
        name: of its result.
        arrays: its result, which may be a tuple.
        opcode: what is done.
        operands: the names of what it is done to.
        rest: what stands behind the opcode.
        scope: the path of name scopes that it comes from.
    """

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str
    scope: str

    @property
    def target(self) -> str:
        """The name of the function that a custom call calls; of others nothing."""
        found = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return found[1] if found else ""

    def called(self, attribute: str) -> str:
        """The computation that an attribute names, or nothing."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""

    @property
    def branches(self) -> list[str]:
        """The computations of which a condition runs one."""
        names = re.findall(r"(?:true|false)_computation=%([\w.\-]+)", self.rest)
        return names or _NAME.findall(match(r"branch_computations=\{([^}]*)\}", self.rest)[1])

    @property
    def value(self) -> int:
        """The value of a constant that is an integer."""
        return int(self.rest.partition(")")[0])


Computation = dict[str, Instruction]


class Program:
    """A compiled program, for one device of those that run it.

    Attributes:
        computations: the instructions of each computation, by their names and in order; the last is the result.
        entry: the name of the computation where it starts.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current: Computation = {}
        for line in text.splitlines():
            if found := _INSTRUCTION.match(line):
                current[found[1]] = _instruction(found[1], found[2])
            elif found := _COMPUTATION.match(line):
                current = self.computations.setdefault(found[2], {})
                self.entry = found[2] if found[1] else self.entry

    def fused(self, instruction: Instruction) -> Iterator[Computation]:
        """Yields the computations that a fusion runs at once; none for other instructions."""
        if instruction.opcode == "fusion":
            computation = self.computations[instruction.called("calls")]
            yield computation
            for inner in computation.values():
                yield from self.fused(inner)


def match(pattern: str, text: str) -> re.Match[str]:
    """Returns where a pattern is found.

    Raises:
        ValueError: nowhere.
    """
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiled program must have {pattern!r} here, got {text[:200]!r}")
    return found


def numbers(text: str) -> list[int]:
    """Returns the integers in a text."""
    return list(map(int, re.findall(r"\d+", text)))


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text) + 1 if text.startswith("(") else text.index(" ")
    arrays = tuple(
        Array(dtype, tuple(numbers(dims)), "S(" in layout) for dtype, dims, layout in _ARRAY.findall(text[:end])
    )
    opcode, _, rest = text[end:].lstrip().partition("(")
    between = "" if opcode in ("parameter", "constant") else rest[: _closing("(" + rest)]
    scope = re.search(r'op_name="([^"]*)"', rest)
    return Instruction(name, arrays, opcode, tuple(_NAME.findall(between)), rest, scope[1] if scope else "")


def _closing(text: str) -> int:
    """The place of the parenthesis that closes the first one."""
    depth = 0
    for place in re.finditer(r"[()]", text):
        depth += 1 if place[0] == "(" else -1
        if not depth:
            return place.start()
    return len(text)
