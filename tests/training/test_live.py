"""Live logs: the numbers of the record by the same names and steps, read back from what the real libraries wrote."""

import json
import math
import sqlite3
import struct

import pytest

from balora_jax.training import Config, ConfigError, RunError
from balora_jax.training.live import LIBRARIES, LiveLog, check_log, numbers
from balora_jax.training.records import RunDirectory

SHARED = {"population": "lora"}
RECORDS = [
    *({"kind": "evaluation", "member": m, "step": 0, "evaluation_loss": 3.0, "by_module": {"a": 2.5}} for m in "xy"),
    *({"kind": "train", "member": m, "step": 1, "loss": 2.0, "gap_mean": 0.5} for m in "xy"),
    {"kind": "checkpoint", "step": 1},
    *({"kind": "train", "member": m, "step": 2, "loss": "nan", "gap_mean": 0.25} for m in "xy"),
    *({"kind": "evaluation", "member": m, "step": 2, "evaluation_loss": 1.5} for m in "xy"),
    *({"kind": "result", "member": m, "step": 2, "accuracy": 0.5, "score": "exact", "status": "ok"} for m in "xy"),
]
EXPECTED = {("evaluation_loss", 0): 3.0, ("by_module/a", 0): 2.5, ("loss", 1): 2.0, ("gap_mean", 1): 0.5}
EXPECTED |= {("loss", 2): math.nan, ("gap_mean", 2): 0.25, ("evaluation_loss", 2): 1.5, ("accuracy", 2): 0.5}


def logged(kind, folder):
    """Hands the records to a log through a run directory, as a run does."""
    members = {name: Config(name="some run") for name in "xy"}
    directory = RunDirectory(folder, members)
    directory.watch(LiveLog(kind, folder, members, identity=f"{folder} {directory.started}", resumed=False))
    for record in RECORDS:
        directory.append([SHARED | record])
    directory.close()


def in_tensorboard(folder):
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = {}
    for file in folder.glob("events.*"):
        data = file.read_bytes()
        while data:  # length, its checksum, event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            data = data[16 + length :]
    return found


def test_tensorboard_has_every_number(tmp_path):
    pytest.importorskip("tensorboardX")
    logged("tensorboard", tmp_path / "run")
    for member in "xy":
        assert in_tensorboard(tmp_path / "run" / "tensorboard" / member) == pytest.approx(EXPECTED, nan_ok=True)


def test_trackio_has_every_number(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio")
    for module in ("sqlite_storage", "run", "utils"):
        monkeypatch.setattr(f"trackio.{module}.TRACKIO_DIR", tmp_path / "trackio", raising=False)
    logged("trackio", tmp_path / "run")
    (file,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as base:
        lines = base.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    for member in "xy":
        found = {
            (name, step): float(value)
            for run, step, text in lines
            if run == member
            for name, value in json.loads(text).items()
        }
        assert found == pytest.approx(EXPECTED, nan_ok=True)


def in_wandb(file):
    """The history in a file of wandb's: chunks in blocks as of LevelDB's log, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts, found = file.read_bytes(), 7, [], {}
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15  # no chunk begins in the last bytes of a block
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its end
            items = Record.FromString(b"".join(parts)).history.item
            values = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
            found |= {(name, values["_step"]): float(x) for name, x in values.items() if not name.startswith("_")}
            parts = []
    return found


def test_wandb_has_every_number(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    logged("wandb", tmp_path / "run")
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    for file in files:
        assert in_wandb(file) == pytest.approx(EXPECTED, nan_ok=True)


def test_numbers_are_those_of_the_record():
    record = {"kind": "result", "member": "x", "step": 3, "accuracy": None, "loss": "-inf", "score": "nano", "n": 2}
    assert numbers(record | {"by_module": {"step": 1.0, "x": "nan"}}) == pytest.approx(
        {"loss": -math.inf, "n": 2.0, "by_module/step": 1.0, "by_module/x": math.nan}, nan_ok=True
    )


def test_a_log_that_cannot_be_is_said(monkeypatch):
    with pytest.raises(ConfigError, match="--log must be one of tensorboard, wandb, trackio, got 'x'"):
        check_log("x")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for kind, library in LIBRARIES.items():
        with pytest.raises(ConfigError, match=rf"--log {kind} needs {library}: pip install 'balora-jax\[{kind}\]'"):
            check_log(kind)


def test_a_log_that_fails_loses_no_record(tmp_path, monkeypatch):
    def fail(library, member):
        raise OSError("no key")

    monkeypatch.setattr("balora_jax.training.live.check_log", lambda kind: None)
    monkeypatch.setattr("balora_jax.training.live._STARTS", {"wandb": fail})
    monkeypatch.setitem(LIBRARIES, "wandb", "json")
    with pytest.raises(RunError, match="--log wandb: no key; the record is kept, and the same command goes on"):
        logged("wandb", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["member"] == "x"
