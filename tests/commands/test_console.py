"""Text from outside (paths, names of tensors) is shown as it is: no markup, no formula, and it steers no terminal."""

import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.table import Table

import balora_jax
from balora_jax.adapters import PeftModule, write_peft
from balora_jax.adapters.peft import from_modules
from balora_jax.cli import main
from balora_jax.console import PlainConsole
from balora_jax.training.progress import TrainingProgress

NASTY = "[/x] [red] :smile: $\\frac{$ \x1b[31m"
SHOWN = NASTY.replace("\x1b", "\\x1b")


def test_every_place_of_a_console_shows_text_as_it_is():
    file = io.StringIO()
    console = PlainConsole(file=file, width=200, force_terminal=True, color_system=None)
    table = Table(NASTY, title=NASTY, caption=NASTY)
    table.add_row(NASTY)
    console.print(table)
    console.print(NASTY)
    assert file.getvalue().count(SHOWN) == 5
    with TrainingProgress(console, "[/y]", 10, 0) as progress:
        progress.update(1, 2.5, 100)
        progress.note("[/z]")
    assert "[/y]: [/z]" in file.getvalue()
    assert "[/y]" in file.getvalue().split("[/z]")[1], "the bar"


def test_no_other_console_is_made():
    """Nor a column of a progress bar that reads markup."""
    for file in Path(balora_jax.__file__).parent.rglob("*.py"):
        text = file.read_text()
        assert file.name == "console.py" or not re.search(r"(?<!Plain)Console\(", text), file
        assert not re.search(r"(TextColumn|from_markup)\((?!.*markup=False)", text), file


@pytest.fixture
def nasty(tmp_path, monkeypatch):
    """An adapter with such names in such a folder, which is the current one."""
    folder = tmp_path / NASTY.replace("/", "|") / "[" / "x]"  # [/x] takes two folders
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder.parent.parent)
    a, b = np.eye(5, 2, dtype=np.float32), np.eye(2, 4, dtype=np.float32)
    modules = {f"h.{n}.{NASTY.replace('.', '')}": PeftModule(a, b, 1.0) for n in range(2)}
    write_peft(from_modules(modules | {"h.2.zero": PeftModule(a, 0 * b, 1.0)}), folder)
    return "[/x]"


def test_adapters_with_names_that_look_like_markup(nasty, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["inspect", nasty, "--figure", "[/x]/$\\frac{$.png"]) == 0
    shown = capsys.readouterr().out
    assert f"h.0.{SHOWN}" in shown
    assert "figure: [/x]/$\\frac{$.png" in shown
    assert Path("[/x]/$\\frac{$.png").is_file()
    assert main(["balance", nasty, "[/y]"]) == 0
    assert "of their norm: [/y]" in capsys.readouterr().out
    assert main(["inspect", "[/none]"]) == 2
    assert "[/none]/adapter_config.json does not exist" in capsys.readouterr().err


def test_paths_that_look_like_markup(model_folder, adapter, config_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source, name in ((model_folder, "model"), (adapter, "adapter")):
        shutil.copytree(source, tmp_path / "[" / "x]" / name)
    shutil.copy(config_file, "[/x]/config.py")
    assert main(["run", "[/x]/config.py", "--model.path", "[/x]/model", "--output", "[/x]/out"]) == 0
    assert "record: [/x]/out, figure: [/x]/out/figure.png" in capsys.readouterr().out
    flags = ["--adapter", "[/x]/adapter", "--model.path", "[/x]/model"]
    assert main(["evaluate", "[/x]/config.py", *flags]) == 0
    assert "[/x]/model, adapter: [/x]/adapter" in " ".join(capsys.readouterr().out.split())
    assert main(["merge", "[/x]/model", "[/x]/adapter", "[/x]/merged"]) == 0
    assert main(["export", "[/x]/out", "[/x]/exported"]) == 0
    prompts = ["--prompt", "[/x]", "--max-new-tokens", "2"]
    capsys.readouterr()
    assert main(["generate", "[/x]/merged", "--adapter", "[/x]/exported", *prompts]) == 0
    assert capsys.readouterr().out.startswith("[/x] ")


def test_errors_steer_no_terminal(capsys):
    assert main(["inspect", "\x1b[31m\udcff"]) == 2
    err = capsys.readouterr().err
    assert "ADAPTER: \\x1b[31m\\udcff/" in err
    assert "\x1b" not in err
