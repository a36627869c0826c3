"""A finished model in the place of a population of one, so that it is evaluated as runs are."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from balora_jax.models import Decoder
from balora_jax.training.layout import Layout
from balora_jax.training.state import TrainState
from balora_jax.training.step import Batch, token_losses


def nothing_trained() -> TrainState:
    """Returns the state that goes with a `Single`."""
    return TrainState(
        jnp.zeros(1, jnp.int32), {}, nnx.State({}), None, nnx.State({}), nnx.State({}), jnp.full(1, -1, jnp.int32)
    )


class Single:
    """A model as `balora_jax.training.evaluation.Evaluated`.

    Attributes:
        base: the parameters, of adapters too.
    """

    def __init__(self, model: Decoder, layout: Layout | None = None):
        """Takes a model with or without adapters, and where its arrays lie, if that is on several devices."""
        model.eval()
        model.sharding = layout.rows() if layout else None
        self._graph, self.base = nnx.split(model)
        self._layout = layout
        self.evaluate = self.by_rows(self._evaluate)

    def member_model(self, state: TrainState, base: nnx.State) -> Decoder:
        """Returns the model."""
        return nnx.merge(self._graph, base, copy=True)

    def by_rows(self, function: Callable[[TrainState, nnx.State, Any], Any]) -> Callable[..., Any]:
        """Compiles a function of rows."""
        return jax.jit(function) if self._layout is None else self._layout.by_rows(function)

    def over_members(self, function: Callable, *arguments: Any) -> Any:
        """Applies a function to the one member."""
        return jax.vmap(function)(*arguments)

    def _evaluate(self, states: TrainState, base: nnx.State, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Summed loss and number of predicted tokens, `(1, rows)`."""
        losses, mask = token_losses(self.member_model(states, base), batch)
        return losses.sum(axis=1)[None], mask.sum(axis=1)[None]
