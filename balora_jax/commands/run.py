"""`balora-jax run`: trains and compares what a config file describes."""

from pathlib import Path

from balora_jax.commands.arguments import Flag, read_config
from balora_jax.console import PlainConsole
from balora_jax.training.live import check_log

WHAT = "Trains and compares what a config file describes; the same command goes on after an interruption."
FLAGS = {
    "--output": Flag("the run directory; default runs/<name of the config>.", "a folder"),
    "--log": Flag("shows the metrics while the run goes on, in tensorboard, wandb or trackio.", "a name"),
}


def main(arguments: list[str]) -> int:
    """Runs the command."""
    config, sweep, given = read_config("run", arguments, what=WHAT, own=FLAGS)
    log = given.get("--log")
    if log is not None:
        check_log(log)
    from balora_jax.training import results, run  # heavy: after the cheap mistakes

    console = PlainConsole()
    output = Path(given.get("--output", Path("runs") / config.name))
    rows = run(config, sweep, output, console, log=log)
    PlainConsole(width=max(console.width, results.TABLE_WIDTH)).print(results.table(rows))
    report = f", report: {output / 'report.html'}" if (output / "report.html").exists() else ""
    console.print(f"record: {output}, figure: {output / 'figure.png'}{report}", soft_wrap=True)
    return 0
