import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_reference import CONFIGS, random_decoder
from flax import nnx
from safetensors.numpy import load_file, save_file

from balora_jax.adapters import add_adapters
from balora_jax.models.config_json import write_config
from balora_jax.models.weights import load_decoder, save_decoder

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


QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        ({}, {QUERY: ABSENT}, f"lacks the tensor {QUERY}"),
        ({}, {"lm_head.weight": ABSENT}, "lacks the tensor lm_head.weight"),
        ({"num_hidden_layers": 3}, {}, "lacks the tensor model.layers.2."),
        ({"num_hidden_layers": 10**9}, {}, "lacks the tensor model.layers.2."),
        ({"model_type": "qwen2"}, {}, r"lacks the tensor model.layers.0.self_attn.\w_proj.bias"),
        ({}, {QUERY: np.zeros((16, 32), "f4")}, rf"{QUERY} must have shape \(32, 16\), got \(16, 32\)"),
        ({}, {"model.norm.weight": np.zeros(3, "f4")}, r"model.norm.weight must have shape \(16,\), got \(3,\)"),
        ({"vocab_size": 30}, {}, r"must have shape \(30, 16\), got \(29, 16\)"),
        # Tensors that the model would not use.
        ({}, {"model.layers.0.self_attn.q_proj.bias": np.ones(32, "f4")}, "model.layers.0.self_attn.q_proj.bias"),
        ({"num_hidden_layers": 1}, {}, "model.layers.1."),
        (
            {"vocab_size": 2**31 - 1, "hidden_size": 2**30},
            {},
            "must be of a model that a machine can hold, got vocab_size",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(fields, tensors, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_decoder(saved(tmp_path, fields=fields, tensors=tensors))


def in_parts(folder, names=None):
    """Splits the weights of a folder over two files and an index, tensors of one layer in both."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    names = sorted(tensors) if names is None else names
    files = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    path.unlink()
    write_index(folder, files)
    return files


def write_index(folder, files):
    content = {"metadata": {"total_size": 0}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_weights_in_several_files(config, tmp_path):
    expected = load_decoder(saved(tmp_path, config))
    assert len(set(in_parts(tmp_path).values())) == 2
    assert_same_parameters(load_decoder(tmp_path), expected)


def test_damaged_weights_in_several_files_are_refused(tmp_path):
    saved(tmp_path)
    files = in_parts(tmp_path)
    file = tmp_path / files[QUERY]
    index = "model.safetensors.index.json"
    other = next(name for name in files.values() if name != files[QUERY])

    def refused(files, message, error=ValueError):
        write_index(tmp_path, files)
        with pytest.raises(error, match=message):
            load_decoder(tmp_path)

    refused({name: f for name, f in files.items() if name != QUERY}, f"{file} holds the tensor {QUERY}, which {index}")
    refused({**files, QUERY: other}, f"{file} holds the tensor {QUERY}, which {index}")
    refused({**files, "extra": other}, f"{tmp_path / other} lacks the tensor extra, which {index}")
    refused(
        {**files, QUERY: "absent.safetensors"},
        r"absent\.safetensors does not exist, .* tensor .*q_proj",
        FileNotFoundError,
    )
    refused({**files, QUERY: "a/absent.safetensors"}, r"does not exist, .* tensor .*q_proj", FileNotFoundError)
    refused({}, "weight_map must give the file of each tensor, got {}")
    refused({**files, QUERY: 3}, "weight_map must give the file of each tensor")
    (tmp_path / index).write_text("{}")
    with pytest.raises(ValueError, match=f"{index}: weight_map must give the file of each tensor, got None"):
        load_decoder(tmp_path)
    write_index(tmp_path, files)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{file} is broken"):
        load_decoder(tmp_path)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_files_of_every_dtype(param_dtype, tmp_path):
    expected = load_decoder(saved(tmp_path))
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    dtypes = (np.float16, jnp.bfloat16, np.float32)
    mixed = {name: tensors[name].astype(dtypes[index % 5 % 3]) for index, name in enumerate(sorted(tensors))}
    assert {str(mixed[f"model.layers.{n}.mlp.up_proj.weight"].dtype) for n in (0, 1)} == {"float16", "bfloat16"}
    save_file(mixed, path)
    found = load_decoder(tmp_path, param_dtype=param_dtype)
    for (key, variable), (_, other) in zip(
        *(nnx.to_flat_state(nnx.state(model)) for model in (found, expected)), strict=True
    ):
        assert variable.dtype == param_dtype
        values = np.asarray(variable[...], np.float32)
        np.testing.assert_allclose(values, other[...], rtol=2**-7, atol=1e-7, err_msg=str(key))
    query = found.layers.self_attn.q_proj.kernel[1]
    np.testing.assert_array_equal(query, mixed[QUERY].T.astype(param_dtype))


@pytest.mark.parametrize(
    ("number", "param_dtype", "message"),
    [
        (
            np.float32(-1e5),
            "float16",
            "holds -100000, beyond the largest number of float16, 65504; choose the dtype flo",
        ),
        (np.float32(3.4e38), "bfloat16", "holds 3.4e.38, beyond the largest number of bfloat16, .* the dtype float32$"),
        (np.float64(1e39), "float32", r"holds 1e.39, beyond the largest number of float32, 3.40282e\+38$"),
    ],
)
def test_numbers_beyond_the_dtype_asked_for_are_refused(number, param_dtype, message, tmp_path):
    query = np.zeros((32, 16), number.dtype)
    query[3, 1] = number
    folder = saved(tmp_path, tensors={QUERY: query})
    with pytest.raises(ValueError, match=rf"model\.safetensors: the tensor {QUERY} {message}"):
        load_decoder(folder, param_dtype=param_dtype)


def test_what_is_not_finite_is_not_written(tmp_path):
    model = random_decoder(LLAMA)
    model.norm.scale[...] = model.norm.scale[...].at[3].set(np.nan)
    with pytest.raises(ValueError, match=r"the tensor model\.norm\.weight must be finite to be written, got a NaN"):
        save_decoder(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_float64_needs_the_option_of_jax(tmp_path):
    folder = saved(tmp_path, tensors={QUERY: np.ones((32, 16))})
    assert load_decoder(folder).layers.self_attn.q_proj.kernel.dtype == "float32"
    for argument in ("dtype", "param_dtype"):
        with pytest.raises(ValueError, match=f"^{argument} float64 needs JAX's option jax_enable_x64"):
            load_decoder(folder, **{argument: "float64"})


def test_other_dtypes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=f"{QUERY} must be of dtype F64 or F32 or F16 or BF16, got I8"):
        load_decoder(saved(tmp_path, tensors={QUERY: np.zeros((32, 16), np.int8)}))


def test_a_tied_head_in_the_file_must_be_the_embedding(tmp_path):
    config = dataclasses.replace(LLAMA, tie_word_embeddings=True)
    embedding = np.asarray(random_decoder(config).embed_tokens.embedding[...])
    folder = saved(tmp_path / "same", config, tensors={"lm_head.weight": embedding})
    assert_same_parameters(load_decoder(folder), random_decoder(config))
    for name, head in (("values", embedding + np.eye(29, 16, -13, "f4")), ("shape", embedding[:5].copy())):
        with pytest.raises(ValueError, match=r"lm_head\.weight must be model\.embed_tokens\.weight, .* but it differs"):
            load_decoder(saved(tmp_path / name, config, tensors={"lm_head.weight": head}))


def run_python(code, *arguments, devices=1):
    """Runs code in a process of its own and returns what it prints."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_parameters_go_to_their_devices_and_only_their_parts_are_read(tmp_path):
    code = """
import sys
import jax, numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from balora_jax.models import weights

mesh = jax.make_mesh((2, 2), ("x", "y"))
layouts = {
    "layers.mlp.gate_proj.kernel": PartitionSpec(None, "x", "y"),
    "layers.self_attn.q_proj.kernel": PartitionSpec("y", None, "x"),
}
read, sizes, shapes = weights._Tensors.read, {}, {}

def spied(self, name, index):
    part = read(self, name, index)
    sizes.setdefault(name, []).append(part.size)
    return part

def sharding(path, expected):
    shapes[path] = expected.shape, expected.dtype
    return NamedSharding(mesh, layouts.get(path, PartitionSpec()))

weights._Tensors.read = spied
models = [weights.load_decoder(sys.argv[1], sharding=sharding)]
assert shapes["layers.mlp.gate_proj.kernel"] == ((2, 16, 24), np.float32), shapes
for layer in (0, 1):
    assert sizes[f"model.layers.{layer}.mlp.gate_proj.weight"] == 4 * [16 * 24 / 4]
    assert set(sizes[f"model.layers.{layer}.self_attn.q_proj.weight"]) == {16 * 32 / 2}
replicated = NamedSharding(mesh, PartitionSpec())
models += [weights.load_decoder(sys.argv[1], sharding=replicated), weights.load_decoder(sys.argv[1])]
for (path, one), (_, two), (_, three) in zip(*(nnx.to_flat_state(nnx.state(model)) for model in models), strict=True):
    assert one.get_value().sharding == NamedSharding(mesh, layouts.get(".".join(path), PartitionSpec())), path
    assert two.get_value().sharding == replicated
    assert three.get_value().sharding.device_set == {jax.devices()[0]}
    np.testing.assert_array_equal(one[...], three[...])
    np.testing.assert_array_equal(two[...], three[...])
"""
    run_python(code, saved(tmp_path), devices=4)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of the process from /proc")
def test_loading_needs_the_memory_of_the_model_and_little_more(tmp_path):
    config = dataclasses.replace(
        LLAMA, vocab_size=4096, hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_key_value_heads=4,
        head_dim=128,
    )  # fmt: skip
    write_config(config, tmp_path)
    shapes = {
        "mlp.gate_proj": (2048, 512), "mlp.up_proj": (2048, 512), "mlp.down_proj": (512, 2048),
        **{f"self_attn.{name}_proj": (512, 512) for name in "qkvo"},
        "input_layernorm": (512,), "post_attention_layernorm": (512,),
    }  # fmt: skip
    tensors = {
        f"model.layers.{layer}.{name}.weight": np.ones(shape, jnp.bfloat16)
        for layer in range(12)
        for name, shape in shapes.items()
    }
    tensors |= {"model.norm.weight": np.ones(512, jnp.bfloat16)}
    tensors |= {name: np.ones((4096, 512), jnp.bfloat16) for name in ("lm_head.weight", "model.embed_tokens.weight")}
    save_file(tensors, tmp_path / "model.safetensors")
    code = """
import sys
import jax.numpy as jnp
from balora_jax.models.weights import load_decoder

def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

jnp.ones(8).astype("bfloat16").block_until_ready()
before = kilobytes("VmRSS")
model = load_decoder(sys.argv[1])
print(1024 * (kilobytes("VmHWM") - before))
"""
    model = 4 * sum(tensor.size for tensor in tensors.values())
    above = int(run_python(code, tmp_path)) - model
    assert above < 16e6, "three parameters have 50 MB, the largest tensor 4 MB"


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_truncated_file_is_refused(kept, tmp_path):
    path = saved(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors is broken"):
        load_decoder(tmp_path)


def test_the_tensor_at_which_a_file_is_cut_off_is_named(tmp_path):
    path = saved(tmp_path) / "model.safetensors"
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:start])
    name = "model.layers.1.mlp.up_proj.weight"
    for kept in (header[name]["data_offsets"][0], header[name]["data_offsets"][1] - 1):
        path.write_bytes(whole[: start + kept])
        with pytest.raises(ValueError, match=rf"model\.safetensors is broken: .* tensor {name}$"):
            load_decoder(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(name, tmp_path):
    (saved(tmp_path) / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_decoder(tmp_path)


def test_adapters_are_not_saved_as_weights(tmp_path):
    model = random_decoder(LLAMA)
    add_adapters(model, targets=["q_proj"], rank=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="adapters"):
        save_decoder(model, tmp_path)


def test_a_config_that_no_family_has_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="qk_norm"):
        save_decoder(random_decoder(dataclasses.replace(LLAMA, qkv_bias=True, qk_norm=True)), tmp_path)
