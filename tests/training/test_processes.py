"""Runs of several processes end with the numbers of one, also when they go on in another number of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from balora_jax.errors import ConfigError
from balora_jax.settings import ParallelSettings
from balora_jax.training.processes import connect

CONFIG = """
from balora_jax.settings import *
config = Config(
    name="x", method="lora", model=ModelSettings(path={folder!r}), adapter=AdapterSettings(rank=3, alpha=6.0),
    data=DataSettings(modules=("arithmetic__add_or_sub",), train_examples=60, eval_examples=10, length=48),
    training=TrainingSettings(
        steps=12, batch_size=4, eval_every=6, checkpoint_every=4, eval_batch_size=4, log_every=1, max_new_tokens=3
    ),
)
"""


def started(folder, count, *flags):
    """The processes of a run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "balora_jax.cli", "run", "config.py", "--output", "out", *flags]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    several = ["--parallel.coordinator", address, "--parallel.processes", str(count)] if count > 1 else []
    return [
        subprocess.Popen(
            [*command, *several, *(["--parallel.process", str(index)] if several else [])],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def run(folder, count, *flags):
    done = [(process.communicate(timeout=240), process.returncode) for process in started(folder, count, *flags)]
    assert not any(code for _, code in done), done
    return [output for (output, _), _ in done]


@pytest.fixture
def folder(tmp_path, model_folder):
    (tmp_path / "config.py").write_text(CONFIG.format(folder=str(model_folder)))
    return tmp_path


def results(folder):
    (row,) = json.loads((folder / "out" / "results.json").read_text())
    return row["evaluation_loss"]["values"]


def test_processes_end_as_one_after_a_kill(folder):
    (folder / "one").mkdir()
    (folder / "one" / "config.py").write_text((folder / "config.py").read_text())
    run(folder / "one", 1)
    record = folder / "out" / "metrics.jsonl"
    processes = started(folder, 2)
    deadline = time.monotonic() + 240
    while not (record.exists() and '"checkpoint"' in record.read_text()):
        assert time.monotonic() < deadline, [process.communicate() for process in processes]
        time.sleep(0.02)
    for process in processes:  # the first would end by itself, when it misses the other
        process.send_signal(signal.SIGKILL)
        process.communicate()
    first, second = run(folder, 2, "--parallel.tensor", "2")
    assert "2 processes" in first
    assert "evaluat" not in second, "the first alone shows"
    assert results(folder) == pytest.approx(results(folder / "one"), rel=1e-5)
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == sorted(set(steps)) == list(range(1, 13)), "the first alone writes"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coordinator": "localhost:1"}, "parallel.processes must be given beside the others"),
        ({"coordinator": "localhost:1", "processes": 2}, "parallel.process must be given beside the others"),
        ({"process": 0, "processes": 2}, "parallel.coordinator must be given beside the others"),
        ({"coordinator": "localhost:1", "processes": 2, "process": 2}, "parallel.process must be from 0 to 1, got 2"),
        (
            {"coordinator": "localhost", "processes": 2, "process": 0},
            "parallel.coordinator must be host:port, got",
        ),
    ],
)
def test_settings_of_processes(settings, message):
    with pytest.raises(ConfigError, match=message):
        connect(ParallelSettings(**settings))
