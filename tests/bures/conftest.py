"""The geometry is tested in float64."""

import jax
import pymanopt.manifolds  # noqa: F401
import pytest

jax.config.update("jax_enable_x64", False)  # importing pymanopt turns it on, for all tests of the process


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield
