"""`balora-jax run`: trains and compares what a config file describes."""

from pathlib import Path

from rich.console import Console

from balora_jax.commands.arguments import read_config


def main(arguments: list[str]) -> int:
    """Runs the command."""
    config, sweep, output = read_config("run", arguments)
    from balora_jax.training import results, run  # heavy: after the cheap mistakes

    console = Console()
    output = output or Path("runs") / config.name
    rows = run(config, sweep, output, console)
    Console(width=max(console.width, results.TABLE_WIDTH)).print(results.table(rows))
    console.print(f"record: {output}, figure: {output / 'figure.png'}", highlight=False, soft_wrap=True)
    return 0
