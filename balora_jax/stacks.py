"""Balancing stacks of pairs: one compiled function for all platforms, for `vmap`, and for sharded factors.

The work itself is in `balora_jax.stages`, for `r > min(a, b)` in `balora_jax.redundant`.
"""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from balora_jax.factors import Stacks, cast, working_dtype
from balora_jax.linalg import split
from balora_jax.redundant import balance_redundant
from balora_jax.sharding import sharded_like
from balora_jax.stages import balance_in_stages
from balora_jax.status import is_skipped, status_of_balancing


class BalancedStacks(NamedTuple):
    """The outcome of `balance_stacks` for N pairs.

    Attributes:
        stacks: the factors after the projection. Those of skipped pairs need not be as they came.
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
    return BalancedStacks(*sharded_like((stacks,), _compiled(gauge, route), stacks, replicated=5))


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
    if working_dtype(*jax.tree.leaves(stacks)) == jnp.float64:
        return wide(stacks)
    on_tpu = "iterative" if route == "auto" and gauge == "svd" else route
    narrow = partial(_balanced, gauge=gauge, route=on_tpu, wide=jnp.float32)
    return lax.platform_dependent(stacks, tpu=narrow, default=wide)


def _balanced(old, gauge, route, wide):
    """The fields of a `BalancedStacks`."""
    working = working_dtype(*jax.tree.leaves(old))
    with jax.enable_x64(wide == jnp.float64):
        stacks = cast(old, working)
        if old.lora_a[0].shape[2] > min(old.lora_a[0].shape[1], old.lora_b[0].shape[2]):
            outcome = balance_redundant(stacks, gauge, working, wide)
        else:
            outcome = balance_in_stages(stacks, gauge, route, working, wide)
        new = jax.tree.map(lambda x, y: x.astype(y.dtype), outcome.stacks, old)
        evidence = outcome.evidence._replace(held=_held(new, working))
        status = status_of_balancing(evidence, working, wide)
        skipped, identity = is_skipped(status)[:, None, None], jnp.eye(outcome.change.T.shape[-1], dtype=working)[None]
        T, T_inv = (jnp.where(skipped, identity, x.astype(working)) for x in outcome.change[:2])
        return new, T, T_inv, status, outcome.cancellation.astype(jnp.float32), outcome.ratio.astype(jnp.float32)


def _held(stacks, working):
    """Whether the dtypes of new factors that are narrower than the working one hold them, `(N)` bool."""
    sides = []
    for factors in stacks:
        held = []
        for factor in factors:
            finfo, largest = jnp.finfo(factor.dtype), jnp.abs(factor).max((1, 2))
            narrower = finfo.max < jnp.finfo(working).max
            held.append((jnp.isfinite(largest) & (largest >= finfo.tiny)) if narrower else jnp.ones(len(factor), bool))
        sides.append(jnp.concatenate(held))
    return sides[0] & sides[1]
