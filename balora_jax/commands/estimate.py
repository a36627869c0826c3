"""`balora-jax estimate`: the sizes and the memory of a config's runs, before any weight is loaded."""

from balora_jax.commands.arguments import read_config
from balora_jax.console import PlainConsole
from balora_jax.training.config import expand


def main(arguments: list[str]) -> int:
    """Runs the command."""
    what = "Prints the sizes and the memory of a step of what a config file describes, before any weight is loaded."
    config, sweep, _ = read_config("estimate", arguments, what=what)
    runs = expand(config, sweep)
    from balora_jax.training import results  # heavy, as what follows: after the cheap mistakes
    from balora_jax.training.estimate import estimate, report
    from balora_jax.training.populations import sort_into_populations

    console = PlainConsole(width=max(PlainConsole().width, results.TABLE_WIDTH))
    populations = sort_into_populations(runs).items()
    for table in report({name: estimate(tuple(members.values())) for name, members in populations}):
        console.print(table)
    return 0
