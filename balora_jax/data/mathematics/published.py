"""Reading the published files of the Mathematics dataset."""

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from balora_jax.data.mathematics.generation import Example
from balora_jax.data.text_files import lines


def read_folder(
    path: str | os.PathLike[str],
    modules: Sequence[str],
    *,
    split: str | Sequence[str],
    limit: int | None = None,
) -> Iterator[Example]:
    """Read examples from the published dataset, unpacked, file after file as they are asked for.

    The folder holds one sub-folder per split, such as `train-easy`, `train-medium`, `train-hard`,
    `interpolate` and `extrapolate`, each with a file `<module>.txt` of alternating lines of questions and
    answers.

    Args:
        path: The folder.
        modules: Names of modules, which need not be ones that `generate` knows.
        split: One or more names of sub-folders.
        limit: Largest number of examples to read from each file, or None for all.

    Returns:
        The examples of all modules and splits, one file after the other.

    Raises:
        FileNotFoundError: If the folder, a sub-folder or the file of a module is missing.
        ValueError: If `limit` is negative, or, when it is reached, a file has a question without an answer.
    """
    files = list_files(path, modules, split=split)
    if limit is not None and limit < 0:
        raise ValueError(f"`limit` must be None or at least 0, got {limit!r}")
    return (example for file in files for example in read_file(file, limit))


def list_files(path: str | os.PathLike[str], modules: Sequence[str], *, split: str | Sequence[str]) -> list[Path]:
    """List the files that `read_folder` reads, in its order; arguments and errors are the same."""
    root = Path(path)
    splits = (split,) if isinstance(split, str) else tuple(split)
    names = (modules,) if isinstance(modules, str) else tuple(modules)
    _require_folder(root, root.parent)
    files = []
    for part in splits:
        _require_folder(root / part, root)
        for name in names:
            file = root / part / f"{name}.txt"
            if not file.is_file():
                raise FileNotFoundError(f"no file {file} for module {name!r}; {_listing(file.parent)}")
            files.append(file)
    return files


def read_file(path: Path, limit: int | None) -> Iterator[Example]:
    """Read the first `limit` examples of one file, or all; the errors are those of `read_folder`."""
    texts = (line.rstrip("\r\n") for _, line in lines(path))
    for number in itertools.count() if limit is None else range(limit):
        question, answer = next(texts, None), next(texts, None)
        if question is None:
            return
        if answer is None:
            raise ValueError(
                f"{path}, line {2 * number + 1}: a question without an answer, as the lines are odd in number"
            )
        yield Example(path.stem, question, answer)


def _require_folder(folder: Path, parent: Path) -> None:
    """Raise where a folder is missing, and say what its parent holds."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; {_listing(parent)}")


def _listing(folder: Path) -> str:
    """Say what a folder holds, in words."""
    if not folder.is_dir():
        return f"{folder} does not exist either"
    names = sorted(item.name for item in folder.iterdir())
    return f"{folder} holds {', '.join(names)}" if names else f"{folder} is empty"
