"""PEFT folders: names and layouts, round trips through a decoder, and adapters that are refused by name."""

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from balora_jax.adapters import (
    ADALORA,
    LORA,
    PISSA,
    AdaLoRALinear,
    DoRALinear,
    FullLinear,
    LoRALinear,
    PeftAdapter,
    PeftModule,
    add_adapters,
    export_adapters,
    iter_adapters,
    load_adapters,
    read_peft,
    write_peft,
)
from balora_jax.adapters.peft import from_modules
from balora_jax.models import Decoder, DecoderConfig

SIZES = {"vocab_size": 29, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
CONFIG = DecoderConfig(**SIZES, num_attention_heads=2, num_key_value_heads=1, head_dim=8, tie_word_embeddings=False)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 9))


STRUCTURE, STATE = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(0)))


def decoder():
    """A fresh model, always with the same parameters."""
    return nnx.merge(STRUCTURE, STATE, copy=True)


def logits(model):
    return nnx.jit(lambda model: model(TOKENS))(model)


def adapted(**options):
    """A decoder with adapters that all have an effect."""
    model = decoder()
    options = {"targets": ["k_proj", "down_proj"], "rank": 3, "alpha": 4.0, **options}
    add_adapters(model, **options, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(1)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        moved = np.asarray(variable[...]) + 0.3 * rng.standard_normal(variable.shape)
        variable.set_value(jnp.asarray(moved, jnp.float32))
    return model


@pytest.fixture
def folder(tmp_path):
    write_peft(export_adapters(adapted()), tmp_path)
    return tmp_path


def test_names_and_layout_of_the_files(tmp_path):
    model = adapted(targets=["k_proj", "lm_head"], layer=DoRALinear, scaling="rslora", dropout=0.25)
    write_peft(export_adapters(model, scaling="rslora", base="org/name"), tmp_path)
    tensors, adapters = load_file(tmp_path / "adapter_model.safetensors"), dict(iter_adapters(model))
    modules = [f"model.layers.{n}.self_attn.k_proj" for n in range(3)] + ["lm_head"]
    parts = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    assert set(tensors) == {f"base_model.model.{module}.{part}" for module in modules for part in parts}
    k_proj = adapters["layers.self_attn.k_proj"]
    prefix = "base_model.model.model.layers.2.self_attn.k_proj"
    np.testing.assert_array_equal(tensors[f"{prefix}.lora_A.weight"], k_proj.lora_a[2].T)
    np.testing.assert_array_equal(tensors[f"{prefix}.lora_B.weight"], k_proj.lora_b[2].T)
    np.testing.assert_array_equal(tensors[f"{prefix}.lora_magnitude_vector"], k_proj.magnitude[2])
    assert tensors["base_model.model.lm_head.lora_A.weight"].shape == (3, 16)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/name",
        "r": 3,
        "lora_alpha": 4,
        "lora_dropout": 0.25,
        "target_modules": ["k_proj", "lm_head"],
        "bias": "none",
        "use_rslora": True,
        "use_dora": True,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    assert expected.items() <= config.items()


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
@pytest.mark.parametrize(("layer", "start"), [(LoRALinear, LORA), (DoRALinear, LORA), (LoRALinear, PISSA)])
def test_round_trip_keeps_the_logits(layer, start, scaling, tmp_path):
    model = adapted(layer=layer, initialisation=start, scaling=scaling)
    written = export_adapters(model, scaling=scaling)
    write_peft(written, tmp_path)
    again = decoder()
    assert set(load_adapters(again, read_peft(tmp_path))) == {path for path, _ in iter_adapters(model)}
    np.testing.assert_allclose(logits(again), logits(model), rtol=0, atol=1e-5)
    assert {type(adapter) for _, adapter in iter_adapters(again)} == {layer}
    rewritten = export_adapters(again, scaling=scaling)
    assert rewritten.config == written.config
    assert written.config["r"] == (3 if start is LORA else 6)
    for name, tensor in written.tensors.items():
        np.testing.assert_array_equal(rewritten.tensors[name], tensor)


def test_factors_that_are_not_finite_are_not_written(tmp_path):
    model = adapted()
    factor = dict(iter_adapters(model))["layers.mlp.down_proj"].lora_b
    factor[...] = factor[...].at[1, 0, 0].set(jnp.inf)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.lora_B\.weight must be finite to be written"):
        write_peft(export_adapters(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ranks_and_scales_that_differ_between_stacked_layers_are_exact():
    rng = np.random.default_rng(0)
    modules = {
        f"model.layers.{layer}.mlp.up_proj": PeftModule(
            rng.standard_normal((16, rank)).astype(np.float32),
            rng.standard_normal((rank, 24)).astype(np.float32),
            scale,
        )
        for layer, rank, scale in ((0, 2, 1.5), (1, 2, 1.5), (2, 5, 0.3))
    }
    adapter = from_modules(modules)
    assert (adapter.config["r"], adapter.config["lora_alpha"]) == (2, 3)
    assert adapter.config["rank_pattern"] == {"model.layers.2.mlp.up_proj": 5}
    assert adapter.config["alpha_pattern"] == {"model.layers.2.mlp.up_proj": 1.5}
    model = decoder()
    load_adapters(model, adapter)
    ((_, wrapped),) = iter_adapters(model)
    for layer, low_rank in enumerate(modules.values()):
        np.testing.assert_allclose(
            wrapped.weight_update()[layer], low_rank.scale * low_rank.lora_a @ low_rank.lora_b, atol=1e-5
        )
    again = export_adapters(model)
    assert again.config == adapter.config
    assert all((again.tensors[name] == tensor).all() for name, tensor in adapter.tensors.items())


def test_layers_that_are_left_out_stay_without_effect():
    written = export_adapters(adapted(targets=["up_proj"], layer=DoRALinear))
    tensors = {name: tensor for name, tensor in written.tensors.items() if ".1." not in name}
    model = decoder()
    load_adapters(model, PeftAdapter({**written.config, "layers_to_transform": [0, 2]}, tensors))
    ((_, wrapped),) = iter_adapters(model)
    norms = np.abs(wrapped.weight_update()).max((1, 2))
    assert norms[1] < 1e-6 < 1e-2 < norms[[0, 2]].min()


def test_half_precision_tensors_are_read():
    written = export_adapters(adapted())
    half = PeftAdapter(written.config, {name: tensor.astype(np.float16) for name, tensor in written.tensors.items()})
    model = decoder()
    load_adapters(model, half)
    assert {variable.dtype.name for _, variable in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))} == {"float32"}
    np.testing.assert_allclose(logits(model), logits(adapted()), atol=1e-2)


def test_copies_of_embeddings_must_be_those_of_the_model():
    model = adapted(targets=["lm_head"])
    written = export_adapters(model)
    name, kernel = "base_model.model.lm_head.base_layer.weight", np.asarray(decoder().lm_head.kernel[...].T)
    again = decoder()
    load_adapters(again, PeftAdapter(written.config, {**written.tensors, name: kernel}))
    np.testing.assert_allclose(logits(again), logits(model), atol=1e-6)
    rounded = np.asarray(jnp.asarray(kernel, jnp.bfloat16))  # as PEFT saves a model that it held in bfloat16
    load_adapters(decoder(), PeftAdapter(written.config, {**written.tensors, name: rounded}))
    with pytest.raises(ValueError, match=f"{name} must be the model's own"):
        load_adapters(decoder(), PeftAdapter(written.config, {**written.tensors, name: 2 * kernel}))


UP = "base_model.model.model.layers.0.mlp.down_proj"


def without(field):
    return lambda config, tensors: config.pop(field)


def with_field(**fields):
    return lambda config, tensors: config.update(fields)


def with_tensor(name, shape):
    return lambda config, tensors: tensors.update({name: np.zeros(shape, np.float32)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_field(peft_type="LOHA"), "peft_type must be 'LORA', got 'LOHA'"),
        (without("peft_type"), "peft_type must be 'LORA', got None"),
        (with_field(bias="all"), "bias must be 'none', got 'all'"),
        (with_field(modules_to_save=["lm_head"]), r"modules_to_save must be None or False, got \['lm_head'\]"),
        (with_field(fan_in_fan_out=True), "fan_in_fan_out must be False, got True"),
        (with_field(target_parameters=["x"]), "target_parameters must be"),
        (with_field(init_lora_weights="pissa"), "init_lora_weights .*path_initial_model_for_weight_conversion"),
        (without("lora_alpha"), "lacks the field lora_alpha"),
        (without("r"), "lacks the field r,"),
        (with_field(lora_alpha="16"), "lora_alpha must be a number, got '16'"),
        (with_field(alpha_pattern={"down_proj": None}), r"alpha_pattern\['down_proj'\] must be a number, got None"),
        (with_field(rank_pattern=[["down_proj", 2]]), r"rank_pattern must be an object, got \[\["),
        (with_field(alpha_pattern={"(up": 2}), r"alpha_pattern: '\(up' is no regular expression"),
        (with_field(target_modules=3), "target_modules must be a regular expression or a list of names, got 3"),
        (with_field(target_modules=["up_proj", 3]), "target_modules must be a regular expression or a list of names"),
        (with_field(target_modules="*up"), "target_modules: .* is no regular expression"),
        (with_field(exclude_modules="(q"), "exclude_modules: .* is no regular expression"),
        (with_field(layers_to_transform=["1"]), "layers_to_transform must be a layer's number or a list of them"),
        (with_field(layers_to_transform=0, layers_pattern=["("]), "layers_pattern: .* is no regular expression"),
        (with_field(r=0), "the rank of .* must be a positive integer, got 0"),
        (with_field(r=4), r"down_proj.lora_A.weight must have shape \(4, in\), got \(3, 24\)"),
        (with_field(rank_pattern={"mlp.down_proj": 2}), r"down_proj.lora_A.weight must have shape \(2, in\)"),
        (with_field(use_dora=True), "lacks the tensor .*lora_magnitude_vector"),
        (with_tensor(f"{UP}.lora_magnitude_vector", 16), "does not set use_dora"),
        (with_tensor(f"{UP}.lora_B.bias", 16), f"holds the tensor {UP}.lora_B.bias, which is not a factor"),
        (with_tensor("a.lora_A.weight", (3, 2)), "holds the tensor a.lora_A.weight, which is not a factor"),
        (with_tensor(f"{UP}.lora_A.weight", (3, 16)), rf"{UP}.lora_A.weight must have shape \(3, 24\) for this model"),
        (with_tensor(f"{UP}.lora_B.weight", (24, 3)), rf"{UP}.lora_B.weight must have shape \(16, 3\) for this model"),
        (lambda config, tensors: tensors.pop(f"{UP}.lora_B.weight"), f"lacks the tensor {UP}.lora_B.weight"),
        (
            lambda config, tensors: [tensors.pop(f"{UP}.lora_{side}.weight") for side in "AB"],
            f"lacks the tensor {UP}.lora_A.weight, which target_modules asks for",
        ),
        (with_field(use_rslora="false"), "use_rslora must be true or false, got 'false'"),
        (with_field(use_dora=1), "use_dora must be true or false, got 1"),
        (without("target_modules"), "target_modules must name the modules, got None"),
        (with_field(target_modules=["k_proj"]), f"holds the tensor {UP}.lora_A.weight, but target_modules"),
        (with_field(layers_to_transform=[1, 2]), "holds the tensor .*layers.0.*layers_to_transform leave it out"),
        (
            lambda config, tensors: [
                tensors.update({f"{UP.replace('0', '3')}.lora_{side}.weight": tensors[f"{UP}.lora_{side}.weight"]})
                for side in "AB"
            ],
            r"layers\.3\.mlp.*matches no linear layer of the model; the nearest is model\.layers\.\d\.mlp\.down_proj",
        ),
        (lambda config, tensors: tensors.clear(), "holds no tensors"),
        (with_tensor(f"{UP}.lora_A.weight", (0, 24)), f"{UP}.lora_A.weight must have entries, got the shape"),
        (
            lambda config, tensors: tensors[f"{UP}.lora_B.weight"].fill(np.inf),
            f"{UP}.lora_B.weight must be finite, got a NaN or an infinity",
        ),
    ],
)
def test_adapter_that_cannot_be_read_is_refused_by_name(folder, change, message):
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    change(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    model = decoder()
    with pytest.raises(ValueError, match=message):
        load_adapters(model, read_peft(folder))
    assert not list(iter_adapters(model))


@pytest.mark.parametrize(
    ("alpha", "factor", "message"),
    [
        (1e300, 1.0, r"the scale of model\.layers\.0\.mlp\.down_proj holds 3\.\d*e\+299, .*; look at lora_alpha and r"),
        (10**400, 1.0, r"adapter_config\.json: lora_alpha must be a number, got 10+$"),
        (
            4.0,
            1e40,
            r"the tensor base_model\.model\.model\.layers\.0\.mlp\.down_proj\.lora_A\.weight holds -?\d.*float32",
        ),
    ],
)
def test_numbers_beyond_float32_are_refused(folder, alpha, factor, message):
    adapter = read_peft(folder)
    tensors = {name: tensor.astype(float) * factor for name, tensor in adapter.tensors.items()}
    model = decoder()
    with pytest.raises(ValueError, match=message):
        load_adapters(model, replace(adapter, config={**adapter.config, "lora_alpha": alpha}, tensors=tensors))
    assert not list(iter_adapters(model))


@pytest.mark.parametrize("name", ["target_parameters", "use_bdlora", "kasa_config"])
def test_what_is_no_plain_pair_is_not_taken_for_one(folder, name):
    adapter = read_peft(folder)
    assert adapter.pairs()
    with pytest.raises(ValueError, match=f"{name} must not be set"):
        replace(adapter, config={**adapter.config, name: {"beta": 1e-4}}).pairs()


def test_tensors_of_whole_modules_stay_as_they_are(folder, tmp_path):
    tensors = load_file(folder / "adapter_model.safetensors")
    others = {"base_model.model.norm.steps": np.array(7), "base_model.model.norm.none": np.zeros((0, 2), bool)}
    save_file(tensors | others, folder / "adapter_model.safetensors")
    write_peft(read_peft(folder), tmp_path)
    found = read_peft(tmp_path).tensors
    for name, tensor in others.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype)
        np.testing.assert_array_equal(found[name], tensor)


def test_broken_files_are_refused(folder):
    entry = {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}
    header = json.dumps({"layer.lora_A.weight": entry}).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    with pytest.raises(ValueError, match=r"layer.lora_A.weight must be of dtype F32, F16 or BF16, got F8_E4M3"):
        read_peft(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is broken"):
        read_peft(folder)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        read_peft(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_peft(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors does not exist"):
        read_peft(folder)


def test_adalora_is_lora_of_its_product():
    model = adapted(targets=["down_proj"], layer=AdaLoRALinear, initialisation=ADALORA)
    modules = export_adapters(model).modules()
    ((_, adapter),) = iter_adapters(model)
    for layer, update in enumerate(np.asarray(adapter.weight_update())):
        pair = modules[f"model.layers.{layer}.mlp.down_proj"]
        np.testing.assert_allclose(pair.scale * pair.lora_a @ pair.lora_b, update, atol=1e-5)


def test_models_that_do_not_suit_are_refused():
    with pytest.raises(ValueError, match="model must have adapters, found none"):
        export_adapters(decoder())
    model = adapted()
    with pytest.raises(ValueError, match="must have no adapters"):
        load_adapters(model, export_adapters(model))

    class Other(LoRALinear):
        pass

    for layer in (Other, FullLinear):
        with pytest.raises(ValueError, match=f"layers.mlp.down_proj: {layer.__name__} has no form in PEFT; merge it"):
            export_adapters(adapted(targets=["down_proj"], layer=layer))
    mixed = {
        "a": PeftModule(np.ones((2, 1)), np.ones((1, 2)), 1.0, np.ones(2)),
        "b": PeftModule(np.ones((2, 1)), np.ones((1, 2)), 1.0),
    }
    with pytest.raises(ValueError, match="b has no magnitude"):
        from_modules(mixed)
