"""Where published data sets lie, and which of their rows are for training and which for evaluation."""

import contextlib
import errno
import glob
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import datasets
import numpy as np

from balora_jax.data.text_files import check_json, check_text
from balora_jax.files import system_error

_READERS = {
    ".parquet": datasets.Dataset.from_parquet,
    ".json": datasets.Dataset.from_json,
    ".jsonl": datasets.Dataset.from_json,
    ".csv": partial(datasets.Dataset.from_csv, keep_default_na=False),  # where None and NA are texts
}
"""By the endings of files. Other than `load_dataset` they ask nobody, and follow no README.md to other files."""


def read_source(path: str | None, *, hub: str | None, part: str | None) -> dict[str, datasets.Dataset]:
    """Reads a data set.

    Args:
        path: a folder that `save_to_disk` wrote, a file of parquet, JSON (lines or one list) or CSV, or a folder of
            such files, whose names tell their splits (`train-00000-of-00001.parquet`, `test.jsonl`), such as a copy of
            the repository; None for the Hub.
        hub: name of the repository on the Hub, if there is one.
        part: name of a configuration, and of the sub-folder that holds it, if there is one.

    Returns:
        The splits by name.

    Raises:
        FileNotFoundError: there is no such data.
        ValueError: the files are of no known format, or broken.
    """
    if path is None:
        if hub is None:
            raise ValueError("data.path must be a file or a folder for data without a place on the Hub, got None")
        with _explained(hub):
            return dict(datasets.load_dataset(hub, name=part))
    place = Path(path)
    if part is not None and (place / part).is_dir():
        place /= part
    if place.is_file():
        if place.suffix not in _READERS:
            raise ValueError(f"data.path must be of one of the types {', '.join(_READERS)}, got {place}")
        return _read_files({"train": [place]})
    if not place.is_dir():
        raise FileNotFoundError(f"data.path: there is no file or folder {place}")
    if (place / "dataset_dict.json").is_file() or (place / "state.json").is_file():
        with _explained(str(place)):
            saved = datasets.load_from_disk(place)
        return dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    if not any(file.suffix in _READERS for file in place.rglob("*")):
        names = ", ".join(sorted(item.name for item in place.iterdir())) or "nothing"
        raise FileNotFoundError(
            f"data.path: {place} must hold files of the types {', '.join(_READERS)}, or be made by save_to_disk; "
            f"it holds {names}"
        )
    return _read_files(_split_by_name(place))


def _split_by_name(place: Path) -> dict[str, list[Path]]:
    """The files of a folder, sorted into splits by their names and folders as on the Hub."""
    base = glob.escape(str(place))
    with _explained(str(place)):
        patterns = datasets.data_files.get_data_patterns(base)
        found = datasets.data_files.DataFilesDict.from_patterns(
            patterns, base_path=base, allowed_extensions=list(_READERS)
        )
    return {str(name): [Path(file) for file in files] for name, files in found.items()}


def _read_files(splits: Mapping[str, Sequence[Path]]) -> dict[str, datasets.Dataset]:
    """Reads files of one format by their splits."""
    by_ending = {file.suffix: file for files in splits.values() for file in files}
    if len({_READERS[ending] for ending in by_ending}) > 1:
        raise ValueError(f"data.path must hold files of one type, got {' and '.join(map(str, by_ending.values()))}")
    reader, read = _READERS[min(by_ending)], {}
    for name, files in splits.items():
        for file in files:
            if file.suffix != ".parquet":
                check_text(file)
        try:
            with _explained(str(files[0] if len(files) == 1 else files[0].parent)), _without_a_log():
                read[name] = reader([glob.escape(str(file)) for file in files], split=name)
        except ValueError:
            for file in files:
                if reader is datasets.Dataset.from_json:
                    check_json(file)
            raise
    return read


@contextlib.contextmanager
def _without_a_log() -> Iterator[None]:
    """Keeps `datasets` from logging an error that is raised too."""
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Says which data set could not be got or read."""
    try:
        yield
    except (StopIteration, IndexError) as error:  # from `datasets`, which expects none
        raise ValueError(f"cannot read {what}: a file or a split of it is empty") from error
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise FileNotFoundError(f"cannot get {what} from the Hub ({error}); set data.path to a copy of it") from error
    except (ValueError, OSError, RecursionError, datasets.exceptions.DatasetGenerationError) as error:
        reason, cache = system_error(error) or error.__cause__ or error, str(datasets.config.HF_DATASETS_CACHE)
        if isinstance(reason, OSError) and (reason.errno == errno.ENOSPC or cache in str(reason)):
            what = f"{what}, or write its copy to the cache {cache} (environment variable HF_DATASETS_CACHE)"
        raise ValueError(f"cannot read {what}: {reason}") from error


def split(
    source: Mapping[str, datasets.Dataset],
    *,
    train_examples: int | None,
    eval_examples: int | None,
    eval_split: str | None = None,
    seed: int,
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Draws the rows for training and for evaluation; no row is in both.

    Evaluation takes rows of the split `validation` where there is one, otherwise of `test`. Where there is neither,
    `eval_examples` rows are held out from training: which ones, the seed alone decides. Without training, where there
    is one split alone, it takes rows of that.

    Args:
        source: the splits of a data set.
        train_examples: largest number of rows for training; None for all, 0 for evaluation alone.
        eval_examples: largest number of rows for evaluation; None for all of a split of its own.
        eval_split: the split to evaluate on, instead.
        seed: decides which rows, and their order.

    Raises:
        ValueError: there is nothing to train on, or no such split to evaluate on.
    """
    rows = source["train"] if "train" in source else next(iter(source.values())) if len(source) == 1 else None
    alone = train_examples == 0
    if rows is None and alone:
        rows = next(iter(source.values())).select(())
    if rows is None:
        raise ValueError(f"a data set must have a split train, got {', '.join(source)}")
    train_order = np.random.default_rng((seed, 0)).permutation(len(rows))
    if eval_split is not None and (eval_split not in source or source[eval_split] is rows):
        others = ", ".join(name for name in source if source[name] is not rows) or "no other than that for training"
        raise ValueError(f"data.eval_split must be a split of the data ({others}), got {eval_split!r}")
    names = ("validation", "test") if eval_split is None else (eval_split,)
    own = next((source[name] for name in names if name in source and source[name] is not rows), None)
    if own is not None:
        eval_order = np.random.default_rng((seed, 1)).permutation(len(own))
        return rows.select(train_order[:train_examples]), own.select(eval_order[:eval_examples])
    if alone and len(source) == 1:
        return rows.select(()), rows.select(train_order[:eval_examples])
    if eval_examples is None or eval_examples >= len(rows):
        raise ValueError(
            f"data.eval_examples must be a number below that of the rows ({len(rows)}), as they have no evaluation "
            f"split of their own, got {eval_examples}"
        )
    held_out, rest = train_order[:eval_examples], train_order[eval_examples:]
    return rows.select(rest[:train_examples]), rows.select(held_out)
