import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_reference import CONFIGS, SIZES, random_decoder
from flax import nnx
from safetensors.numpy import load_file, save_file

from balora_jax.adapters import add_adapters
from balora_jax.models import DecoderConfig, RopeScaling, weights
from balora_jax.models.weights import load_decoder, read_config, save_decoder

LLAMA = CONFIGS["llama"]
ABSENT = object()


def assert_same_parameters(found, expected):
    pairs = zip(*(nnx.to_flat_state(nnx.state(model)) for model in (found, expected)), strict=True)
    for (path, variable), (other_path, other) in pairs:
        assert (path, variable.dtype) == (other_path, other.dtype)
        np.testing.assert_array_equal(variable[...], other[...], err_msg=str(path))


def saved(folder, config=LLAMA, *, fields=None, tensors=None):
    """Writes a decoder to a folder, then changes fields of its config or tensors of its weights."""
    save_decoder(random_decoder(config), folder)
    for path, changes, read, write in (
        (folder / "config.json", fields, lambda p: json.loads(p.read_text()), lambda d, p: p.write_text(json.dumps(d))),
        (folder / "model.safetensors", tensors, load_file, save_file),
    ):
        if changes:
            content = {**read(path), **changes}
            write({name: value for name, value in content.items() if value is not ABSENT}, path)
    return folder


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_round_trip_is_exact(config, param_dtype, tmp_path):
    config = dataclasses.replace(config, param_dtype=param_dtype)
    model = random_decoder(config)
    save_decoder(model, tmp_path / "new" / "folder")
    again = load_decoder(tmp_path / "new" / "folder", param_dtype=param_dtype)
    assert again.config == config
    assert_same_parameters(again, model)


def test_a_loaded_decoder_runs(tmp_path):
    tokens = np.arange(6)[None]
    expected = nnx.jit(lambda model: model(tokens))(random_decoder(LLAMA))
    np.testing.assert_array_equal(nnx.jit(lambda model: model(tokens))(load_decoder(saved(tmp_path))), expected)


def test_dtypes_and_rematerialisation_are_chosen_at_loading(tmp_path):
    model = load_decoder(saved(tmp_path), dtype="bfloat16", param_dtype="bfloat16", remat=True)
    assert model.config == dataclasses.replace(LLAMA, dtype="bfloat16", param_dtype="bfloat16", remat=True)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("bfloat16")}
    wide = load_decoder(saved(tmp_path / "bfloat16", dataclasses.replace(LLAMA, param_dtype="bfloat16")))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(wide))} == {jnp.dtype("float32")}
    as_bfloat16 = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), nnx.state(wide))
    nnx.update(wide, as_bfloat16)
    assert_same_parameters(wide, model)


def test_tensors_have_the_published_names_and_layout(tmp_path):
    config = CONFIGS["qwen2"]
    model = random_decoder(config)
    save_decoder(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    block = {
        "input_layernorm.weight": (16,),
        "mlp.down_proj.weight": (16, 24),
        "mlp.gate_proj.weight": (24, 16),
        "mlp.up_proj.weight": (24, 16),
        "post_attention_layernorm.weight": (16,),
        "self_attn.k_proj.bias": (4,),
        "self_attn.k_proj.weight": (4, 16),
        "self_attn.o_proj.weight": (16, 16),
        "self_attn.q_proj.bias": (16,),
        "self_attn.q_proj.weight": (16, 16),
        "self_attn.v_proj.bias": (4,),
        "self_attn.v_proj.weight": (4, 16),
    }
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "model.embed_tokens.weight": (29, 16),
        "model.norm.weight": (16,),
        **{f"model.layers.{layer}.{name}": shape for layer in (0, 1) for name, shape in block.items()},
    }
    attention = model.layers.self_attn
    np.testing.assert_array_equal(tensors["model.layers.1.self_attn.q_proj.weight"], attention.q_proj.kernel[1].T)
    np.testing.assert_array_equal(tensors["model.layers.1.self_attn.q_proj.bias"], attention.q_proj.bias[1])
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], model.embed_tokens.embedding[...])


PLAIN = {
    **SIZES,
    "model_type": "llama",
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-6,
}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
PLAIN_CONFIG = DecoderConfig(
    **SIZES, num_attention_heads=4, num_key_value_heads=4, head_dim=4, tie_word_embeddings=False
)


@pytest.mark.parametrize(
    ("fields", "changes"),
    [
        ({}, {}),  # what a config.json may leave out
        ({"head_dim": None, "rope_scaling": None, "sliding_window": 9}, {}),
        ({"model_type": "mistral", "sliding_window": None}, {}),
        ({"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": False}, {"qkv_bias": True}),
        ({"model_type": "qwen3", "head_dim": 6}, {"qk_norm": True, "head_dim": 6}),
        ({"num_key_value_heads": 2}, {"num_key_value_heads": 2}),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
        ({"rope_theta": 500}, {"rope_theta": 500.0}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500}}, {"rope_theta": 500.0}),
        ({"rope_scaling": {"rope_type": "llama3", **SCALING}}, {"rope_scaling": RopeScaling(**SCALING)}),
        ({"rope_scaling": {"type": "llama3", **SCALING}}, {"rope_scaling": RopeScaling(**SCALING)}),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 7, **SCALING}},
            {"rope_scaling": RopeScaling(**SCALING), "rope_theta": 7.0},
        ),
    ],
)
def test_read_config(fields, changes, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**PLAIN, **fields}))
    assert read_config(tmp_path) == dataclasses.replace(PLAIN_CONFIG, **changes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, "model_type must be one of llama, mistral, qwen2, qwen3, got 'gpt2'"),
        ({"model_type": ABSENT}, "model_type must be one of .* got None"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"attention_bias": True}, "attention_bias must be False, got True"),
        ({"mlp_bias": True}, "mlp_bias must be False, got True"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window must be null, got 4096"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window must be False, got True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling must be of type llama3 .* got 'linear'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling must be .* got 'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "must be .* got 'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling lacks the field low_freq_factor"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide"),
        *[({name: ABSENT}, f"the field {name} is missing") for name in (*SIZES, "num_attention_heads", "rms_norm_eps")],
    ],
)
def test_unsupported_configs_are_refused(fields, message, tmp_path):
    content = {name: value for name, value in {**PLAIN, **fields}.items() if value is not ABSENT}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


def test_a_broken_config_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ValueError, match=r"config\.json"):
        read_config(tmp_path)


QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        ({}, {QUERY: ABSENT}, f"lacks the tensor {QUERY}"),
        ({}, {"lm_head.weight": ABSENT}, "lacks the tensor lm_head.weight"),
        ({"num_hidden_layers": 3}, {}, "lacks the tensor model.layers.2."),
        ({"model_type": "qwen2"}, {}, r"lacks the tensor model.layers.0.self_attn.\w_proj.bias"),
        ({}, {QUERY: np.zeros((16, 32), "f4")}, rf"{QUERY} must have shape \(32, 16\), got \(16, 32\)"),
        ({}, {"model.norm.weight": np.zeros(3, "f4")}, r"model.norm.weight must have shape \(16,\), got \(3,\)"),
        ({"vocab_size": 30}, {}, r"must have shape \(30, 16\), got \(29, 16\)"),
        # Tensors that the model would not use.
        ({}, {"model.layers.0.self_attn.q_proj.bias": np.ones(32, "f4")}, "model.layers.0.self_attn.q_proj.bias"),
        ({"num_hidden_layers": 1}, {}, "model.layers.1."),
    ],
)
def test_weights_that_do_not_fit_are_refused(fields, tensors, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_decoder(saved(tmp_path, fields=fields, tensors=tensors))


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_truncated_file_is_refused(kept, tmp_path):
    path = saved(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors is broken"):
        load_decoder(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(name, tmp_path):
    (saved(tmp_path) / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_decoder(tmp_path)


def test_shipped_models_go_by_name(tmp_path, monkeypatch):
    shipped = tmp_path / "shipped"
    for name, config in (("first", LLAMA), ("second", CONFIGS["qwen2"])):
        saved(shipped / name, config)
    monkeypatch.setattr(weights, "PRETRAINED", shipped)
    monkeypatch.chdir(tmp_path)
    assert load_decoder("second").config == CONFIGS["qwen2"]
    for absent in ("third", tmp_path / "third", shipped / "first" / "config.json"):
        with pytest.raises(FileNotFoundError, match=r"shipped model \(first, second\)"):
            load_decoder(absent)
    saved(tmp_path / "second", CONFIGS["qwen3"])
    assert load_decoder("second").config == CONFIGS["qwen3"]  # a folder of one's own goes first


def test_adapters_are_not_saved_as_weights(tmp_path):
    model = random_decoder(LLAMA)
    add_adapters(model, targets=["q_proj"], rank=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="adapters"):
        save_decoder(model, tmp_path)


def test_a_config_that_no_family_has_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="qk_norm"):
        save_decoder(random_decoder(dataclasses.replace(LLAMA, qkv_bias=True, qk_norm=True)), tmp_path)
