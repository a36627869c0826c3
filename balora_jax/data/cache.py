"""Work on a data set that is done once and found again on disk."""

import hashlib
from collections.abc import Callable, Hashable
from pathlib import Path

import datasets
import pyarrow
from datasets.fingerprint import Hasher

_FORMAT = 1
"""Part of every key; a change of the code that makes the same input give another output must raise it."""


def mapped(
    examples: datasets.Dataset,
    function: Callable[[dict[str, list]], dict[str, list]],
    *,
    features: datasets.Features,
    key: Hashable,
    description: str,
) -> datasets.Dataset:
    """Applies a function to batches of rows, or takes the outcome of an earlier call from the cache.

    The cache is the folder `balora_jax` in that of `datasets` (environment variable `HF_DATASETS_CACHE`). Files in it
    are named by a hash of the input's rows and the key, and written whole or not at all. Data sets that lie in
    memory are worked on in memory.

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
    fingerprint = Hasher.hash((_digest(examples), key, _FORMAT))
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "balora_jax"
    folder.mkdir(parents=True, exist_ok=True)
    return examples.map(
        function,
        batched=True,
        remove_columns=examples.column_names,
        features=features,
        new_fingerprint=fingerprint,
        cache_file_name=str(folder / f"{fingerprint}.arrow"),
        desc=description,
    )


def _digest(examples: datasets.Dataset) -> str:
    """A hash of the rows and their types, wherever they lie."""
    digest = hashlib.sha256()
    for table in examples.with_format("arrow").iter(10_000):
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, table.schema.remove_metadata()) as stream:
            stream.write_table(table.replace_schema_metadata().combine_chunks())
        digest.update(sink.getvalue())
    return digest.hexdigest()
