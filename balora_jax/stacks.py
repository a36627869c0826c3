"""Balancing stacks of pairs: one compiled function for all platforms, for `vmap`, and for sharded factors.

The work itself is in `balora_jax.stages`, for `r > min(a, b)` in `balora_jax.redundant`.
"""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from balora_jax.factors import Moved, Stacks, over_factors, working_dtype
from balora_jax.linalg import split
from balora_jax.redundant import balance_redundant
from balora_jax.sharding import sharded_like
from balora_jax.stages import balance_in_stages
from balora_jax.status import is_skipped, status_of_balancing


class BalancedStacks(NamedTuple):
    """The outcome of `balance_stacks` for N pairs.

    Attributes:
        stacks: the factors after the projection, as `balora_jax.factors.written`. Those of skipped pairs may be
            anything.
        T: `(N, r, r)`, the change of gauge, in float32 or wider; the identity for skipped pairs.
        T_inv: `(N, r, r)`.
        status: `(N)` int8, see `balora_jax.status.Status`.
        cancellation: `(N)` float32, see `balora_jax.rounding.cancellation`.
        ratio: `(N)` float32, the norm of the smaller factor over that of the larger one, as they came.
    """

    stacks: Stacks
    T: jax.Array
    T_inv: jax.Array
    status: jax.Array
    cancellation: jax.Array
    ratio: jax.Array


def balance_stacks(stacks: Stacks, gauge: str, route: str) -> BalancedStacks:
    """The projection of stacks of pairs of one rank; a stack with `r > min(a, b)` comes alone.

    Args:
        stacks: the pairs, in any floating-point dtypes of one working dtype.
        gauge: one of `GAUGES`.
        route: one of `ROUTES`.
    """
    like = over_factors(lambda factor: factor.step if isinstance(factor, Moved) else factor, stacks)
    return BalancedStacks(*sharded_like((like,), _compiled(gauge, route), stacks, replicated=5))


@cache
def _compiled(gauge: str, route: str):
    """The compiled function behind `balance_stacks`.

    A `vmap` outside would make both branches of every condition run, and batch calls of LAPACK; so it is turned into
    longer stacks instead.
    """

    @jax.custom_batching.custom_vmap
    def run(stacks):
        return _on_any_platform(stacks, gauge, route)

    @run.def_vmap
    def _(axis_size, in_batched, stacks):
        def flat(x, batched):
            x = x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        def unflat(x):
            return x.reshape(axis_size, -1, *x.shape[1:])

        stacks = jax.tree.map(flat, stacks, in_batched[0])
        new, *over_pairs = run(stacks)
        parts = [[unflat(part) for part in split(x, stacks.lora_a)] for x in over_pairs]
        out = jax.tree.map(unflat, new), *(jnp.concatenate(p, axis=1) for p in parts)
        return out, jax.tree.map(lambda _: True, out)

    return jax.jit(run)


def _on_any_platform(stacks, gauge, route):
    """The projection with the arithmetic of the platform on which the program will run.

    The r x r work is done in float64 whatever the user's setting, except on TPUs, which lack it. This is decided in the
    program, which may be compiled for another platform than that of the process that traces it.
    """
    wide = partial(_balanced, gauge=gauge, route=route, wide=jnp.float64)
    if working_dtype(stacks) == jnp.float64:
        return wide(stacks)
    on_tpu = "iterative" if route == "auto" and gauge == "svd" else route
    narrow = partial(_balanced, gauge=gauge, route=on_tpu, wide=jnp.float32)
    return lax.platform_dependent(stacks, tpu=narrow, default=wide)


def _balanced(stacks, gauge, route, wide):
    """The fields of a `BalancedStacks`."""
    working = working_dtype(stacks)
    with jax.enable_x64(wide == jnp.float64):
        if stacks.is_redundant:
            outcome = balance_redundant(stacks, gauge, working, wide)
        else:
            outcome = balance_in_stages(stacks, gauge, route, working, wide)
        evidence = outcome.evidence._replace(held=_held(outcome.stacks, stacks, working))
        status = status_of_balancing(evidence, working, wide)
        skipped, identity = is_skipped(status)[:, None, None], jnp.eye(stacks.rank, dtype=working)[None]
        T, T_inv = (jnp.where(skipped, identity, x.astype(working)) for x in outcome.change[:2])
        return (
            outcome.stacks,
            T,
            T_inv,
            status,
            outcome.cancellation.astype(jnp.float32),
            outcome.ratio.astype(jnp.float32),
        )


def _held(new, stacks, working):
    """Whether the dtypes of new factors that are narrower than the working one hold them, `(N)` bool; of an update that
    leads to them it is what it is added to that must."""

    def of_stack(new, factor):
        finfo = jnp.finfo(new.dtype)
        if isinstance(factor, Moved) or finfo.max >= jnp.finfo(working).max:
            return jnp.ones(len(new), bool)
        largest = jnp.abs(new).max((1, 2))
        return jnp.isfinite(largest) & (largest >= finfo.tiny)

    held_a, held_b = over_factors(of_stack, new, stacks)
    return jnp.concatenate(held_a) & jnp.concatenate(held_b)
