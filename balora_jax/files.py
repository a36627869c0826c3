"""Files that are read and written whole: JSON that may hold anything, and writes that follow no link."""

import contextlib
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

MOST_NESTED = 100
"""How deep JSON may be nested: readers and writers of it call themselves for every level."""

NOT_FINITE = ("nan", "inf", "-inf")
"""Texts in records, in the place of the numbers that JSON lacks."""

_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_OTHERS = re.compile(r"[^\[\]{}]+")


def read_json(path: Path) -> Any:
    """Returns what a JSON file holds.

    Raises:
        ValueError: it is not JSON, not in UTF-8, or nested too deeply; the message names the file.
    """
    content = path.read_bytes()
    try:
        text = content.decode(json.detect_encoding(content))
        if not is_nested_too_deeply(text):
            return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    raise ValueError(f"{path} must be JSON that is nested at most {MOST_NESTED} deep")


def read_object(path: Path) -> dict[str, Any]:
    """As `read_json`, of a file that holds an object; raises `ValueError` if it holds something else."""
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object, got {fields!r:.80}")
    return fields


def is_number(value: Any) -> bool:
    """Whether a value of a record is a number, or the text in the place of one that JSON lacks."""
    return isinstance(value, int | float) or value in NOT_FINITE


def is_nested_too_deeply(text: str) -> bool:
    """Whether JSON is nested more than `MOST_NESTED` deep."""
    if text.count("[") + text.count("{") <= MOST_NESTED:
        return False
    brackets = _OTHERS.sub("", _STRING.sub("", text))
    depths = itertools.accumulate(1 if bracket in "[{" else -1 for bracket in brackets)
    return max(depths, default=0) > MOST_NESTED


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
