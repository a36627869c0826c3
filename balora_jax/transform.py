"""The balanced projection as optax transformations: after an optimizer in a chain, or around it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from balora_jax.balance import Balanced, changed_pairs, working_dtype
from balora_jax.gauge import Gauge, Route, check_gauge, check_route
from balora_jax.pairs import Pairs, find_pairs, read_pairs, write_pairs
from balora_jax.transport import check_movable, move_state


class BaloraProjectState(NamedTuple):
    """State of `balora_project`.

    Attributes:
        count: int32, number of updates so far.
        untouched: int32, pairs that the last projection left as they came: their product lacks rank (a fresh `B = 0`,
            say), or they are so far from balance that an update, which is added to the parameters in their dtype, could
            not carry them there without losing a third of the product's digits.
        nonfinite: int32, pairs that it left as they came because they hold a NaN or an infinity.
    """

    count: jax.Array  # type: ignore[assignment]
    untouched: jax.Array
    nonfinite: jax.Array


def balora_project(
    *,
    gauge: Gauge = "svd",
    route: Route = "auto",
    every: int = 1,
    start_step: int = 0,
    pairs: Pairs | None = None,
) -> optax.GradientTransformation:
    """Balances every LoRA pair after the step: `params + updates` lies on the set `A^T A = B B^T`.

    The products `A B` after the step are those that the optimizer chose; only their factors move. In a chain of
    transformations it must be the last one, because it needs the update that will really be applied. Leaves that
    belong to no pair keep their updates.

    Args:
        gauge: which balanced pair to take, see `balora_jax.balance`.
        route: how the r x r work is done, see `balora_jax.balance`.
        every: projects after every `every`-th update only.
        start_step: number of first updates that are not followed by a projection.
        pairs: names the pairs if their leaves have other names than `find_pairs` knows; see there.

    Returns:
        An `optax.GradientTransformation` whose state is a `BaloraProjectState`.

    Raises:
        ValueError: an argument is out of its range; from `init`, the parameters hold no pair or an unpaired factor;
            from `update`, `params` was not given.
        TypeError: `every` or `start_step` is not an integer.

    Notes:
        Costs O((a + b) r^2) per pair and step. A pair whose product lacks rank, or that is not finite, is left as the
        optimizer made it, and counted in the state. So is one that is so far from balance (factors that differ in size
        by a factor of 1e4, or a gauge of condition 500) that adding the update to float32 parameters would change the
        product by more than about 3e-6; near balance it changes by 1e-7. `balance` itself takes such a pair. Keep the
        factors in float32: bfloat16 ones cannot hold a balanced pair to better than three digits.
        `optax.MultiSteps` evaluates what it wraps on every mini-step; accumulating gradients before the optimizer is
        cheaper.

    Source: arXiv 2605.31484 (BaLoRA: an optimizer step, then the projection).

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from balora_jax import balancing_gap, balora_project
        >>> params = {"lora_a": jnp.eye(6, 2), "lora_b": 3.0 * jnp.eye(2, 5)}
        >>> tx = optax.chain(optax.adamw(1e-3), balora_project())
        >>> state = tx.init(params)
        >>> grads = {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.ones((2, 5))}
        >>> updates, state = tx.update(grads, state, params)
        >>> params = optax.apply_updates(params, updates)
        >>> bool(balancing_gap(params["lora_a"], params["lora_b"]) < 1e-5)
        True
    """
    init_fn, project = _projection(gauge, route, every, start_step, pairs, transport=False)

    def update_fn(updates, state, params=None):
        updates, state, _ = project(updates, state, params, ())
        return updates, state

    return optax.GradientTransformation(init_fn, update_fn)


class BaloraState(NamedTuple):
    """State of `balora`.

    Attributes:
        inner: the state of the wrapped optimizer, carried to the present gauge.
        projection: what `balora_project` keeps.
    """

    inner: optax.OptState
    projection: BaloraProjectState


def balora(
    inner: optax.GradientTransformation,
    *,
    gauge: Gauge = "svd",
    transport: bool = True,
    route: Route = "auto",
    every: int = 1,
    start_step: int = 0,
    pairs: Pairs | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer: balances every LoRA pair after its step, and carries its moments along.

    The projection changes a pair to `(A T, T^-1 B)`, and with it the meaning of all momentum that was gathered before.
    First moments follow exactly, `m_A T^-T` and `T^T m_B`. Entrywise second moments follow as if gradients of different
    columns were uncorrelated, `v_A (T^-T)^{o2}` and `(T^T)^{o2} v_B`, which is exact where columns only change places
    and signs.

    Args:
        inner: the optimizer. States of optax's Adam family (adam, adamw, nadam, amsgrad, adabelief), sgd with momentum,
            lion, rmsprop and adagrad are carried, inside chains, `inject_hyperparams`, `masked`, `partition` and
            `MultiSteps` too. adamax keeps an Adam state of another meaning that cannot be told apart: give it
            `transport=False`.
        gauge: which balanced pair to take, see `balora_jax.balance`.
        transport: whether to carry the moments; `balora(inner, transport=False)` does what
            `optax.chain(inner, balora_project())` does.
        route: how the r x r work is done, see `balora_jax.balance`.
        every: projects after every `every`-th update only.
        start_step: number of first updates that are not followed by a projection.
        pairs: names the pairs if their leaves have other names than `find_pairs` knows; see there.

    Returns:
        An `optax.GradientTransformationExtraArgs` whose state is a `BaloraState`.

    Raises:
        ValueError: as `balora_project`; from `init`, the optimizer keeps something about a factor in its state that no
            rule tells how to carry.
        TypeError: as `balora_project`; `inner` is not a gradient transformation.

    Notes:
        Carrying costs one product of each moment with an r x r matrix per projection. Wrap the optimizer of the pairs
        with its mask inside: `balora(optax.masked(adam, mask))` sees every parameter, and moments where there are any.

    Source: arXiv 2605.31484 for the projection, which the paper applies with the moments left as they are; the carrying
    of the second moments is this package's.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from balora_jax import balancing_gap, balora
        >>> params = {"lora_a": jnp.eye(6, 2), "lora_b": 3.0 * jnp.eye(2, 5)}
        >>> tx = balora(optax.adamw(1e-3))
        >>> state = tx.init(params)
        >>> grads = {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.ones((2, 5))}
        >>> updates, state = tx.update(grads, state, params)
        >>> params = optax.apply_updates(params, updates)
        >>> bool(balancing_gap(params["lora_a"], params["lora_b"]) < 1e-5)
        True
    """
    if not (callable(getattr(inner, "init", None)) and callable(getattr(inner, "update", None))):
        raise TypeError(f"inner must be an optax gradient transformation, got {inner!r}")
    init_projection, project = _projection(gauge, route, every, start_step, pairs, transport)
    if not isinstance(inner, optax.MultiSteps):  # which passes extra arguments on by itself
        inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        state = BaloraState(inner.init(params), init_projection(params))
        if transport and jax.tree.leaves(params):
            check_movable(state.inner, find_pairs(params, pairs))
        return state

    def update_fn(updates, state, params=None, **extra_args):
        updates, moments = inner.update(updates, state.inner, params, **extra_args)
        updates, projection, moments = project(updates, state.projection, params, moments)
        return updates, BaloraState(moments, projection)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _projection(gauge, route, every, start_step, pairs, transport):
    """The two functions behind the transformations: `init(params)`, and `project(updates, state, params, moments)`.

    The second returns new updates and state, and the moments, carried along if `transport` says so.
    """
    check_gauge(gauge)
    check_route(route, gauge)
    _check_count("every", every, 1)
    _check_count("start_step", start_step, 0)
    always = isinstance(every, int) and every == 1 and isinstance(start_step, int) and start_step == 0
    pairs = pairs if pairs is None or callable(pairs) else tuple(pairs)

    def init_fn(params):
        if jax.tree.leaves(params):  # optax also initialises with an empty placeholder
            find_pairs(params, pairs)
        return BaloraProjectState(*(jnp.zeros((), jnp.int32) for _ in BaloraProjectState._fields))

    def balanced(updates, moments, params):
        found = find_pairs(params, pairs)
        old, steps = read_pairs(params, found), read_pairs(updates, found)
        moved = [tuple(map(_add_wide, factors, step)) for factors, step in zip(old, steps, strict=True)]
        new_steps, changes = [], []
        untouched, nonfinite = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        outcomes = changed_pairs(moved, gauge=gauge, route=route, overwrite=True)
        for factors, step, new in zip(old, steps, outcomes, strict=True):
            lost = _rounded_away(new, *(factor.dtype for factor in factors))
            left = (new.untouched | new.nonfinite | lost)[:, None, None]
            news = zip(step, (new.lora_a, new.lora_b), factors, strict=True)
            step_a, step_b = (jnp.where(left, u, (x - p.astype(x.dtype)).astype(u.dtype)) for u, x, p in news)
            new_steps.append((step_a, step_b))
            identity = jnp.eye(new.change.shape[-1], dtype=new.change.dtype)[None]
            changes.append((jnp.where(left, identity, new.change), jnp.where(left, identity, new.inverse_change)))
            untouched += (new.untouched | lost).sum(dtype=jnp.int32)
            nonfinite += new.nonfinite.sum(dtype=jnp.int32)
        if transport:
            moments = move_state(moments, found, changes)
        return write_pairs(updates, found, new_steps), moments, untouched, nonfinite

    def project(updates, state, params, moments):
        if params is None:
            raise ValueError("the projection needs the parameters: call `update(updates, state, params)`")
        count = optax.safe_increment(state.count)
        if always:
            updates, moments, untouched, nonfinite = balanced(updates, moments, params)
        else:
            due = (count > start_step) & ((count - start_step) % every == 0)

            def unchanged(updates, moments, _):
                return updates, moments, state.untouched, state.nonfinite

            updates, moments, untouched, nonfinite = jax.lax.cond(due, balanced, unchanged, updates, moments, params)
        return updates, BaloraProjectState(count, untouched, nonfinite), moments

    return init_fn, project


def _add_wide(param, update):
    """`param + update` in float32 or wider."""
    wide = working_dtype(param, update)
    return param.astype(wide) + update.astype(wide)


def _rounded_away(new: Balanced, *dtypes) -> jax.Array:
    """Whether `old + (new - old)` would cost the product a third of its digits (3e-6 in float32), `(n,)`."""
    eps = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)
    return ~(new.cancellation < 0.4 * eps ** (-1 / 3)) & ~new.nonfinite


def _check_count(name: str, value, least: int) -> None:
    """Raises unless `value` is an integer of at least `least`; a traced one is taken on trust."""
    if isinstance(value, jax.Array) and not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"{name} must be an integer, got dtype {value.dtype}")
    if isinstance(value, jax.Array) and value.ndim:
        raise TypeError(f"{name} must be a single integer, got shape {value.shape}")
    if not isinstance(value, jax.Array) and (isinstance(value, bool) or not isinstance(value, int | np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not isinstance(value, jax.core.Tracer) and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
