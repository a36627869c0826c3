"""Folders that commands read and write: errors in one line, and outputs that appear as a whole or not at all."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError

from balora_jax.errors import ConfigError
from balora_jax.interruption import guarded


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns the errors of reading a file or a model into one of the command line.

    Args:
        what: the argument they are about.

    Raises:
        ConfigError: in the place of `ImportError`, `OSError`, `TypeError` and `ValueError`.
    """
    try:
        yield
    except ConfigError:
        raise
    except (ImportError, OSError, TypeError, ValueError) as error:
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
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with guarded(), tempfile.TemporaryDirectory(prefix=".balora-jax-", dir=out.parent) as place:
            temporary = Path(place) / "whole"
            temporary.mkdir()
            yield temporary
            for file in temporary.iterdir():  # safetensors makes files that the owner alone may read
                file.chmod(temporary.stat().st_mode & 0o666)
            temporary.replace(out)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise ConfigError(f"cannot write {out}: {reason or error}") from error


def check_runs(command: str, runs: Sequence[Path]) -> None:
    """Raises `ConfigError` if no run directories are given to a command, or one of them holds no run."""
    if not runs:
        raise ConfigError(f"{command} needs run directories: balora-jax {command} RUN ...")
    for folder in runs:
        if not (folder / "config.json").exists():
            raise ConfigError(f"{folder} must be the output of a finished run, but has no config.json")


def check_free(out: Path) -> None:
    """Raises `ConfigError` if `out` is there and not an empty folder; commands overwrite nothing."""
    try:
        if out.exists() and not out.is_dir():
            raise ConfigError(f"OUT must be a new folder, but {out} is a file")
        if out.is_dir() and any(out.iterdir()):
            raise ConfigError(f"OUT must be a new or an empty folder, but {out} holds files; choose another")
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}") from error


def check_holds(argument: str, folder: Path, file: str, kind: str) -> None:
    """Raises `ConfigError` if a folder lacks the file that makes it what a command takes, before anything is imported.

    Args:
        argument: of the command line that names the folder.
        folder: the folder.
        file: name of the file.
        kind: what the folder must be.
    """
    if not (folder / file).is_file():
        raise ConfigError(f"{argument}: {folder / file} does not exist; {argument.lstrip('-')} must be {kind}")


def check_peft(argument: str, folder: Path) -> None:
    """As `check_holds`, of a PEFT folder."""
    check_holds(argument, folder, "adapter_config.json", "a PEFT folder")


def copy_other_files(source: Path, target: Path) -> None:
    """Copies what a folder holds beside weights, subfolders and hidden files: tokenizer, configs, texts.

    Args:
        source: the folder.
        target: files that it has already are overwritten.

    Raises:
        ConfigError: a file is a link that leads out of the folder, see `copy_file`.
    """
    weights = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".msgpack")
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith(".") and not file.name.endswith(weights):
            copy_file(file, target)


def copy_file(file: Path, target: Path) -> None:
    """Copies a file into a folder.

    Args:
        file: the file.
        target: the folder; a file of this name that it has is overwritten.

    Raises:
        ConfigError: the file is a link that leads out of its folder. In the hub's cache, where files are links to
            blobs, it may lead to a blob of the same model.
    """
    if not file.resolve().is_relative_to(_home(file.parent.resolve())):
        raise ConfigError(f"{file} is a link to {file.resolve()}, outside of its folder; it is not copied")
    shutil.copyfile(file, target / file.name)


def _home(folder: Path) -> Path:
    """Where a folder's files may lie: in it, or for a snapshot in the hub's cache with those of its model."""
    model = folder.parent.parent
    return model if folder.parent.name == "snapshots" and model.name.startswith("models--") else folder
