"""The command line: `balora-jax COMMAND ...`. It imports a command's modules when they are needed."""

import contextlib
import importlib
import importlib.metadata
import io
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from balora_jax.errors import ConfigError, RunError, printable
from balora_jax.interruption import leave_at_once

_COMMANDS = {
    "run": (
        "CONFIG [--output FOLDER] [--log NAME] [--launcher NAME] [--show-batch] [--field.name VALUE ...]",
        "train and compare what a config file describes; the same command goes on after an interruption",
    ),
    "estimate": (
        "CONFIG [--field.name VALUE ...]",
        "print the sizes and the memory of a step, before any weight is loaded",
    ),
    "methods": ("", "list the methods with their sources and their own options"),
    "compare": (
        "RUN ... [--reference METHOD] [--by FIELD] [--csv FILE] [--figure FILE]",
        "compare the methods of finished runs, each at its best cell, with one of them, seed by seed",
    ),
    "report": (
        "RUN ... [--output FILE] [--reference METHOD] [--by FIELD]",
        "write an HTML file about finished runs, with charts, that opens without a network",
    ),
    "export": (
        "RUN OUT [--member NAME] [--merged]",
        "write the trained adapter of a run as a PEFT folder, or added to the weights of its base",
    ),
    "inspect": (
        "ADAPTER [--figure FILE] [--json]",
        "show the spectrum, balance and conditioning of every pair of a PEFT adapter",
    ),
    "balance": (
        "ADAPTER OUT [--gauge GAUGE]",
        "balance the pairs of a PEFT adapter; their products stay as they are",
    ),
    "merge": (
        "MODEL ADAPTER OUT",
        "add a PEFT adapter to the weights of its base, in Hugging Face's format",
    ),
    "merge-adapters": (
        "FIRST SECOND OUT [--weight SHARE] [--how geodesic|factors|products]",
        "write the PEFT adapter that is a share of the way from one adapter to another of the same base",
    ),
    "evaluate": (
        "CONFIG [--adapter ADAPTER] [--json] [--field.name VALUE ...]",
        "measure loss and accuracy of a model on the data of a config",
    ),
    "generate": (
        "MODEL [--adapter ADAPTER] [--chat] [--prompt TEXT ...] [--max-new-tokens N]",
        "continue texts",
    ),
}
"""The commands, each the `main` of a module of `balora_jax.commands`, with their arguments and what they do."""

_LISTED = "\n".join(
    f"  {f'{name} {arguments}'.rstrip()}\n      {what}" for name, (arguments, what) in _COMMANDS.items()
)

USAGE = f"""usage: balora-jax COMMAND ...

commands:
{_LISTED}

balora-jax COMMAND --help says more, and balora-jax run --help lists every field of a config, which can be set.
With --offline (or HF_HUB_OFFLINE=1 in the environment) the Hugging Face hub is not asked for models and data.
balora-jax --version prints the version.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code: 0, 2 for a wrong command or config, 130 or 143 after a signal.

    Args:
        arguments: of the command line; None for those of this process, which Ctrl-C then ends at once.
    """
    if arguments is not None:
        return _called(list(arguments))
    leave_at_once("balora-jax: interrupted" + ("; the same command goes on" if sys.argv[1:2] == ["run"] else ""))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what the terminal's encoding lacks
    if not sys.stderr.isatty():
        for library in ("HUB", "DATASETS"):
            os.environ.setdefault(f"HF_{library}_DISABLE_PROGRESS_BARS", "1")
    code = _called(sys.argv[1:])
    if code:  # what could not be written to the standard output would be tried again
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return code


def _called(arguments: list[str]) -> int:
    # read when JAX first calls LAPACK: threads slow r x r matrices down, by a lot where other programs use the cores
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if "--offline" in arguments:
        arguments = [argument for argument in arguments if argument != "--offline"]
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries that ask are imported, which is later
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    try:
        if command in _COMMANDS:
            _keep_compiled_programs()
            code = importlib.import_module(f"balora_jax.commands.{command.replace('-', '_')}").main(rest)
        elif command in ("-h", "--help"):
            print(USAGE, end="")
            code = 0 if arguments else 2
        elif command == "--version":
            print(f"balora-jax {importlib.metadata.version('balora-jax')}")
            code = 0
        else:
            raise ConfigError(f"unknown command {command!r}; commands are {', '.join(_COMMANDS)}")
        sys.stdout.flush()
        return code
    except (ConfigError, RunError) as error:
        reason = str(error)
    except BrokenPipeError:  # who read what is shown has gone
        return 1
    except OSError as error:
        reason = f"{error.filename or 'the output'}: {error.strerror}" if error.strerror else str(error)
    except MemoryError as error:
        reason = f"there is not enough memory ({str(error) or 'of the machine'})"
    except RecursionError as error:
        reason = f"something is nested too deeply ({error})"
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = f"there is not enough memory ({error})"
    except KeyboardInterrupt as interruption:
        hint = str(interruption) or ("nothing is lost; the same command goes on" if command == "run" else "")
        print(f"balora-jax: interrupted{hint and '; '}{hint}", file=sys.stderr)
        return 128 + getattr(interruption, "signal", signal.SIGINT)
    reason = printable(" ".join(reason.split()))
    print(f"balora-jax: error: {reason if len(reason) < 2000 else reason[:2000] + '...'}", file=sys.stderr)
    return 2


def _keep_compiled_programs() -> None:
    """Lets JAX, which reads the variables when it is imported, keep what it compiles in the user's cache folder."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    with contextlib.suppress(OSError, RuntimeError):  # no home, or none to write to: then there is no cache
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(cache, "balora_jax", "compilation").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2 * 1024**3))  # bytes; the oldest go first


if __name__ == "__main__":
    sys.exit(main())
