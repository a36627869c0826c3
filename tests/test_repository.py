"""The files around the package: configs, the shipped base, and results in the README."""

import runpy
import subprocess
import sys
from pathlib import Path

import chat_tokenizers
import datasets
import jax
import numpy as np
import published_rows
import pytest
from flax import nnx
from rich.console import Console

from balora_jax.commands.arguments import apply_overrides
from balora_jax.data import recipes
from balora_jax.data.batches import encode, pad
from balora_jax.data.tokenizer import CharTokenizer
from balora_jax.models import Decoder, DecoderConfig
from balora_jax.models.folders import PRETRAINED
from balora_jax.models.weights import load_decoder, save_decoder
from balora_jax.training import load_config, run
from balora_jax.training.config import expand
from balora_jax.training.step import token_losses

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))
SCRIPTS = sorted(file for file in (ROOT / "experiments").rglob("*.py") if "def main" in file.read_text())
SHRINK = (
    "--training.steps 2 --training.batch_size 2 --training.eval_every 2 --data.train_examples 100 "
    "--data.eval_examples 10 --optimizer.learning_rate 1e-3 --seed 0 --method balora --balance.least_ratio 0"
)

TINY = (  # of one shape, so that the step is compiled once
    "--adapter.rank 2 --adapter.alpha 4 --data.length 96 --training.accumulate 2 --training.max_new_tokens 4 "
    "--training.eval_batch_size 5"
)


@pytest.fixture(scope="module")
def tiny_qwen(tmp_path_factory):
    """A model folder with a tokenizer and a chat template."""
    pytest.importorskip("transformers", reason="the tokenizers of published models need the extra hf")
    folder = tmp_path_factory.mktemp("qwen")
    size = chat_tokenizers.write(folder, **chat_tokenizers.FAMILIES["qwen"])
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    shape = DecoderConfig(vocab_size=size, num_hidden_layers=1, head_dim=8, **sizes)
    save_decoder(Decoder(shape, rngs=nnx.Rngs(0)), folder)
    return folder


def published_files(recipe, folder):
    """Some rows of a published data set; the text files of DeepMind Mathematics."""
    if recipe != "dm_mathematics":
        return published_rows.write(folder / "rows.jsonl", [getattr(published_rows, recipe)(i) for i in range(60)])
    for split in ("train-easy", "train-medium", "train-hard", "interpolate"):
        (folder / split).mkdir()
        lines = [line for i in range(12) for line in (f"What is {i} plus {len(split)}?", str(i + len(split)))]
        (folder / split / "arithmetic__add_or_sub.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_config_runs_when_shrunk(file, tmp_path, request, monkeypatch):
    """The last BaLoRA of each config, for two steps; a published model and its data become tiny ones."""
    config, sweep = load_config(file)
    assert config.name == file.stem
    assert expand(config, sweep)
    flags = SHRINK.split()
    if config.model.path != "school-math":
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        _, picked = apply_overrides(config, sweep, ["--method", "balora"])
        recipe = expand(config, picked)[-1].data.recipe
        files = published_files(recipe, tmp_path)
        tiny = str(request.getfixturevalue("tiny_qwen"))
        flags += ["--model.path", tiny, "--data.path", str(files), *TINY.split()]
        flags += ["--data.tokenizer", tiny] if config.data.tokenizer else []
        flags += ["--data.eval-split", "None"] if config.data.eval_split else []  # the rows are one file
    config, sweep = apply_overrides(config, sweep, flags)
    last = expand(config, sweep)[-1]
    assert last.method == "balora"
    (row,) = run(last, {}, tmp_path / "out", Console(quiet=True))
    assert row["n"] == 1
    assert row["gap_mean"]["mean"] < 1e-5


def test_shipped_base_knows_its_easy_modules():
    settings = recipes.DataSettings(modules=("comparison__sort", "numbers__place_value"), eval_examples=60)
    splits = recipes.load(settings)
    encoded = encode(splits.evaluation, CharTokenizer(), max_length=128)
    arrays = pad(encoded, length=80, pad_id=CharTokenizer().pad_id).arrays()
    losses, mask = jax.jit(lambda: token_losses(load_decoder("school-math"), arrays))()
    assert np.sum(losses) / np.sum(mask) < 0.1


def test_shipped_files_are_small():
    assert sum(file.stat().st_size for file in PRETRAINED.rglob("*") if file.is_file()) < 8_000_000


def test_readme_shows_what_is_recorded():
    command = [sys.executable, str(ROOT / "experiments" / "update_readme.py"), "--check"]
    assert subprocess.run(command, check=False, timeout=60).returncode == 0


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
def test_experiment_finds_what_it_imports(file, monkeypatch):
    monkeypatch.syspath_prepend(file.parent)
    assert callable(runpy.run_path(str(file))["main"])
