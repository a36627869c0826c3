"""`balora-jax run`: trains and compares what a config file describes."""

from pathlib import Path

from balora_jax.commands.arguments import read_config
from balora_jax.console import PlainConsole


def main(arguments: list[str]) -> int:
    """Runs the command."""
    config, sweep, output = read_config("run", arguments)
    from balora_jax.training import results, run  # heavy: after the cheap mistakes

    console = PlainConsole()
    output = output or Path("runs") / config.name
    rows = run(config, sweep, output, console)
    PlainConsole(width=max(console.width, results.TABLE_WIDTH)).print(results.table(rows))
    console.print(f"record: {output}, figure: {output / 'figure.png'}", soft_wrap=True)
    return 0
