"""The command line: `balora-jax COMMAND ...`."""

import importlib
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from balora_jax.commands.arguments import parse
from balora_jax.training.config import (
    Config,
    ConfigError,
    Sweep,
    combinations,
    expand,
    field_names,
    get_field,
    load_config,
    suggestion,
    with_fields,
)
from balora_jax.training.records import RunError

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code: 0, 2 for a wrong command or config, 130 or 143 after a signal."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # read when JAX first calls LAPACK: threads slow r x r matrices down, by a lot where other programs use the cores
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    try:
        if arguments[0] not in _COMMANDS:
            raise ConfigError(f"unknown command {arguments[0]!r}; commands are {', '.join(_COMMANDS)}")
        return _COMMANDS[arguments[0]](arguments[1:])
    except (ConfigError, RunError) as error:
        print(f"balora-jax: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        hint = str(interruption) or ("nothing is lost; the same command goes on" if arguments[0] == "run" else "")
        print(f"balora-jax: interrupted{hint and '; '}{hint}", file=sys.stderr)
        return 128 + getattr(interruption, "signal", signal.SIGINT)


def _read(
    command: str, arguments: list[str], *, option: tuple[str, str] | None = None
) -> tuple[Config, Sweep, Path | None]:
    """The config and the sweep of a command that takes a config file, and the path given with an option of its own."""
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError(f"{command} needs a config file: balora-jax {command} CONFIG")
    config, sweep = load_config(arguments[0])
    rest, path = _take(arguments[1:], *option) if option else (arguments[1:], None)
    config, sweep, output = apply_overrides(config, sweep, rest, prog=f"balora-jax {command} {arguments[0]}")
    if command != "run" and output is not None:
        raise ConfigError(f"{command} prints its result and has no --output")
    return config, sweep, path or output


def _run(arguments: list[str]) -> int:
    config, sweep, output = _read("run", arguments)
    from balora_jax.training import results, run  # heavy: after the cheap mistakes

    console = Console()
    output = output or Path("runs") / config.name
    rows = run(config, sweep, output, console)
    Console(width=max(console.width, results.TABLE_WIDTH)).print(results.table(rows))
    console.print(f"record: {output}, figure: {output / 'figure.png'}", highlight=False, soft_wrap=True)
    return 0


def _estimate(arguments: list[str]) -> int:
    config, sweep, _ = _read("estimate", arguments)
    from balora_jax.training import results
    from balora_jax.training.estimate import estimate, report
    from balora_jax.training.run import sort_into_populations

    console = Console(width=max(Console().width, results.TABLE_WIDTH))
    for name, members in sort_into_populations(expand(config, sweep)).items():
        console.print(report(name, estimate(tuple(members.values()))))
    return 0


def _evaluate(arguments: list[str]) -> int:
    config, sweep, adapter = _read("evaluate", arguments, option=("--adapter", "a PEFT folder"))
    from balora_jax.commands import evaluate

    evaluate.report(config, sweep, adapter, Console())
    return 0


def _of_module(name: str) -> Callable[[list[str]], int]:
    """The command of a file in `balora_jax.commands`, which is imported when the command is used."""
    return lambda arguments: importlib.import_module(f"balora_jax.commands.{name}").main(arguments)


_COMMANDS = {
    "run": _run,
    "estimate": _estimate,
    "export": _of_module("export"),
    "inspect": _of_module("inspect"),
    "balance": _of_module("balance"),
    "merge": _of_module("merge"),
    "evaluate": _evaluate,
    "generate": _of_module("generate"),
}


def apply_overrides(
    config: Config, sweep: Sweep, arguments: list[str], *, prog: str = "balora-jax"
) -> tuple[Config, Sweep, Path | None]:
    """Applies dotted flags to a config; a field that is set this way is no longer swept.

    Of a sweep of several mappings, those stay that hold the value that is set, so that flags pick out runs of the
    sweep; if none does, all stay, and have the value.

    Args:
        config: the file's config.
        sweep: the file's sweep.
        arguments: `--field.name value ...`, and perhaps `--output folder`.
        prog: what the help calls the command.

    Returns:
        The config, the sweep, and the output folder if one was given.

    Raises:
        ConfigError: an unknown field, or a value that is not of its type.
    """
    arguments, output = _take(arguments, "--output", "a folder")
    known, overridden = set(field_names()), []
    for argument in arguments:
        if argument.startswith("--") and argument not in ("--help",):
            name = argument[2:].split("=", 1)[0].replace("-", "_")
            negated = ".".join([*name.split(".")[:-1], name.split(".")[-1].removeprefix("no_")])
            if name not in known and negated not in known:
                raise ConfigError(f"there is no field {name}{suggestion(name)}")
            overridden.append(name if name in known else negated)
    config = parse(Config, arguments, prog=prog, default=config)
    return config, _without(config, sweep, overridden), output


def _without(config: Config, sweep: Sweep, overridden: list[str]) -> Sweep:
    """The sweep without some fields; runs that differed in these alone, and are now the same, are one run."""
    mappings = [sweep] if isinstance(sweep, Mapping) else list(sweep)
    if not any(name in mapping for mapping in mappings for name in overridden):
        return sweep

    for name in overridden:
        holding = [mapping for mapping in mappings if get_field(config, name) in mapping.get(name, ())]
        if holding:
            mappings = [mapping for mapping in mappings if name not in mapping or mapping in holding]
    runs: list[Config] = []
    kept: list[dict] = []
    for mapping in mappings:
        for choice in combinations({name: values for name, values in mapping.items() if name not in overridden}):
            run = with_fields(config, choice)
            if run not in runs:
                runs.append(run)
                kept.append({name: (value,) for name, value in choice.items()})
    return kept


def _take(arguments: list[str], flag: str, what: str) -> tuple[list[str], Path | None]:
    """The arguments without a flag that has a path, and the path."""
    rest, path = [], None
    remaining = iter(arguments)
    for argument in remaining:
        if argument == flag or argument.startswith(f"{flag}="):
            value = argument.partition("=")[2] or next(remaining, "")
            if not value or value.startswith("--"):
                raise ConfigError(f"{flag} needs {what}")
            path = Path(value)
        else:
            rest.append(argument)
    return rest, path


if __name__ == "__main__":
    sys.exit(main())
