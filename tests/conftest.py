"""What all tests share: compiled programs are kept for the length of a session, also across processes."""

import os
import tempfile

# Many tests compile the same small programs. The variables are read when jax is imported, here and in subprocesses.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="balora-jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
