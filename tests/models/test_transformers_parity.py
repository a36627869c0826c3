"""The decoder against the library whose format it reads, on random tiny models."""

import json

import numpy as np
import pytest
from decoder_reference import CONFIGS, HEADS, LLAMA3, SIZES, random_decoder
from flax import nnx

from balora_jax.models.weights import load_decoder, save_decoder

REASON = "the comparison needs the original library, which is no dependency"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

SCALED = {"rope_type": "llama3", "rope_theta": 500.0, **vars(LLAMA3)}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
MODELS = {
    "llama": (transformers.LlamaConfig, {"rope_parameters": PLAIN, "rms_norm_eps": 1e-5}),
    "llama3": (transformers.LlamaConfig, {"rope_parameters": SCALED}),
    "qwen2": (transformers.Qwen2Config, {"rope_parameters": {**PLAIN, "rope_theta": 1e6}, "head_dim": 4}),
    "qwen3": (transformers.Qwen3Config, {"rope_parameters": {**PLAIN, "rope_theta": 1e6}}),
}
TOKENS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (3, 40))


def assert_same_logits(model, original):
    """Equality to 1e-5 of the largest logit, in float32."""
    with torch.no_grad():
        expected = original.eval()(torch.tensor(TOKENS)).logits.numpy()
    found = nnx.jit(lambda model: model(TOKENS))(model)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def random_original(name, *, tied):
    """A model of the original library all of whose parameters are random, so that no bias is zero and no norm one."""
    make, options = MODELS[name]
    model = transformers.AutoModelForCausalLM.from_config(
        make(**{**SIZES, **HEADS, **options}, tie_word_embeddings=tied, max_position_embeddings=512)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            size = 0.3 if parameter.ndim == 1 else 1.5 / parameter.shape[-1] ** 0.5
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator) + path.endswith("norm.weight"))
    return model


@pytest.mark.parametrize(("tied", "dtype"), [(False, "float32"), (True, "float32"), (True, "bfloat16")])
@pytest.mark.parametrize("name", MODELS)
def test_published_weights_give_the_published_logits(name, tied, dtype, tmp_path):
    random_original(name, tied=tied).to(getattr(torch, dtype)).save_pretrained(tmp_path)
    original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same_logits(load_decoder(tmp_path), original)


@pytest.mark.parametrize("older", [False, True])
def test_both_generations_of_the_config_file(older, tmp_path):
    original = random_original("llama3", tied=True)
    original.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    rope = fields.pop("rope_parameters", None) or {**fields.pop("rope_scaling"), "rope_theta": fields.pop("rope_theta")}
    if older:  # theta beside the scaling rather than in it
        fields |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    else:
        fields["rope_parameters"] = rope
    path.write_text(json.dumps(fields))
    assert_same_logits(load_decoder(tmp_path), original)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_original_library_reads_what_is_saved(config, tmp_path):
    model = random_decoder(config)
    save_decoder(model, tmp_path)
    original, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert {parameter.dtype for parameter in original.parameters()} == {torch.float32}
    assert_same_logits(model, original)
