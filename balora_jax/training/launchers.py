"""Where the jobs of a sweep run, through submitit: on a SLURM cluster, or on this machine."""

import importlib.util
import math
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from balora_jax.errors import ConfigError, RunError

NAMES = ("slurm", "local")
"""What `--launcher` takes."""

_OURS = ("array", "error", "nodes", "ntasks", "ntasks_per_node", "open_mode", "output", "signal", "wrap")
"""Options of sbatch that follow from what is launched."""

_WHOLE_NUMBERS = ("array_parallelism", "signal_delay_s")
"""Options of submitit's own, beside `setup`; all others are sbatch's."""

_A_YEAR = 365 * 24 * 60
"""Minutes; submitit ends local jobs after two otherwise."""


class Launcher(NamedTuple):
    """Where jobs run, and with which options.

    Attributes:
        name: `"slurm"` or `"local"`.
        options: for SLURM those of sbatch by their long names, `{"partition": "gpu", "time": "2:00:00"}`, where
            `time` is needed; `setup`, a line of shell before the job, and `array_parallelism`, the most jobs at a time.
            On this machine `gpus`, over which the jobs are spread.
    """

    name: str
    options: Mapping[str, str] = MappingProxyType({})

    def check(self) -> None:
        """Raises `ConfigError` for a name or an option that does not do, and if submitit is not installed."""
        if self.name not in NAMES:
            raise ConfigError(f"--launcher must be one of {', '.join(NAMES)}, got {self.name!r}")
        if importlib.util.find_spec("submitit") is None:
            raise ConfigError(f"--launcher {self.name} needs submitit: pip install 'balora-jax[cluster]'")
        if self.name == "local":
            for option in self.options.keys() - {"gpus"}:
                raise ConfigError(f"--launcher-options of local jobs must be gpus=NUMBER, got {option}")
            _whole_number(self.options, "gpus", least=0)
            return
        for option in self.options:
            if option in _OURS:
                raise ConfigError(f"--launcher-options must leave {option} out, which follows from the sweep")
        if "time" not in self.options:
            raise ConfigError("--launcher slurm needs the time limit of a job: --launcher-options time=2:00:00")
        minutes(self.options["time"])
        for option in _WHOLE_NUMBERS:
            _whole_number(self.options, option, least=1)

    def submit(self, calls: Sequence[Callable[[], Any]], folder: Path, name: str) -> list[Any]:
        """Hands calls to the machine or to the cluster, there as one array.

        Args:
            calls: what the jobs do.
            folder: for their logs.
            name: that the cluster shows.

        Returns:
            A job of submitit for each.

        Raises:
            RunError: the cluster does not take them.
        """
        import submitit

        if self.name == "local":
            return [self._submit_here(call, folder, index) for index, call in enumerate(calls)]
        try:
            executor = submitit.SlurmExecutor(folder)
            executor.update_parameters(job_name=name, stderr_to_stdout=True, wckey=None, **self._parameters())
            with executor.batch():
                jobs = [executor.submit(call) for call in calls]
        except (RuntimeError, ValueError, OSError, submitit.core.utils.FailedJobError) as error:
            raise RunError(f"SLURM does not take the jobs: {error}") from error
        return jobs

    def running(self, folder: Path, job: str) -> Any | None:
        """Returns a job of SLURM that an earlier process has submitted if it waits or runs; None otherwise.

        Args:
            folder: of its log.
            job: its id.
        """
        import submitit

        if self.name == "local":  # ids of processes are given again
            return None
        found: Any = submitit.SlurmJob(folder, job)
        return None if found.done() or found.state == "UNKNOWN" else found

    def _submit_here(self, call: Callable[[], Any], folder: Path, index: int) -> Any:
        import submitit

        gpus = int(self.options.get("gpus", 0))
        executor = submitit.LocalExecutor(folder)
        visible = {"gpus_per_node": 1, "visible_gpus": (index % gpus,)} if gpus else {}
        executor.update_parameters(timeout_min=_A_YEAR, stderr_to_stdout=True, **visible)
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is this process's, which stops them
        try:
            return executor.submit(call)
        finally:
            signal.signal(signal.SIGINT, before)

    def _parameters(self) -> dict[str, Any]:
        """The options as submitit takes them."""
        options = dict(self.options)
        found: dict[str, Any] = {"time": minutes(options.pop("time"))}
        found |= {option: int(options.pop(option)) for option in _WHOLE_NUMBERS if option in options}
        if "setup" in options:
            found["setup"] = [options.pop("setup")]
        if "cpus_per_task" in options:  # which srun does not take over from sbatch
            found["srun_args"] = [f"--cpus-per-task={options['cpus_per_task']}"]
        return found | {"additional_parameters": {option: value or True for option, value in options.items()}}


def parse_options(words: Sequence[str]) -> dict[str, str]:
    """Returns `NAME=VALUE` words as a mapping, with `_` for `-` in names; a name alone has an empty value.

    Raises:
        ConfigError: a name is no name, or comes twice.
    """
    options: dict[str, str] = {}
    for word in words:
        name, _, value = word.partition("=")
        name = name.replace("-", "_")
        if not name.isidentifier() or name in options:
            raise ConfigError(f"--launcher-options must be NAME=VALUE, each name once, got {word!r}")
        options[name] = value
    return options


def minutes(time: str) -> int:
    """Returns a time limit as sbatch has it (`90`, `1:30:00`, `2-12`) in minutes, rounded up.

    Raises:
        ConfigError: it is none.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if found is None:
        raise ConfigError(f"--launcher-options time must be as for sbatch, 90 or 1:30:00 or 2-12, got {time!r}")
    days, *clock = found.groups()
    first, second, third = (int(part or 0) for part in clock)
    if days is None and clock[2] is None:  # minutes, or minutes and seconds
        return math.ceil(first + second / 60)
    return math.ceil(1440 * int(days or 0) + 60 * first + second + third / 60)


def _whole_number(options: Mapping[str, str], name: str, *, least: int) -> None:
    value = options.get(name, str(least))
    if not value.isdecimal() or int(value) < least:
        raise ConfigError(f"--launcher-options {name} must be a whole number of at least {least}, got {value!r}")
