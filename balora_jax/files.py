"""Files that are read and written whole: JSON that may hold anything, and writes that follow no link."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


def read_json(path: Path) -> Any:
    """Returns what a JSON file holds.

    Raises:
        ValueError: it is not JSON, not in UTF-8, or nested too deeply; the message names the file.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is JSON that is nested too deeply to be read") from error


@contextlib.contextmanager
def whole_file(path: Path, mode: str = "w") -> Iterator[IO]:
    """Opens a file for writing so that a kill, or a full disk, leaves either the old or the new one.

    It is written as `<name>.tmp` beside, and takes its name when the block ends without an error. Links that have one
    of the names are replaced, not followed.

    Args:
        path: the file.
        mode: `"w"` for text, `"wb"` for bytes.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with temporary.open(mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def system_error(error: BaseException) -> OSError | None:
    """Returns the error of the system (a full disk, a file that cannot be read) that is behind another."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause


def open_to_append(path: Path) -> IO[str]:
    """Opens a text file to add to its end, and makes it if it does not exist; raises `OSError` if it is a link."""
    no_follow = getattr(os, "O_NOFOLLOW", 0)  # not on Windows, where making a link needs the rights of an administrator
    return open(path, "a", encoding="utf-8", opener=lambda name, flags: os.open(name, flags | no_follow, 0o666))
