"""What benchmarks leave, in the folder that `--record` names."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def add_record_flag(parser: argparse.ArgumentParser) -> None:
    """Adds `--record FOLDER`."""
    parser.add_argument("--record", type=Path, help="folder that gets what is measured")


def write(folder: Path | None, file: str, text: str) -> None:
    """Writes a file into the folder; nothing without a folder."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text + "\n")


def with_environment(rows: Sequence[Any]) -> str:
    """The text of a record: rows, and what they were measured on."""
    from balora_jax.training.records import environment  # imports JAX, which not every process here is to have

    return json.dumps({"environment": environment(), "rows": rows}, indent=1)
