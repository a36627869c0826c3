"""Folders that commands read and write: errors in one line, and outputs that appear as a whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from balora_jax.training.config import ConfigError


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns the errors of reading a file or a model into one of the command line.

    Args:
        what: the argument they are about.

    Raises:
        ConfigError: in the place of `FileNotFoundError`, `ImportError`, `TypeError` and `ValueError`.
    """
    try:
        yield
    except ConfigError:
        raise
    except (FileNotFoundError, ImportError, TypeError, ValueError) as error:
        raise ConfigError(f"{what}: {error}") from error


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `out`, which takes its name if the block ends without an error.

    Args:
        out: does not exist, or is an empty folder.

    Raises:
        ConfigError: it is something else, or cannot be written.
    """
    check_free(out)
    out = out.resolve()
    temporary = out.parent / f".{out.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.iterdir():  # safetensors makes files that the owner alone may read
            file.chmod(temporary.stat().st_mode & 0o666)
        temporary.replace(out)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(out: Path) -> None:
    """Raises `ConfigError` if `out` is there and not an empty folder; commands overwrite nothing."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"OUT must be a new folder, but {out} is a file")
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"OUT must be a new or an empty folder, but {out} holds files; choose another")


def copy_other_files(source: Path, target: Path) -> None:
    """Copies what a folder holds beside weights, subfolders and hidden files: tokenizer, configs, texts.

    Args:
        source: the folder.
        target: files that it has already are overwritten.
    """
    weights = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".msgpack")
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith(".") and not file.name.endswith(weights):
            shutil.copyfile(file, target / file.name)
