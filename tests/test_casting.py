"""Casts to a narrower dtype, over numbers of every size."""

import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balora_jax.casting import check_cast, largest

DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in ("float64", "float32", "bfloat16", "float16")}
FLOATS = st.floats() | st.floats(-1e39, 1e39) | st.floats(-1e5, 1e5)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(numbers=st.lists(FLOATS, min_size=1, max_size=4), source=st.sampled_from(list(DTYPES)), data=st.data())
def test_what_a_cast_makes_infinite_is_refused_and_nothing_else(numbers, source, data):
    target = data.draw(st.sampled_from(list(DTYPES)))
    with np.errstate(over="ignore"):
        before = np.array(numbers).astype(DTYPES[source])
        after = before.astype(DTYPES[target])
    lost = [float(b) for b, a in zip(before, after, strict=True) if np.isfinite(b) and not np.isfinite(a)]
    if not lost:
        return check_cast("x", before, after)
    with pytest.raises(ValueError, match=rf"^x holds {re.escape(f'{lost[0]:g}')}, .* {target}, ") as error:
        check_cast("x", before, after)
    offered = re.findall(r"\w*float\d+", str(error.value).partition("choose")[2])
    assert all(abs(lost[0]) <= largest(dtype) for dtype in offered)
    assert target not in offered


def test_arrays_of_jax_are_checked_too():
    numbers = jnp.array([[1.0, -1e5], [2.0, 1e6]])
    check_cast("x", numbers, numbers.astype("bfloat16"))
    with pytest.raises(ValueError, match="x holds -100000, beyond the largest number of float16, 65504; choose the "):
        check_cast("x", numbers, numbers.astype("float16"))
