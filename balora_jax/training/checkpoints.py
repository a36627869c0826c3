"""Checkpoints of a population's state and of its place in the data, through orbax."""

import contextlib
import errno
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from balora_jax.training.records import RunError

_ROOM, _ROOM_PER_ARRAY = 2**17, 2**10
"""Bytes that a checkpoint takes beside its arrays."""


class Checkpoints:
    """The checkpoints of one population.

    A checkpoint appears as a whole or not at all, and carries checksums of its arrays, so that damage is noticed.
    """

    def __init__(self, path: Path, *, keep: int | None):
        """Opens the folder; makes it if it does not exist.

        Args:
            path: the folder.
            keep: number of latest checkpoints to keep; None to read alone, which leaves the folder as it is.
        """
        self._path = path.resolve()
        self._step: int | None = None  # of what is being written
        for name in ("absl", "asyncio"):  # which repeat what is raised
            logging.getLogger(name).setLevel(logging.CRITICAL)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=keep is not None,
            cleanup_tmp_directories=keep is not None,
            read_only=keep is None,
        )
        if self._path.exists() and not self._path.is_dir():
            raise RunError(f"the checkpoints {self._path} must be a folder, but it is a file")
        with self._explained():
            self._manager = ocp.CheckpointManager(self._path, options=options)

    def latest_step(self) -> int | None:
        """Returns the step of the latest checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Begins to write a checkpoint, and returns when the state is on the host; `wait` says when it is on disk.

        Args:
            step: its number.
            state: a pytree of arrays, which may be donated afterwards.

        Raises:
            RunError: it cannot be written, or the one before it could not.
        """
        self.wait()
        self._step = step
        with self._unwritten():
            self._check_room(state)  # as orbax's threads, when they find none, have much to say
            meta = {"checksum": _checksum(state)}
            args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
            self._manager.save(step, args=args)

    def wait(self) -> int | None:
        """Waits until all that was saved is on disk.

        Returns:
            The step of the checkpoint that is there since the last call; None if there is no new one.

        Raises:
            RunError: it could not be written.
        """
        step, self._step = self._step, None
        if step is not None:
            with self._unwritten(step):
                self._manager.wait_until_finished()
        return step

    def restore(self, step: int, like: Any) -> Any:
        """Reads a checkpoint.

        Args:
            step: its number.
            like: a state of the same structure, on the devices where it is to be.

        Raises:
            RunError: the checkpoint is damaged.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore())
        with self._explained(step):
            restored = self._manager.restore(step, args=args)
            if _checksum(restored.state) != restored.meta["checksum"]:
                raise ValueError("its arrays are not those that were saved")
        return restored.state

    def close(self) -> None:
        """Releases the folder, when what was saved is on disk; raises as `wait`."""
        with contextlib.nullcontext() if self._step is None else self._unwritten(self._step):
            self._manager.close()

    @contextlib.contextmanager
    def _unwritten(self, step: int | None = None):
        try:
            yield
        except Exception as error:  # of many types, from several libraries
            step = self._step if step is None else step
            raise RunError(
                f"cannot write the checkpoint {self._path / str(step)} ({_reason(error)}); once that is mended, the "
                f"same command goes on from the checkpoint before it"
            ) from error

    def _check_room(self, state: Any) -> None:
        """Raises if the disk cannot hold the state's arrays, twice while they are put together, and orbax's files."""
        leaves = jax.tree.leaves(state)
        needed = 2 * sum(leaf.nbytes for leaf in leaves) + _ROOM_PER_ARRAY * len(leaves) + _ROOM
        if shutil.disk_usage(self._path).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextlib.contextmanager
    def _explained(self, step: int | None = None):
        where = self._path if step is None else self._path / str(step)
        try:
            yield
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS):
                raise RunError(f"cannot use the checkpoint {where}: {error.strerror}") from error
            raise RunError(
                f"the checkpoint {where} is broken ({_reason(error)}); delete it to go on from the one before it, "
                f"or delete the run directory to start again"
            ) from error


def _reason(error: Exception) -> str:
    """What an error of orbax says, in short; of a disk that is full, no more than that."""
    full = os.strerror(errno.ENOSPC)
    return full if full in str(error) else (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _checksum(state: Any) -> list[int]:
    """A number for each array of a state, reckoned where the array is, however it is sharded."""
    return [int(number) for number in jax.device_get(_checksums(jax.tree.leaves(state)))]


@jax.jit
def _checksums(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_weighted_sum(leaf) for leaf in leaves]


def _weighted_sum(leaf: jax.Array) -> jax.Array:
    """The bytes of an array, each times an odd number that depends on its place, summed modulo 2**32."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    places = jnp.arange(leaf.size, dtype=jnp.uint32).reshape(leaf.shape)
    parts = jax.lax.bitcast_convert_type(leaf, jnp.uint8).reshape(*leaf.shape, -1)
    weights = (places[..., None] * parts.shape[-1] + jnp.arange(parts.shape[-1], dtype=jnp.uint32)) * 2 + 1
    return (parts.astype(jnp.uint32) * weights).sum(dtype=jnp.uint32)
