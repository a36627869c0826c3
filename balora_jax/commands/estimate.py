"""`balora-jax estimate`: the sizes, the memory and the time of a config's runs, before any weight is loaded."""

from typing import TYPE_CHECKING

from balora_jax.commands.arguments import Flag, read_config
from balora_jax.console import PlainConsole
from balora_jax.errors import ConfigError
from balora_jax.training.config import expand

if TYPE_CHECKING:
    from balora_jax.training.targets import Target

_OWN = {
    "--target": Flag(
        "accelerators to compile for instead, which need not be there: h100:8, h200:1, a100-40gb:4, v5e:4x4, "
        "v5p:2x2x4; or cpu",
        "accelerators, as h100:8",
    ),
    "--search": Flag("with --target: tries all meshes (parallel.data, fsdp, tensor), and shows the fastest first"),
}


def main(arguments: list[str]) -> int:
    """Runs the command."""
    what = "Prints the sizes, and the memory and time of a step, of what a config file describes, from shapes alone."
    config, sweep, own = read_config("estimate", arguments, what=what, own=_OWN)
    target = _read_target(own.get("--target"))  # before anything is computed
    runs = expand(config, sweep)
    from balora_jax.training import results  # heavy, as what follows: after the cheap mistakes
    from balora_jax.training.estimate import estimate, search
    from balora_jax.training.estimate_tables import report, search_table
    from balora_jax.training.populations import sort_into_populations

    console = PlainConsole(width=max(PlainConsole().width, results.TABLE_WIDTH))
    populations = sort_into_populations(runs)
    if "--search" in own:
        if target is None:
            raise ConfigError("--search needs accelerators: --target h100:8, say")
        for name, members in populations.items():
            console.print(name, search_table(search(tuple(members.values()), target), target))
        return 0
    found = {name: estimate(tuple(members.values()), target) for name, members in populations.items()}
    for table in report(found, target):
        console.print(table)
    return 0


def _read_target(text: str | None) -> "Target | None":
    """The accelerators to compile for; none for what is there, and for a CPU, with which all is computed then."""
    if text is None:
        return None
    import jax

    from balora_jax.training.targets import parse_target

    target = None if text == "cpu" else parse_target(text)
    jax.config.update("jax_platforms", "cpu")
    return target
