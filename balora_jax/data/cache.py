"""Work on a data set that is done once and found again on disk."""

import hashlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path

import datasets
import pyarrow
from datasets.fingerprint import Hasher

_FORMAT = 2
"""Part of every key; a change of the code that makes the same input give another output must raise it."""

_SHARD = 10_000
"""Rows that are worked on between two files, of which there are at most `_SHARDS`."""

_SHARDS = 100


def cache_folder() -> Path:
    """Returns the folder of what is cached, and makes it if it is missing."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "balora_jax"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


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
    files are named by a hash of their rows and the key, and written whole or not at all. Data sets that lie in memory
    are worked on in memory.

    Args:
        examples: the data set.
        function: from columns to new columns, which may have fewer rows.
        features: the types of the new columns.
        key: everything that the function depends on, beside its code.
        description: what the progress bar says.

    Returns:
        The data set of the new columns.
    """
    if not examples.cache_files:
        return datasets.Dataset.from_dict(function(examples[:]), features=features)
    size = max(_SHARD, -(-len(examples) // _SHARDS))
    shards = [
        _mapped(examples.select(range(start, min(start + size, len(examples)))), function, features, key, description)
        for start in range(0, len(examples), size)
    ]
    return datasets.concatenate_datasets(shards)


def _mapped(examples: datasets.Dataset, function, features: datasets.Features, key: Hashable, description: str):
    fingerprint = Hasher.hash((_digest(examples), key, _FORMAT))
    return examples.map(
        function,
        batched=True,
        remove_columns=examples.column_names,
        features=features,
        new_fingerprint=fingerprint,
        cache_file_name=str(cache_folder() / f"{fingerprint}.arrow"),
        desc=description,
    )


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
        ValueError: the rows cannot be made.
    """
    contents = []
    for file in files:
        with file.open("rb") as content:
            contents.append(hashlib.file_digest(content, "sha256").hexdigest())

    def generate():
        yield from rows()

    try:
        return datasets.Dataset.from_generator(
            generate,
            features=features,
            cache_dir=str(cache_folder()),
            fingerprint=Hasher.hash((contents, key, _FORMAT)),
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(str(error.__cause__ or error)) from error


def _digest(examples: datasets.Dataset) -> str:
    """A hash of the rows and their types, wherever they lie."""
    digest = hashlib.sha256()
    for table in examples.with_format("arrow").iter(10_000):
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, table.schema.remove_metadata()) as stream:
            stream.write_table(table.replace_schema_metadata().combine_chunks())
        digest.update(sink.getvalue())
    return digest.hexdigest()
