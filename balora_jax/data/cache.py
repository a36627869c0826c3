"""Work on a data set that is done once and found again on disk."""

from collections.abc import Callable, Hashable
from pathlib import Path

import datasets
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
    are named by a hash of the input's fingerprint and the key, and written whole or not at all. Data sets that lie in
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
    fingerprint = Hasher.hash((examples._fingerprint, key, _FORMAT))
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
