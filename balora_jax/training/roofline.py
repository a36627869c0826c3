"""How long a program takes by a roofline model: reckoned from what its vendor says of a chip, never measured."""

from dataclasses import dataclass

from balora_jax.training.hlo import Program
from balora_jax.training.targets import Target
from balora_jax.training.work import Work, work

LOOPS = 4
"""Rounds of loops whose number the data decide: the projection's iteration after a step of training."""


@dataclass(frozen=True)
class Roofline:
    """What one device does, and the seconds that it takes for each part at its peak.

    Attributes:
        work: what it does.
        compute: seconds of the matrix products.
        memory: seconds of its traffic with its memory.
        network: seconds of what it sends to other devices.
        launches: seconds of starting operations one by one.
    """

    work: Work
    compute: float
    memory: float
    network: float
    launches: float

    @property
    def parts(self) -> dict[str, float]:
        """The seconds by their cause."""
        return {name: getattr(self, name) for name in ("compute", "memory", "network", "launches")}

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        return max(self.parts, key=self.parts.__getitem__)

    @property
    def fastest(self) -> float:
        """Seconds if all parts overlap: no program is faster."""
        return self.parts[self.bound]

    @property
    def slowest(self) -> float:
        """Seconds if no part overlaps another, each still at its peak."""
        return sum(self.parts.values())


def roofline(program: Program, target: Target, *, within: str = "") -> Roofline:
    """Returns what a compiled program takes on a target, or what comes from one name scope in it."""
    chip, done = target.chip, work(program, loops=LOOPS, node=target.node, within=within)
    return Roofline(
        done,
        compute=sum(amount / chip.peak[kind] for kind, amount in done.products.items()),
        memory=done.bytes / chip.bandwidth,
        network=sum(sent / (chip.network if far else chip.link) for (_, far), sent in done.sent.items()),
        launches=done.kernels * chip.launch,
    )
