"""A tiny model, a finished run on it, and its adapter as a PEFT folder."""

import json

import pytest
from flax import nnx

from balora_jax.cli import main
from balora_jax.data.tokenizer import CharTokenizer
from balora_jax.models import Decoder, DecoderConfig
from balora_jax.models.weights import save_decoder

TINY = DecoderConfig(
    vocab_size=CharTokenizer.vocab_size,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)
SCRIPT = """
from balora_jax.training import (
    AdapterSettings, Config, DataSettings, ModelSettings, OptimizerSettings, TrainingSettings
)

config = Config(
    name="tiny",
    model=ModelSettings(path={path!r}),
    adapter=AdapterSettings(rank=3, alpha=6.0),
    optimizer=OptimizerSettings(learning_rate=3e-2),
    data=DataSettings(modules=("arithmetic__add_or_sub", "comparison__pair"), train_examples=60, eval_examples=10),
    training=TrainingSettings(steps=2, batch_size=2, eval_every=2, checkpoint_every=2, eval_batch_size=10),
)
"""


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_decoder(Decoder(TINY, rngs=nnx.Rngs(0)), folder)
    return folder


@pytest.fixture(scope="session")
def config_file(model_folder, tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "tiny.py"
    file.write_text(SCRIPT.format(path=str(model_folder)))
    return file


@pytest.fixture(scope="session")
def run(config_file, tmp_path_factory):
    """A run with two seeds."""
    file, folder = config_file.with_name("sweep.py"), tmp_path_factory.mktemp("runs") / "tiny"
    file.write_text(config_file.read_text() + "sweep = {'seed': (0, 1)}\n")
    assert main(["run", str(file), "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def adapter(run, tmp_path_factory):
    """The PEFT folder of one member, with a file of its own beside."""
    folder = tmp_path_factory.mktemp("exported") / "lora"
    assert main(["export", str(run), str(folder), "--member", "lora-seed=1"]) == 0
    (folder / "README.md").write_text("mine\n")
    return folder


@pytest.fixture(scope="session")
def records(run):
    """The records of the run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def fails(capsys):
    """Calls the command line, which must print one line and return 2; gives the line."""

    def call(*arguments):
        assert main([str(argument) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        assert not out
        assert err.count("\n") == 1
        assert err.startswith("balora-jax: error: ")
        return err

    return call
