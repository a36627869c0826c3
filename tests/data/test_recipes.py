"""Data sets by name."""

import dataclasses

import pytest

from balora_jax.data.recipes import DataSettings, load

SETTINGS = DataSettings(modules=("numbers__gcd", "arithmetic__mul"), train_examples=20, eval_examples=6)


def test_generated():
    splits = load(SETTINGS)
    assert len(splits.train) == 20
    assert len(splits.evaluation) == 6
    assert set(splits.train["module"]) == set(SETTINGS.modules)
    assert not set(splits.train["prompt"]) & set(splits.evaluation["prompt"])
    assert all(prompt.endswith(" ") for prompt in splits.train["prompt"])


@pytest.fixture
def published(tmp_path):
    for split in ("train-easy", "train-medium", "train-hard", "interpolate"):
        (tmp_path / split).mkdir()
        for module in ("algebra__linear_1d", "numbers__gcd"):
            lines = [line for i in range(9) for line in (f"{split} question {i} of {module}?", str(i))]
            (tmp_path / split / f"{module}.txt").write_text("\n".join(lines) + "\n")
    with (tmp_path / "train-easy" / "numbers__gcd.txt").open() as file:
        first = file.readline()
    held_out = tmp_path / "interpolate" / "numbers__gcd.txt"
    held_out.write_text(first + "7\n" + held_out.read_text())
    return tmp_path


def test_published_files_by_the_same_name(published):
    settings = DataSettings(path=str(published), train_examples=30, eval_examples=8)
    splits = load(settings)
    assert set(splits.train["module"]) == {"algebra__linear_1d", "numbers__gcd"}
    assert len(splits.evaluation) == 8
    assert len(splits.train) == 29, "the question that is also an evaluation question is left out"
    assert not set(splits.train["prompt"]) & set(splits.evaluation["prompt"])
    one = load(dataclasses.replace(settings, modules=("numbers__gcd",)))
    assert set(one.train["module"]) == {"numbers__gcd"}


def test_errors_name_what_is_wrong(published):
    with pytest.raises(ValueError, match="did you mean 'mathematics'"):
        load(dataclasses.replace(SETTINGS, recipe="mathmatics"))
    with pytest.raises(FileNotFoundError, match="numbers__lcm"):
        load(DataSettings(path=str(published), modules=("numbers__lcm",)))
