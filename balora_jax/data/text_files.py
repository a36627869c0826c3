"""Text files of data: what readers would crash at, looked for before, and what they failed at, by its line."""

import json
from collections.abc import Iterator
from pathlib import Path

from balora_jax.files import MOST_NESTED, is_nested_too_deeply, read_json


def check_text(file: Path) -> None:
    """Raises `ValueError` at a line that is not in UTF-8, or so nested that readers of JSON crash.

    Args:
        file: of CSV or JSON.
    """
    for number, line in lines(file):
        if file.suffix != ".csv" and is_nested_too_deeply(line):
            raise ValueError(f"{file}, line {number} must be nested at most {MOST_NESTED} deep")


def check_json(file: Path) -> None:
    """Raises `ValueError` at what is wrong in a file of JSON, one list or a row in each line, that cannot be read."""
    if _is_list(file):
        read_json(file)
    else:
        for number, line in lines(file):
            if line.strip():
                _check_row(line, f"{file}, line {number}")


def lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yields the lines of a text file with their numbers; raises `ValueError` at one that is not in UTF-8."""
    with file.open("rb") as content:
        for number, line in enumerate(content, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}, line {number} must be text in UTF-8: {error}") from error


def _is_list(file: Path) -> bool:
    with file.open("rb") as content:
        return content.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _check_row(line: str, where: str) -> None:
    try:
        row = json.loads(line)
        if r"\ud" in line.lower():
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} must hold texts, but half of a pair of surrogates is none: {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg} (character {error.pos + 1})") from error
    except ValueError as error:  # a number of many thousand digits
        raise ValueError(f"{where} is JSON that cannot be read: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be an object of columns, got {line.strip():.80}")
