"""`balora-jax run`: trains and compares what a config file describes."""

import functools
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

from balora_jax.commands.arguments import Flag, read_config
from balora_jax.console import PlainConsole
from balora_jax.errors import ConfigError
from balora_jax.settings import Config
from balora_jax.training.config import Sweep, expand
from balora_jax.training.launchers import NAMES, Launcher, parse_options
from balora_jax.training.live import check_log

WHAT = "Trains and compares what a config file describes; the same command goes on after an interruption."
FLAGS = {
    "--output": Flag("the run directory; default runs/<name of the config>.", "a folder"),
    "--log": Flag("shows the metrics while the run goes on, in tensorboard, wandb or trackio.", "a name"),
    "--launcher": Flag("trains the sweep in jobs, of slurm or local, and waits for them.", "a name"),
    "--jobs": Flag("into how many jobs the sweep is cut; default one a population.", "a number"),
    "--launcher-options": Flag(
        "NAME=VALUE ...: sbatch's options for the jobs by their long names, as partition=gpu time=2:00:00; of local "
        "jobs gpus=NUMBER, over which they are spread.",
        "NAME=VALUE ...",
        many=True,
    ),
    "--show-batch": Flag("prints the first rows as text, with what is learned marked, and ends."),
}


def main(arguments: list[str]) -> int:
    """Runs the command."""
    config, sweep, given = read_config("run", arguments, what=WHAT, own=FLAGS)
    log = given.get("--log")
    if log is not None:
        check_log(log)
    expand(config, sweep)  # tells of a wrong field before what follows is imported
    launcher, jobs = _launcher(config, given)
    if launcher is not None:
        import jax

        from balora_jax.training.cluster import launch

        jax.config.update("jax_platforms", "cpu")  # the accelerators are for the jobs
        train = functools.partial(launch, launcher=launcher, jobs=jobs)
        return _run(config, sweep, given, train)
    from balora_jax.training.processes import connect, together

    connect(config.parallel)
    with together():
        return _run(config, sweep, given, None)


def _run(config: Config, sweep: Sweep, given: Mapping[str, str], train: Callable[..., list[dict]] | None) -> int:
    """Trains by the function, or in this process if there is none."""
    from balora_jax.training.processes import is_first

    console = PlainConsole(quiet=not is_first())
    if "--show-batch" in given:
        return _show_batches(config, sweep, console)
    from balora_jax.training import results, run  # heavy: after the cheap mistakes

    output = Path(given.get("--output", Path("runs") / config.name))
    rows = (train or run)(config, sweep, output, console, log=given.get("--log"))
    if not is_first():
        return 0
    from balora_jax.training.comparison import load_runs  # heavy: not before the first step
    from balora_jax.training.standings import standings, verdict

    PlainConsole(width=max(console.width, results.TABLE_WIDTH)).print(results.table(rows))
    runs, _ = load_runs([output])
    methods = list(dict.fromkeys(run.field("method") for run in runs))
    if len(methods) > 1:
        reference = "lora" if "lora" in methods else methods[0]
        console.print(verdict(standings(runs, reference=reference), reference), soft_wrap=True)
    report = f", report: {output / 'report.html'}"
    if not (output / "report.html").exists():
        report = "; with the extra report (plotly) there is a page of curves and tables too"
    console.print(f"record: {output}, figure: {output / 'figure.png'}{report}", soft_wrap=True)
    return 0


def _launcher(config: Config, given: Mapping[str, str]) -> tuple[Launcher | None, int | None]:
    """Where the jobs run, if there are any, and their number, if it is given."""
    jobs = given.get("--jobs")
    if "--launcher" not in given:
        for flag in ("--jobs", "--launcher-options"):
            if flag in given:
                raise ConfigError(f"{flag} needs --launcher {' or '.join(NAMES)}")
        return None, None
    launcher = Launcher(given["--launcher"], parse_options(shlex.split(given.get("--launcher-options", ""))))
    launcher.check()
    if config.parallel.coordinator is not None:
        raise ConfigError("--launcher makes jobs of one process each: parallel.coordinator must be left out")
    if jobs is not None and (not jobs.isdecimal() or int(jobs) < 1):
        raise ConfigError(f"--jobs must be a whole number of at least 1, got {jobs!r}")
    return launcher, None if jobs is None else int(jobs)


def _show_batches(config: Config, sweep: Sweep, console: PlainConsole) -> int:
    """Prints the first batch of every way in which the sweep lays out data."""
    from balora_jax.training.first_batch import first_batch

    shown = set()
    for run in expand(config, sweep):
        laid_out = run.data, run.model.path, run.training.batch_size, run.training.accumulate
        if laid_out not in shown:
            shown.add(laid_out)
            for line in first_batch(run):
                console.print(line, soft_wrap=True)
    return 0
