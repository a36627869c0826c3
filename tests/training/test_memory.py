"""What can never fit is refused before it is tried, and what may fit is not."""

import re

import pytest

from balora_jax.cli import main
from balora_jax.models.config_json import read_config
from balora_jax.training import ConfigError
from balora_jax.training.memory import NO_MACHINE, check_answers, check_step, memory_limit

GIB = 2**30


@pytest.fixture(scope="module")
def model(model_folder):
    """Two heads; two layers with one head of keys of 8 numbers in float32, so that a token takes 128 bytes."""
    return read_config(model_folder)


def test_memory_of_a_step(members, model):
    config = members(training__batch_size=4, training__accumulate=2, training__members_at_once=1)
    # 3 x 2 x 4 x 1000 tokens of 13 bytes, and for one run 4 x 2 heads x 1000 x 1000 / 8 scores of 4 bytes
    check_step(config, model, members=3, length=1000, limit=4_000_000)
    with pytest.raises(ConfigError, match=r"3 x 2 x 4 rows of 1000 tokens needs .*make data.length, .* smaller"):
        check_step(config, model, members=3, length=1000, limit=3_999_999)
    check_step(config, model, members=3, length=10, limit=3 * 2 * 4 * 10 * 13)
    with pytest.raises(ConfigError, match="a step of"):
        check_step(config, model, members=3, length=10, limit=3 * 2 * 4 * 10 * 13 - 1)


def test_memory_of_answers(model):
    settings = {"rows": 3, "prompt": 10, "field": "--x"}
    check_answers(model, **settings, new_tokens=90, limit=3 * 100 * 2 * 2 * 8 * 4)
    with pytest.raises(ConfigError, match=r"answering 3 prompts of 10 tokens with 90 each .*make --x smaller"):
        check_answers(model, **settings, new_tokens=90, limit=3 * 100 * 2 * 2 * 8 * 4 - 1)


def test_this_machine_has_memory():
    assert GIB < memory_limit() < NO_MACHINE


REFUSED = {
    "run": {
        "--data.length 2000000000": "a step of .* rows of 2000000000 tokens",
        "--training.batch-size 2000000000": "a step of 1 x 1 x 2000000000 rows",
        "--training.accumulate 2000000000": "a step of 1 x 2000000000 x 2 rows",
        "--training.max-new-tokens 2000000000": "answering .* make training.max_new_tokens",
        "--data.train-examples 2000000000": "data.train_examples must be at most 10000000",
        "--data.eval-examples 2000000000": "data.eval_examples must be at most 10000000",
    },
    "estimate": {"--data.length 2000000000": "a step of .* rows of 2000000000 tokens"},
    "evaluate": {"--training.max-new-tokens 2000000000": "answering .* make training.max_new_tokens"},
}
CASES = [(command, flags) for command, refused in REFUSED.items() for flags in refused]


@pytest.mark.parametrize(("command", "flags"), CASES)
def test_numbers_that_no_machine_has(command, flags, config, tmp_path, capsys):
    imports = "from balora_jax.data.recipes import DataSettings\nfrom balora_jax.optimizers import OptimizerSettings\n"
    (tmp_path / "x.py").write_text(f"from balora_jax.training import *\n{imports}config = {config!r}\n")
    output = ["--output", str(tmp_path / "out")] if command == "run" else []
    assert main([command, str(tmp_path / "x.py"), *flags.split(), *output]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert re.search(REFUSED[command][flags], err), err
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_too_long_to_answer(model_folder, capsys):
    flags = ["--prompt", "x", "--max-new-tokens", "2000000000"]
    assert main(["generate", str(model_folder), *flags]) == 2
    assert "with 2000000000 each needs at least" in capsys.readouterr().err
