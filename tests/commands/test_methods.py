"""`balora-jax methods`: every method with its source and its own options."""

import pytest

from balora_jax.cli import main
from balora_jax.commands.methods import split_source
from balora_jax.methods import METHODS


def test_every_method_is_listed_with_its_options(capsys):
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines if line.startswith("  ") and line[2:3].strip()]
    assert names[1:] == list(METHODS)
    said = " ".join(" ".join(lines).split())
    for method in METHODS.values():
        for option, value in method.defaults.items():
            assert f"{option} {value:g}" in said or f"{option}" in said.split(), (option, value)
    assert "ratio 16" in said


def test_a_method_and_what_its_options_do(capsys):
    assert main(["methods", "balora_ga"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "balora_ga: BaLoRA from LoRA-GA's start (arXiv 2605.31484)"
    assert "gamma 16: the larger, the smaller the start" in lines
    assert main(["methods", "lora"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "no options of its own"


@pytest.mark.parametrize(
    ("summary", "parts"),
    [
        ("B learns faster than A (arXiv 2402.12354)", ("B learns faster than A", "arXiv 2402.12354")),
        ("LoRA+, balanced", ("LoRA+, balanced", "")),
        ("scale (alpha) / rank (ICLR 2025)", ("scale (alpha) / rank", "ICLR 2025")),
    ],
)
def test_sources_are_taken_from_the_summaries(summary, parts):
    assert split_source(summary) == parts


def test_mistakes(fails):
    assert "did you mean 'balora'" in fails("methods", "balorra")
