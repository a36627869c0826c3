"""Random configs: each is refused with the name of a field, or is run as it is and comes back from its JSON."""

import dataclasses
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Union, get_args, get_origin

import hypothesis
import numpy as np
from hypothesis import strategies as st

from balora_jax.methods import METHODS
from balora_jax.training import Config, ConfigError
from balora_jax.training.config import expand
from balora_jax.training.fields import field_types, from_json, get_field, hints, with_fields

BASE = Config(name="test")
FIELDS = field_types(Config)

ODD_NUMBERS = [0, -1, 1, 2, 1.0, -0.0, 0.5, 2**31 - 1, 2**31, 2**32, 2**63, -(2**63), 10**400, 10**5000]
ODD_NUMBERS += [1e-320, 1e38, 1e39, 1e300, float("nan"), float("inf"), -float("inf"), 3 + 0j, True]
ODD_NUMBERS += [np.float32(1), np.int64(3), np.float64(0.1)]
ODD_TEXTS = ["", " ", ".", "..", "a/b", "/etc", "~", "\0", "a\nb", "[/x]", "\x1b[2J", "é\ud800", "x" * 300, "lora"]
ODD_OTHERS = [None, b"a", [], [1], {}, {"a": 1}, {1, 2}, object(), int, np.ones(2), lambda: 0, (), ((),), (1,), ("a",)]
odd = st.one_of(
    st.sampled_from(ODD_NUMBERS + ODD_TEXTS + ODD_OTHERS),
    st.recursive(
        st.none() | st.integers() | st.floats() | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=3).map(tuple) | st.lists(inner, max_size=3),
        max_leaves=5,
    ),
)


def fitting(hint):
    """Values of a field's type, most of them of a usual size."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return st.one_of(*map(fitting, args))
    if origin is Literal:
        return st.sampled_from(args)
    if origin is tuple and args[-1] is ...:
        return st.lists(fitting(args[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(fitting, args))
    if origin is Mapping:
        return st.dictionaries(*map(fitting, args), max_size=3)
    if dataclasses.is_dataclass(hint):
        return st.builds(hint, **{name: fitting(kind) for name, kind in hints(hint).items()})
    return {
        int: st.integers(-3, 200) | st.integers(),
        float: st.floats(0, 1) | st.floats(),
        bool: st.booleans(),
        str: st.text(max_size=9) | st.sampled_from(ODD_TEXTS),
        types.NoneType: st.none(),
    }[hint]


@st.composite
def changes(draw):
    """Values for some fields, and for the method's options."""
    names = draw(st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=3, unique=True))
    values = {name: draw(fitting(FIELDS[name]) if draw(st.integers(0, 2)) else odd) for name in names}
    if draw(st.booleans()):
        values["method"] = draw(st.sampled_from(sorted(METHODS)))
        if (options := sorted(METHODS[values["method"]].all_options)) and draw(st.booleans()):
            number = fitting(float) | fitting(int) | odd
            values["options"] = {name: draw(number) for name in options[: draw(st.integers(1, len(options)))]}
    return values


def check(values):
    try:
        (config,) = expand(with_fields(BASE, values), {})
    except ConfigError as error:
        message = str(error)
        assert any(name in message for name in values), message
        assert len(message) < 1000
        return
    assert {name: get_field(config, name) for name in values} == values
    assert Path(config.name).name == config.name
    assert from_json(Config, json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert hash(config) == hash(dataclasses.replace(config))


@hypothesis.settings(max_examples=400, derandomize=True, deadline=None, database=None)
@hypothesis.given(changes())
def test_configs_are_refused_by_a_field_or_come_back(values):
    check(values)


def test_every_field_with_every_odd_value():
    for name in FIELDS:
        for value in ODD_NUMBERS + ODD_TEXTS + ODD_OTHERS:
            check({name: value})
