"""Configs: files, sweeps, overrides, and the one-line errors of the command line."""

import dataclasses
import re
import time

import pytest

from balora_jax.cli import main
from balora_jax.commands.arguments import apply_overrides
from balora_jax.training import Config, ConfigError, load_config
from balora_jax.training.checks import check
from balora_jax.training.config import expand
from balora_jax.training.fields import field_names, get_field, with_field

BASE = Config(name="test")


def write(folder, text):
    file = folder / "config.py"
    file.write_text(text)
    return file


HEAD = "from balora_jax.training import *\n"


def test_load_config(tmp_path):
    file = write(tmp_path, HEAD + "config = Config(name='x', method='balora')\nsweep = {'seed': (0, 1)}\n")
    assert load_config(file) == (Config(name="x", method="balora"), {"seed": (0, 1)})


def test_expand_takes_all_combinations_of_each_mapping():
    sweep = [{"method": ("lora",), "seed": (0, 1)}, {"method": ("balora",), "adapter.rank": (2, 4)}]
    runs = expand(BASE, sweep)
    assert [(r.method, r.seed, r.adapter.rank) for r in runs] == [
        ("lora", 0, 8),
        ("lora", 1, 8),
        ("balora", 0, 2),
        ("balora", 0, 4),
    ]
    assert expand(BASE, {}) == (BASE,)


def test_fields_by_dotted_names():
    assert "optimizer.learning_rate" in field_names()
    assert "optimizer" not in field_names()
    changed = with_field(BASE, "optimizer.b1", 0.5)
    assert get_field(changed, "optimizer.b1") == 0.5
    assert changed == dataclasses.replace(BASE, optimizer=dataclasses.replace(BASE.optimizer, b1=0.5))


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        (["--optimizer.learning_rate", "3e-2"], "optimizer.learning_rate", 3e-2),
        (["--optimizer.learning-rate=3e-2"], "optimizer.learning_rate", 3e-2),
        (["--data.modules", "a", "b"], "data.modules", ("a", "b")),
        (["--data.no-packing"], "data.packing", False),
        (["--optimizer.clip_norm", "None"], "optimizer.clip_norm", None),
        (["--method", "balora"], "method", "balora"),
    ],
)
def test_override_sets_the_field_and_takes_it_out_of_the_sweep(flags, field, value):
    sweep = {field: (get_field(BASE, field),), "seed": (0, 1)}
    config, remaining = apply_overrides(BASE, sweep, flags)
    assert get_field(config, field) == value
    assert config == with_field(BASE, field, value)
    assert expand(config, remaining) == expand(config, {"seed": (0, 1)})


def test_override_of_a_field_that_distinguishes_mappings_merges_them():
    sweep = [{"method": ("lora",), "seed": (0,)}, {"method": ("balora",), "seed": (0,)}]
    _, remaining = apply_overrides(BASE, sweep, ["--method", "rslora"])
    assert remaining == [{"seed": (0,)}]


def test_an_override_picks_the_mappings_that_hold_its_value():
    sweep = [
        {"method": ("lora", "dora"), "optimizer.learning_rate": (0.1, 0.2), "seed": (0, 1)},
        {"method": ("olora",), "optimizer.learning_rate": (0.01, 0.02), "seed": (0, 1)},
    ]
    flags = ["--method", "olora", "--optimizer.learning-rate", "0.02"]
    config, remaining = apply_overrides(BASE, sweep, flags)
    assert [(r.method, r.optimizer.learning_rate, r.seed) for r in expand(config, remaining)] == [
        ("olora", 0.02, 0),
        ("olora", 0.02, 1),
    ]
    _, remaining = apply_overrides(BASE, sweep, ["--method", "olora"])
    assert remaining == [{"optimizer.learning_rate": (r,), "seed": (s,)} for r in (0.01, 0.02) for s in (0, 1)]
    _, remaining = apply_overrides(BASE, sweep, ["--method", "olora", "--seed", "7"])
    assert remaining == [{"optimizer.learning_rate": (rate,)} for rate in (0.01, 0.02)], "also beside another value"
    _, remaining = apply_overrides(BASE, sweep, ["--optimizer.learning-rate", "0.5"])
    assert [choice["method"] for choice in remaining] == [("lora",)] * 2 + [("dora",)] * 2 + [("olora",)] * 2


def test_runs_that_an_override_makes_equal_are_one():
    """One mapping holds the other's runs once the field that told them apart is set."""
    sweep = [{"method": ("lora",), "seed": (0, 1)}, {"method": ("balora",), "adapter.rank": (4, 8), "seed": (0, 1)}]
    base = with_field(BASE, "adapter.rank", 8)
    config, remaining = apply_overrides(base, sweep, ["--method", "balora"])
    runs = expand(config, remaining)
    assert sorted((run.adapter.rank, run.seed) for run in runs) == [(4, 0), (4, 1), (8, 0), (8, 1)]
    with pytest.raises(ConfigError, match="twice"):
        expand(base, [{"seed": (0,)}, {"seed": (0, 1)}])


BAD_FIELDS = [
    ("method", "loora", "method must be one of .*did you mean 'lora'"),
    ("adapter.rank", 0, "adapter.rank must be at least 1, got 0"),
    ("adapter.rank", "8", "adapter.rank must be of type int, got '8'"),
    ("adapter.rank", True, "adapter.rank must be of type int, got True"),
    ("adapter.dropout", 1.0, "adapter.dropout must be at least 0 and below 1"),
    ("optimizer.learning_rate", float("nan"), "optimizer.learning_rate must be at least 0 and finite, got nan"),
    ("optimizer.learning_rate", float("inf"), "optimizer.learning_rate must be at least 0 and finite, got inf"),
    ("optimizer.schedule", "cos", "optimizer.schedule must be of type .*got 'cos'"),
    ("optimizer.clip_norm", 0.0, "optimizer.clip_norm must be positive or None"),
    ("training.steps", 0, "training.steps must be at least 1"),
    ("optimizer.warmup_steps", 1000, r"optimizer.warmup_steps must be below training.steps \(1000\)"),
    ("data.modules", ["a"], "data.modules must be of type tuple"),
    ("data.difficulty", (1, "2"), "data.difficulty must be of type tuple"),
    ("seed", -1, "seed must be from 0"),
    ("options", (("a", 1.0),), r"options must be of type .*Mapping\[str, float\], got"),
    ("options", {"a": [1.0]}, r"options must be of type .*Mapping\[str, float\], got"),
    ("data.modules", ("a", "b", "b", "b"), "data.modules must name everything once, got 'b' 3 times"),
    ("data.seed", -1, "data.seed must be from 0"),
    ("training.steps", 2**40, "training.steps must be at most 2,147,483,647, got 1,099,511,627,776"),
    ("data.length", 10**12, "data.length must be at most"),
    ("data.train_examples", 10**15, "data.train_examples must be at most"),
    ("training.max_new_tokens", 2**31, "training.max_new_tokens must be at most"),
    ("balance.start_step", 2**31, "balance.start_step must be at most"),
    ("optimizer.learning_rate", 10**400, r"optimizer.learning_rate must be within .*got 10+\.\.\."),
    ("optimizer.learning_rate", 1e39, r"optimizer.learning_rate must be within .* 2\*\*128 .*got 1e\+39"),
    ("adapter.alpha", -(10**400), "adapter.alpha must be within"),
    ("adapter.rank", 10**400, "adapter.rank must be within"),
    ("data.difficulty", (1, 10**30), "data.difficulty must be within"),
    ("options", {"x": 10**400}, "options must be within"),
    ("options", {"x": float("inf")}, "options: x must be finite"),
]


@pytest.mark.parametrize(("field", "value", "message"), BAD_FIELDS)
def test_check_names_the_field(field, value, message):
    check(BASE)
    with pytest.raises(ConfigError, match=message):
        check(with_field(BASE, field, value))


@pytest.mark.parametrize(
    ("method", "name", "value", "message"),
    [
        (
            "scaled_gd",
            "weight_decay",
            0.1,
            r"optimizer\.weight_decay plays no part in scaled_gd and must be left at 0\.01",
        ),
        (
            "balora_gd",
            "weight_decay",
            0.1,
            r"optimizer\.weight_decay plays no part in balora_gd and must be left at 0\.01",
        ),
        ("balora_gd", "b1", 0.5, r"optimizer\.b1 plays no part in balora_gd and must be left at 0\.9, got 0\.5$"),
        (
            "lora_rite",
            "clip_norm",
            None,
            r"optimizer\.clip_norm plays no .*got None; its own clip_norm is among its options",
        ),
        ("galore", "eps", 1e-3, r"optimizer\.eps plays no part in galore .*; its own eps is among its options"),
    ],
)
def test_settings_that_a_method_does_not_read_are_refused(method, name, value, message):
    config = with_field(BASE, "method", method)
    check(with_field(config, "optimizer.weight_decay", 0.0))
    check(with_field(BASE, f"optimizer.{name}", value))
    with pytest.raises(ConfigError, match=message):
        check(with_field(config, f"optimizer.{name}", value))


def test_a_number_that_has_no_text():
    for value in (10**5000, (10**5000,)):
        with pytest.raises(ConfigError, match=r"optimizer.learning_rate must be .*got a \w+ that has no text"):
            check(with_field(BASE, "optimizer.learning_rate", value))


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"optimizer.lr": (1,)}, "there is no field optimizer.lr"),
        ({"adapter.rnk": (1,)}, "did you mean adapter.rank"),
        ({"seed": 3}, "seed must have a sequence of values, got 3"),
        ({"method": "lora"}, "method must have a sequence of values"),
        ({"seed": ()}, "seed must have a sequence of values"),
        ({"seed": (1, 1)}, "holds a run twice"),
        ([("seed", (1,))], "must map field names"),
        ({"seed": range(15_000_000)}, "sweep must hold at most 100000 runs, got 15000000 of seed"),
        (
            {"seed": range(2**80), "adapter.rank": (1, 2)},
            "at most 100000 runs, .* of seed, adapter.rank",
        ),
        ([{"seed": (i,)} for i in range(100_001)], "sweep must hold at most 100000 runs"),
        ({"data.modules": (["a"], ["b"])}, r"sweep: data.modules must have texts, numbers or tuples, got \['a'\]"),
        ({"data.modules": ((["a"],),)}, r"sweep: data.modules must have texts, numbers or tuples, got \(\['a'\],\)"),
        (
            {"method": ("lora", "scaled_gd"), "optimizer.weight_decay": (0.0, 0.01)},
            "sweep: optimizer.weight_decay plays no part in scaled_gd",
        ),
    ],
)
def test_bad_sweeps(sweep, message):
    with pytest.raises(ConfigError, match=message):
        expand(BASE, sweep)


def test_a_large_sweep_takes_seconds_and_is_checked_to_its_last_run():
    sweep = {"seed": range(5_000), "adapter.rank": (4, 8)}
    start = time.process_time()
    assert len(set(expand(BASE, sweep))) == 10_000
    assert time.process_time() - start < 5
    for last in (None, True, "8"):
        with pytest.raises(ConfigError, match=r"adapter.rank must be of type int"):
            expand(BASE, {"seed": range(100), "adapter.rank": (4, last)})


COMMAND_LINES = {
    "no such command": (["trian"], "unknown command 'trian'"),
    "no config": (["run"], "run needs a config file"),
    "missing file": (["run", "{folder}/confg.py"], "did you mean .*config.py"),
    "unknown field": (["run", "{file}", "--optimizer.lerning_rate", "1"], "did you mean optimizer.learning_rate"),
    "field of another part": (["run", "{file}", "--learning_rate", "1"], "did you mean optimizer.learning_rate"),
    "unknown method": (["run", "{file}", "--method", "balra"], "did you mean 'balora'"),
    "bad type": (["run", "{file}", "--adapter.rank", "many"], "--adapter.rank.*'many'"),
    "flag with a value": (["run", "{file}", "--data.packing", "False"], "write --data.packing or --data.no-packing"),
    "flag with a sign": (["run", "{file}", "--model.remat=True"], "model.remat takes no value; write --model.remat or"),
    "no value": (["run", "{file}", "--adapter.rank"], "--adapter.rank"),
    "bad choice": (["run", "{file}", "--optimizer.schedule", "cos"], "'constant', 'linear', 'cosine'"),
    "rank zero": (["run", "{file}", "--adapter.rank", "0"], "adapter.rank must be at least 1, got 0"),
    "rank above the matrix": (["run", "{file}", "--adapter.rank", "17"], r"_proj: rank must be from 1 to 16 .*got 17"),
    "unknown layer": (["run", "{file}", "--adapter.targets", "gat_proj"], "did you mean 'gate_proj'"),
    "missing model": (["run", "{file}", "--model.path", "nowhere"], "model.path: nowhere must be a model folder"),
    "missing data": (["run", "{file}", "--data.path", "nowhere"], "data.path: no folder nowhere"),
    "unknown module": (["run", "{file}", "--data.modules", "algebra"], "data: .*'algebra'"),
    "unknown recipe": (["run", "{file}", "--data.recipe", "mathematic"], "did you mean 'mathematics'"),
    "too long": (["run", "{file}", "--data.length", "4"], r"\(data.length\) must leave at least one example, got 4"),
    "output without a folder": (["run", "{file}", "--output"], "--output needs a folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", COMMAND_LINES)
def test_wrong_command_lines_give_one_line_and_exit_code_2(case, config, tmp_path, capsys):
    arguments, message = COMMAND_LINES[case]
    imports = (
        "from balora_jax.data.recipes import DataSettings\n"
        "from balora_jax.optimizers import OptimizerSettings\n"
        "from balora_jax.training import BalanceSettings, ParallelSettings\n"
    )
    file = write(tmp_path, f"{HEAD}{imports}config = {config!r}\n")
    arguments = [a.format(file=file, folder=tmp_path) for a in arguments]
    if "--output" not in arguments and arguments[-1] != "run" and len(arguments) > 2:
        arguments += ["--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("balora-jax: error: ")
    assert captured.err.count("\n") == 1
    assert re.search(message, captured.err), captured.err
    assert not (tmp_path / "out").exists(), "a wrong command leaves nothing behind"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config = 3", "must set `config`"),
        (HEAD + "config = Config(name='x', optimzer=3)", "did you mean 'optimizer'"),
        (HEAD + "config = Config(name='x', steps=3)", "keyword argument 'steps'; did you mean training.steps"),
        (HEAD + "config = Config(name='x', training=TrainingSettings(stpes=3))", "did you mean 'steps'"),
        (HEAD + "config = Config(name='x', training=TrainingSettings(lenght=3))", "did you mean data.length"),
        (HEAD + "config = 10**5000", "must set `config` .*got a int that has no text"),
        (HEAD + "config = Config()", "missing 1 required positional argument: 'name'"),
        ("import nonsense_module", "No module named 'nonsense_module'"),
        ("config = (", "SyntaxError"),
        ("raise SystemExit(0)", "fails: SystemExit"),
        (HEAD + "config = Config(name='x')\nsweep = 3", "sweep must map field names to values.*got 3"),
        (HEAD + "config = Config(name='x')\nsweep = ['seed']", "sweep must map field names to values"),
    ],
)
def test_wrong_config_files(text, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))
