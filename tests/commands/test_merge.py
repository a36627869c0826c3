"""Adapters merged into their base: every tensor, its dtype and the tokenizer, and merges that cannot be written."""

import dataclasses
import json
import re
import shutil

import chat_tokenizers
import numpy as np
import pytest
from connections import no_connections
from flax import nnx
from safetensors.numpy import load_file, save_file

from balora_jax.adapters import add_adapters, export_adapters, read_peft, write_peft
from balora_jax.cli import main
from balora_jax.commands import generated
from balora_jax.data.hub_tokenizer import load_tokenizer, tokenizer_files
from balora_jax.data.recipes import DataSettings
from balora_jax.models import Decoder
from balora_jax.models.config_json import read_config
from balora_jax.models.weights import save_decoder
from balora_jax.training import Config, ModelSettings
from balora_jax.training.trained import Trained

DOWN = "base_model.model.model.layers.1.mlp.down_proj"


def call(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def products(folder):
    return {name: m.scale * m.lora_a @ m.lora_b for name, m in read_peft(folder).modules().items()}


def test_merged_is_base_and_adapter(run, adapter, model_folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(model_folder, base)
    fields = json.loads((base / "config.json").read_text()) | {"torch_dtype": "float32", "note": "kept"}
    (base / "config.json").write_text(json.dumps(fields))
    (base / "tokenizer_config.json").write_text("{}")
    call("merge", base, adapter, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == fields
    assert (tmp_path / "merged" / "tokenizer_config.json").read_text() == "{}"
    before, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    updates = products(adapter)
    assert set(merged) == set(before)
    for name, tensor in before.items():
        update = updates.pop(name.removesuffix(".weight"), np.zeros(()))
        np.testing.assert_allclose(merged[name], tensor + update.T, atol=1e-6)
    assert not updates
    call("export", run, tmp_path / "direct", "--member", "lora-seed=1", "--merged")
    direct = load_file(tmp_path / "direct" / "model.safetensors")
    assert all(np.array_equal(merged[name], direct[name]) for name in merged | direct)


def test_merged_keeps_the_dtype_of_its_base_or_takes_the_one_asked_for(adapter, model_folder, tmp_path):
    def dtypes(name):
        return {tensor.dtype.name for tensor in load_file(tmp_path / name / "model.safetensors").values()}

    shutil.copytree(model_folder, tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}))
    call("merge", tmp_path / "base", adapter, tmp_path / "half", "--dtype", "bfloat16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    call("merge", tmp_path / "half", adapter, tmp_path / "again")
    assert dtypes("half") == dtypes("again") == {"bfloat16"}
    config = tmp_path / "half" / "config.json"
    for silent in ({}, {"dtype": "auto"}):  # the weights tell it, then
        fields = {name: value for name, value in json.loads(config.read_text()).items() if name != "dtype"}
        config.write_text(json.dumps(fields | silent))
        call("merge", tmp_path / "half", adapter, tmp_path / f"silent{len(silent)}")
        assert dtypes(f"silent{len(silent)}") == {"bfloat16"}


def cast_weights(folder, dtype_of, **others):
    """Changes the dtypes of a folder's tensors, and adds others."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.astype(dtype_of(name)) for name, tensor in load_file(file).items()}
    save_file(tensors | {name.replace("__", "."): tensor for name, tensor in others.items()}, file)


def test_merged_is_the_base_but_for_the_tensors_with_an_adapter(adapter, model_folder, tmp_path, capsys):
    """A base as old ones are: in two dtypes, with a copy of the tied head and the frequencies that nobody reads."""
    base = tmp_path / "base"
    shutil.copytree(model_folder, base)
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    frequencies = np.arange(4, dtype=np.float32)
    others = {"lm_head__weight": embedding, "model__layers__0__self_attn__rotary_emb__inv_freq": frequencies}
    cast_weights(base, lambda name: "float16" if "proj" in name else "float32", **others)
    capsys.readouterr()
    call("merge", base, adapter, tmp_path / "merged")
    assert capsys.readouterr().out.count("\n") == 1, "nothing else is changed, and so there is nothing to say"
    before, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    assert before.keys() == merged.keys()
    for name in before:
        assert merged[name].dtype == before[name].dtype, name
        adapted = name.removesuffix(".weight") in products(adapter)
        assert np.array_equal(merged[name], before[name]) != adapted, name


@pytest.mark.parametrize(
    ("stored", "declared", "options", "note"),
    [
        ("float32", "float64", [], "config.json of the base declares the dtype float64, but its weights are float32\n"),
        (
            "float16",
            "bfloat16",
            [],
            "config.json of the base declares the dtype bfloat16, but its weights are float16\n",
        ),
        ("float64", "float64", ["--dtype", "float32"], "written in float32; those of the base are in float64\n"),
        ("float32", "float32", ["--dtype", "bfloat16"], "written in bfloat16; those of the base are in float32\n"),
        ("float16", "float16", [], ""),
    ],
)
def test_merge_says_where_a_dtype_is_another(stored, declared, options, note, adapter, model_folder, tmp_path, capsys):
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(model_folder, base)
    cast_weights(base, lambda name: stored)
    config = json.loads((base / "config.json").read_text()) | {"dtype": declared}
    (base / "config.json").write_text(json.dumps(config))
    call("merge", base, adapter, out, *options)
    assert capsys.readouterr().out.partition(f"{out}\n")[2].endswith(note)
    dtypes = {tensor.dtype.name for tensor in load_file(out / "model.safetensors").values()}
    assert dtypes == {json.loads((out / "config.json").read_text())["dtype"]}


def test_merges_that_a_dtype_cannot_hold_leave_no_folder(adapter, model_folder, fails, tmp_path):
    base, strong, out = (tmp_path / name for name in ("base", "strong", "out"))
    shutil.copytree(model_folder, base)
    shutil.copytree(adapter, strong)
    name = rf"the tensor {re.escape(DOWN.removeprefix('base_model.model.').replace('1', '0'))}\.weight"

    def strengthen(alpha):
        config = json.loads((strong / "adapter_config.json").read_text()) | {"lora_alpha": alpha}
        (strong / "adapter_config.json").write_text(json.dumps(config))

    strengthen(1e9)
    beyond = name + r", with the adapter merged, holds -?\d.*, beyond .* float16, 65504; choose the dtype float32 or"
    assert re.search(beyond, fails("merge", base, strong, out, "--dtype", "float16"))
    cast_weights(base, lambda name: "float16")
    assert re.search(beyond, fails("merge", base, strong, out))
    cast_weights(base, lambda name: "float16" if "proj" in name else "float32")
    assert re.search(name + " holds .*65504; choose the dtype float32 or", fails("merge", base, strong, out))
    strengthen(1e300)
    assert "the scale of model.layers.0.mlp.down_proj holds 3.33333e+299, beyond" in fails("merge", base, strong, out)
    cast_weights(base, lambda name: "float64")
    assert f"{base} holds weights in float64; choose one of float32, bfloat16" in fails("merge", base, adapter, out)
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))


@pytest.fixture
def instructed(model_folder, tmp_path):
    """A base whose tokenizer has no chat template, an adapter for it, and the tokenizer that it was trained with."""
    base, adapter, instruct = (tmp_path / name for name in ("base", "adapter", "instruct"))
    size = chat_tokenizers.write(base, **{**chat_tokenizers.FAMILIES["qwen"], "template": None, "eos": "<|endoftext|>"})
    chat_tokenizers.write(instruct, **chat_tokenizers.FAMILIES["qwen"])
    model = Decoder(dataclasses.replace(read_config(model_folder), vocab_size=size), rngs=nnx.Rngs(0))
    save_decoder(model, base)
    (base / "generation_config.json").write_text('{"eos_token_id": 0, "top_k": 9}')
    (base / "vocab.json").write_text("{}")
    add_adapters(model, targets=["up_proj"], rank=2, rngs=nnx.Rngs(0))
    write_peft(export_adapters(model), adapter)
    return base, adapter, instruct, model


def tokenizers_of(folder):
    return {file.name: file.read_bytes() for file in tokenizer_files(folder)}


def test_merge_takes_the_tokenizer_of_the_adapter(instructed, tmp_path, capsys):
    base, adapter, instruct, _ = instructed
    call("merge", base, adapter, tmp_path / "plain")
    assert tokenizers_of(tmp_path / "plain") == tokenizers_of(base)
    for file in instruct.iterdir():
        shutil.copy(file, adapter)
    capsys.readouterr()
    call("merge", base, adapter, tmp_path / "merged")
    said = capsys.readouterr().out
    assert f"\nthe tokenizer is that of {adapter}\n" in said
    assert tokenizers_of(tmp_path / "merged") == tokenizers_of(instruct)
    tokenizer = load_tokenizer(tmp_path / "merged")
    generation = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": tokenizer.eos_id, "top_k": 9}
    assert f"the eos_token_id of generation_config.json is its {tokenizer.eos_id}, in the base 0" in said


def test_local_models_tokenizers_and_adapters_open_no_connection(instructed, tmp_path):
    base, adapter, instruct, _ = instructed
    with no_connections():
        call("inspect", adapter)
        call("merge", base, adapter, tmp_path / "merged")
        assert load_tokenizer(tmp_path / "merged", instruct).end_ids


def test_generate_takes_the_tokenizer_of_the_adapter(instructed, monkeypatch, fails, capsys):
    base, adapter, instruct, _ = instructed
    arguments = ["generate", base, "--adapter", adapter, "--prompt", "hello", "--chat", "--max-new-tokens", "1"]
    assert "has no chat template" in fails(*arguments)
    for file in instruct.iterdir():
        shutil.copy(file, adapter)
    call(*arguments)
    monkeypatch.setattr(generated, "continuations", lambda model, tokenizer, *_, **__: [str(tokenizer._folder)])
    for options, source in (([], adapter), (["--tokenizer", instruct], instruct)):
        capsys.readouterr()
        call(*arguments, *options)
        assert capsys.readouterr().out == f"hello\n{source}\n"


def test_export_carries_the_tokenizer_of_the_run(instructed, tmp_path, monkeypatch, capsys):
    base, _, instruct, model = instructed
    config = Config(name="x", model=ModelSettings(path=str(base)), data=DataSettings(tokenizer=str(instruct)))
    there = Trained("lora", config, model, 1, -1)
    monkeypatch.setattr("balora_jax.training.trained.load_trained", lambda run, member, **_: there)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").touch()
    call("export", tmp_path / "run", tmp_path / "peft")
    assert f"with the tokenizer of {instruct}" in capsys.readouterr().out
    assert tokenizers_of(tmp_path / "peft") == tokenizers_of(instruct)
    call("export", tmp_path / "run", tmp_path / "merged", "--merged")
    assert f"the tokenizer is that of {instruct}\n" in capsys.readouterr().out
    assert tokenizers_of(tmp_path / "merged") == tokenizers_of(instruct)
    assert load_tokenizer(tmp_path / "merged").encode_question([{"role": "user", "content": "hello"}])


def test_evaluate_says_that_the_tokenizer_of_an_adapter_is_not_used(adapter, config_file, tmp_path, capsys):
    own = tmp_path / "own"
    shutil.copytree(adapter, own)
    chat_tokenizers.write(own, **chat_tokenizers.FAMILIES["qwen"])
    capsys.readouterr()
    call("evaluate", config_file, "--adapter", own)
    assert f"not used; --data.tokenizer {own} takes it" in capsys.readouterr().out
