"""The command line: `balora-jax COMMAND ...`. It imports a command's modules when they are needed."""

import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence

from balora_jax.errors import ConfigError, RunError, printable
from balora_jax.interruption import leave_at_once

USAGE = """usage: balora-jax COMMAND ...

commands:
  run CONFIG [--output FOLDER] [--field.name VALUE ...]
      train and compare what a config file describes; the same command goes on after an interruption
  estimate CONFIG [--field.name VALUE ...]
      print the sizes and the memory of a step, before any weight is loaded
  export RUN OUT [--member NAME] [--merged]
      write the trained adapter of a run as a PEFT folder, or added to the weights of its base
  inspect ADAPTER [--figure FILE]
      show the spectrum, balance and conditioning of every pair of a PEFT adapter
  balance ADAPTER OUT [--gauge GAUGE]
      balance the pairs of a PEFT adapter; their products stay as they are
  merge MODEL ADAPTER OUT
      add a PEFT adapter to the weights of its base, in Hugging Face's format
  evaluate CONFIG [--adapter ADAPTER] [--field.name VALUE ...]
      measure loss and accuracy of a model on the data of a config
  generate MODEL [--adapter ADAPTER] [--chat] [--prompt TEXT ...] [--max-new-tokens N]
      continue texts

Every field of the config can be set: balora-jax run CONFIG --help lists them. The others have --help too.
"""

_COMMANDS = "run", "estimate", "export", "inspect", "balance", "merge", "evaluate", "generate"
"""The commands, each the `main` of a module of `balora_jax.commands`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code: 0, 2 for a wrong command or config, 130 or 143 after a signal.

    Args:
        arguments: of the command line; None for those of this process, which Ctrl-C then ends at once.
    """
    if arguments is None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # what the terminal's encoding lacks
        arguments = sys.argv[1:]
        leave_at_once("balora-jax: interrupted" + ("; the same command goes on" if arguments[:1] == ["run"] else ""))
    # read when JAX first calls LAPACK: threads slow r x r matrices down, by a lot where other programs use the cores
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    try:
        if arguments[0] not in _COMMANDS:
            raise ConfigError(f"unknown command {arguments[0]!r}; commands are {', '.join(_COMMANDS)}")
        return importlib.import_module(f"balora_jax.commands.{arguments[0]}").main(list(arguments[1:]))
    except (ConfigError, RunError) as error:
        print(f"balora-jax: error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        hint = str(interruption) or ("nothing is lost; the same command goes on" if arguments[0] == "run" else "")
        print(f"balora-jax: interrupted{hint and '; '}{hint}", file=sys.stderr)
        return 128 + getattr(interruption, "signal", signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())
