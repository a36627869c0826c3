"""The compiled functions of a population: runs that differ in numbers alone are one step, mapped over their states."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from balora_jax.adapters import adapter_scale, lora_ga_start, start_at
from balora_jax.methods import get_method
from balora_jax.models import Decoder
from balora_jax.platforms import with_choice
from balora_jax.settings import Config
from balora_jax.training.adapted import AdaptedModel
from balora_jax.training.hyperparameters import Numbers, optimizer_of, stacked_numbers
from balora_jax.training.layout import Layout
from balora_jax.training.memory import MEMBERS_ON_CPUS
from balora_jax.training.selection import nothing_seen, seen
from balora_jax.training.state import TrainState, named_key
from balora_jax.training.step import Batch, mean_loss, token_losses, train_step


class Program:
    """The compiled functions of the runs that share everything but their numbers.

    Attributes:
        config: the config of any of them.
        layout: where the arrays lie; None for one device.
        base: the frozen parameters, shared by all members and passed to every function.
        trained_parameters: how many numbers one member trains.
        step: `(states, base, batches) -> (states, metrics)`, arrays of batches `(members, accumulate, rows, length)`;
            the memory of the states is used again.
        evaluate: `(states, base, rows) -> (losses, tokens)`, `(members, rows)` each: the summed loss and the number of
            the predicted tokens; all members see the same rows, arrays `(rows, length)`.
    """

    def __init__(self, config: Config, decoder: Decoder, layout: Layout | None = None):
        """Finds the structure; the decoder's arrays are shared, and shapes in their place do to compile with.

        Args:
            config: of any member.
            decoder: the base.
            layout: where the arrays lie; None for one device.

        Raises:
            ValueError: the targets match nothing or the rank does not fit.
            TypeError: a target is not a layer that adapters go on.
        """
        self.config, self.layout = config, layout
        self.member_model = AdaptedModel(config, decoder, layout.rows() if layout else None)
        self.base = self.member_model.base
        self.trained_parameters = self.member_model.trained_parameters
        self._method = get_method(config.method)
        self._options = self._method.resolved(config.options)
        self._optimizer = optimizer_of(config)
        self.step = jax.jit(self._step, donate_argnums=0)
        self.evaluate = self.by_rows(self._evaluate)
        self._everywhere = jax.jit(lambda tree: tree, out_shardings=layout.replicated if layout else None)
        self._start = jax.jit(self._start_members)
        self._select = jax.jit(jax.vmap(self._select_member), donate_argnums=0)

    @property
    def gradient_batches(self) -> tuple[int, int]:
        """How many batches of how many rows the start of the adapters takes; none for most methods."""
        if not self.member_model.starts_from_gradients:
            return 0, 0
        return int(self._options["gradient_batches"]), int(self._options["gradient_batch_size"])

    def initial_state(
        self, members: Sequence[Config], batches: Mapping[int, Mapping[str, Any]] | None = None
    ) -> TrainState:
        """Returns the state of a population before its first step.

        Args:
            members: the configs.
            batches: for methods that start from gradients, arrays `(*gradient_batches, length)` for each seed.

        Raises:
            ValueError: the start does not fit a layer.
        """
        return self._initial_state(self.member_model.bare, stacked_numbers(members), members, batches)

    def abstract_state(self, members: Sequence[Config]) -> TrainState:
        """Returns the shapes of `initial_state`; the decoder may have shapes alone."""
        count, rows = self.gradient_batches
        shapes = abstract_batch(count, rows, self.config.data.length)
        batches = {member.seed: shapes for member in members} if count else None
        state = jax.eval_shape(
            lambda bare, batches: self._initial_state(bare, stacked_numbers(members), members, batches),
            self.member_model.bare,
            batches,
        )
        if self.layout is None:
            return state
        return jax.tree.map(lambda leaf, where: leaf.update(sharding=where), state, self.layout.state(state))

    def after_evaluation(self, state: TrainState, losses: Any) -> TrainState:
        """Returns the state of a population after its evaluation.

        Args:
            state: that was evaluated.
            losses: `(members,)` the evaluation losses.
        """
        return state if state.selection is None else self._select(state, np.asarray(losses, np.float32))

    def sizes(self, state: TrainState) -> dict[str, int]:
        """Returns what one member of a population has for itself.

        Args:
            state: of the population.

        Returns:
            `trained_parameters`, how many numbers are trained, and `state_bytes`, the memory of the optimizer's state.
        """

        def of_member(array):
            return math.prod(array.shape[1:])

        return {
            "trained_parameters": self.trained_parameters,
            "state_bytes": sum(of_member(array) * array.dtype.itemsize for array in jax.tree.leaves(state.opt_state)),
        }

    def fetched(self, tree: Any) -> Any:
        """Returns arrays of the host, whole.

        Args:
            tree: arrays of the devices, of a state for example.
        """
        return jax.device_get(tree if self.layout is None else self._everywhere(tree))

    def by_rows(self, function: Callable[[TrainState, nnx.State, Any], Any]) -> Callable[..., Any]:
        """Compiles a function, whose work is shared among the devices by rows.

        Args:
            function: `(states, base, rows) -> results`, arrays `(rows, ...)` and `(members, rows, ...)`.
        """
        return jax.jit(function) if self.layout is None else self.layout.by_rows(function)

    def over_members(self, function: Callable, *arguments: Any) -> Any:
        """Applies a function to every member, `training.members_at_once` at a time.

        Args:
            function: of one member.
            *arguments: its arguments, with a leading axis of members.
        """
        count = len(jax.tree.leaves(arguments)[0])
        limit = min(self.config.training.members_at_once or count, count)

        def by_groups(limit: int, *arguments: Any) -> Any:
            if limit == count:
                return jax.vmap(function)(*arguments)
            return jax.lax.map(lambda one: function(*one), arguments, batch_size=limit)

        is_open = self.config.training.members_at_once is None and self.layout is None
        on_cpus = min(MEMBERS_ON_CPUS, count) if is_open else limit
        return with_choice(by_groups, *arguments, cpu=on_cpus, default=limit)

    def scale(self, member: Config) -> float:
        """Returns by what the products of a member's pairs are multiplied."""
        settings = member.adapter
        return float(jnp.asarray(adapter_scale(settings.alpha, settings.rank, self._method.scaling)))

    def _step(self, states: TrainState, base: nnx.State, batches: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        step = partial(train_step, model=self.member_model, optimizer=self._optimizer)
        states, metrics = self.over_members(lambda state, batch: step(state, base, batch), states, batches)
        if self.layout is not None:
            metrics = jax.lax.with_sharding_constraint(metrics, self.layout.replicated)
        return self._placed(states), metrics

    def _evaluate(self, states: TrainState, base: nnx.State, batch: Batch) -> tuple[jax.Array, jax.Array]:
        def member(state: TrainState) -> tuple[jax.Array, jax.Array]:
            losses, mask = token_losses(self.member_model(state, base), batch)
            return losses.sum(axis=1), mask.sum(axis=1)

        return self.over_members(member, states)

    def _initial_state(self, bare: nnx.State, numbers: Numbers, members: Sequence[Config], batches) -> TrainState:
        starts = None
        if self.member_model.starts_from_gradients:
            if batches is None:
                raise ValueError(f"batches must be given for {self.config.method}, which starts from gradients")
            by_seed = {seed: self._gradient_start(bare, seed, rows) for seed, rows in batches.items()}
            starts = jax.tree.map(lambda *x: jnp.stack(x), *(by_seed[member.seed] for member in members))
        return self._start(bare, numbers, starts)

    def _start_members(self, bare: nnx.State, numbers: Numbers, starts: Any) -> TrainState:
        return self._placed(jax.vmap(self._start_member, in_axes=(None, 0, 0))(bare, numbers, starts))

    def _placed(self, states: TrainState) -> TrainState:
        """The states where they are to lie."""
        if self.layout is None:
            return states
        return jax.lax.with_sharding_constraint(states, self.layout.state(states))

    def _gradient_start(self, bare: nnx.State, seed: int, batches: Mapping[str, Any]):
        return lora_ga_start(
            self.member_model.decoder(bare),
            mean_loss,
            batches,
            targets=self.member_model.targets,
            rank=self.config.adapter.rank,
            key=self._key(seed, "gradient"),
            gamma=self._options["gamma"],
        )

    def _start_member(self, bare: nnx.State, numbers: Numbers, starts) -> TrainState:
        model = self.member_model.start(bare, numbers["seed"], numbers["adapter.alpha"])
        if starts is not None:
            start_at(model, starts)
        adapters, random, frozen = self.member_model.own_parts(model)
        training, selection = self.config.training, None
        if training.select == "best" or training.patience is not None:
            selection = nothing_seen(adapters, keep=training.select == "best")
        opt_state = self._optimizer(numbers).init(adapters)
        return TrainState(jnp.int32(0), dict(numbers), adapters, opt_state, random, frozen, jnp.int32(-1), selection)

    def _key(self, seed: int, name: str) -> jax.Array:
        """A key where the base is."""
        where = None if self.layout is None else self.layout.replicated
        return jax.jit(named_key, static_argnums=(0, 1), out_shardings=where)(seed, name)

    def _select_member(self, state: TrainState, loss: jax.Array) -> TrainState:
        assert state.selection is not None
        patience = self.config.training.patience
        return state._replace(
            selection=seen(state.selection, state.adapters, loss=loss, step=state.step, patience=patience)
        )


def abstract_batch(*shape: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a batch, as `balora_jax.data.batches` makes them.

    Args:
        *shape: of each of its arrays.
    """
    integers = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ("tokens", "positions", "segment_ids")}
    return {**integers, "loss_mask": jax.ShapeDtypeStruct(shape, jnp.bool_)}
