"""`balora-jax evaluate`: a model, perhaps with an adapter, on the evaluation data of a config."""

import json
from collections.abc import Mapping
from pathlib import Path

from balora_jax.commands.arguments import Flag, read_config
from balora_jax.commands.folders import check_peft
from balora_jax.console import PlainConsole
from balora_jax.errors import ConfigError
from balora_jax.training.checks import check

WHAT = "Measures loss and accuracy of a model on the evaluation data of a config file, and on its evaluations."
FLAGS = {
    "--adapter": Flag("a PEFT folder, whose adapter is put on the model.", "a PEFT folder"),
    "--json": Flag("prints one JSON object instead, for programs."),
}


def main(arguments: list[str]) -> int:
    """Runs the command."""
    config, sweep, given = read_config("evaluate", arguments, what=WHAT, own=FLAGS)
    adapter = Path(given["--adapter"]) if "--adapter" in given else None
    if adapter is not None:
        check_peft("--adapter", adapter)
    for mapping in [sweep] if isinstance(sweep, Mapping) else sweep:
        for name in mapping:
            if name.startswith(("model.", "data.")):
                raise ConfigError(f"the config sweeps {name}; choose one with --{name}")
            if name == "evaluations":
                raise ConfigError("the config sweeps evaluations; it must have one value of them to be evaluated")
    check(config)
    from balora_jax.commands.evaluated import evaluated, report  # heavy: after the cheap mistakes

    found = evaluated(config, adapter)
    if "--json" in given:
        print(json.dumps(found))
    else:
        report(found, PlainConsole())
    return 0
