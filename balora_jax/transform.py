"""The balanced projection as optax transformations: after an optimizer in a chain, or around it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from balora_jax.gauge import Gauge, Route, check_gauge, check_route
from balora_jax.pairs import Pairs, PairSearch
from balora_jax.projection import disturbed, project
from balora_jax.status import COUNTED, Status, is_skipped, is_untouched
from balora_jax.transport import check_movable, move_state
from balora_jax.trees import path_text

PROJECTION = "balora_projection"
"""Name scope of all that comes after the optimizer's step, in profiles and in compiled programs."""


class BaloraProjectState(NamedTuple):
    """State of `balora_project`. Counts of pairs are of the last projection; the last axis of `status` is summed up.

    Attributes:
        count: int32, number of updates so far.
        disturbed: int32, how often a pair that an update left balanced did not come back so: something after the
            projection, in the chain or around it, changes its updates, or the parameters were set by hand.
        projected: bool, whether the last update was followed by a projection.
        status: `(pairs)` int8, what the last projection made of each pair: a `Status`.
    """

    count: jax.Array  # type: ignore[assignment]
    disturbed: jax.Array
    projected: jax.Array
    status: jax.Array

    @property
    def balanced(self) -> jax.Array:
        """`(pairs)` bool, those that the last update left balanced."""
        return self.projected[..., None] & ~is_skipped(self.status)

    @property
    def untouched(self) -> jax.Array:
        """int32, pairs that were skipped though they have finite updates, for any reason."""
        return is_untouched(self.status).sum(-1, dtype=jnp.int32)

    @property
    def nonfinite(self) -> jax.Array:
        """int32, pairs that were skipped because they hold a NaN or an infinity."""
        return self.number_of(Status.NONFINITE)

    @property
    def waiting(self) -> jax.Array:
        """int32, pairs that were skipped because one factor is still too small beside the other."""
        return self.number_of(Status.WAITING)

    @property
    def frozen(self) -> jax.Array:
        """int32, pairs that were skipped because one factor has no update, though neither is zero."""
        return self.number_of(Status.FROZEN)

    def number_of(self, status: Status) -> jax.Array:
        """Returns the number of pairs of a status, int32."""
        return (self.status == status).sum(-1, dtype=jnp.int32)

    def counts(self) -> dict[str, jax.Array]:
        """Returns what metrics show: `untouched`, `disturbed`, and the number of pairs of each status by its name."""
        numbers = {status.name.lower(): self.number_of(status) for status in COUNTED}
        return {"untouched": self.untouched, "disturbed": self.disturbed} | numbers


def balora_project(
    *,
    gauge: Gauge = "svd",
    route: Route = "auto",
    every: int = 1,
    start_step: int = 0,
    least_ratio: float = 0.03,
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
        start_step: number of first updates that are not followed by a projection. The paper's code has a number of this
            name that is one more for the same steps: its first projection follows the update of this number.
        least_ratio: a pair waits until the Frobenius norm of its smaller factor is at least this share of the larger
            one's; 0 waits for nothing. A fresh B is tiny, and balancing makes A as small at once: optimizers that adapt
            to the size of the parameters, as prodigy, can stay there for ever (experiments/optimizers).
        pairs: names the pairs if their leaves have other names than `find_pairs` knows; see there.

    Returns:
        An `optax.GradientTransformation` whose state is a `BaloraProjectState`.

    Raises:
        ValueError: an argument is out of its range; from `init`, the parameters hold no pair or an unpaired factor;
            from `update`, `params` was not given.
        TypeError: `every` or `start_step` is not an integer.

    Notes:
        Costs O((a + b) r^2) per pair and step. A pair whose product lacks rank, or that is not finite, is skipped: it
        stays as the optimizer made it, and is counted in the state. So is one that is so far from balance (factors that
        differ in size by a factor of 1e4, or a gauge of condition 500) that adding the update to float32 parameters
        would change the product by more than about 3e-6; near balance it changes by 1e-7. `balance` itself takes such a
        pair. Keep the factors in float32: bfloat16 ones cannot hold a balanced pair to better than three digits.
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
    find = PairSearch(pairs)
    project_fn = _projection(find, gauge, route, every, start_step, least_ratio, transport=False)

    def init_fn(params):
        return _initial_state(params, find.at_init(params))

    def update_fn(updates, state, params=None):
        updates, state, _ = project_fn(updates, state, params, ())
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

    def counts(self) -> dict[str, jax.Array]:
        """As `BaloraProjectState.counts`."""
        return self.projection.counts()


def balora(
    inner: optax.GradientTransformation,
    *,
    gauge: Gauge = "svd",
    transport: bool = True,
    route: Route = "auto",
    every: int = 1,
    start_step: int = 0,
    least_ratio: float = 0.03,
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
        start_step: number of first updates that are not followed by a projection. The paper's code has a number of this
            name that is one more for the same steps: its first projection follows the update of this number.
        least_ratio: a pair waits until the Frobenius norm of its smaller factor is at least this share of the larger
            one's; 0 waits for nothing. A fresh B is tiny, and balancing makes A as small at once: optimizers that adapt
            to the size of the parameters, as prodigy, can stay there for ever (experiments/optimizers).
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
    find = PairSearch(pairs)
    project_fn = _projection(find, gauge, route, every, start_step, least_ratio, transport)
    if not isinstance(inner, optax.MultiSteps):  # which passes extra arguments on by itself
        inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        found = find.at_init(params)
        state = BaloraState(inner.init(params), _initial_state(params, found))
        if transport:
            check_movable(state.inner, found)
        return state

    def update_fn(updates, state, params=None, **extra_args):
        updates, moments = inner.update(updates, state.inner, params, **extra_args)
        updates, projection, moments = project_fn(updates, state.projection, params, moments)
        return updates, BaloraState(moments, projection)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def projection_states(opt_state: Any) -> list[BaloraProjectState]:
    """Returns the states of all projections in an optimizer's state."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, BaloraProjectState))
    return [node for node in nodes if isinstance(node, BaloraProjectState)]


def pair_statuses(opt_state: Any, params: Any, *, pairs: Pairs | None = None) -> dict[str, tuple[Status, ...]]:
    """Returns what the last projection made of every pair, by the paths of its leaves; outside of `jit`.

    Args:
        opt_state: of any optax transformation that holds one `balora_project` or `balora`.
        params: the parameters that it trains; of a tree that `optax.masked` hides in part, the rest alone.
        pairs: as the transformation was given.

    Returns:
        For `"path/of/a, path/of/b"` one status, or for leaves that stack pairs one each.

    Raises:
        ValueError: the state holds no projection or several, or is that of other parameters or of a population.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> params = {"lora_a": jnp.eye(6, 2), "lora_b": 3.0 * jnp.eye(2, 5)}
        >>> tx = balora(optax.sgd(1e-3))
        >>> _, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        >>> {pair: [status.name for status in found] for pair, found in pair_statuses(state, params).items()}
        {'lora_a, lora_b': ['BALANCED']}
    """
    states = projection_states(opt_state)
    if len(states) != 1:
        raise ValueError(f"opt_state must hold the state of one balora_project or balora, found {len(states)}")
    found = PairSearch(pairs)(params)
    counts, status = found.counts(params), np.asarray(states[0].status)
    if status.shape != (sum(counts),):
        raise ValueError(
            f"opt_state must be that of the {sum(counts)} pairs of params, got statuses of shape {status.shape}; "
            f"of a population take one member, and of masked parameters those that are trained"
        )
    parts = np.split(status, np.cumsum(counts)[:-1])
    return {
        f"{path_text(pair.path_a)}, {path_text(pair.path_b)}": tuple(Status(int(x)) for x in part)
        for pair, part in zip(found.pairs, parts, strict=True)
    }


def check_projection(opt_state: Any) -> None:
    """Raises if an optimizer's state tells that balancing was undone, or would have moved a frozen factor.

    Call it now and then in a training loop, outside of `jit`; it looks at a few numbers.

    Args:
        opt_state: of any optax transformation that holds `balora_project` or `balora`, also of a population.

    Raises:
        ValueError: pairs were disturbed, or in the last update frozen, see `Status`; or the state holds
            no projection.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> params = {"lora_a": jnp.eye(6, 2), "lora_b": 3.0 * jnp.eye(2, 5)}
        >>> tx = optax.chain(balora_project(), optax.adam(1e-1))  # in the wrong order
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> check_projection(state)
        Traceback (most recent call last):
        ValueError: pairs that balora_project had balanced came back unbalanced (1 times): it must be the last...
    """
    states = projection_states(opt_state)
    if not states:
        raise ValueError("opt_state must hold the state of balora_project or balora, found none")
    for state in states:
        if changed := int(jnp.sum(state.disturbed)):
            raise ValueError(
                f"pairs that balora_project had balanced came back unbalanced ({changed} times): it must be the last "
                f"transformation, as in optax.chain(optax.adamw(1e-3), balora_project()), and wrappers that set "
                f"parameters themselves, as optax.lookahead, go in front of it too"
            )
        if frozen := int(jnp.sum(state.frozen)):
            raise ValueError(
                f"{frozen} pair{'s' * (frozen > 1)} cannot be balanced, because one of the factors gets no update: "
                f"balancing moves both, so train both, or take balora_project out"
            )


def _initial_state(params, found) -> BaloraProjectState:
    """The state before the first update."""
    return BaloraProjectState(
        count=jnp.zeros((), jnp.int32),
        disturbed=jnp.zeros((), jnp.int32),
        projected=jnp.zeros((), bool),
        status=jnp.full(sum(found.counts(params)), Status.NO_UPDATE, jnp.int8),
    )


def _projection(find, gauge, route, every, start_step, least_ratio, transport):
    """The function behind the transformations, `project(updates, state, params, moments)`.

    It returns new updates and state, and the moments, carried along if `transport` says so.
    """
    check_gauge(gauge)
    check_route(route, gauge)
    _check_count("every", every, 1)
    _check_count("start_step", start_step, 0)
    _check_share("least_ratio", least_ratio)
    always = isinstance(every, int) and every == 1 and isinstance(start_step, int) and start_step == 0

    @jax.named_scope(PROJECTION)
    def update_fn(updates, state, params, moments):
        if params is None:
            raise ValueError("the projection needs the parameters: call `update(updates, state, params)`")
        found, count = find(params), optax.safe_increment(state.count)

        def projected(updates, moments):
            new, changes, status = project(updates, params, found, gauge=gauge, route=route, least_ratio=least_ratio)
            return new, move_state(moments, found, changes) if transport else moments, status

        def as_they_are(updates, moments):
            return updates, moments, state.status

        def undone():
            return disturbed(params, found, state.balanced).sum(dtype=jnp.int32)

        if always:
            due, changed = jnp.ones((), bool), undone()
            updates, moments, status = projected(updates, moments)
        else:
            due = (count > start_step) & ((count - start_step) % every == 0)
            changed = jax.lax.cond(state.balanced.any(), undone, lambda: jnp.zeros((), jnp.int32))
            updates, moments, status = jax.lax.cond(due, projected, as_they_are, updates, moments)
        return updates, BaloraProjectState(count, state.disturbed + changed, due, status), moments

    return update_fn


def _check_share(name: str, value) -> None:
    """Raises unless `value` is a number from 0 to 1; a traced one is taken on trust."""
    if isinstance(value, jax.core.Tracer):
        return
    if isinstance(value, bool) or not isinstance(value, int | float | np.number | jax.Array) or np.ndim(value):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {value}")


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
