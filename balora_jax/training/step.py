"""One training step of one run."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from balora_jax.balance import balancing_gap
from balora_jax.models.cross_entropy import token_cross_entropy
from balora_jax.pairs import find_pairs, read_pairs
from balora_jax.training.adapted import AdaptedModel
from balora_jax.training.hyperparameters import Optimizer
from balora_jax.training.state import TrainState
from balora_jax.transform import projection_states

Batch = dict[str, jax.Array]


def train_step(
    state: TrainState, base: nnx.State, batch: Batch, *, model: AdaptedModel, optimizer: Optimizer
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one step of the optimizer on the mean loss of the predicted tokens.

    Args:
        state: of the run; one that has diverged or stopped only counts the step.
        base: the frozen parameters.
        batch: arrays `(accumulate, rows, length)`, as `balora_jax.data.batches` makes the rows.
        model: the structure.
        optimizer: makes the optimizer from the run's numbers.

    Returns:
        The new state, and the metrics.
    """
    loss, grads, random = mean_gradient(state, base, batch, model=model)
    updates, opt_state = optimizer(state.numbers).update(grads, state.opt_state, state.adapters)
    adapters = optax.apply_updates(state.adapters, updates)
    metrics = {"loss": loss, "gradient_norm": optax.tree.norm(grads), "update_norm": optax.tree.norm(updates)}
    finite = jnp.isfinite(jnp.stack([*metrics.values()])).all()
    stepped = state._replace(adapters=adapters, opt_state=opt_state, random=random)
    new = jax.tree.map(lambda after, before: jnp.where(finite & state.changes, after, before), stepped, state)
    step = state.step + 1
    new = new._replace(step=step, diverged_at=jnp.where(finite | ~state.changes, state.diverged_at, step))
    return new, metrics | (balance_metrics(new) if model.has_pairs else {})


def mean_gradient(
    state: TrainState, base: nnx.State, batch: Batch, *, model: AdaptedModel
) -> tuple[jax.Array, nnx.State, nnx.State]:
    """Returns the mean loss over the predicted tokens of all micro-batches, its gradient, and the random streams then.

    The arguments are those of `train_step`.
    """

    def summed_loss(adapters: nnx.State, random: nnx.State, rows: Batch):
        decoder = model(state._replace(adapters=adapters, random=random), base, training=True)
        losses, mask = token_losses(decoder, rows)
        return losses.sum(), (mask.sum(), nnx.state(decoder, nnx.RngState))

    def add(total, rows):
        grads, loss, tokens, random = total
        (more_loss, (more_tokens, random)), more = jax.value_and_grad(summed_loss, has_aux=True)(
            state.adapters, random, rows
        )
        return (jax.tree.map(jnp.add, grads, more), loss + more_loss, tokens + more_tokens, random), None

    nothing = jax.tree.map(jnp.zeros_like, state.adapters), jnp.float32(0), jnp.int32(0), state.random
    (grads, loss, tokens, random), _ = jax.lax.scan(add, nothing, batch)
    tokens = jnp.maximum(tokens, 1)
    return loss / tokens, jax.tree.map(lambda grad: grad / tokens, grads), random


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


def mean_loss(model: Any, batch: Batch) -> jax.Array:
    """Returns the mean of `token_losses` over the tokens that must be predicted."""
    losses, mask = token_losses(model, batch)
    return losses.sum() / jnp.maximum(mask.sum(), 1)


def balance_metrics(state: TrainState) -> dict[str, jax.Array]:
    """Returns the balancing gaps over the pairs, and what the projection counts, if there is one."""
    pairs = find_pairs(state.adapters)
    gaps = jnp.concatenate([balancing_gap(*factors) for factors in read_pairs(state.adapters, pairs)])
    metrics = {"gap_mean": gaps.mean(), "gap_worst": gaps.max()}
    for projection in projection_states(state.opt_state):
        metrics |= projection.counts()
    return metrics
