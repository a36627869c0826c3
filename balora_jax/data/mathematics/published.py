"""Reading the published files of the Mathematics dataset."""

import os
from collections.abc import Sequence
from pathlib import Path

from balora_jax.data.mathematics.generation import Example


def read_folder(
    path: str | os.PathLike[str],
    modules: Sequence[str],
    *,
    split: str | Sequence[str],
    limit: int | None = None,
) -> list[Example]:
    """Read examples from the published dataset, unpacked.

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
        ValueError: If a file has a question without an answer, or `limit` is negative.
    """
    if limit is not None and limit < 0:
        raise ValueError(f"`limit` must be None or at least 0, got {limit!r}")
    root = Path(path)
    splits = (split,) if isinstance(split, str) else tuple(split)
    names = (modules,) if isinstance(modules, str) else tuple(modules)
    _require_folder(root, root.parent)
    examples: list[Example] = []
    for part in splits:
        _require_folder(root / part, root)
        for name in names:
            examples.extend(_read_file(root / part / f"{name}.txt", name, limit))
    return examples


def _read_file(path: Path, module: str, limit: int | None) -> list[Example]:
    """Read the first `limit` examples of one file."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path} for module {module!r}; {_listing(path.parent)}")
    examples: list[Example] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if limit is not None and len(examples) >= limit:
                break
            if number % 2:
                question = line.rstrip("\r\n")
            else:
                examples.append(Example(module, question, line.rstrip("\r\n")))
        else:
            if number % 2:
                raise ValueError(f"{path}, line {number}: a question without an answer, as the lines are odd in number")
    return examples


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
