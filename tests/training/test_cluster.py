"""Sweeps in jobs: how they are cut, what their jobs leave, and what happens when some fail or the launcher stops."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from balora_jax.training import ConfigError, RunError, cluster, run
from balora_jax.training.cluster import TrainPart, launch
from balora_jax.training.comparison import load_runs
from balora_jax.training.launchers import Launcher
from balora_jax.training.parts import cut
from balora_jax.training.populations import everyone
from balora_jax.training.records import RunDirectory
from balora_jax.training.trained import load_trained

pytest.importorskip("submitit")

SWEEP = {"method": ("lora", "balora"), "optimizer.learning_rate": (1e-3, 1e-2), "seed": (0, 1)}
QUIET = Console(quiet=True)
HERE = Launcher("local")


def timeless(value):
    """JSON without the times in it."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in ("seconds", "step_seconds")}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def lines(folder, name="metrics.jsonl"):
    """The records of members: where the checkpoints are is the parts' own."""
    found = [timeless(json.loads(line)) for line in (folder / name).read_text().splitlines()]
    return [line for line in found if line.get("kind") != "checkpoint"]


@pytest.fixture(scope="module")
def short(config):
    settings = dataclasses.replace(config.training, steps=2, eval_every=1, checkpoint_every=1)
    return dataclasses.replace(config, training=settings)


@pytest.fixture(scope="module")
def whole(short, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run(short, SWEEP, folder, QUIET)


def do_at_once(monkeypatch):
    """Jobs are done at once in this process; returns the list of what they are."""
    done = []

    def submit(self, call, folder, index):
        done.append(call)
        try:
            call()
            error = None
        except Exception as caught:
            error = f"a traceback\n{type(caught).__name__}: {caught}\nthe end"
        paths = SimpleNamespace(stdout=folder / f"{index}.out")
        return SimpleNamespace(job_id=str(index), paths=paths, done=lambda: True, exception=lambda: error)

    monkeypatch.setattr(Launcher, "_submit_here", submit)
    monkeypatch.setattr(cluster, "_POLL_SECONDS", 0.0)
    return done


@pytest.mark.parametrize(
    ("sizes", "jobs", "expected"),
    [
        ((4, 2), None, [[("p0", 4)], [("p1", 2)]]),
        ((4, 2), 1, [[("p0", 4), ("p1", 2)]]),
        ((1, 6, 2), 2, [[("p0", 1), ("p2", 2)], [("p1", 6)]]),
        ((5, 1), 4, [[("p0", 2)], [("p0", 1)], [("p0", 2)], [("p1", 1)]]),
        ((2, 1), 9, [[("p0", 1)], [("p0", 1)], [("p1", 1)]]),
    ],
)
def test_populations_are_spread_or_cut(sizes, jobs, expected, short):
    populations = {f"p{i}": {f"p{i}-{n}": short for n in range(size)} for i, size in enumerate(sizes)}
    parts = cut(populations, jobs)
    assert [[(name, len(members)) for name, members in part.items()] for part in parts] == expected
    assert [name for part in parts for name in everyone(part) if name.startswith("p0")] == list(populations["p0"])
    assert sorted(name for part in parts for name in everyone(part)) == sorted(everyone(populations))


def test_a_population_that_stops_early_stays_whole(members):
    populations = {"lora": {str(seed): members(seed=seed, training__patience=1) for seed in range(4)}}
    assert cut(populations, 4) == [populations]


@pytest.fixture
def calls(monkeypatch):
    return do_at_once(monkeypatch)


@pytest.fixture(scope="module")
def launched(short, tmp_path_factory):
    """A finished run in jobs, and what these were."""
    folder = tmp_path_factory.mktemp("launched") / "run"
    with pytest.MonkeyPatch.context() as patch:
        calls = do_at_once(patch)
        launch(short, SWEEP, folder, QUIET, launcher=HERE)
    return folder, calls


def test_jobs_leave_the_record_of_one_process(short, whole, launched, calls):
    (folder, rows), (out, launched_calls) = whole, launched
    assert [list(call.populations) for call in launched_calls] == [["lora"], ["balora"]]
    assert timeless(json.loads((out / "results.json").read_text())) == timeless(rows)
    for name in ("metrics.jsonl", "answers.jsonl", "spectra.jsonl"):
        assert lines(out, name) == lines(folder, name), name
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert len(load_runs([out])[0]) == 8
    starts = json.loads((out / "environment.json").read_text())
    assert len(starts) == 2
    assert timeless(launch(short, SWEEP, out, QUIET, launcher=HERE)) == timeless(rows)
    assert timeless(run(short, SWEEP, out, QUIET)) == timeless(rows)
    assert not calls, "a finished run is not done again"


def test_members_may_be_cut_from_each_other(short, whole, calls, tmp_path):
    """Up to rounding, as other numbers of members are other programs."""
    sweep, folder = SWEEP | {"method": ("balora",)}, whole[0]
    (row,) = launch(short, sweep, tmp_path / "run", QUIET, launcher=HERE, jobs=2)
    assert [len(everyone(call.populations)) for call in calls] == [2, 2]
    expected = [line for line in lines(folder) if line["population"] == "balora"]
    for found, one in zip(lines(tmp_path / "run"), expected, strict=True):
        assert (found["kind"], found["member"], found["step"]) == (one["kind"], one["member"], one["step"])
        for name, value in one.items():
            if isinstance(value, float) and "gap" not in name:
                np.testing.assert_allclose(found[name], value, rtol=1e-5)
    parts = [json.loads(line) for i in range(2) for line in (tmp_path / f"run/parts/{i}/metrics.jsonl").open()]
    of_parts, of_run = (
        [line["seconds"] for line in found if "seconds" in line]
        for found in (parts, map(json.loads, (tmp_path / "run" / "metrics.jsonl").open()))
    )
    assert len(of_parts) == 2, "of the second step; the first takes longer"
    assert of_run == [pytest.approx(sum(of_parts))]
    assert row["step_seconds"] == of_run[0] / 4
    for member in ("balora-learning_rate=0.001-seed=1", "balora-learning_rate=0.01-seed=1"):
        models = [load_trained(where, member).model for where in (tmp_path / "run", folder)]
        for pair in zip(*(jax.tree.leaves(nnx.state(model, nnx.LoRAParam)) for model in models), strict=True):
            np.testing.assert_allclose(*pair, rtol=1e-4, atol=1e-6)


def test_finished_parts_are_kept_when_others_fail(short, whole, launched, calls, tmp_path, monkeypatch):
    folder, failing = tmp_path / "run", ["balora"]

    def done_before(self):
        if list(self.populations) == failing:
            raise RunError("no memory")
        shutil.copytree(launched[0] / "parts" / self.folder.name, self.folder)
        (start,) = json.loads((self.folder / "environment.json").read_text())
        start |= {"command": "_submit.py", "device": f"gpu of {self.folder.name}"}
        (self.folder / "environment.json").write_text(json.dumps([start]))

    monkeypatch.setattr(TrainPart, "__call__", done_before)
    wanted = r"1 of 2 jobs failed.*: parts/1: balora \(4 runs\): RunError: no memory, log .*jobs/1\.out$"
    with pytest.raises(RunError, match=wanted):
        launch(short, SWEEP, folder, QUIET, launcher=HERE)
    with pytest.raises(RunError, match="is cut into parts, of which some are missing; the same command with --launch"):
        run(short, SWEEP, folder, QUIET)
    with pytest.raises(ConfigError, match="is cut into 2 parts already; leave --jobs 3 out"):
        launch(short, SWEEP, folder, QUIET, launcher=HERE, jobs=3)
    busy = RunDirectory(folder / "parts" / "1", {})  # of a launcher that was killed, say
    with pytest.raises(RunError, match=r"another process is working in .*parts/1; when it has ended"):
        launch(short, SWEEP, folder, QUIET, launcher=HERE)
    busy.close()
    shutil.rmtree(folder / "parts" / "1")
    failing.clear()
    calls.clear()
    assert timeless(launch(short, SWEEP, folder, QUIET, launcher=HERE)) == timeless(whole[1])
    assert [list(one.populations) for one in calls] == [["balora"]]
    starts = json.loads((folder / "environment.json").read_text())
    assert {start["device"] for start in starts} == {"gpu of 0", "gpu of 1"}
    assert "_submit.py" not in [start["command"] for start in starts]


def test_a_sweep_in_jobs_goes_on_to_more_steps(short, calls, tmp_path):
    longer = dataclasses.replace(short, training=dataclasses.replace(short.training, steps=3))
    sweep = {"seed": (0, 1)}
    launch(short, sweep, tmp_path / "run", QUIET, launcher=HERE)
    rows = launch(longer, sweep, tmp_path / "run", QUIET, launcher=HERE)
    assert timeless(rows) == timeless(run(longer, sweep, tmp_path / "whole", QUIET))
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def test_what_one_process_has_begun_is_not_cut(short, tmp_path):
    directory = RunDirectory(tmp_path / "run", {"lora": short})
    directory.append([{"kind": "checkpoint", "population": "lora", "step": 1}])
    directory.close()
    with pytest.raises(RunError, match="was begun without --launcher, and goes on without"):
        launch(short, {}, tmp_path / "run", QUIET, launcher=HERE)


def test_a_job_that_is_preempted_is_queued_again_as_it_is(short, tmp_path):
    part = TrainPart({"lora": {"lora": short}}, tmp_path, None, tmp_path)
    again = part.checkpoint()
    assert (again.function, again.args, again.kwargs) == (part, (), {})


def script(config, folder):
    file = folder / "tiny.py"
    file.write_text(f"from balora_jax.training import *\nconfig = {config!r}\nsweep = {{'seed': (0, 1)}}\n")
    return file


def test_a_launcher_that_is_stopped_stops_its_jobs(config, tmp_path):
    """With real processes; the jobs save first, as rare checkpoints show."""
    settings = dataclasses.replace(config.training, steps=2000, eval_every=1000, checkpoint_every=10_000)
    config = dataclasses.replace(config, training=settings)
    file, out = script(config, tmp_path), tmp_path / "run"
    command = ["run", str(file), "--output", str(out), "--launcher", "local", "--jobs", "2"]
    process = subprocess.Popen([sys.executable, "-m", "balora_jax.cli", *command], stderr=subprocess.PIPE, text=True)
    metrics = [out / "parts" / str(part) / "metrics.jsonl" for part in range(2)]
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not all(f.exists() and '"step": 20' in f.read_text() for f in metrics):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(100) == 130
    assert "interrupted; the same command goes on" in process.stderr.read()
    saved = [sorted(int(path.name) for path in (file.parent / "checkpoints/lora").iterdir()) for file in metrics]
    assert all(len(steps) == 1 and 20 <= steps[0] < 2000 for steps in saved), saved
    logs = [log.read_text() for log in (out / "jobs").glob("*.out")]
    assert len(logs) == 2
    assert all("the same command goes on from step" in log for log in logs)
