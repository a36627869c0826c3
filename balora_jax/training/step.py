"""One pure training step for a whole population of runs that differ in numbers alone.

Everything of a member that can be a number is an array in its `TrainState`; everything static is in `Program`. The
step of one member is an ordinary function of its config, in which the numbers are traced; `vmap` over the leading axis
of the states makes it the step of the population, with the frozen base shared.
"""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from balora_jax.adapters import (
    LORA_GA,
    AdapterOffset,
    AdapterScale,
    LoRALinear,
    adapter_scale,
    add_adapters,
    iter_adapters,
    lora_ga_start,
    start_at,
)
from balora_jax.balance import balancing_gap
from balora_jax.methods import get_method
from balora_jax.models import Decoder
from balora_jax.models.cross_entropy import token_cross_entropy
from balora_jax.pairs import find_pairs, read_pairs
from balora_jax.settings import Config
from balora_jax.training.config import NUMERIC_FIELDS
from balora_jax.training.fields import get_field, with_field
from balora_jax.training.selection import Selection, nothing_seen, seen
from balora_jax.transform import projection_states

Batch = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that changes in training, of one member, or of a population along a leading axis of every array.

    Attributes:
        step: int32, number of steps done.
        numbers: the numeric fields of the member's config, by their dotted names.
        adapters: the trained parameters.
        opt_state: the optimizer's state.
        random: the random streams of dropout; empty without dropout.
        offsets: the products that the adapters started with, frozen; empty for methods that start at zero.
        diverged_at: int32, the step at which a loss or gradient was not finite, or -1. From then on nothing changes.
        selection: what the evaluations have shown; None where the last step is taken and nothing stops earlier.
    """

    step: jax.Array
    numbers: dict[str, jax.Array]
    adapters: nnx.State
    opt_state: Any
    random: nnx.State
    offsets: nnx.State
    diverged_at: jax.Array
    selection: Selection | None = None

    @property
    def changes(self) -> jax.Array:
        """Whether training still changes the member."""
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


def token_losses(model: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns the cross-entropy (nats) of every token that must be predicted and the mask of these tokens.

    Args:
        model: a decoder.
        batch: arrays `(rows, length)` as `balora_jax.data.batches` makes them.

    Returns:
        Two arrays `(rows, length - 1)`; losses are 0 outside the mask.
    """
    inputs = {name: batch[name][:, :-1] for name in ("tokens", "positions", "segment_ids")}
    hidden, _ = model.hidden_states(**inputs)
    mask = batch["loss_mask"][:, 1:]
    losses = token_cross_entropy(model, hidden, batch["tokens"][:, 1:])
    return jnp.where(mask, losses, 0.0), mask


def _mean_loss(model: nnx.Module, batch: Batch) -> jax.Array:
    losses, mask = token_losses(model, batch)
    return losses.sum() / jnp.maximum(mask.sum(), 1)


class Program:
    """The compiled functions of the runs that share everything but the numeric fields.

    Attributes:
        config: the config of any of them.
        base: the frozen parameters, shared by all members and passed to every function.
        trained_parameters: how many numbers one member trains.
    """

    def __init__(self, config: Config, base_model: Decoder):
        """Puts adapters on a copy of the model's structure; the base's arrays are shared, not copied.

        Raises:
            ValueError: the targets match nothing or the rank does not fit.
            TypeError: a target is not a layer that adapters go on.
        """
        self.config = config
        self._method = get_method(config.method)
        self._options = self._method.resolved(dict(config.options))
        self._bare = nnx.split(base_model)
        structure = replace(self._method.initialisation, factors=_no_factors)  # the values come from `initial_state`
        model = nnx.merge(*self._bare, copy=True)
        self._add_adapters(model, jax.random.key(0), jax.random.key(0), config.adapter.alpha, structure)
        model.train()
        self._train_graph, *states = nnx.split(model, nnx.LoRAParam, nnx.RngState, AdapterOffset, ...)
        self.base: nnx.State = states[-1]
        self.trained_parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(states[0]))
        model.eval()
        self._eval_graph = nnx.graphdef(model)
        self.step = jax.jit(self._step, donate_argnums=0)
        self.evaluate = jax.jit(self._evaluate)
        self._select = jax.jit(jax.vmap(self._select_member), donate_argnums=0)

    @property
    def gradient_batches(self) -> tuple[int, int]:
        """How many batches of how many rows the start of the adapters takes; none for most methods."""
        if self._method.initialisation is not LORA_GA:
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
        numbers = {
            name: jnp.asarray([get_field(m, name) for m in members], jnp.uint32 if name == "seed" else jnp.float32)
            for name in NUMERIC_FIELDS
        }
        starts = None
        if self.gradient_batches[0]:
            if batches is None:
                raise ValueError(f"batches must be given for {self.config.method}, which starts from gradients")
            by_seed = {seed: self._gradient_start(seed, rows) for seed, rows in batches.items()}
            starts = jax.tree.map(lambda *x: jnp.stack(x), *(by_seed[member.seed] for member in members))
        return jax.jit(jax.vmap(self._init_member, in_axes=(None, 0, 0)))(self._bare[1], numbers, starts)

    def after_evaluation(self, state: TrainState, losses: Any) -> TrainState:
        """Returns the state of a population after its evaluation.

        Args:
            state: that was evaluated.
            losses: `(members,)` the evaluation losses.
        """
        return state if state.selection is None else self._select(state, jnp.asarray(losses, jnp.float32))

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

    def over_members(self, function: Callable, *arguments: Any) -> Any:
        """Applies a function to every member, `training.members_at_once` at a time.

        Args:
            function: of one member.
            *arguments: its arguments, with a leading axis of members.
        """
        limit, count = self.config.training.members_at_once, len(jax.tree.leaves(arguments)[0])
        if limit is None or count <= limit:
            return jax.vmap(function)(*arguments)
        return jax.lax.map(lambda one: function(*one), arguments, batch_size=limit)

    def member_model(self, state: TrainState, base: nnx.State, *, training: bool = False) -> Decoder:
        """Returns the model of one member: base, adapters and scale."""
        graph = self._train_graph if training else self._eval_graph
        model = nnx.merge(graph, state.adapters, state.random, state.offsets, base, copy=True)
        scale = self._scale(state.numbers["adapter.alpha"])
        for _, adapter in iter_adapters(model):
            if isinstance(adapter, LoRALinear):
                adapter.scale = AdapterScale(jnp.full(adapter.scale.shape, scale, adapter.scale.dtype))
        return model

    def scale(self, member: Config) -> float:
        """Returns by what the products of a member's pairs are multiplied."""
        return float(self._scale(member.adapter.alpha))

    def _scale(self, alpha):
        return adapter_scale(alpha, self.config.adapter.rank, self._method.scaling)

    def _gradient_start(self, seed: int, batches: Mapping[str, Any]):
        model = nnx.merge(*self._bare, copy=True)
        model.eval()
        return lora_ga_start(
            model,
            _mean_loss,
            batches,
            targets=self._targets,
            rank=self.config.adapter.rank,
            key=named_key(seed, "gradient"),
            gamma=self._options["gamma"],
        )

    @property
    def _targets(self) -> str | tuple[str, ...]:
        targets = self.config.adapter.targets
        pattern = len(targets) == 1 and not targets[0].replace(".", "").replace("_", "").isalnum()
        return targets[0] if pattern else targets

    def _add_adapters(self, model, adapter_key, dropout_key, alpha, initialisation):
        settings = self.config.adapter
        add_adapters(
            model,
            targets=self._targets,
            rank=settings.rank,
            alpha=alpha,
            scaling=self._method.scaling,
            dropout=settings.dropout,
            layer=self._method.layer,
            initialisation=initialisation,
            rngs=nnx.Rngs(params=adapter_key, dropout=dropout_key),
        )

    def _transformation(self, numbers) -> optax.GradientTransformation:
        config = self.config
        for name, number in numbers.items():
            config = with_field(config, name, number)
        scale = self._scale(config.adapter.alpha)
        return self._method.transformation(
            config.optimizer, config.balance, steps=config.training.steps, scale=scale, options=dict(config.options)
        )

    def _init_member(self, bare, numbers, starts) -> TrainState:
        seed = numbers["seed"]
        model = nnx.merge(self._bare[0], bare, copy=True)
        keys = named_key(seed, "adapters"), named_key(seed, "dropout")
        self._add_adapters(model, *keys, numbers["adapter.alpha"], self._method.initialisation)
        if starts is not None:
            start_at(model, starts)
        adapters, random, offsets = nnx.state(model, nnx.LoRAParam, nnx.RngState, AdapterOffset)
        opt_state = self._transformation(numbers).init(adapters)
        training, selection = self.config.training, None
        if training.select == "best" or training.patience is not None:
            selection = nothing_seen(adapters, keep=training.select == "best")
        return TrainState(jnp.int32(0), numbers, adapters, opt_state, random, offsets, jnp.int32(-1), selection)

    def _select_member(self, state: TrainState, loss: jax.Array) -> TrainState:
        assert state.selection is not None
        patience = self.config.training.patience
        return state._replace(
            selection=seen(state.selection, state.adapters, loss=loss, step=state.step, patience=patience)
        )

    def _step(self, states: TrainState, base: nnx.State, batches: Batch) -> tuple[TrainState, dict]:
        """One step of every member; arrays of `batches` are `(members, accumulate, rows, length)`."""
        return self.over_members(lambda state, batch: self._step_member(state, base, batch), states, batches)

    def _evaluate(self, states: TrainState, base: nnx.State, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Summed loss and number of predicted tokens, `(members, rows)`; all members see the same batch."""

        def member(state):
            losses, mask = token_losses(self.member_model(state, base), batch)
            return losses.sum(axis=1), mask.sum(axis=1)

        return self.over_members(member, states)

    def _step_member(self, state: TrainState, base: nnx.State, batches: Batch) -> tuple[TrainState, dict]:
        """One optimizer step on `accumulate` micro-batches, arrays `(accumulate, rows, length)`."""

        def objective(adapters, random, batch):
            model = self.member_model(state._replace(adapters=adapters, random=random), base, training=True)
            losses, mask = token_losses(model, batch)
            return losses.sum(), (mask.sum(), nnx.state(model, nnx.RngState))

        def accumulate(carry, batch):
            grads, loss, tokens, random = carry
            (more_loss, (more_tokens, random)), more = jax.value_and_grad(objective, has_aux=True)(
                state.adapters, random, batch
            )
            return (jax.tree.map(jnp.add, grads, more), loss + more_loss, tokens + more_tokens, random), None

        zeros = jax.tree.map(jnp.zeros_like, state.adapters)
        (grads, loss, tokens, random), _ = jax.lax.scan(
            accumulate, (zeros, jnp.float32(0), jnp.int32(0), state.random), batches
        )
        tokens = jnp.maximum(tokens, 1)
        loss, grads = loss / tokens, jax.tree.map(lambda g: g / tokens, grads)
        updates, opt_state = self._transformation(state.numbers).update(grads, state.opt_state, state.adapters)
        gradient_norm, update_norm = optax.tree.norm(grads), optax.tree.norm(updates)
        finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm) & jnp.isfinite(update_norm)
        alive = finite & state.changes
        stepped = state._replace(
            adapters=optax.apply_updates(state.adapters, updates), opt_state=opt_state, random=random
        )
        new = jax.tree.map(lambda after, before: jnp.where(alive, after, before), stepped, state)
        step = state.step + 1
        new = new._replace(step=step, diverged_at=jnp.where(finite | ~state.changes, state.diverged_at, step))
        metrics = {"loss": loss, "gradient_norm": gradient_norm, "update_norm": update_norm}
        if self._method.has_pairs:
            metrics |= _balance_metrics(new)
        return new, metrics


def _no_factors(key, weight, rank, scale):
    """Factors of the right shapes, without the work of an initialisation."""
    *leading, rows, columns = weight.shape
    return jnp.zeros((*leading, rows, rank)), jnp.zeros((*leading, rank, columns))


def _balance_metrics(state: TrainState) -> dict[str, jax.Array]:
    """Balancing gaps over the pairs, and what the projection counts, if there is one."""
    pairs = find_pairs(state.adapters)
    gaps = jnp.concatenate([balancing_gap(*factors) for factors in read_pairs(state.adapters, pairs)])
    metrics = {"gap_mean": gaps.mean(), "gap_worst": gaps.max()}
    for projection in projection_states(state.opt_state):
        metrics |= projection.counts()
    return metrics
