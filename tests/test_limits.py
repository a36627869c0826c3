"""Limits of time and memory: they stop what goes on, and leave everything else as it is."""

import re
import resource
import signal
import threading

import numpy as np
import pytest
from flax import nnx

from balora_jax.adapters import add_adapters
from balora_jax.adapters.peft import PeftAdapter
from balora_jax.limits import compiled, limited

ENDLESS = r"(\w+\.?)+!"
MODULE = "model.layers.1.a_module_of_a_long_name.gate_proj"


def state():
    return (
        signal.getsignal(signal.SIGVTALRM),
        signal.getitimer(signal.ITIMER_VIRTUAL),
        resource.getrlimit(resource.RLIMIT_AS),
    )


def test_a_block_is_stopped_and_everything_is_as_before():
    before = state()
    with limited(seconds=10, memory=2**30):
        assert len("x" * 10**6) == 10**6
    assert state() == before

    def go_on():
        while True:
            pass

    for work, error in (
        (go_on, TimeoutError),
        (lambda: "x" * 10**10, MemoryError),
        (lambda: 1 // 0, ZeroDivisionError),
    ):
        with pytest.raises(error), limited(seconds=0.05, memory=2**30):
            work()
        assert state() == before
    assert len(bytes(2**31)) == 2**31, "there is memory again"


def test_other_threads_can_use_it():
    found = []
    thread = threading.Thread(target=lambda: found.append(compiled("a+").fullmatch("aaa")))
    thread.start()
    thread.join()
    assert found[0]


@pytest.mark.parametrize("expression", ["(", "a{99999999999999999999}", "(" * 5000 + ")" * 5000, "*"])
def test_what_is_no_regular_expression(expression):
    with pytest.raises(ValueError, match="is no regular expression"):
        compiled(expression)


def test_odd_expressions_warn_nobody(recwarn):
    assert isinstance(compiled("[[x]"), re.Pattern)
    assert not recwarn


def config(**fields):
    return {"r": 3, "lora_alpha": 6, "target_modules": ["gate_proj"], **fields}


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("balora_jax.limits._MATCHING_SECONDS", 0.05)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"target_modules": ENDLESS}, "target_modules"),
        ({"target_modules": ".*.*.*.*.*.*.*.*.*.*!"}, "target_modules"),
        ({"exclude_modules": ENDLESS}, "exclude_modules"),
        ({"layers_to_transform": [1], "layers_pattern": ENDLESS}, "layers_pattern"),
    ],
)
def test_expressions_of_peft_that_backtrack_for_ever(fields, name):
    adapter = PeftAdapter(config(**fields), {})
    with pytest.raises(ValueError, match=rf"adapter_config.json: .*{name}.* takes more than 0.05 s to match"):
        adapter.targets([MODULE])


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_backtrack_for_ever(pattern):
    adapter = PeftAdapter(config(**{pattern: {rf"({ENDLESS})+x": 4}}), {})
    with pytest.raises(ValueError, match=rf"adapter_config.json: {pattern}: it takes more than 0.05 s"):
        adapter.scale("a." * 30 + MODULE)


@pytest.mark.parametrize(
    "fields", [{"rank_pattern": {"(?i)x": 4}}, {"layers_pattern": ["("]}, {"target_modules": "(" * 5000 + ")" * 5000}]
)
def test_expressions_that_fail_within_what_is_put_around_them(fields):
    with pytest.raises(ValueError, match=rf"adapter_config.json: {next(iter(fields))}: .* is no regular expression"):
        PeftAdapter(config(**fields), {})


@pytest.mark.usefixtures("impatient")
def test_targets_that_backtrack_for_ever():
    name = "a" * 40
    model = nnx.Dict({name: nnx.Linear(4, 4, rngs=nnx.Rngs(0))})
    with pytest.raises(ValueError, match=r"targets must be a regular expression .*takes more than 0.05 s to match"):
        add_adapters(model, targets="(a+)+!", rank=2, rngs=nnx.Rngs(0))


def test_layers_are_counted_behind_groups_of_the_pattern():
    fields = {"layers_to_transform": [1], "layers_pattern": ["(lay)(ers)"]}
    modules = [MODULE, MODULE.replace("1", "2")]
    assert PeftAdapter(config(**fields), {}).targets(modules) == {MODULE}


def test_modules_whose_numbers_are_none():
    a, b = "base_model.model.h.{}.x.lora_A.weight", "base_model.model.h.{}.x.lora_B.weight"
    numbers = ("10", "9", "²", "9" * 5000)
    tensors = {a.format(n): np.ones((2, 3)) for n in numbers} | {b.format(n): np.ones((4, 2)) for n in numbers}
    assert list(PeftAdapter(config(), tensors).pairs()) == [f"h.{n}.x" for n in ("9", "10", "9" * 5000, "²")]
