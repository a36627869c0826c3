"""Checkpoints of a population's state and of its place in the data, through orbax."""

import contextlib
import errno
import hashlib
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from balora_jax.training.records import RunError

_ROOM, _ROOM_PER_ARRAY = 2**17, 2**10
"""Bytes that a checkpoint takes beside its arrays."""


class Checkpoints:
    """The checkpoints of one population.

    A checkpoint appears as a whole or not at all, and carries a digest of its arrays, so that a damaged one is noticed.
    """

    def __init__(self, path: Path, *, keep: int | None):
        """Opens the folder; makes it if it does not exist.

        Args:
            path: the folder.
            keep: number of latest checkpoints to keep; None to read alone, which leaves the folder as it is.
        """
        self._path = path.resolve()
        for name in ("absl", "asyncio"):  # which repeat what is raised
            logging.getLogger(name).setLevel(logging.CRITICAL)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=keep is not None,
            read_only=keep is None,
        )
        with self._explained():
            self._manager = ocp.CheckpointManager(self._path, options=options)

    def latest_step(self) -> int | None:
        """Returns the step of the latest checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data: dict) -> None:
        """Writes a checkpoint and waits until it is on disk.

        Args:
            step: its number.
            state: a pytree of arrays.
            data: JSON-like, the place in the data.

        Raises:
            RunError: it cannot be written.
        """
        meta = {"data": data, "digest": _digest(state)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        try:
            self._check_room(state)  # as orbax's threads, when they find none, have much to say
            self._manager.save(step, args=args)
            self._manager.wait_until_finished()
        except Exception as error:  # of many types, from several libraries
            raise RunError(
                f"cannot write the checkpoint {self._path / str(step)} ({_reason(error)}); once that is mended, the "
                f"same command goes on from the checkpoint before it"
            ) from error

    def restore(self, step: int, like: Any) -> tuple[Any, dict]:
        """Reads a checkpoint.

        Args:
            step: its number.
            like: a state of the same structure.

        Returns:
            The state, and the place in the data.

        Raises:
            RunError: the checkpoint is damaged.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore())
        with self._explained(step):
            restored = self._manager.restore(step, args=args)
            if _digest(restored.state) != restored.meta["digest"]:
                raise ValueError("its arrays are not those that were saved")
        return restored.state, restored.meta["data"]

    def close(self) -> None:
        """Releases the folder."""
        self._manager.close()

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


def _digest(state: Any) -> str:
    """A hash of all arrays of a state."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
