"""Running code under meshes with explicit axes, where every product would have to name the sharding of its result."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, auto_axes


def rows_at(table: jax.Array, indices: jax.Array) -> jax.Array:
    """Returns `table[indices]`, `(..., width)`, sharded as the indices are; a table `(n, width)` of any sharding."""
    sharding = jax.typeof(indices).sharding
    mesh = sharding.mesh if sharding.mesh.explicit_axes else jax.typeof(table).sharding.mesh
    if not mesh.explicit_axes:
        return jnp.take(table, indices, axis=0)
    out = NamedSharding(mesh, PartitionSpec(*sharding.spec, None))
    return auto_axes(
        lambda table, indices: jnp.take(table, indices, axis=0), axes=mesh.explicit_axes, out_sharding=out
    )(table, indices)


def entries_at(x: jax.Array, indices: jax.Array) -> jax.Array:
    """Returns the entry of each row of `x (..., n)` that `indices (...)` names; rows may be sharded."""
    if jax.typeof(x).sharding.spec[-1] is None:
        return jnp.take_along_axis(x, indices[..., None], -1)[..., 0]
    return jnp.where(jnp.arange(x.shape[-1]) == indices[..., None], x, 0).sum(-1)


def sharded_like(like: Any, function: Callable, *arguments: Any, replicated: int = 0) -> Any:
    """Returns `function(*arguments)` with the shardings of some arrays, and leaves what is between to the compiler.

    Args:
        like: arrays in the structure of the function's result.
        function: of arrays; outside meshes with explicit axes it is just called.
        *arguments: for it.
        replicated: number of results after those of `like`, in the same tuple, which are replicated.
    """
    shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, like)
    meshes = [sharding.mesh for sharding in jax.tree.leaves(shardings) if sharding.mesh.explicit_axes]
    if not meshes:
        return function(*arguments)
    if replicated:
        shardings = (*shardings, *replicated * (NamedSharding(meshes[0], PartitionSpec()),))
    return auto_axes(function, axes=meshes[0].explicit_axes, out_sharding=shardings)(*arguments)
