"""Flows of ordinary differential equations over the time 1, with steps that adapt, and with derivatives.

The steps are those of Dormand and Prince's method of order 8 (Hairer, Nørsett, Wanner 1993, DOP853), whose coefficients
are SciPy's. A loop that ends when it likes has no reverse derivative, so a flow is differentiated as what it is, a
composition of steps of given sizes: found once, then repeated.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

MOST_STEPS = 200
_TOLERANCE = 128.0  # roundings of the scale that a step may be wrong by
_REACH = 0.5  # of a step, in units of the time in which the solution may change altogether


class Flow(NamedTuple):
    """The vector field `state' = field(parameters, state)`, and how fast it may be followed.

    Attributes:
        field: `(parameters, state) -> (slope, rate)`: `slope` is as `state`, a tuple of arrays; `rate` is `()`, the
            inverse of the time in which the solution may leave the domain of the field.
        size: `(parameters, error) -> ()`, the size of an error of the state, relative to what its rounding is.
    """

    field: Callable[[Any, tuple], tuple[tuple, jax.Array]]
    size: Callable[[Any, tuple], jax.Array]


def _tableau():
    """The coefficients of the stages and of the step, and those of the two estimates of its error."""
    from scipy.integrate import DOP853

    return DOP853.A, DOP853.B, DOP853.E3, DOP853.E5


def _moved(state, weights, slopes):
    """The state plus the weighted sum of slopes, stacked along the first axis."""
    return tuple(x + jnp.tensordot(weights, y, 1) for x, y in zip(state, slopes, strict=True))


def _stages(field, state, slope, size):
    """The slopes `(12, ...)` of the stages of a step, and the state after it."""
    rows, weights, *_ = (jnp.asarray(x, size.dtype) for x in _tableau())
    first = tuple(jnp.zeros((weights.size, *x.shape), x.dtype).at[0].set(x) for x in slope)

    def stage(i, slopes):  # those that are still to come are 0, and so are their weights
        new, _ = field(_moved(state, size * rows[i], slopes))
        return tuple(x.at[i].set(y) for x, y in zip(slopes, new, strict=True))

    slopes = lax.fori_loop(1, weights.size, stage, first)
    return slopes, _moved(state, size * weights, slopes)


def adaptive(
    equation: Flow, parameters: Any, state: tuple, tolerance: float | jax.Array = 0.0
) -> tuple[tuple, jax.Array]:
    """Solves an equation over the time 1.

    Args:
        equation: what is solved.
        parameters: any tree of arrays.
        state: at the time 0, arrays of one dtype.
        tolerance: what a step may be wrong by, in the units of `size`; not less than some roundings.

    Returns:
        The state at the time 1, and the sizes `(MOST_STEPS,)` of the steps, 0 beyond the last; all NaN where the
        solution does not last so long.
    """
    dtype = state[0].dtype
    _, _, third, fifth = (jnp.asarray(x, dtype) for x in _tableau())
    field = partial(equation.field, parameters)
    allowed = jnp.maximum(jnp.asarray(tolerance, dtype), _TOLERANCE * jnp.finfo(dtype).eps)

    def unfinished(carry):
        time, size, _, _, _, count, tries, _ = carry
        return (time < 1) & (count < MOST_STEPS) & (tries < 4 * MOST_STEPS) & (size > 0)

    def attempt(carry):
        time, size, state, slope, rate, count, tries, sizes = carry
        size = jnp.minimum(size, _REACH / rate)
        last = size >= 1 - time
        size = jnp.where(last, 1 - time, size)
        slopes, new = _stages(field, state, slope, size)
        new_slope, new_rate = field(new)
        slopes = tuple(jnp.concatenate([x, y[None]]) for x, y in zip(slopes, new_slope, strict=True))
        error_5, error_3 = (
            equation.size(parameters, tuple(jnp.tensordot(weights, x, 1) for x in slopes)) for weights in (fifth, third)
        )
        error = size * error_5**2 / jnp.sqrt(error_5**2 + 0.01 * error_3**2 + jnp.finfo(dtype).tiny)
        error = error / allowed
        good = error <= 1  # false for NaN
        factor = jnp.where(jnp.isfinite(error), jnp.clip(0.9 * (error + 1e-10) ** -0.125, 0.2, 8.0), 0.1)
        later = jnp.where(last, 1.0, time + size)
        state, slope = jax.tree.map(lambda x, y: jnp.where(good, x, y), (new, new_slope), (state, slope))
        return (
            jnp.where(good, later, time).astype(dtype),
            (size * factor).astype(dtype),
            state,
            slope,
            jnp.where(good, new_rate, rate),
            count + good,
            tries + 1,
            sizes.at[count].set(jnp.where(good, size, 0)),
        )

    slope, rate = field(state)
    zero = jnp.zeros((), int)
    start = jnp.zeros((), dtype), jnp.ones((), dtype), state, slope, rate, zero, zero, jnp.zeros(MOST_STEPS, dtype)
    time, _, state, *_, sizes = lax.while_loop(unfinished, attempt, start)
    return tuple(jnp.where(time < 1, jnp.nan, x) for x in state), jnp.where(time < 1, jnp.nan, sizes)


def repeated(equation: Flow, parameters: Any, state: tuple, sizes: jax.Array) -> tuple:
    """The state after steps of given sizes `(n,)`, which can be differentiated."""
    field = partial(equation.field, parameters)

    def step(state, size):
        return _stages(field, state, field(state)[0], size)[1]

    def body(state, size):
        return lax.cond(_throughout(size == 0), lambda state, _: state, step, state, size), None

    return lax.scan(body, state, sizes)[0]


@jax.custom_batching.custom_vmap
def _throughout(done):
    """Whether all of a batch are done: one condition for all, as a choice for each would do the work for each."""
    return done


@_throughout.def_vmap
def _(axis_size, in_batched, done):
    del axis_size, in_batched
    return _throughout(done.all(0)), False
