"""The files around the package: configs, the shipped base, and results in the README."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from balora_jax.cli import apply_overrides
from balora_jax.data import recipes
from balora_jax.data.batches import encode, pad
from balora_jax.data.tokenizer import CharTokenizer
from balora_jax.models.folders import PRETRAINED
from balora_jax.models.weights import load_decoder
from balora_jax.training import load_config, run
from balora_jax.training.config import expand
from balora_jax.training.step import token_losses

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
SCRIPTS = sorted(file for file in (ROOT / "experiments").rglob("*.py") if "def main" in file.read_text())
SHRINK = (
    "--training.steps 2 --training.batch_size 2 --training.eval_every 2 --data.train_examples 100 "
    "--data.eval_examples 10 --optimizer.learning_rate 1e-3 --seed 0 --method balora"
)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_config_runs_when_shrunk(file, tmp_path):
    config, sweep = load_config(file)
    assert config.name == file.stem
    assert expand(config, sweep)
    config, sweep, _ = apply_overrides(config, sweep, SHRINK.split())
    last = expand(config, sweep)[-1]
    (row,) = run(last, {}, tmp_path / "out", Console(quiet=True))
    assert row["n"] == 1
    assert row["gap_mean"]["mean"] < 1e-5


def test_shipped_base_knows_its_easy_modules():
    settings = recipes.DataSettings(modules=("comparison__sort", "numbers__place_value"), eval_examples=60)
    splits = recipes.load(settings)
    encoded = encode(splits.evaluation, CharTokenizer(), max_length=128)
    arrays = pad(encoded, length=80, pad_id=CharTokenizer().pad_id)
    losses, mask = jax.jit(lambda: token_losses(load_decoder("school-math"), arrays))()
    assert np.sum(losses) / np.sum(mask) < 0.1


def test_shipped_files_are_small():
    assert sum(file.stat().st_size for file in PRETRAINED.rglob("*") if file.is_file()) < 8_000_000


def test_readme_shows_what_is_recorded():
    command = [sys.executable, str(ROOT / "experiments" / "update_readme.py"), "--check"]
    assert subprocess.run(command, check=False, timeout=60).returncode == 0


def test_readme_example_of_the_geometry_prints_what_it_says(capsys):
    section = (ROOT / "README.md").read_text().split("## Studying the geometry")[1]
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1), {})
    assert [line[:5] for line in capsys.readouterr().out.splitlines()[1:]] == ["24.45", "24.45"]


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
def test_experiment_finds_what_it_imports(file, monkeypatch):
    monkeypatch.syspath_prepend(file.parent)
    assert callable(runpy.run_path(str(file))["main"])
