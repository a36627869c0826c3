"""The wheel holds what the package needs, and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built by setuptools alone, from a copy, without a network."""
    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip(f"building needs setuptools 77, and {version('setuptools')} is installed")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "balora_jax", source / "balora_jax", ignore=shutil.ignore_patterns("__pycache__"))
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(out)!r})"
    built = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False, timeout=120
    )
    assert built.returncode == 0, built.stderr
    (file,) = out.iterdir()
    return zipfile.ZipFile(file)


def test_it_holds_every_file_of_the_package(wheel):
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "balora_jax").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == files
    assert {"balora_jax/py.typed", "balora_jax/models/pretrained/school-math/model.safetensors"} <= files


def test_it_says_what_it_is(wheel):
    (metadata,) = (wheel.read(name).decode() for name in wheel.namelist() if name.endswith("METADATA"))
    for line in ("Name: balora-jax", "License-Expression: Apache-2.0", "Requires-Python: >=3.11", "Project-URL: Paper"):
        assert f"\n{line}" in metadata
    (scripts,) = (wheel.read(name).decode() for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "balora-jax = balora_jax.cli:main" in scripts
