"""Launchers: their options, and a cluster of stand-ins for SLURM's programs."""

import functools
import os
import re
import stat
import sys
import time
from pathlib import Path

import pytest

from balora_jax.cli import main
from balora_jax.training import ConfigError, RunError
from balora_jax.training.launchers import Launcher, minutes, parse_options

pytest.importorskip("submitit")

SBATCH = """#!{python}
import os, re, subprocess, sys, pathlib
text = pathlib.Path(sys.argv[1]).read_text()
(pathlib.Path(__file__).parent / "submitted.txt").write_text(text)
if "partition=closed" in text:
    sys.exit("sbatch: error: invalid partition specified: closed")
first, last = re.search(r"--array=(\\d+)-(\\d+)", text).groups()
for task in range(int(first), int(last) + 1):
    ids = {{"SLURM_JOB_ID": str(70 + task), "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task)}}
    ids |= {{"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}}
    subprocess.Popen(["bash", sys.argv[1]], env=os.environ | ids, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print("Submitted batch job 7")
"""
SRUN = """#!{python}
import os, sys
command = sys.argv[sys.argv.index("{python}"):]
out = sys.argv[sys.argv.index("--output") + 1].replace("%A", "7").replace("%a", os.environ["SLURM_ARRAY_TASK_ID"])
os.dup2(os.open(out.replace("%t", "0"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
os.dup2(1, 2)
os.execv(command[0], command)
"""
SACCT = """#!{python}
print("JobID|State|NodeList\\n7_0|COMPLETED|n1\\n7_1|FAILED|n1\\n8_0|PENDING|None")
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Programs on the path that do what SLURM's do, and write down what they are asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT)):
        (folder / name).write_text(text.format(python=sys.executable))
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def wait(jobs):
    deadline = time.monotonic() + 60
    while not all(job.done() for job in jobs) and time.monotonic() < deadline:
        time.sleep(0.05)


def test_slurm_gets_one_array_with_the_options_of_sbatch(slurm, tmp_path):
    words = ["partition=gpu", "time=1:30:00", "gpus-per-node=1", "exclusive", "cpus_per_task=4", "setup=export X=a\\ b"]
    launcher = Launcher("slurm", parse_options([*words, "array_parallelism=3"]))
    launcher.check()
    calls = [functools.partial((tmp_path / "written").write_text, "done"), functools.partial(int, "x")]
    jobs = launcher.submit(calls, tmp_path / "jobs", "my-sweep")
    assert [job.job_id for job in jobs] == ["7_0", "7_1"]
    asked = set((slurm / "submitted.txt").read_text().splitlines())
    for option in ("partition=gpu", "time=90", "gpus-per-node=1", "exclusive", "cpus-per-task=4", "job-name=my-sweep"):
        assert f"#SBATCH --{option}" in asked
    assert {"#SBATCH --array=0-1%2", "#SBATCH --signal=USR2@90", "export X=a\\ b"} <= asked
    assert "#SBATCH --wckey=submitit" not in asked
    assert jobs[0].result() == len("done")  # waits for it
    assert (tmp_path / "written").read_text() == "done"
    assert jobs[0].exception() is None
    assert "invalid literal for int" in str(jobs[1].exception())
    assert "invalid literal for int" in Path(jobs[1].paths.stdout).read_text()


def test_jobs_of_slurm_that_run_still_are_found_again(slurm, tmp_path):
    launcher = Launcher("slurm", {"time": "5"})
    assert launcher.running(tmp_path, "8_0").job_id == "8_0"
    for job in ("7_0", "7_1", "9_0"):
        assert launcher.running(tmp_path, job) is None, job


def test_what_slurm_refuses_is_said(slurm, tmp_path):
    calls = [functools.partial(int, "1")] * 2
    with pytest.raises(RunError, match=r"SLURM does not take the jobs: .*invalid partition specified: closed"):
        Launcher("slurm", {"time": "5", "partition": "closed"}).submit(calls, tmp_path, "x")


def test_no_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match="SLURM does not take the jobs: Could not detect"):
        Launcher("slurm", {"time": "5"}).submit([functools.partial(int, "1")], tmp_path, "x")


def test_local_jobs_are_spread_over_the_devices(tmp_path):
    calls = [functools.partial(os.getenv, "CUDA_VISIBLE_DEVICES") for _ in range(3)]
    jobs = Launcher("local", {"gpus": "2"}).submit(calls, tmp_path, "x")
    wait(jobs)
    assert [job.result() for job in jobs] == ["0", "1", "0"]


@pytest.mark.parametrize(
    ("time", "expected"),
    [("90", 90), ("1:30", 2), ("2:00:00", 120), ("1-0", 1440), ("2-12:30", 3630), ("0-0:0:1", 1)],
)
def test_time_limits_are_those_of_sbatch(time, expected):
    assert minutes(time) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--launcher", "pbs"], "--launcher must be one of slurm, local, got 'pbs'"),
        (["--launcher", "slurm"], "needs the time limit of a job: --launcher-options time=2:00:00"),
        (["--launcher", "slurm", "--launcher-options", "time=soon"], "time must be as for sbatch, .* got 'soon'"),
        (["--launcher", "slurm", "--launcher-options", "time=5", "nodes=2"], "must leave nodes out"),
        (["--launcher", "slurm", "--launcher-options", "time=5", "time=6"], "each name once, got 'time=6'"),
        (["--launcher", "slurm", "--launcher-options", "time=5", "array_parallelism=x"], "at least 1, got 'x'"),
        (["--launcher", "slurm", "--launcher-options"], "--launcher-options needs NAME=VALUE ..."),
        (["--launcher", "local", "--launcher-options", "partition=x"], "must be gpus=NUMBER, got partition"),
        (["--launcher", "local", "--jobs", "0"], "--jobs must be a whole number of at least 1, got '0'"),
        (["--jobs", "2"], "--jobs needs --launcher slurm or local"),
    ],
)
def test_flags_that_do_not_do(flags, message, tmp_path, capsys):
    file = tmp_path / "c.py"
    file.write_text('from balora_jax.training import Config\nconfig = Config(name="x")\n')
    assert main(["run", str(file), *flags]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_submitit_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--launcher local needs submitit: pip install 'balora-jax\[cluster\]'"):
        Launcher("local").check()
