"""The core needs jax and optax alone."""

import subprocess
import sys
from importlib.metadata import version

from processes import run_alone

import balora_jax

HEAVY = ("flax", "datasets", "transformers", "orbax", "grain", "matplotlib", "tyro")


def test_core_imports_and_works_without_the_heavy_packages():
    code = f"""
import sys
for name in {HEAVY}: sys.modules[name] = None
import jax.numpy as jnp, optax
from balora_jax import *
tx = optax.chain(optax.adam(0.1), balora_project())
params = {{"lora_a": jnp.eye(5, 2), "lora_b": 3 * jnp.eye(2, 4)}}
updates, _ = tx.update(params, tx.init(params), params)
print(float(balancing_gap(*optax.apply_updates(params, updates).values())))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 1e-5


def test_no_module_starts_a_backend():
    """Programs of several processes call `jax.distributed.initialize` after their imports, which is too late then."""
    code = """
import pkgutil, sys, balora_jax
from importlib import import_module
from jax._src.xla_bridge import backends_are_initialized
for module in pkgutil.walk_packages(balora_jax.__path__, "balora_jax."):
    import_module(module.name)
    assert not backends_are_initialized(), module.name
import jax
jax.config.update("jax_num_cpu_devices", 3)
print(len(jax.devices()))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert result.stdout == "3\n", result.stderr


def test_checking_a_config_starts_no_backend():
    """Processes connect with each other after that, and before a device is used."""
    run_alone(
        """
        from jax._src import xla_bridge
        from balora_jax.methods import METHODS
        from balora_jax.settings import Config
        from balora_jax.training.config import expand
        expand(Config(name="x"), {"method": tuple(METHODS)})
        assert not xla_bridge.backends_are_initialized()
        """
    )


def test_public_names_exist():
    assert all(hasattr(balora_jax, name) for name in balora_jax.__all__)
    assert list(balora_jax.__all__) == sorted(balora_jax.__all__, key=lambda n: (not n.isupper(), n[0].islower(), n))


def test_the_version_is_that_of_the_installation():
    assert balora_jax.__version__ == version("balora-jax")


def test_what_only_some_systems_have_is_not_needed():
    """Windows has no limits of resources, no timers, no locks of this kind and no such flag of `open`."""
    code = """
import os, signal, sys, tempfile
from pathlib import Path
import balora_jax.training.run  # with all libraries, which have modules for other systems
for name in [name for name in sys.modules if name.startswith("balora_jax")] + ["resource", "fcntl"]:
    del sys.modules[name]
sys.modules["resource"] = sys.modules["fcntl"] = None
for module, names in ((signal, ("setitimer", "SIGVTALRM", "ITIMER_VIRTUAL")), (os, ("O_NOFOLLOW", "sysconf"))):
    for name in names:
        delattr(module, name)
from balora_jax.limits import compiled, limited
from balora_jax.training.config import Config
from balora_jax.training.memory import memory_limit
from balora_jax.training.records import RunDirectory
assert compiled("a+").fullmatch("aa")
with limited(seconds=1, memory=2**20):
    pass
assert memory_limit() > 2**30
directory = RunDirectory(Path(tempfile.mkdtemp()), {"lora": Config(name="x")})
directory.append([{"kind": "checkpoint", "population": "lora", "step": 1}])
directory.close()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
