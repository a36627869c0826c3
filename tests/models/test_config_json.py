import dataclasses
import json

import jax
import numpy as np
import pytest
from decoder_reference import CONFIGS, SIZES
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from balora_jax.models import Decoder, DecoderConfig, RopeScaling
from balora_jax.models.config_json import _config, read_config, write_config
from balora_jax.models.decoder import rotary_frequencies

ABSENT = object()
PLAIN = {
    **SIZES,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
DEFAULT = {"rope_type": "default", "rope_theta": 500}
PLAIN_CONFIG = DecoderConfig(
    **SIZES, num_attention_heads=4, num_key_value_heads=4, head_dim=4, tie_word_embeddings=False
)


def write(folder, fields):
    content = {name: value for name, value in {**PLAIN, **fields}.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("fields", "changes"),
    [
        ({}, {}),  # what a config.json may leave out
        ({"head_dim": None, "rope_scaling": None, "sliding_window": 9}, {}),
        ({"num_key_value_heads": None}, {}),
        ({"num_key_value_heads": ABSENT}, {}),
        ({"model_type": "mistral", "sliding_window": None}, {}),
        ({"model_type": "mistral", "sliding_window": 7}, {"sliding_window": 7}),
        ({"model_type": "mistral"}, {"sliding_window": 4096}),
        (
            {"model_type": "mistral", "num_attention_heads": 8, "num_key_value_heads": ABSENT, "sliding_window": None},
            {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 2},
        ),
        ({"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": False}, {"qkv_bias": True}),
        ({"model_type": "qwen2", "layer_types": ["full_attention"] * 2}, {"qkv_bias": True}),
        ({"model_type": "qwen3"}, {"qk_norm": True, "head_dim": 128}),
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
    write(tmp_path, fields)
    assert read_config(tmp_path) == dataclasses.replace(PLAIN_CONFIG, **changes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, "model_type must be one of llama, mistral, qwen2, qwen3, got 'gpt2'"),
        ({"model_type": ABSENT}, "model_type must be one of .* got None"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"attention_bias": True}, "attention_bias must be False, got True"),
        ({"mlp_bias": True}, "mlp_bias must be False, got True"),
        (
            {"model_type": "mistral", "sliding_window": 0},
            "sliding_window must be None, or at least 1 and below 2.*, got 0",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]},
            r"layer_types must all be 'full_attention', got \['full_attention', 'sliding_attention'\]",
        ),
        ({"attention_dropout": 0.1}, "attention_dropout must be 0, got 0.1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1, got 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config must be None, got {'bits': 4}"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "auto_map must be None"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor must be"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1]}}, "mrope_section must be None"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "got some for full_attention"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window must be False, got True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling must be of type llama3 .* got 'linear'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling must be .* got 'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "must be .* got 'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling lacks the field low_freq_factor"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide"),
        ({"logits_scaling": 8.0}, "logits_scaling must be 1, got 8"),
        ({"embedding_multiplier": 12}, "embedding_multiplier must be 1, got 12"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping must be None, got 30"),
        ({"is_causal": False}, "is_causal must be True, got False"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers must be None"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers must be an integer, got '2'"),
        ({"vocab_size": 98.5}, "vocab_size must be an integer, got 98.5"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a number, got '1e-6'"),
        ({"rope_parameters": DEFAULT, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "llama3 or absent, got 'yarn'"),
        (
            {"rope_parameters": DEFAULT, "rope_scaling": {"type": "llama3", **SCALING}},
            "rope_scaling and rope_parameters must agree where both are there",
        ),
        ({"rope_theta": None}, "rope_theta must be a number, got None"),
        ({"rope_parameters": {**DEFAULT, "rope_theta": "5"}}, "rope_theta must be a number, got '5'"),
        ({"rope_parameters": [1]}, r"rope_parameters must be an object, got \[1\]"),
        ({"rope_scaling": {"rope_type": "llama3", **SCALING, "factor": "8"}}, "factor must be a number, got '8'"),
        ({"rope_theta": 0}, "rope_theta must be a positive number that float32 holds, got 0"),
        ({"rope_theta": -1e4}, "rope_theta must be a positive number that float32 holds, got -10000.0"),
        ({"rope_theta": float("nan")}, "rope_theta must be a positive number that float32 holds, got nan"),
        ({"rope_theta": 10**400}, "rope_theta must be a positive number that float32 holds, got 10+$"),
        ({"rope_theta": True}, "rope_theta must be a number, got True"),
        ({"rope_parameters": {**DEFAULT, "rope_theta": 0.0}}, r"rope_theta must be a positive number .*, got 0\.0"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be a positive number that float32 holds, got -1"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number that float32 holds, got 0"),
        ({"rms_norm_eps": 1e-60}, "rms_norm_eps must be a positive number that float32 holds, got 1e-60"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be a positive number that float32 holds, got inf"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, got 'false'"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings must be true or false, got 0"),
        ({"head_dim": 0}, "head_dim must be at least 1 and below 2.*, got 0"),
        ({"head_dim": True}, "head_dim must be an integer, got True"),
        ({"num_attention_heads": 0}, r"num_attention_heads must divide hidden_size \(16\) where there is no head_dim"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, r"must divide hidden_size \(16\) .*, got 3"),
        ({"num_attention_heads": 0, "head_dim": 4}, "num_attention_heads must be at least 1 and below 2.*, got 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be at least 1 and below 2.*, got 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be at least 1 and below 2.*, got -1"),
        ({"vocab_size": 2**40}, "vocab_size must be at least 1 and below 2.*, got 1099511627776"),
        ({"model_type": "mistral", "sliding_window": 2**31}, "sliding_window must be None, or at least 1"),
        ({"model_type": "mistral", "sliding_window": 9.5}, r"sliding_window must be an integer, got 9\.5"),
        ({"model_type": ["llama"]}, "model_type must be one of .* got \\['llama'\\]"),
        ({"layer_types": 3}, "layer_types must be a list, got 3"),
        ({"layer_types": [["full_attention"]]}, "layer_types must all be 'full_attention'"),
        *[
            ({"rope_scaling": {"rope_type": "llama3", **SCALING, **change}}, f"rope_scaling: {message}")
            for change, message in (
                ({"factor": 0}, "factor must be at least 1 and below 2.*, got 0"),
                ({"factor": float("nan")}, "factor must be at least 1 and below 2.*, got nan"),
                ({"low_freq_factor": -1.0}, "low_freq_factor must be at least 0 and below 2.*, got -1"),
                ({"high_freq_factor": 1.0}, r"high_freq_factor must be above low_freq_factor \(1.0\) .* got 1"),
                ({"original_max_position_embeddings": 0}, "original_max_position_embeddings must be at least 1"),
                ({"original_max_position_embeddings": 64.5}, "original_max_position_embeddings must be an integer"),
            )
        ],
        *[({name: ABSENT}, f"the field {name} is missing") for name in (*SIZES, "num_attention_heads", "rms_norm_eps")],
    ],
)
def test_unsupported_configs_are_refused(fields, message, tmp_path):
    write(tmp_path, fields)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


def test_a_broken_config_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ValueError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_config_file_that_holds_no_object_is_named(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json must hold a JSON object, got \[1\]"):
        read_config(tmp_path)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_what_is_written_is_read(config, tmp_path):
    write_config(config, tmp_path)
    assert read_config(tmp_path) == config


PUBLISHED = {  # what their config.json says, and their number of parameters
    "SmolLM2-135M": (
        '{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "hidden_act": "silu", '
        '"hidden_size": 576, "intermediate_size": 1536, "is_llama_config": true, "max_position_embeddings": 8192, '
        '"model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, '
        '"rms_norm_eps": 1e-05, "rope_interleaved": false, "rope_scaling": null, "rope_theta": 100000, '
        '"tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers.js_config": {"kv_cache_dtype": {}}, '
        '"use_cache": true, "vocab_size": 49152}',
        134_515_008,
    ),
    "Llama-3.2-1B": (
        '{"attention_bias": false, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, '
        '"intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama", '
        '"num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, '
        '"rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, '
        '"original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0, '
        '"tie_word_embeddings": true, "torch_dtype": "bfloat16", "vocab_size": 128256}',
        1_235_814_400,
    ),
    "Qwen2.5-3B": (
        '{"attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 11008, '
        '"max_window_layers": 36, "model_type": "qwen2", "num_attention_heads": 16, "num_hidden_layers": 36, '
        '"num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, '
        '"tie_word_embeddings": true, "use_mrope": false, "use_sliding_window": false, "vocab_size": 151936}',
        3_085_938_688,
    ),
    "Qwen3-0.6B": (
        '{"attention_bias": false, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, '
        '"intermediate_size": 3072, "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, '
        '"num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": null, '
        '"rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": true, "use_sliding_window": false, '
        '"vocab_size": 151936}',
        596_049_920,
    ),
    "Mistral-7B": (
        '{"hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "model_type": "mistral", '
        '"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, '
        '"rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": false, "vocab_size": 32000}',
        7_241_732_096,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_number_of_parameters(name, tmp_path):
    content, parameters = PUBLISHED[name]
    (tmp_path / "config.json").write_text(content)
    config = read_config(tmp_path)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) == parameters


NUMBERS = st.integers(-3, 9) | st.integers() | st.floats(allow_nan=True) | st.floats(0, 3)
ANYTHING = NUMBERS | st.none() | st.booleans() | st.sampled_from(["false", "2", "", [], [1], {}, {"factor": 2}])
READ = [*PLAIN, "head_dim", "rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "tie_word_embeddings"]
READ += ["layer_types", "hidden_act", "attention_bias", "use_sliding_window"]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]), st.dictionaries(st.sampled_from(READ), ANYTHING))
def test_any_config_is_one_that_works_or_is_refused_by_a_field(family, fields):
    fields = {**PLAIN, "model_type": family, **fields}
    scaling = fields.get("rope_scaling")
    if isinstance(scaling, dict) and scaling:
        fields["rope_scaling"] = {"rope_type": "llama3", **SCALING, **scaling}
    config, message = None, ""
    try:
        config = _config(fields)
    except ValueError as error:
        message = str(error)
    if config is None:
        assert any(name in message for name in fields), message
        return
    assert isinstance(config.tie_word_embeddings, bool)
    frequencies = np.asarray(rotary_frequencies(dataclasses.replace(config, head_dim=min(config.head_dim, 64))))
    assert np.isfinite(frequencies).all()
    assert np.float32(config.rms_norm_eps) > 0
