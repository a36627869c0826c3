"""A model and a config small enough to train in a second."""

import dataclasses

import pytest
from flax import nnx

from balora_jax.data.recipes import DataSettings
from balora_jax.data.tokenizer import CharTokenizer
from balora_jax.models import Decoder, DecoderConfig
from balora_jax.models.weights import save_decoder
from balora_jax.training import AdapterSettings, Config, ModelSettings, TrainingSettings

TINY = DecoderConfig(
    vocab_size=CharTokenizer.vocab_size,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_decoder(Decoder(TINY, rngs=nnx.Rngs(0)), folder)
    return folder


@pytest.fixture(scope="session")
def config(model_folder):
    return Config(
        name="tiny",
        model=ModelSettings(path=str(model_folder)),
        adapter=AdapterSettings(rank=3, alpha=6.0),
        data=DataSettings(
            modules=("arithmetic__add_or_sub", "comparison__pair"), train_examples=60, eval_examples=10, length=48
        ),
        training=TrainingSettings(
            steps=6, batch_size=2, eval_every=3, checkpoint_every=2, eval_batch_size=4, log_every=1
        ),
    )


@pytest.fixture
def members(config):
    """Builds configs that differ from the tiny one in the given fields of its parts."""

    def build(**changes):
        parts = {}
        for name, value in changes.items():
            part, _, field = name.partition("__")
            if field:
                parts[part] = dataclasses.replace(parts.get(part, getattr(config, part)), **{field: value})
            else:
                parts[part] = value
        return dataclasses.replace(config, **parts)

    return build
