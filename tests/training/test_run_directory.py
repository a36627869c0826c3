"""Run directories on a full disk, with links in them, and with what a kill leaves."""

import dataclasses
import errno
import json
import os
import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest
from rich.console import Console

from balora_jax.training import ConfigError, RunError, run
from balora_jax.training.checkpoints import Checkpoints
from balora_jax.training.records import RunDirectory

QUIET = Console(quiet=True)


def records(folder):
    """Without times, and the places of checkpoints, which are recorded when they are on disk."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [{name: value for name, value in line.items() if name != "seconds"} for line in lines]
    return sorted(lines, key=lambda line: line["kind"] == "checkpoint")


@pytest.fixture(scope="module")
def short(config):
    settings = dataclasses.replace(config.training, steps=2, eval_every=2, checkpoint_every=1)
    return dataclasses.replace(config, training=settings)


@pytest.fixture(scope="module")
def whole(short, tmp_path_factory):
    """An undisturbed run and the number of times that it waited for a file to be on disk."""
    folder, calls = tmp_path_factory.mktemp("whole") / "run", []
    with pytest.MonkeyPatch.context() as patch:
        fsync = os.fsync
        patch.setattr(os, "fsync", lambda fd: calls.append(fsync(fd)))
        run(short, {}, folder, QUIET)
    return folder, len(calls)


def is_full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place", [4, -1])
def test_a_disk_that_is_full_at_any_write(place, short, whole, tmp_path, monkeypatch):
    """At a record of training, and at the figure."""
    expected, count = whole
    fsync, left = os.fsync, iter(range(count))
    monkeypatch.setattr(os, "fsync", lambda fd: is_full() if next(left) == place % count else fsync(fd))
    with pytest.raises(RunError, match=r"cannot (use|write to) .*run.*No space left on device"):
        run(short, {}, tmp_path / "run", QUIET)
    monkeypatch.undo()
    assert not list((tmp_path / "run").glob("*.tmp"))
    run(short, {}, tmp_path / "run", QUIET)
    assert records(tmp_path / "run") == records(expected)
    for name in ("results.json", "results.txt", "figure.png"):
        assert (tmp_path / "run" / name).stat().st_size > 500


def test_a_disk_without_room_for_a_checkpoint(short, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 10_000))
    with pytest.raises(RunError, match=r"cannot write the checkpoint .*lora/1 \(No space left on device\)"):
        run(short, {}, tmp_path / "run", QUIET)
    monkeypatch.undo()
    run(short, {}, tmp_path / "run", QUIET)
    assert records(tmp_path / "run") == records(whole[0])


def test_a_checkpoint_that_cannot_be_written(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=1)
    monkeypatch.setattr(ocp.CheckpointManager, "save", is_full)
    with pytest.raises(RunError, match=r"cannot write the checkpoint .*/7 \(No space left on device\)"):
        checkpoints.save(7, {"x": np.ones(3)})
    checkpoints.close()


def test_a_full_disk_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", is_full)
    with pytest.raises(RunError, match=r"cannot use the output folder .*: No space left on device"):
        RunDirectory(tmp_path, {})
    monkeypatch.undo()
    RunDirectory(tmp_path, {}).close()


@pytest.mark.parametrize("cut", ["a line without its end", "a whole line", "a part of a line"])
def test_the_last_line_of_a_record_may_be_cut_anywhere(cut, tmp_path):
    directory = RunDirectory(tmp_path, {})
    lines = [{"kind": "checkpoint", "population": "lora", "step": step} for step in range(3)]
    directory.append(lines)
    directory.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    left = {"a line without its end": text[:-1], "a whole line": text, "a part of a line": text[:-5]}[cut]
    (tmp_path / "metrics.jsonl").write_text(left)
    kept = 2 if cut == "a part of a line" else 3
    for extra in range(2):
        directory = RunDirectory(tmp_path, {})
        assert directory.records == lines[:kept] + lines[:1] * extra
        directory.append(lines[:1])
        directory.close()


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"kind": "checkpoint", "population": "lora", "step": 1, "x": ' + "[" * 900 + "]" * 900 + "}",
        "5",
        '{"kind": "checkpoint", "population": "lora", "step": "1"}',
        '{"kind": [], "step": 1}',
        "\xff",
    ],
)
def test_lines_that_are_no_record(line, tmp_path):
    good = '{"kind": "checkpoint", "population": "lora", "step": 1}\n'
    RunDirectory(tmp_path, {}).close()
    (tmp_path / "metrics.jsonl").write_text(f"{good}{line}\n{good}", encoding="latin-1")
    with pytest.raises(RunError, match=r"metrics.jsonl, line 2 is"):
        RunDirectory(tmp_path, {})


@pytest.mark.parametrize(
    "name",
    [".lock", "config.json.tmp", "config.json", "metrics.jsonl", "environment.json", "results.json", "figure.png",
     "checkpoints", "checkpoints/lora", "checkpoints/lora/1/state"],
)  # fmt: skip
@pytest.mark.parametrize("there", [True, False])
def test_planted_links_are_refused(name, there, tmp_path):
    """Through them a run would write, truncate or delete elsewhere."""
    victim = tmp_path / "victim"
    (victim.mkdir if name.startswith("checkpoints") else victim.touch)() if there else None
    folder = tmp_path / "run"
    if name not in (".lock", "config.json.tmp", "config.json"):
        RunDirectory(folder, {}).close()
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(victim)
    before = sorted(folder.rglob("*"))
    with pytest.raises(ConfigError, match=rf"{name} is a link"):
        RunDirectory(folder, {})
    assert sorted(folder.rglob("*")) == before
    assert victim.exists() == there


def test_a_folder_that_is_a_link_itself_is_a_choice(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    RunDirectory(tmp_path / "run", {}).close()
    assert (tmp_path / "elsewhere" / "config.json").is_file()


def test_output_of_a_name_that_is_too_long(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot write to the output folder .*too long"):
        RunDirectory(tmp_path / ("x" * 300), {})
