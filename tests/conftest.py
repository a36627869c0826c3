"""What all tests share: quick compilation, and compiled programs that are kept for the length of a session."""

import gc
import os
import signal
import tempfile
from pathlib import Path

import compilation

# The variables are read when jax is imported, here and in subprocesses. Many tests compile the same small programs.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="balora-jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

os.environ.setdefault("XLA_FLAGS", compilation.FLAGS)

# As `balora-jax` does. Two processes of tests on two cores would wait for each other's threads otherwise.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pymanopt.manifolds  # noqa: F401
import pytest

jax.config.update("jax_enable_x64", False)  # importing pymanopt turns it on, for all tests of the process
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs tests in the background has it ignored


SLOW = Path(__file__).with_name("slow.txt")


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="of each table of tests its first row, and none of slow.txt")


def pytest_collection_modifyitems(config, items):
    """Leaves out what is not quick, if that is asked for."""
    if not config.getoption("--quick"):
        return
    done = set(SLOW.read_text().splitlines())
    kept, left_out = [], []
    for item in items:
        table = item.nodeid.partition("[")[0]
        (left_out if table in done else kept).append(item)
        done.add(table)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs():
    """Thousands of programs in one process take gigabytes, and more memory maps than Linux allows: it would crash."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def float64():
    """Float64 for the length of a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def quick_compilation():
    """Programs compiled with next to no optimization, for tests where to compile is most of the work."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
