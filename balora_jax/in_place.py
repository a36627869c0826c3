"""A condition that costs no memory."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

Value = TypeVar("Value")

SELDOM = "seldom"
"""Name scope of what runs only for pairs that the ordinary way does not do for."""


def update_if(condition: jax.Array, update: Callable[[Value], Value], value: Value) -> Value:
    """Returns `update(value)` where a scalar condition holds, else `value`.

    XLA gives a `lax.cond` buffers of its own for its results, and copies what a branch returns as it came: a copy of
    all factors here, in each step, for the few steps that have a pair to repair. The body of a loop works in the
    buffers of what it carries. So this is a loop that runs once or not at all.
    """

    def once(carry):
        return jnp.zeros((), bool), update(carry[1])

    with jax.named_scope(SELDOM):
        return lax.while_loop(lambda carry: carry[0], once, (condition, value))[1]
