"""Random PEFT folders: each is refused by the name of a field or a tensor, or its products are those of NumPy."""

import json
import math
import re

import hypothesis
import ml_dtypes
import numpy as np
from flax import nnx
from hypothesis import strategies as st
from safetensors.numpy import save_file

from balora_jax.adapters import iter_adapters, load_adapters, read_peft, remove_adapters
from balora_jax.adapters.diagnosis import diagnose_adapter
from balora_jax.models import Decoder, DecoderConfig

CONFIG = DecoderConfig(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
)
MODEL = Decoder(CONFIG, rngs=nnx.Rngs(0))
SIDES = {
    "mlp.gate_proj": (8, 12),
    "mlp.down_proj": (12, 8),
    "self_attn.q_proj": (8, 8),
    "self_attn.k_proj": (8, 4),
}  # (in, out)
DTYPES = [np.float32, np.float32, np.float16, ml_dtypes.bfloat16, np.float64]
MODULES = [f"model.layers.{layer}.{name}" for layer in range(CONFIG.num_hidden_layers) for name in SIDES]
FIELDS = ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "use_rslora", "bias"]
FIELDS += ["use_dora", "layers_to_transform", "layers_pattern", "init_lora_weights", "peft_type", "fan_in_fan_out"]
FIELDS += ["modules_to_save", "target_parameters", "lora_bias", "anything"]

odd = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-2, 9) | st.floats() | st.text(max_size=5)
    | st.sampled_from([10**400, 1e300, 1e-300, "all-linear", "(", ".*", "gate_proj", "LORA", "a" * 300, "\0", "[/x]"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.sampled_from(MODULES), inner),
    max_leaves=4,
)  # fmt: skip


def tensor_name(module, side):
    return f"base_model.model.{module}.lora_{side}.weight"


@st.composite
def good(draw):
    """The config and the tensors of an adapter that is in order."""
    modules = sorted(draw(st.sets(st.sampled_from(MODULES), min_size=1, max_size=4)))
    ranks = {module: draw(st.integers(1, 4)) for module in modules}
    alphas = {module: draw(st.integers(-3, 16) | st.floats(-9, 9)) for module in modules}
    config = {
        "peft_type": "LORA",
        "target_modules": modules if draw(st.booleans()) else "|".join(map(re.escape, modules)),
        "use_rslora": draw(st.booleans()),
        "r": ranks[modules[0]],
        "lora_alpha": alphas[modules[0]],
        "rank_pattern": {module: ranks[module] for module in modules[1:]},
        "alpha_pattern": {module: alphas[module] for module in modules[1:]},
    }
    rng, tensors = np.random.default_rng(draw(st.integers(0, 99))), {}
    for module in modules:
        (rows, columns), dtype = SIDES[module.split(".", 3)[-1]], draw(st.sampled_from(DTYPES))
        tensors[tensor_name(module, "A")] = rng.standard_normal((ranks[module], rows)).astype(dtype)
        tensors[tensor_name(module, "B")] = rng.standard_normal((columns, ranks[module])).astype(dtype)
    return config, tensors


@st.composite
def damaged(draw):
    """A good adapter with up to two changes, some of which leave it good."""
    config, tensors = draw(good())
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(tensors))) if tensors else "none"
        tensor = tensors.get(name, np.ones((1, 1), np.float32))
        change = draw(st.sampled_from(["field", "no field", "lack", "shape", "dtype", "number", "rename", "extra"]))
        if change == "field":
            config[draw(st.sampled_from(FIELDS))] = draw(odd)
        elif change == "no field":
            config.pop(draw(st.sampled_from(FIELDS)), None)
        elif change == "lack":
            tensors.pop(name, None)
        elif change == "shape":
            shape = draw(st.sampled_from([tensor.shape[::-1], (), (0,), (0, 3), tensor.shape[:1], (1, *tensor.shape)]))
            tensors[name] = np.resize(tensor, shape)
        elif change == "dtype":
            tensors[name] = tensor.astype(draw(st.sampled_from([np.int32, bool, np.float16, np.uint8, np.complex64])))
        elif change == "number" and tensor.size:
            tensors[name] = tensor.copy()
            with np.errstate(all="ignore"):
                tensors[name].flat[0] = draw(st.sampled_from([0.0, 7.0, np.nan, np.inf, 6e4, 1e-7]))
        elif change == "rename":
            tensors[draw(st.sampled_from(_odd_names(name)))] = tensors.pop(name, tensor)
        else:
            tensors[draw(st.sampled_from(_odd_names(name)))] = tensor
    return config, tensors


def _odd_names(name):
    odd = [
        name.replace("lora_A", "lora_C"),
        name.replace("base_model.model.", ""),
        name.replace("layers.0", "layers.7"),
    ]
    odd += [name.replace(".weight", ".default.weight"), name.replace(".weight", ""), name.replace("A", "B"), "", "\0"]
    return [*odd, name.replace("_proj", "_porj"), name.replace("lora_A", "lora_magnitude_vector"), "[/x]", "é" * 300]


def expected(config, tensors):
    """The updates `(in, out)` by their modules, as PEFT's documentation has them."""
    updates = {}
    for module in MODULES:
        if tensor_name(module, "A") not in tensors:
            continue
        a, b = (np.asarray(tensors[tensor_name(module, side)], np.float64) for side in "AB")
        numbers = {"r": config["r"], "lora_alpha": config["lora_alpha"]}
        for field, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
            for key, value in (config.get(pattern) or {}).items():
                if re.match(rf"(.*\.)?({key})$", module):
                    numbers[field] = value
                    break
        rank = numbers["r"]
        updates[module] = (b @ a).T * numbers["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return updates


def names_what(message, config, tensors):
    fields = {*FIELDS, *config, "rank", "scale"}
    return any(name and name in message for name in {*fields, *tensors, *MODULES}) or "holds no tensors" in message


@hypothesis.settings(max_examples=220, derandomize=True, deadline=None, database=None)
@hypothesis.given(damaged())
def test_folders_are_refused_by_name_or_agree_with_numpy(tmp_path_factory, folder_content):
    config, tensors = folder_content
    folder = tmp_path_factory.mktemp("peft")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    try:
        adapter = read_peft(folder)
        found = diagnose_adapter(adapter)
        load_adapters(MODEL, adapter)
    except ValueError as error:
        message = str(error)
        assert names_what(message, config, tensors), message
        assert len(message) < 2000
        return
    updates = expected(config, tensors)
    for path, layer in iter_adapters(MODEL):
        update = np.asarray(layer.weight_update())
        for index in range(CONFIG.num_hidden_layers):
            wanted = updates.pop(f"model.{path.replace('layers', f'layers.{index}', 1)}", np.zeros(()))
            np.testing.assert_allclose(
                update[index], np.broadcast_to(wanted, update[index].shape), atol=1e-4, rtol=1e-4
            )
    remove_adapters(MODEL, merge=False)
    assert not updates
    for module, diagnosis in found.items():
        product = np.asarray(tensors[tensor_name(module, "B")], float) @ np.asarray(
            tensors[tensor_name(module, "A")], float
        )
        np.testing.assert_allclose(diagnosis.norm, np.linalg.norm(product), rtol=1e-6)
