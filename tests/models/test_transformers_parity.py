"""The decoder against the library whose format it reads, on random tiny models."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from decoder_reference import CONFIGS, HEADS, LLAMA3, SIZES, random_decoder
from flax import nnx

from balora_jax.adapters import add_adapters, iter_adapters
from balora_jax.models.generation import generate
from balora_jax.models.weights import load_decoder, save_decoder
from balora_jax.training.step import token_losses

REASON = "the comparison needs the original library, which is no dependency"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

SCALED = {"rope_type": "llama3", "rope_theta": 500.0, **vars(LLAMA3)}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
MODELS = {
    "llama": (transformers.LlamaConfig, {"rope_parameters": PLAIN, "rms_norm_eps": 1e-5}),
    "mistral": (transformers.MistralConfig, {"rope_parameters": PLAIN, "sliding_window": None}),
    "mistral, window": (transformers.MistralConfig, {"rope_parameters": PLAIN, "sliding_window": 7}),
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


def test_weights_in_several_files_as_the_original_library_writes_them(tmp_path):
    original = random_original("qwen2", tied=False)
    original.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_logits(load_decoder(tmp_path), original)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_adapters(name, tmp_path):
    """Of the masked cross-entropy, with the products added to the original's layers by hooks."""
    original = random_original(name, tied=True)
    original.save_pretrained(tmp_path)
    model = load_decoder(tmp_path)
    targets = [f"{kind}_proj" for kind in ("q", "k", "v", "o", "gate", "up", "down")]
    add_adapters(model, targets=targets, rank=2, alpha=3.0, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    factors = {}
    for path, adapter in iter_adapters(model):
        for factor in (adapter.lora_a, adapter.lora_b):
            factor[...] = jnp.asarray(0.3 * rng.standard_normal(factor.shape), jnp.float32)
        pair = np.array(adapter.lora_a[...]), np.array(adapter.lora_b[...])
        factors[path] = [torch.tensor(factor, requires_grad=True) for factor in pair]
        for layer, original_layer in enumerate(original.model.layers):
            a, b = (factor[layer] for factor in factors[path])
            linear = original_layer.get_submodule(path.removeprefix("layers."))
            linear.register_forward_hook(lambda _, x, y, a=a, b=b: y + 1.5 * x[0] @ a @ b)
    mask = rng.random(TOKENS.shape) < 0.5
    batch = {
        "tokens": TOKENS,
        "positions": np.broadcast_to(np.arange(TOKENS.shape[1]), TOKENS.shape),
        "segment_ids": np.ones_like(TOKENS),
        "loss_mask": mask,
    }
    labels = torch.tensor(np.where(mask, TOKENS, -100))
    original(torch.tensor(TOKENS), labels=labels).loss.backward()

    def loss(model):
        losses, mask = token_losses(model, batch)
        return losses.sum() / mask.sum()

    grads = nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam)))(model)
    grads = dict(nnx.to_flat_state(grads))
    for path, pair in factors.items():
        for factor, expected in zip(("lora_a", "lora_b"), pair, strict=True):
            expected = expected.grad.numpy()
            found = grads[*path.split("."), factor][...]
            atol = 1e-4 * np.abs(expected).max()
            np.testing.assert_allclose(found, expected, rtol=0, atol=atol, err_msg=f"{path} {factor}")


@pytest.mark.parametrize("name", MODELS)
def test_greedy_generation(name, tmp_path):
    """From a cache, of prompts of different lengths, until the end of each text."""
    original = random_original(name, tied=False).eval()
    original.save_pretrained(tmp_path)
    lengths, new_tokens = (12, 5, 1), 20
    prompts, kept = np.zeros((3, 12), int), np.zeros((3, 12), int)
    for row, length in enumerate(lengths):
        prompts[row, 12 - length :], kept[row, 12 - length :] = TOKENS[row, :length], 1
    options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        free = original.generate(
            torch.tensor(prompts), attention_mask=torch.tensor(kept), eos_token_id=None, **options
        ).numpy()[:, 12:]
        eos = int(free[0, 6])  # some token that ends a text
        expected = original.generate(
            torch.tensor(prompts), attention_mask=torch.tensor(kept), eos_token_id=eos, **options
        ).numpy()[:, 12:]
    generated = nnx.jit(lambda model: generate(model, prompts, kept, new_tokens=new_tokens, eos_id=eos))
    found = np.asarray(generated(load_decoder(tmp_path)))
    for row, tokens in zip(found, expected, strict=True):
        ended = np.append(np.flatnonzero(tokens == eos), len(tokens))[0] + 1
        np.testing.assert_array_equal(row[:ended], tokens[:ended])
        assert (row[ended:] == eos).all()


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
