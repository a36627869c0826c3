"""What changes in training."""

import zlib
from typing import Any, NamedTuple

import jax
from flax import nnx

from balora_jax.training.selection import Selection


class TrainState(NamedTuple):
    """All that a run has for itself, or a population along a leading axis of every array.

    Attributes:
        step: int32, number of steps done.
        numbers: the numeric fields of the run's config, by their dotted names.
        adapters: the trained parameters.
        opt_state: the optimizer's state.
        random: the random streams of dropout; empty without dropout.
        frozen: what adapters hold beside: their scale, and the product that they started with, if not zero.
        diverged_at: int32, the step at which a loss or gradient was not finite, or -1. From then on nothing changes.
        selection: what the evaluations have shown; None where the last step is taken and nothing stops earlier.
    """

    step: jax.Array
    numbers: dict[str, jax.Array]
    adapters: nnx.State
    opt_state: Any
    random: nnx.State
    frozen: nnx.State
    diverged_at: jax.Array
    selection: Selection | None = None

    @property
    def changes(self) -> jax.Array:
        """Whether training still changes the run."""
        running = self.diverged_at < 0
        return running if self.selection is None else running & (self.selection.stopped_at < 0)

    @property
    def selected(self) -> "TrainState":
        """The state with the adapters that the run ends with."""
        if self.selection is None or not jax.tree.leaves(self.selection.adapters):
            return self
        return self._replace(adapters=self.selection.adapters)


def named_key(seed: jax.typing.ArrayLike, name: str) -> jax.Array:
    """Returns the random key that a run of this seed uses for one purpose."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
