"""What the command line makes of its arguments and of the errors of its commands."""

import importlib
import importlib.metadata
import os
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


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    """An environment in which no cache of programs is chosen."""
    for name in ("JAX_COMPILATION_CACHE_DIR", *SETTINGS):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


SETTINGS = ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "JAX_COMPILATION_CACHE_MAX_SIZE")


def test_commands_keep_compiled_programs_in_the_users_cache(no_cache, command, tmp_path):
    found = []
    command(lambda rest: found.append(os.environ.get("JAX_COMPILATION_CACHE_DIR")) or 0)
    assert cli.main(["run"]) == 0
    assert found == [str(tmp_path / "cache" / "balora_jax" / "compilation")]
    assert os.path.isdir(found[0])
    assert all(float(os.environ[name]) > 0 for name in SETTINGS)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["rnu"]])
def test_what_compiles_nothing_makes_no_cache(no_cache, arguments, tmp_path):
    cli.main(arguments)
    assert not (tmp_path / "cache").exists()


def test_another_cache_may_be_chosen(no_cache, command, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    command(lambda rest: 0)
    assert cli.main(["run"]) == 0
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "/elsewhere"
    assert not set(SETTINGS) & set(os.environ)
    assert not (tmp_path / "cache").exists()


def test_a_home_that_cannot_be_written_to_has_no_cache(no_cache, command, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    command(lambda rest: 0)
    assert cli.main(["run"]) == 0
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
