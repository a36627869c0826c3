"""What the command line makes of its arguments and of the errors of its commands."""

import importlib
import importlib.metadata
import types

import pytest

from balora_jax import cli
from balora_jax.errors import ConfigError, RunError


@pytest.fixture
def command(monkeypatch):
    """Makes the command `run` the given function of its arguments."""

    def replace(function):
        monkeypatch.setattr(importlib, "import_module", lambda name: types.SimpleNamespace(main=function))

    return replace


@pytest.fixture
def unchanged_environment(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "")  # so that it is put back


@pytest.mark.parametrize("name", cli._COMMANDS)
def test_every_command_has_a_main(name):
    assert callable(importlib.import_module(f"balora_jax.commands.{name.replace('-', '_')}").main)


@pytest.mark.parametrize(
    ("arguments", "code", "out"),
    [
        ([], 2, "usage: balora-jax COMMAND"),
        (["--help"], 0, "usage: balora-jax COMMAND"),
        (["-h"], 0, "usage: balora-jax COMMAND"),
        (["--version"], 0, f"balora-jax {importlib.metadata.version('balora-jax')}\n"),
    ],
)
def test_without_a_command(arguments, code, out, capsys):
    assert cli.main(arguments) == code
    assert capsys.readouterr().out.startswith(out)


@pytest.mark.usefixtures("unchanged_environment")
def test_a_command_gets_the_rest_and_gives_the_code(command):
    given = []
    command(lambda arguments: given.append(arguments) or 7)
    assert cli.main(["run", "a", "--offline", "--b"]) == 7
    assert given == [["a", "--b"]], "--offline is for all commands"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("steps must\nbe 1"), 2, "error: steps must be 1"),
        (RunError("x" * 3000), 2, f"error: {'x' * 2000}..."),
        (ConfigError("\x1b[31m"), 2, "error: \\x1b[31m"),
        (PermissionError(13, "Permission denied", "a/b"), 2, "error: a/b: Permission denied"),
        (OSError(28, "No space left on device"), 2, "error: the output: No space left on device"),
        (MemoryError(), 2, "error: there is not enough memory (of the machine)"),
        (RecursionError("deep"), 2, "error: something is nested too deeply (deep)"),
        (RuntimeError("RESOURCE_EXHAUSTED: 5 GB"), 2, "error: there is not enough memory (RESOURCE_EXHAUSTED: 5 GB)"),
        (KeyboardInterrupt(), 130, "interrupted; nothing is lost; the same command goes on"),
        (BrokenPipeError(), 1, None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_errors_of_a_command_are_one_line(error, code, line, command, capsys):
    def fail(arguments):
        raise error

    command(fail)
    assert cli.main(["run"]) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"balora-jax: {line}\n" if line else "")


def test_an_error_of_the_program_is_not_hidden(command):
    def fail(arguments):
        raise RuntimeError("a bug")

    command(fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["run"])
