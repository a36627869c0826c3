"""Running code under meshes with explicit axes, where every product would have to name the sharding of its result."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, auto_axes


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
