"""What the pages say is so: their code runs, their commands exist, examples run, tables are those of the code."""

import ast
import contextlib
import importlib.util
import io
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path

import jax
import matplotlib
import pytest

from balora_jax.cli import main
from balora_jax.methods import METHODS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
OPTIONAL = {"equinox": "equinox", "keras": "keras", "sklearn": "scikit-learn", "tunix": "google-tunix"}  # who has them
PYTHON, SHELL = (re.compile(rf"^```{kind}\n(.*?)^```$", re.MULTILINE | re.DOTALL) for kind in ("python", "sh"))
CONFIGURED = ("run", "estimate", "evaluate")
TARGETS = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def sections(page):
    """The Python of each section of a page, by title: a section runs on its own, its blocks one after the other."""
    parts = re.split(r"^## (.*)$", page.read_text(), flags=re.MULTILINE)
    titled = zip(["top", *parts[1::2]], parts[::2], strict=True)
    return {title: "\n\n".join(PYTHON.findall(text)) for title, text in titled if PYTHON.search(text)}


CODE = [
    pytest.param(code, id=f"{page.relative_to(ROOT)}: {title}")
    for page in PAGES
    for title, code in sections(page).items()
]


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """In a folder of its own, without windows; programs that run for a moment are compiled as quickly as may be."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    matplotlib.use("Agg")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def skip_without(code):
    """Skips what needs a library that is not there."""
    for module in OPTIONAL.keys() & set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"this needs {OPTIONAL[module]}, which is not installed")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the libraries
@pytest.mark.parametrize("code", CODE)
def test_code_of_a_page_runs_and_prints_what_it_says(code):
    """A comment behind a `print` on a line of its own is what it prints."""
    skip_without(code)
    names, lines = {"__name__": "page"}, code.splitlines()
    for statement in ast.parse(code).body:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(ast.Module([statement], []), "page", "exec"), names)
        said = re.fullmatch(r"print\(.*\)  # (.*)", lines[statement.end_lineno - 1])
        if said:
            assert out.getvalue().rstrip() == said[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_a_page_exist(page, capsys):
    """With their flags, and the files, targets and extras that they name."""
    for line in "\n".join(SHELL.findall(page.read_text())).splitlines():
        command, *words = shlex.split(line, comments=True) or [""]
        if command == "balora-jax":
            config = [str(ROOT / words[1])] if words[0] in CONFIGURED else []
            for asked in ([], [words[0], *config]):
                with contextlib.suppress(SystemExit):
                    main([*asked, "--help"])
            shown = re.findall(r"--[\w.-]+", capsys.readouterr().out)
            assert {word for word in words if word.startswith("--")} <= set(shown), line
        elif command == "make":
            assert set(words) <= set(TARGETS), line
        elif command == "pip":
            named = [name for word in words if word.startswith(".[") for name in word[2:-1].split(",")]
            assert set(named) <= set(EXTRAS), line
        else:
            assert command in ("", "python", "sbatch", "source", "vllm"), line
        assert all((ROOT / word).exists() for word in words if word.endswith(".py")), line


OUTCOMES = {
    "curvature": lambda names: (
        float(names["curvatures"].min()) < -0.5
        and float(names["curvatures"].max()) > 0.5
        and names["length"] >= names["chord"]
    ),
    "geometry": lambda names: (
        names["last"][50, "scaled"] < 1e-6 < names["last"][50, "bures"] and names["last"][2, "bures"] < 1e-6
    ),
    "image_classifier": lambda names: (
        names["gaps"]["BaLoRA"] < 1e-5 < 0.1 < names["gaps"]["LoRA"] and min(names["accuracies"].values()) > 0.7
    ),
    "own_loop": lambda names: names["gaps"]["BaLoRA"] < 1e-5 < 0.1 < names["gaps"]["LoRA"],
    "own_method": lambda names: names["outcomes"]["balora_signed"][1] < 1e-5 < 0.1 < names["outcomes"]["signed"][1],
    "peft_adapter": lambda names: all(diagnosis.gap < 1e-5 for diagnosis in names["after"].values()),
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.stem)
def test_example_is_short_and_does_what_it_says(example, monkeypatch):
    skip_without(example.read_text())
    assert len(example.read_text().splitlines()) <= 80
    monkeypatch.setattr(sys, "argv", [str(example)])
    assert OUTCOMES[example.stem](runpy.run_path(str(example), run_name="__main__"))


@pytest.mark.parametrize("package", ["balora_jax", "balora_jax.adapters", "balora_jax.optimizers", "balora_jax.bures"])
def test_every_public_name_is_in_the_reference(package):
    public = importlib.import_module(package).__all__
    pages = "\n".join(page.read_text() for page in PAGES if page.parent.name == "api")
    whole = [name for name in re.findall(r"^::: (\S+)", pages, re.MULTILINE) if name in sys.modules]
    documented = {name for module in whole for name in vars(sys.modules[module])} | set(re.findall(r"\w+", pages))
    assert not set(public) - documented


def test_the_page_of_methods_has_every_method_and_option():
    page = (ROOT / "docs" / "methods.md").read_text()
    overview, options = page.split("## The methods")[1].split("## Options")
    assert re.findall(r"^\| `(\w+)` \|", overview, re.MULTILINE) == list(METHODS)
    said = {
        name: {option: float(value) for option, value in re.findall(r"`(\w+)` ([\d.e-]+)", row)}
        for row in options.splitlines()
        for name in re.findall(r"`(\w+)`", row.split("|")[1] if row.startswith("| `") else "")
    }
    assert said == {name: method.defaults for name, method in METHODS.items() if method.all_options}
