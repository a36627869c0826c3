"""Work on a data set that is done once and found again on disk."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path

import datasets
import pyarrow
from datasets.arrow_writer import ArrowWriter
from datasets.fingerprint import Hasher

from balora_jax.files import system_error
from balora_jax.interruption import guarded

_FORMAT = 4
"""Part of every key; a change of the code that makes the same input give another output must raise it."""

_SHARD = 10_000
"""Rows that are worked on between two files, of which there are at most `_SHARDS`."""

_SHARDS = 100


def mapped(
    examples: datasets.Dataset,
    function: Callable[[dict[str, list]], dict[str, list]],
    *,
    features: datasets.Features,
    key: Hashable,
    description: str,
) -> datasets.Dataset:
    """Applies a function to batches of rows, or takes the outcome of an earlier call from the cache.

    The cache is the folder `balora_jax` in that of `datasets` (environment variable `HF_DATASETS_CACHE`). A large data
    set is worked on shard by shard, with a file for each, so that a call that was interrupted is gone on with. The
    files are named by a hash of their rows and the key, and written whole or not at all; one that has been damaged
    since is made anew. Data sets that lie in memory are worked on in memory.

    Args:
        examples: the data set.
        function: from columns to new columns, which may have fewer rows.
        features: the types of the new columns.
        key: everything that the function depends on, beside its code.
        description: what the progress bar says.

    Returns:
        The data set of the new columns.

    Raises:
        ValueError: the cache cannot be written.
    """
    if not examples.cache_files or not len(examples):
        return datasets.Dataset.from_dict(function(examples[:]), features=features)
    size = max(_SHARD, -(-len(examples) // _SHARDS))

    def shard(start: int) -> datasets.Dataset:
        rows = examples.select(range(start, min(start + size, len(examples))))

        rows_and_key = _digest(rows), key

        def write(path: str) -> None:
            rows.map(
                function,
                batched=True,
                remove_columns=rows.column_names,
                features=features,
                cache_file_name=path,
                new_fingerprint=Hasher.hash(rows_and_key),  # lest the function be hashed, which may hold anything
                desc=description,
            )

        return _kept(rows_and_key, write)

    return datasets.concatenate_datasets([shard(start) for start in range(0, len(examples), size)])


def written(
    rows: Callable[[], Iterable[dict]], *, files: Sequence[Path], features: datasets.Features, key: Hashable
) -> datasets.Dataset:
    """Writes rows to a file, one by one, or takes that of an earlier call; in the cache of `mapped`.

    Args:
        rows: makes the rows.
        files: everything that the rows are read from.
        features: the types of the columns.
        key: everything else that the rows depend on, beside the code.

    Returns:
        The data set of the rows, which lies on disk.

    Raises:
        ValueError: the cache cannot be written.
    """

    def write(path: str) -> None:
        with ArrowWriter(features=features, path=path) as writer:
            for row in rows():
                writer.write(row)
            writer.finalize()

    return _kept(([_sha256(file) for file in files], key), write)


def _kept(key: Hashable, write: Callable[[str], None]) -> datasets.Dataset:
    """The data set in the file of a key; if it is missing, or not as it was written, it is written by the function."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "balora_jax"
    file = folder / f"{Hasher.hash((key, _FORMAT))}.arrow"
    seal = file.with_suffix(".sha256")
    if not (file.is_file() and seal.is_file() and seal.read_text() == _sha256(file)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with guarded(), tempfile.TemporaryDirectory(dir=folder) as temporary:
                new_file, new_seal = Path(temporary) / file.name, Path(temporary) / seal.name
                write(str(new_file))
                new_seal.write_text(_sha256(new_file))
                os.replace(new_file, file)
                os.replace(new_seal, seal)
        except Exception as error:  # a full disk is also "I/O operation on closed file"
            reason = system_error(error)
            if reason is None or str(folder) not in (reason.filename or str(folder)):
                raise
            raise ValueError(
                f"the cache {folder} cannot be written ({reason.strerror or reason}); set the environment variable "
                "HF_DATASETS_CACHE to another folder"
            ) from error
    return datasets.Dataset.from_file(str(file))


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _digest(examples: datasets.Dataset) -> str:
    """A hash of the rows and their types, wherever they lie."""
    digest = hashlib.sha256()
    for table in examples.with_format("arrow").iter(10_000):
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, table.schema.remove_metadata()) as stream:
            stream.write_table(table.replace_schema_metadata().combine_chunks())
        digest.update(sink.getvalue())
    return digest.hexdigest()
