"""Where the arrays of a population lie on several devices: one mesh, and one table of rules for all weights."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from balora_jax.errors import ConfigError
from balora_jax.models import Decoder
from balora_jax.settings import Config
from balora_jax.training.state import TrainState

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"

WEIGHTS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"), (FSDP, TENSOR)),
    **dict.fromkeys(("o_proj", "down_proj", "embed_tokens"), (TENSOR, FSDP)),
}
"""The axes of the mesh that the rows and the columns of a layer's weight are cut along; others are on every device.

A layer that reads what every device has is cut by its columns along `tensor`, the one behind it by its rows, so that a
product is summed over the devices once in two layers (arXiv 1909.08053); the other side is cut along `fsdp`, and put
together when the layer is used (arXiv 1910.02054)."""

_PARTS: dict[str, Callable[[str, str], tuple[str | None, ...]]] = {
    "kernel": lambda rows, columns: (rows, columns),
    "embedding": lambda rows, columns: (rows, columns),
    "bias": lambda rows, columns: (columns,),
    "magnitude": lambda rows, columns: (columns,),
    **dict.fromkeys(("lora_a", "offset_a"), lambda rows, columns: (rows, None)),
    **dict.fromkeys(("lora_b", "offset_b"), lambda rows, columns: (None, columns)),
}
"""The axes of the mesh for the last axes of a layer's arrays, from those of its weight."""


def layout_of(
    config: Config, decoder: Decoder, *, members: int, devices: Sequence[Any] | None = None
) -> "Layout | None":
    """Returns the layout of a population, or None on a single device.

    Args:
        config: of any member.
        decoder: the base, or its shapes.
        members: number of members; they are spread along `data` where it divides their number.
        devices: to use; default all there are.

    Raises:
        ConfigError: the mesh does not divide the devices, the rows of a batch or a weight; the message says what would.
    """
    devices = jax.devices() if devices is None else devices
    parallel, training = config.parallel, config.training
    rest = parallel.fsdp * parallel.tensor

    def members_along(data: int) -> bool:
        return training.members_at_once is None and members > 1 and members % data == 0

    def fits(data: int) -> bool:
        return training.batch_size % (parallel.fsdp * (1 if members_along(data) else data)) == 0

    most = len(devices) // rest
    if len(devices) % (max(parallel.data, 1) * rest):
        sizes = f"{max(parallel.data, 1)} x {parallel.fsdp} x {parallel.tensor}"
        raise ConfigError(
            f"parallel.data x parallel.fsdp x parallel.tensor = {sizes} must divide the {len(devices)} devices; "
            f"{_listed(_divisors(len(devices)))} would"
        )
    fitting = [data for data in range(1, most + 1) if fits(data)]
    data = max(fitting, default=1) if parallel.data == -1 else parallel.data
    if not fits(data):
        shards = parallel.fsdp * (1 if members_along(data) else data)
        would = f"parallel.data {_listed(fitting)}" if fitting else f"a multiple of {parallel.fsdp}"
        raise ConfigError(
            f"training.batch_size must be a multiple of {shards}, into which the mesh cuts the rows, got "
            f"{training.batch_size}; {would} would do"
        )
    used = data * rest
    if jax.process_count() > 1 and used < len(devices):
        raise ConfigError(
            f"all {len(devices)} devices of all processes must take part, but the rows are cut into parts for {used}: "
            f"training.batch_size must be a multiple of {len(devices) // parallel.tensor}, got {training.batch_size}"
        )
    if used == 1:
        return None
    mesh = _mesh(devices[:used], data, parallel.fsdp, parallel.tensor)
    layout = Layout(mesh, members_along_data=members_along(data))
    _check_weights(layout, decoder)
    return layout


def tensor_layout(decoder: Decoder, devices: int) -> "Layout | None":
    """Returns a layout in which some devices share the weights, and rows are whole; None for one device.

    Args:
        decoder: the base, or its shapes.
        devices: their number.

    Raises:
        ConfigError: there are not as many, or a weight cannot be cut evenly.
    """
    there = jax.devices()
    if not 1 <= devices <= len(there):
        raise ConfigError(f"--tensor must be from 1 to {len(there)}, the devices that there are, got {devices}")
    if devices == 1:
        return None
    layout = Layout(_mesh(there[:devices], 1, 1, devices))
    _check_weights(layout, decoder)
    return layout


class Layout:
    """The shardings of a population's arrays.

    Attributes:
        mesh: of the axes `data`, `fsdp` and `tensor`, with automatic shardings.
        replicated: the sharding of what every device has.
    """

    def __init__(self, mesh: Mesh, *, members_along_data: bool = False):
        """Takes a mesh of the three axes.

        Args:
            mesh: the mesh.
            members_along_data: whether the members are spread along `data`, and the rows along `fsdp` alone.
        """
        self.mesh = mesh
        self._members = DATA if members_along_data else None
        self._rows = (FSDP,) if members_along_data else (DATA, FSDP)
        self.replicated = self._sharding()

    @property
    def row_shards(self) -> int:
        """Number of parts that the rows of a batch are cut into."""
        return math.prod(self.mesh.shape[axis] for axis in self._rows)

    def weight(self, path: str, array: Any) -> NamedSharding:
        """Returns the sharding of a parameter of the base; `load_decoder` takes this function.

        Args:
            path: dotted.
            array: or its shape and dtype.
        """
        return self._sharding(*self._spec(path.split("."), array.ndim))

    def by_rows(self, function: Callable[[Any, Any, Any], Any]) -> Callable[..., Any]:
        """Compiles a function whose work is shared among the devices by rows; every device gets all results.

        Args:
            function: `(states, base, rows) -> results`, arrays `(rows, ...)` and `(members, rows, ...)`.
        """
        compiled = jax.jit(function, out_shardings=self.replicated)

        def of_rows(states: Any, base: Any, rows: Any) -> Any:
            count = len(jax.tree.leaves(rows)[0])
            whole = -(-count // self.row_shards) * self.row_shards  # repeats rows to fill the parts
            placed = jax.tree.map(lambda x: jax.device_put(np.resize(x, (whole, *x.shape[1:])), self.rows()), rows)
            return jax.tree.map(lambda x: x[:, :count], compiled(states, base, placed))

        return of_rows

    def batch(self) -> NamedSharding:
        """Returns the sharding of the arrays of a batch, `(members, accumulate, rows, length)`."""
        return self._sharding(self._members, None, self._rows)

    def rows(self) -> NamedSharding:
        """Returns the sharding of arrays `(rows, ...)` that all members see."""
        return self._sharding(self._rows)

    def state(self, state: TrainState) -> TrainState:
        """Returns the shardings of a population's state, in its structure.

        What an optimizer holds for a parameter is cut as the parameter is, along the axes that are as long.

        Args:
            state: arrays, or shapes, with a leading axis of members.
        """
        parameters = {
            _names(path): (leaf.shape, self._of_adapter(path, leaf).spec)
            for path, leaf in jax.tree_util.tree_leaves_with_path(state.adapters)
        }

        def of(path: tuple, leaf: Any) -> NamedSharding:
            names = _names(path)
            parameter = next((parameters[names[i:]] for i in range(len(names)) if names[i:] in parameters), None)
            if parameter is None or leaf.ndim != len(parameter[0]):
                return self._sharding(self._members)
            spec = (*parameter[1], *[None] * (leaf.ndim - len(parameter[1])))
            same = zip(spec, leaf.shape, parameter[0], strict=True)
            return self._sharding(*(axis if size == whole else None for axis, size, whole in same))

        shardings = jax.tree_util.tree_map_with_path(of, state)
        return shardings._replace(frozen=jax.tree_util.tree_map_with_path(self._of_adapter, state.frozen))

    def _of_adapter(self, path: tuple, leaf: Any) -> NamedSharding:
        """The sharding of an array of the adapters, with a leading axis of members."""
        return self._sharding(self._members, *self._spec(_names(path), leaf.ndim)[1:])

    def _spec(self, path: Sequence[str], ndim: int) -> tuple[str | None, ...]:
        axes = next((WEIGHTS[part] for part in path if part in WEIGHTS), None)
        part = next((_PARTS[part] for part in reversed(path) if part in _PARTS), None)
        own = part(*axes) if axes is not None and part is not None else ()
        return (None,) * (ndim - len(own)) + own

    def _sharding(self, *axes: Any) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*axes))


def _names(path: tuple) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr(path, simple=True, separator="/").split("/"))


def _mesh(devices: Sequence[Any], *sizes: int) -> Mesh:
    return Mesh(np.array(devices).reshape(sizes), (DATA, FSDP, TENSOR), axis_types=(AxisType.Auto,) * 3)


def _check_weights(layout: Layout, decoder: Decoder) -> None:
    """Raises if a weight cannot be cut evenly."""
    weights = [
        (".".join(map(str, path)), variable.shape)
        for path, variable in nnx.to_flat_state(nnx.state(decoder, nnx.Param))
    ]
    cut = [
        (axis, size, path)
        for path, shape in weights
        for axis, size in zip(layout.weight(path, jax.ShapeDtypeStruct(shape, np.float32)).spec, shape, strict=True)
        if axis is not None
    ]
    for axis, size, path in cut:
        if size % layout.mesh.shape[axis]:
            would = _divisors(math.gcd(*(other for name, other, _ in cut if name == axis)))
            raise ConfigError(
                f"parallel.{axis} must divide the {size} rows or columns of {path}, got {layout.mesh.shape[axis]}; "
                f"{_listed(would)} would"
            )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, min(number, 4096) + 1) if number % divisor == 0]


def _listed(numbers: Sequence[int]) -> str:
    """The first numbers of a list, in words."""
    *others, last = map(str, numbers[:8])
    return f"{', '.join(others)} or {last}" if others else last
