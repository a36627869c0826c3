"""A sweep as jobs: cut into parts that are trained apart from each other, and put together at the end."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from balora_jax.console import PlainConsole
from balora_jax.errors import ConfigError, RunError
from balora_jax.settings import Config
from balora_jax.training.config import Sweep, expand
from balora_jax.training.interruption import Interrupted, Interruptions
from balora_jax.training.launchers import Launcher
from balora_jax.training.parts import Part, check_begins_here, collect, new_parts, read_parts, write_parts
from balora_jax.training.populations import Populations, everyone, sort_into_populations
from balora_jax.training.progress import counted
from balora_jax.training.records import RunDirectory, is_in_use
from balora_jax.training.run import finish, opened, trained

_POLL_SECONDS = 0.5

Jobs = list[tuple[Part, Any]]
"""Parts, and the jobs of submitit that train them."""


@dataclass(frozen=True)
class TrainPart:
    """What a job does: it trains a part of a sweep, or goes on where an earlier one was stopped.

    Attributes:
        populations: the configs of its members by name.
        folder: its run directory.
        log: as for `balora_jax.training.run`.
        log_folder: the run directory of the whole sweep.
    """

    populations: Populations
    folder: Path
    log: str | None
    log_folder: Path

    def __call__(self) -> None:
        """Trains."""
        try:
            with trained(self.populations, self.folder, PlainConsole(), log=self.log, log_folder=self.log_folder):
                pass
        except Interrupted as interruption:  # not an error for submitit
            raise RunError(f"stopped by signal {interruption.signal}; {interruption}") from interruption

    def checkpoint(self) -> Any:
        """Lets submitit queue the job again when its time is over or it is preempted."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def launch(
    config: Config,
    sweep: Sweep,
    output: Path,
    console: Console,
    *,
    launcher: Launcher,
    jobs: int | None = None,
    log: str | None = None,
) -> list[dict]:
    """As `balora_jax.training.run`, in jobs, for which this process waits.

    Args:
        config: what the members have in common.
        sweep: the fields in which they differ.
        output: the run directory, which the jobs must see too.
        console: where progress is shown.
        launcher: where the jobs run.
        jobs: number of parts of the sweep; see `balora_jax.training.parts.cut`.
        log: as for `run`.

    Returns:
        The rows of the result's table, which is also written to the run directory.

    Raises:
        ConfigError: the config cannot be run, or the directory belongs to another config, or has other parts.
        RunError: the directory cannot be used, or jobs have failed; the finished ones are kept.
        Interrupted: a signal came; the message says what becomes of the jobs.
    """
    populations = sort_into_populations(expand(config, sweep))
    with opened(output, everyone(populations)) as directory:
        if len(directory.of("result")) < len(everyone(populations)):
            parts = _parts(directory, populations, jobs)
            missing = [part for part in parts if not part.is_finished()]
            console.print(
                f"{counted(len(everyone(populations)), 'run')} in {counted(len(populations), 'population')}, cut into "
                f"{counted(len(parts), 'part')}, {len(parts) - len(missing)} of them finished; writes to {output}",
                soft_wrap=True,
            )
            started = _start(missing, parts, directory, launcher, log, config.name)
            for part, job in started:
                console.print(f"{part}; job {job.job_id}, log {job.paths.stdout}", soft_wrap=True)
            _wait(started, launcher, console)
            _check_finished(started)
            collect(directory, populations, parts)
        return finish(directory, populations)


def _parts(directory: RunDirectory, populations: Populations, jobs: int | None) -> list[Part]:
    """The parts of the sweep, those of an earlier launch if there was one."""
    parts = read_parts(directory.path, populations)
    if parts is None:
        check_begins_here(directory)
        parts = new_parts(directory.path, populations, jobs)
        write_parts(directory.path, parts)
    elif jobs not in (None, len(parts)):
        raise ConfigError(f"{directory.path} is cut into {len(parts)} parts already; leave --jobs {jobs} out")
    return parts


def _start(
    missing: list[Part], parts: list[Part], directory: RunDirectory, launcher: Launcher, log: str | None, name: str
) -> Jobs:
    """The jobs of the parts that are missing: those that run still, and new ones."""
    folder = directory.path / "jobs"
    found = [(part, launcher.running(folder, part.job) if part.job else None) for part in missing]
    started = [(part, job) for part, job in found if job is not None]
    new = [part for part, job in found if job is None]
    for part in new:
        if is_in_use(part.folder):
            raise RunError(f"another process is working in {part.folder}; when it has ended, the same command goes on")
    calls = [TrainPart(part.populations, part.folder.resolve(), log, directory.path.resolve()) for part in new]
    for part, job in zip(new, launcher.submit(calls, folder.resolve(), name) if new else (), strict=True):
        part.job = job.job_id
        started.append((part, job))
    write_parts(directory.path, parts)
    return started


def _wait(started: Jobs, launcher: Launcher, console: Console) -> None:
    """Waits for jobs; those on this machine are stopped, and save what they have done, if a signal comes."""
    left, begun = list(started), time.monotonic()
    with Interruptions() as interruptions:
        while left and interruptions.received is None:
            time.sleep(_POLL_SECONDS)
            for part, job in [(part, job) for part, job in left if job.done()]:
                left.remove((part, job))
                how = "finished" if part.is_finished() else "failed"
                console.print(f"{part}: {how} after {time.monotonic() - begun:.0f} s", soft_wrap=True)
    if interruptions.received is None:
        return
    if launcher.name == "slurm":
        ids = " ".join(sorted({job.job_id.split("_")[0] for _, job in left}))
        what = f"the jobs go on, and the same command waits for them again; scancel {ids} stops them"
    else:
        _stop(job for _, job in left)
        what = "the same command goes on"
    raise Interrupted(what, interruptions.received)


def _stop(jobs: Iterable[Any]) -> None:
    """Lets local jobs save what they have done, and waits until they have ended."""
    jobs = list(jobs)
    for job in jobs:
        job._process.terminate()  # submitit's own cancel gives them no time
    for job in jobs:
        job._process.wait()


def _check_finished(started: Jobs) -> None:
    failed = [(part, job) for part, job in started if not part.is_finished()]
    if not failed:
        return
    said = []
    for part, job in failed:
        lines = str(job.exception() or "it has ended without its results").strip().splitlines()
        reasons = [line for line in lines if "Error: " in line] or lines
        said.append(f"{part}: {reasons[-1]}, log {job.paths.stdout}")
    raise RunError(
        f"{len(failed)} of {len(started)} jobs failed; the same command starts these alone again: {'; '.join(said)}"
    )
