"""PEFT folders against PEFT itself, on random tiny models: logits both ways."""

import jax
import numpy as np
import pytest
from flax import nnx

from balora_jax.adapters import (
    LORA,
    OLORA,
    PISSA,
    DoRALinear,
    LoRALinear,
    add_adapters,
    export_adapters,
    load_adapters,
    read_peft,
    remove_adapters,
    write_peft,
)
from balora_jax.models import Decoder, DecoderConfig
from balora_jax.models.weights import load_decoder, save_decoder

REASON = "the comparison needs the original library, which is no dependency"
torch = pytest.importorskip("torch", reason=REASON)
peft = pytest.importorskip("peft", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

MODEL = DecoderConfig(
    vocab_size=29,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    qkv_bias=True,
    tie_word_embeddings=False,
)
TOKENS = np.random.default_rng(0).integers(0, MODEL.vocab_size, (3, 20))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a random model, biases among its parameters."""
    folder = tmp_path_factory.mktemp("base")
    model = Decoder(MODEL, rngs=nnx.Rngs(0))
    key = jax.random.key(1)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if path[-1] == "bias":
            variable[...] = jax.random.normal(key, variable.shape)
    save_decoder(model, folder)
    return folder


def shaken(model):
    """The model, every trained parameter moved at random, so that every adapter has an effect."""
    key = jax.random.key(2)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        key, own = jax.random.split(key)
        variable[...] += 0.3 * jax.random.normal(own, variable.shape)
    return model


def logits(model):
    return np.asarray(nnx.jit(lambda model: model(TOKENS))(model))


def original_logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


def assert_same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def original(base):
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
@pytest.mark.parametrize(
    ("layer", "start"),
    [(LoRALinear, LORA), (DoRALinear, LORA), (LoRALinear, PISSA), (LoRALinear, OLORA), (DoRALinear, PISSA)],
)
def test_peft_loads_what_is_written(base, layer, start, scaling, tmp_path):
    model = load_decoder(base)
    options = {"alpha": 5.0, "scaling": scaling, "layer": layer, "initialisation": start}
    add_adapters(model, targets=["q_proj", "down_proj"], rank=3, rngs=nnx.Rngs(0), **options)
    add_adapters(model, targets=["v_proj", "lm_head"], rank=2, rngs=nnx.Rngs(1), **options)
    expected = logits(shaken(model))
    write_peft(export_adapters(model, scaling=scaling), tmp_path)
    plain = original(base)
    before = original_logits(plain)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path)
    assert loaded.peft_config["default"].use_rslora == (scaling == "rslora")
    assert np.abs(expected - before).max() > 0.1
    assert_same(original_logits(loaded), expected)


PEFT_CONFIGS = {
    "lora": {"target_modules": ["q_proj", "up_proj"]},
    "rslora": {"target_modules": ["o_proj", "gate_proj"], "use_rslora": True},
    "dora": {"target_modules": ["k_proj", "down_proj", "lm_head"], "use_dora": True},
    "patterns": {
        "target_modules": ["v_proj", "lm_head", "down_proj"],
        "rank_pattern": {"layers.1.self_attn.v_proj": 2, "lm_head": 5},
        "alpha_pattern": {"v_proj": 3, "layers.0.mlp.down_proj": 1},
    },
    "patterns_rslora": {
        "target_modules": ["q_proj"],
        "use_rslora": True,
        "rank_pattern": {"layers.0.self_attn.q_proj": 1},
    },
    "expression": {"target_modules": r".*\.[01]\.(self_attn|mlp)\.(k|up)_proj", "exclude_modules": ["up_proj"]},
    "some_layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "some_layers_dora": {
        "target_modules": ["q_proj"],
        "layers_to_transform": 1,
        "layers_pattern": "layers",
        "use_dora": True,
    },
    "all": {"target_modules": "all-linear"},
}


def adapted(base, **config):
    """A model of PEFT with random adapters."""
    options = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **config}
    model = peft.get_peft_model(original(base), peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("config", PEFT_CONFIGS.values(), ids=PEFT_CONFIGS.keys())
def test_what_peft_writes_is_loaded(base, config, tmp_path):
    model = adapted(base, **config)
    expected = original_logits(model)
    assert np.abs(expected - original_logits(original(base))).max() > 0.1
    model.save_pretrained(tmp_path)
    ours = load_decoder(base)
    load_adapters(ours, read_peft(tmp_path))
    assert_same(logits(ours), expected)
    write_peft(export_adapters(ours), tmp_path / "again")
    assert_same(original_logits(peft.PeftModel.from_pretrained(original(base), tmp_path / "again")), expected)
    remove_adapters(ours, merge=True)
    save_decoder(ours, tmp_path / "merged")
    assert_same(original_logits(original(tmp_path / "merged")), expected)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
)
def test_what_is_more_than_lora_is_refused_by_name(base, config, field, tmp_path):
    adapted(base, target_modules=["q_proj"], **config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"adapter_config.json: {field} must be"):
        load_adapters(load_decoder(base), read_peft(tmp_path))


def test_what_peft_converts_is_loaded(base, tmp_path):
    model = peft.get_peft_model(
        original(base),
        peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights="olora", task_type="CAUSAL_LM"),
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "olora"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.2)
    expected = original_logits(model)
    model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours = load_decoder(base)
    load_adapters(ours, read_peft(tmp_path / "out"))
    assert_same(logits(ours), expected)
