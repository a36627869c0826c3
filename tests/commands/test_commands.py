"""What the commands for adapters do and print, end to end on a tiny model; and their mistakes in one line."""

import dataclasses
import io
import json
import re
import shutil
import sys

import chat_tokenizers
import numpy as np
import pytest
from flax import nnx
from processes import run_alone
from safetensors.numpy import load_file, save_file

from balora_jax.adapters import PeftModule, load_adapters, read_peft, write_peft
from balora_jax.adapters.peft import from_modules
from balora_jax.cli import _COMMANDS, main
from balora_jax.commands import generated
from balora_jax.commands.generated import _said
from balora_jax.data.tokenizer import CharTokenizer
from balora_jax.models import Decoder
from balora_jax.models.config_json import read_config
from balora_jax.models.weights import load_decoder, save_decoder
from balora_jax.training.fields import field_names

DOWN = "base_model.model.model.layers.1.mlp.down_proj"


def call(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def evaluated(out):
    """The loss and accuracy over all examples that `evaluate` printed."""
    loss, accuracy = re.search(r"all +\d+ +([\d.]+) +([\d.]+) %", out).groups()
    return float(loss), float(accuracy)


def test_exported_adapter_is_that_of_the_run(adapter, config_file, records, capsys):
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 6, False)
    call("evaluate", config_file, "--adapter", adapter)
    loss, accuracy = re.search(r"all +10 +([\d.]+) +([\d.]+) %", capsys.readouterr().out).groups()
    (expected,) = (r for r in records if r["kind"] == "result" and r["member"] == "lora-seed=1")
    assert float(loss) == pytest.approx(expected["evaluation_loss"], abs=1e-4)
    assert float(accuracy) == pytest.approx(100 * expected["accuracy"], abs=0.1)
    call("evaluate", config_file, "--adapter", adapter, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["modules"]["all"] == {
        "examples": 10,
        "evaluation_loss": pytest.approx(expected["evaluation_loss"], abs=1e-4),
        "accuracy": expected["accuracy"],
    }
    assert (found["adapter"], found["score"]) == (str(adapter), "exact match")
    before = next(r["evaluation_loss"] for r in records if r["kind"] == "evaluation" and r["step"] == 0)
    assert float(loss) != pytest.approx(before, abs=1e-2)


def products(folder):
    return {name: m.scale * m.lora_a @ m.lora_b for name, m in read_peft(folder).modules().items()}


def test_balance_keeps_products_and_everything_else(adapter, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(adapter, source)
    tensors = load_file(source / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] = np.ones((2, 2), np.float32)
    save_file(tensors, source / "adapter_model.safetensors", metadata={"format": "pt", "mine": "1"})
    config = json.loads((source / "adapter_config.json").read_text()) | {"modules_to_save": ["lm_head"]}
    (source / "adapter_config.json").write_text(json.dumps(config))
    capsys.readouterr()
    call("balance", source, tmp_path / "out", "--gauge", "nearest")
    shown = capsys.readouterr().out
    worst = [float(re.search(rf"{when} +\S+ +(\S+)", shown).group(1)) for when in ("before", "after")]
    assert worst[1] < 1e-6 < 0.1 < worst[0]
    assert "6 pairs" in shown
    for file in ("adapter_config.json", "README.md"):
        assert (tmp_path / "out" / file).read_bytes() == (source / file).read_bytes()
    after = read_peft(tmp_path / "out")
    assert after.metadata == {"format": "pt", "mine": "1"}
    np.testing.assert_array_equal(after.tensors["base_model.model.lm_head.weight"], np.ones((2, 2)))
    assert set(after.tensors) == set(tensors)
    left, right = (after.tensors[f"{DOWN}.lora_{side}.weight"] for side in "AB")
    gram = left @ left.T
    np.testing.assert_allclose(gram, right.T @ right, atol=1e-6 * np.abs(gram).max())
    assert np.abs(gram - np.diag(np.diag(gram))).max() > 1e-4 * np.abs(gram).max()  # as only the default's is diagonal
    np.testing.assert_allclose(
        right @ left, tensors[f"{DOWN}.lora_B.weight"] @ tensors[f"{DOWN}.lora_A.weight"], atol=1e-6
    )


def test_balance_of_dtypes_and_of_pairs_that_lack_rank(tmp_path, capsys):
    rng = np.random.default_rng(0)
    modules = {
        f"h.{n}.x": PeftModule(*(rng.standard_normal(shape).astype(dtype) for shape in ((9, 2), (2, 7))), 1.0)
        for n, dtype in enumerate(("float64", "float32", "float16"))
    }
    modules["h.10.x"] = PeftModule(np.ones((9, 2), np.float32), np.zeros((2, 7), np.float32), 1.0)
    for name, size in (("huge", 6e4), ("tiny", 1e-7)):
        factors = (size * rng.choice((-1, 1), shape) for shape in ((9, 2), (2, 7)))
        modules[name] = PeftModule(*(factor.astype("float16") for factor in factors), 1.0)
    write_peft(from_modules(modules), tmp_path / "in")
    call("balance", tmp_path / "in", tmp_path / "out")
    said = capsys.readouterr().out
    assert "skipped, because their product lacks rank: h.10.x\n" in said
    assert "skipped, because their dtype cannot hold the balanced factors: huge, tiny\n" in said
    with np.errstate(over="ignore"):  # in the huge one
        before, after = products(tmp_path / "in"), products(tmp_path / "out")
    for name, tolerance in (("h.0.x", 1e-13), ("h.1.x", 1e-5), ("h.2.x", 1e-2)):
        assert after[name].dtype == before[name].dtype
        np.testing.assert_allclose(after[name], before[name], atol=tolerance)
    np.testing.assert_array_equal(read_peft(tmp_path / "out").modules()["h.10.x"].lora_a, 1)


@pytest.mark.parametrize(("dtype", "size"), [("float16", 1), ("float32", 1), ("float32", 1e15), ("float64", 1e150)])
def test_balance_tells_the_change_of_products(dtype, size, tmp_path, capsys):
    rng = np.random.default_rng(0)
    columns = size * np.geomspace(1, 1e-3, 4)
    pair = rng.standard_normal((40, 4)) * columns, rng.standard_normal((4, 30)) / size
    write_peft(from_modules({"x": PeftModule(*(x.astype(dtype) for x in pair), 1.0)}), tmp_path / "in")
    call("balance", tmp_path / "in", tmp_path / "out")
    before, after = (
        np.asarray(m.lora_a, np.longdouble) @ np.asarray(m.lora_b, np.longdouble)
        for m in (read_peft(tmp_path / folder).modules()["x"] for folder in ("in", "out"))
    )
    told = float(re.search(r"changed by at most (\S+) of", capsys.readouterr().out).group(1))
    expected = float(np.sqrt(np.sum((after - before) ** 2) / np.sum(before**2)))
    assert 0 < told < 2.0**-8
    assert told == pytest.approx(expected, rel=0.5)  # one digit is told


def test_inspect_shows_every_pair_in_order(tmp_path, capsys):
    a, b = np.array([[3.0, 0], [0, 1], [0, 0]]), np.array([[1.0, 0, 0, 0], [0, 1, 0, 0]])
    modules = {f"h.{n}.x": PeftModule(a.astype(np.float32), b.astype(np.float32), 2.0) for n in (10, 9)}
    write_peft(from_modules(modules), tmp_path / "in")
    call("inspect", tmp_path / "in", "--figure", tmp_path / "figure.png")
    first, second = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  h.")]
    # singular values 6 and 2; A^T A = diag(9, 1), B B^T = I; (9 + 1) / 1 and 2 x 3 / 1
    gap = f"{8 / (np.hypot(9, 1) + np.sqrt(2)):.1e}"
    assert first == ["h.9.x", "3", "x", "4", "2", "6.00e+00", "to", "2.00e+00", "6.32", "1.11", gap, "10", "6"]
    assert second[0] == "h.10.x"
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_begins_with_a_summary(tmp_path, capsys):
    """Of A = diag(3, 1), B = I as above; of its balanced pair; and of a pair whose product is zero."""
    a, b = np.eye(3, 2, dtype=np.float32), np.eye(2, 4, dtype=np.float32)
    root = np.sqrt(np.array([3, 1], np.float32))
    pairs = {
        "unbalanced": (a * root**2, b, "condition number: median 10, worst 10; .* median 6, worst 6", "1.67 times sm"),
        "balanced": (a * root, b * root[:, None], "gap is 0.0e.00, of h.0.x", "balanced: there is nothing to gain"),
        "zero": (a, 0 * b, "the product of 1 of them lacks rank", "^1 pair of rank 2; the worst balancing gap is 1"),
    }
    for name, (lora_a, lora_b, *expected) in pairs.items():
        write_peft(from_modules({"h.0.x": PeftModule(lora_a, lora_b, 1.0)}), tmp_path / name)
        call("inspect", tmp_path / name)
        shown = capsys.readouterr().out.split("\n\n")[0]
        for line in expected:
            assert re.search(line, shown), shown
        call("inspect", tmp_path / name, "--json")
        found = json.loads(capsys.readouterr().out)
        (pair,) = found["pairs"]
        assert (pair["in"], pair["out"], pair["rank"]) == (3, 4, 2)
        assert pair["condition_number"] == found["summary"]["worst_condition_number"]
        assert (pair["condition_number"] is None) == (name == "zero")


@pytest.mark.parametrize(("given", "written"), [("plain", "plain.png"), ("dot.", "dot.png"), ("x.pdf", "x.pdf")])
def test_inspect_reports_the_figure_that_it_wrote(given, written, tmp_path, capsys):
    modules = {"h.0.x": PeftModule(np.eye(3, 2, dtype=np.float32), np.eye(2, 4, dtype=np.float32), 1.0)}
    write_peft(from_modules(modules), tmp_path / "in")
    (tmp_path / "out").mkdir()
    call("inspect", tmp_path / "in", "--figure", tmp_path / "out" / given)
    assert capsys.readouterr().out.endswith(f"figure: {tmp_path / 'out' / written}\n")
    assert [file.name for file in (tmp_path / "out").iterdir()] == [written]


def test_inspect_says_where_products_are_not_the_updates(tmp_path, capsys):
    modules = {"h.0.x": PeftModule(np.eye(3, 2, dtype=np.float32), np.eye(2, 4, dtype=np.float32), 1.0)}
    plain = from_modules(modules)
    for field, value, note in (("use_dora", True, "DoRA: "), ("init_lora_weights", "pissa_niter_4", "pissa_niter_4: ")):
        write_peft(dataclasses.replace(plain, config={**plain.config, field: value}), tmp_path)
        call("inspect", tmp_path)
        assert f"\n{note}" in capsys.readouterr().out
    write_peft(plain, tmp_path)
    call("inspect", tmp_path)
    assert capsys.readouterr().out.rstrip().endswith("balanced pairs attain")


def test_generate_continues_every_prompt_with_the_most_likely_tokens(adapter, model_folder, capsys, monkeypatch):
    prompts = ["What is 3 + 4?", "7?"]
    call("generate", model_folder, "--adapter", adapter, "--prompt", *prompts, "--max-new-tokens", "2")
    shown = capsys.readouterr().out
    tokenizer, model = CharTokenizer(), load_decoder(model_folder)
    load_adapters(model, read_peft(adapter))
    likeliest = nnx.jit(lambda model, tokens: model(tokens)[0].argmax(-1))
    expected = []
    for prompt in prompts:  # each alone, without padding
        tokens = [tokenizer.bos_id, *tokenizer.encode(f"{prompt} ")]
        for _ in range(2):
            row = np.array([tokens + [0] * (40 - len(tokens))])  # no token looks at what follows it
            tokens.append(int(likeliest(model, row)[len(tokens) - 1]))
        expected.append(tokenizer.decode(tokens))
    assert shown.splitlines() == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(prompts)))
    call("generate", model_folder, "--adapter", adapter, "--max-new-tokens", "2")
    assert capsys.readouterr().out == shown


def test_generate_draws_tokens_at_a_temperature(model_folder, capsys):
    def said(*options):
        call("generate", model_folder, "--prompt", "What is 3 + 4?", "--max-new-tokens", "12", *options)
        return capsys.readouterr().out

    hot = ["--temperature", "2"]
    assert said(*hot) == said(*hot, "--seed", "0")
    assert len({said(), said(*hot), said(*hot, "--seed", "1")}) == 3


def test_generate_asks_by_the_chat_template(model_folder, tmp_path, capsys, monkeypatch):
    size = chat_tokenizers.write(tmp_path, **chat_tokenizers.FAMILIES["qwen"])
    save_decoder(Decoder(dataclasses.replace(read_config(model_folder), vocab_size=size), rngs=nnx.Rngs(0)), tmp_path)
    asked = "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"

    def said(*options):
        call("generate", tmp_path, "--max-new-tokens", "6", "--prompt", *options)
        return capsys.readouterr().out

    chat = said("hello", "--chat", "--system", "be kind")
    assert said(asked) == asked + chat.removeprefix("hello\n")

    def repeated(model, tokenizer, prompts, **options):
        return [tokenizer._tokenizer.decode(prompt) for prompt in prompts]

    monkeypatch.setattr(generated, "continuations", repeated)
    assert said("hello", "--chat", "--system", "be kind") == f"hello\n{asked}\n"
    assert said("hello") == "hellohello\n"


def test_continuation_keeps_the_space_before_it():
    class Words:
        def decode(self, ids):
            return " ".join(f"w{i}" for i in ids)

    assert _said(Words(), [1, 2], [3]) == " w3"
    assert _said(Words(), [1, 2], []) == ""


def test_reading_a_run_leaves_it_as_it_is(run, tmp_path):
    def state():
        return {file: file.stat().st_mtime_ns for file in run.rglob("*")}

    (run / "checkpoints" / "lora" / "3.orbax-checkpoint-tmp").mkdir()  # a save that goes on meanwhile
    before = state()
    call("export", run, tmp_path / "out", "--member", "lora-seed=0")
    assert state() == before
    (run / "checkpoints" / "lora" / "3.orbax-checkpoint-tmp").rmdir()


def test_mistakes_of_export(run, fails, tmp_path):
    out = tmp_path / "out"
    message = fails("export", run, out)
    assert "name one member" in message
    assert message.count("seed=") == 2
    assert "has no member lora-seed=2; did you mean lora-seed=1?" in fails(
        "export", run, out, "--member", "lora-seed=2"
    )
    assert "must be a run directory" in fails("export", tmp_path, out)
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    assert "is not finished; name one of its members" in fails("export", tmp_path / "run", out)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "lora")
    assert "has no checkpoint of lora-seed=0" in fails("export", tmp_path / "run", out, "--member", "lora-seed=0")
    (tmp_path / "run" / "config.json").write_text('{"a": {"name": "x", "colour": 3}}')
    assert "Config has no field colour" in fails("export", tmp_path / "run", out)
    assert not out.exists()


def test_outputs_are_never_overwritten(run, adapter, model_folder, fails, tmp_path):
    (tmp_path / "file").touch()
    for out, message in ((adapter, "holds files"), (tmp_path / "file", "is a file")):
        assert message in fails("export", run, out, "--member", "lora-seed=0")
        assert message in fails("balance", adapter, out)
        assert message in fails("merge", model_folder, adapter, out)
    assert "cannot write" in fails("balance", adapter, tmp_path / "file" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_interrupted_output_leaves_nothing(adapter, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("balora_jax.commands.balanced.copy_other_files", interrupted)
    assert main(["balance", str(adapter), str(tmp_path / "out")]) == 130
    assert not list(tmp_path.iterdir())


def test_mistakes_of_adapters_and_models(adapter, model_folder, config_file, fails, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    assert "needs ADAPTER, OUT; balora-jax balance --help" in fails("balance")
    assert "invalid choice 'sdv'" in fails("balance", adapter, out, "--gauge", "sdv")
    for arguments in (["inspect", out], ["balance", out, other], ["merge", model_folder, out, other]):
        assert f"ADAPTER: {out}/adapter_config.json does not exist" in fails(*arguments)
    assert "--adapter: " in fails("generate", model_folder, "--adapter", out, "--prompt", "x")
    assert "--adapter: " in fails("evaluate", config_file, "--adapter", out)
    assert "MODEL: nowhere must be a model folder" in fails("merge", "nowhere", adapter, out)
    shutil.copytree(adapter, other)
    tensors = load_file(other / "adapter_model.safetensors")
    del tensors[f"{DOWN}.lora_B.weight"]
    save_file(tensors, other / "adapter_model.safetensors")
    assert f"lacks the tensor {DOWN}.lora_B.weight" in fails("merge", model_folder, other, out)
    assert f"the factor {DOWN}.lora_A.weight has no partner" in fails("inspect", other)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"target_parameters": ["x"]}))
    assert "target_parameters must not be set" in fails("balance", other, out)
    (other / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    shutil.copyfile(adapter / "adapter_model.safetensors", other / "adapter_model.safetensors")
    assert "lacks the field lora_alpha" in fails("inspect", other)
    tensors = load_file(other / "adapter_model.safetensors")
    tensors[f"{DOWN}.lora_B.weight"][0, 0] = np.nan
    save_file(tensors, other / "adapter_model.safetensors")
    assert "model.layers.1.mlp.down_proj: lora_a and lora_b must be finite" in fails("balance", other, out)
    (other / "adapter_config.json").write_text(json.dumps(config))
    assert f"{DOWN}.lora_B.weight must be finite" in fails("merge", model_folder, other, out)
    shutil.copyfile(adapter / "adapter_model.safetensors", other / "adapter_model.safetensors")
    (other / "adapter_config.json").write_text(json.dumps(config | {"r": 7}))
    for arguments in (["inspect", other], ["balance", other, out]):
        assert "gives it the rank 7, adapter_model.safetensors 3" in fails(*arguments)
    assert "cannot write the figure" in fails("inspect", adapter, "--figure", tmp_path / "none" / "x.png")


def test_evaluate_says_what_was_left_out(config_file, capsys):
    call("evaluate", config_file, "--data.length", "33")
    shown = capsys.readouterr().out
    left_out = int(re.search(r"^skipped (\d+) evaluation examples of more than 33 tokens$", shown, re.MULTILINE)[1])
    assert 0 < left_out == 10 - int(re.search(r"all +(\d+)", shown)[1])


def test_evaluate_measures_the_evaluations_of_a_config_too(config_file, capsys):
    text = config_file.read_text().replace("AdapterSettings, Config", "AdapterSettings, EvaluationSettings, Config")
    harder = "EvaluationSettings('harder', 'mathematics', modules=('arithmetic__mul',), difficulty=(3,), examples=12)"
    file = config_file.with_name("others.py")
    file.write_text(text.replace('name="tiny",', f'name="tiny", evaluations=({harder},),'))
    call("evaluate", file, "--json")
    found = json.loads(capsys.readouterr().out)
    harder = found["others"]["harder"]
    assert (harder["score"], list(harder["modules"])) == ("exact match", ["arithmetic__mul", "all"])
    assert harder["modules"]["all"]["examples"] == 12
    assert harder["modules"]["all"]["evaluation_loss"] != found["modules"]["all"]["evaluation_loss"]
    call("evaluate", file)
    shown = capsys.readouterr().out
    assert "harder: " in shown
    assert f"{harder['modules']['all']['evaluation_loss']:.4f}" in shown
    call("evaluate", config_file, "--json")
    without = json.loads(capsys.readouterr().out)
    assert without == found | {"others": {}}


def test_mistakes_of_evaluate_and_generate(model_folder, config_file, fails, monkeypatch):
    assert "evaluate needs a config file" in fails("evaluate")
    assert "--adapter needs a PEFT folder" in fails("evaluate", config_file, "--adapter")
    assert "has no --output" in fails("evaluate", config_file, "--output", "x")
    assert "did you mean data.length" in fails("evaluate", config_file, "--data.lenght", "3")
    file = config_file.with_name("swept.py")
    file.write_text(config_file.read_text() + "sweep = {'data.length': (40, 60)}\n")
    assert "the config sweeps data.length; choose one with --data.length" in fails("evaluate", file)
    file.write_text(config_file.read_text() + "sweep = {'evaluations': ((),)}\n")
    assert "the config sweeps evaluations; it must have one value" in fails("evaluate", file)
    assert "--max-new-tokens must be at least 1" in fails(
        "generate", model_folder, "--prompt", "x", "--max-new-tokens", "0"
    )
    assert "--temperature must be at least 0, got -1" in fails(
        "generate", model_folder, "--prompt", "x", "--temperature", "-1"
    )
    assert "--tokenizer: no-such must be a model folder" in fails(
        "generate", model_folder, "--prompt", "x", "--tokenizer", "no-such"
    )
    assert "printable ASCII" in fails("generate", model_folder, "--prompt", "π")
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert "the standard input holds no texts" in fails("generate", model_folder)
    assert "--chat: the tokenizer of single characters has no chat template" in fails(
        "generate", model_folder, "--prompt", "x", "--chat"
    )
    assert "--system needs --chat" in fails("generate", model_folder, "--prompt", "x", "--system", "be kind")


def test_numbers_that_are_not_finite_are_said(model_folder, config_file, fails, tmp_path):
    shutil.copytree(model_folder, tmp_path / "nan")
    tensors = load_file(tmp_path / "nan" / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name][3, 4] = np.nan
    save_file(tensors, tmp_path / "nan" / "model.safetensors")
    assert f"must be finite, got nan; the weight {name} holds" in fails(
        "evaluate", config_file, "--model.path", tmp_path / "nan"
    )
    assert f"the logits of the model must be finite; the weight {name} holds" in fails(
        "generate", tmp_path / "nan", "--prompt", "What is 3 + 4?", "--max-new-tokens", "12"
    )


def test_lapack_is_told_of_one_thread_before_it_is_loaded():
    run_alone(
        """
        import os, sys
        from balora_jax.cli import main
        os.environ.pop("OPENBLAS_NUM_THREADS", None)
        assert main(["--help"]) == 0
        assert os.environ["OPENBLAS_NUM_THREADS"] == "1"
        assert "scipy.linalg" not in sys.modules, "its OpenBLAS has read the variable"
        """
    )


HEAVY = "jax", "flax", "optax", "datasets", "orbax", "grain", "matplotlib", "transformers"
CHEAP = {
    "help": ([], 2),
    "version": (["--version"], 0),
    "unknown command": (["trian"], 2),
    **{f"help of {command}": ([command, "--help"], 0) for command in _COMMANDS},
    "run without a config": (["run"], 2),
    "missing config": (["run", "nowhere.py"], 2),
    "unknown field": (["run", "{config}", "--adapter.rnk", "3"], 2),
    **{
        f"field of {command} out of range": ([command, "{config}", "--adapter.rank", "0"], 2)
        for command in ("run", "estimate", "evaluate")
    },
    "unknown method": (["run", "{config}", "--method", "loro_"], 2),
    "bad type": (["evaluate", "{config}", "--adapter.rank", "x"], 2),
    "help of a config": (["run", "{config}", "--help"], 0),
    "missing adapter of evaluate": (["evaluate", "{config}", "--adapter", "nowhere"], 2),
    "missing run": (["export", "nowhere", "out"], 2),
    "missing adapter of inspect": (["inspect", "nowhere"], 2),
    "missing adapter of balance": (["balance", "nowhere", "out"], 2),
    "missing adapter of merge": (["merge", "school-math", "nowhere", "out"], 2),
    "missing model": (["generate", "nowhere", "--prompt", "x"], 2),
    "wrong flag": (["inspect", "nowhere", "--figur", "x"], 2),
    "unknown log": (["run", "{config}", "--log", "x"], 2),
    "no run to compare": (["compare", "none"], 2),
    "no run to report": (["report"], 2),
}


def test_cheap_mistakes_and_help_import_nothing_heavy(config_file):
    run_alone(
        f"""
        import contextlib, io, sys
        from balora_jax.cli import main
        for name, (arguments, code) in {CHEAP!r}.items():
            arguments = [argument.format(config={str(config_file)!r}) for argument in arguments]
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                try:
                    found = main(arguments)
                except SystemExit as end:
                    found = end.code or 0
            assert found == code, (name, found, out.getvalue())
            heavy = sys.modules.keys() & set({HEAVY!r})
            assert not heavy, (name, heavy)
        """
    )


def test_help_of_run_lists_every_field(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["run", "--help"])
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in shown for name in field_names() if name != "evaluations")
    assert "--output" in shown


def test_usage_names_every_command(capsys):
    assert main(["--help"]) == 0
    named = re.findall(r"^  ([\w-]+)(?: [A-Z]+.*)?$", capsys.readouterr().out, re.MULTILINE)
    assert named == list(_COMMANDS)
