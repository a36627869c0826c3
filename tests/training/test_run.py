"""Whole runs: what they leave on disk, interruption and resumption, and directories that cannot be used."""

import dataclasses
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from balora_jax.cli import main
from balora_jax.console import PlainConsole
from balora_jax.training import ConfigError, RunError, evaluator, run
from balora_jax.training.config import expand
from balora_jax.training.evaluation import Losses
from balora_jax.training.feed import Feed
from balora_jax.training.figures import elapsed_seconds, loss_curves
from balora_jax.training.interruption import Interrupted
from balora_jax.training.populations import sort_into_populations
from balora_jax.training.records import RunDirectory

SWEEP = {"method": ("lora", "balora"), "optimizer.learning_rate": (1e-3, 1e-2, 1e-1), "seed": (0, 1)}
QUIET = Console(quiet=True)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_time(lines):
    """Also without the places of checkpoints, which are recorded when they are on disk."""
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    return sorted(lines, key=lambda line: line["kind"] == "checkpoint")


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A finished run of the sweep: its folder and its rows; beside the folder is what was said."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    with folder.with_name("said.txt").open("w") as file:
        return folder, run(config, SWEEP, folder, PlainConsole(file=file))


def test_run_says_what_it_does(finished):
    said = finished[0].with_name("said.txt").read_text()
    slow = ": reading the base and the data ..."  # said where it takes more than a second
    first, *lines = [line for line in said.splitlines() if slow not in line]
    assert first.startswith("12 runs in 2 populations; ")
    assert first.endswith(f"; writes to {finished[0]}")
    trained = 2 * 3 * 3 * (16 + 24)
    for line, method in zip(lines[:2], ("lora", "balora"), strict=True):
        assert re.match(rf"{method}: 6 runs of 6 steps of 2 rows; {trained} trained parameters each, \d", line), line
    for method in ("lora", "balora"):
        for line in (
            r"step 0/6: evaluating \.\.\. [\d.]+ s; evaluation loss [\d.]+ at best \(METHOD-.*\), median [\d.]+",
            r"compiling the step \.\.\. [\d.]+ s; a step needs \d+ [KM]iB of ",
            r"step 6/6  loss [\d.]+, mean of 6 steps [\d.]+  [\d,]+ tokens/s",
            r"step 6/6: evaluating \.\.\. ",
        ):
            assert re.search(f"^{method}: {line.replace('METHOD', method)}", said, re.MULTILINE), line


def test_run_leaves_a_complete_record(finished, config):
    folder, rows = finished
    lines = records(folder)
    kinds = {kind: [line for line in lines if line["kind"] == kind] for kind in {line["kind"] for line in lines}}
    members, steps = 12, config.training.steps
    assert len(kinds["train"]) == members * steps
    assert len(kinds["evaluation"]) == members * 3  # before, in the middle, at the end
    assert len(kinds["result"]) == members
    assert {"loss", "gradient_norm", "update_norm", "gap_mean", "gap_worst"} <= set(kinds["train"][0])
    assert all("untouched" in line for line in kinds["train"] if line["population"] == "balora")
    assert set(kinds["evaluation"][0]["by_module"]) == set(config.data.modules)
    resolved = json.loads((folder / "config.json").read_text())
    assert len(resolved) == members
    assert resolved["balora-learning_rate=0.01-seed=1"]["optimizer"]["learning_rate"] == 0.01
    (environment,) = json.loads((folder / "environment.json").read_text())
    assert {"packages", "device", "commit", "command", "time"} <= set(environment)
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    table = (folder / "results.txt").read_text()
    assert table.count("±") >= 4
    assert "exact match" in table
    assert "standard deviation over n seeds" in table
    for method in ("lora", "balora"):
        assert sorted(os.listdir(folder / "checkpoints" / method)) == ["4", "6"]
    assert [row["population"] for row in rows] == ["lora", "balora"]


def test_time_is_that_of_the_steps(tmp_path):
    directory = RunDirectory(tmp_path / "run", {})
    shared = {"kind": "train", "population": "lora"}
    directory.append({**shared, "member": "a", "step": 1 + i} | seconds for i, seconds in enumerate(
        ({}, {"seconds": 2.0}, {"seconds": 4.0}, {"seconds": 12.0})))  # fmt: skip
    directory.append({**shared, "member": "b", "step": 1 + i} for i in range(4))
    assert elapsed_seconds(directory, "lora", 2) == [0, 2, 3, 5, 11], "the first step counts as the median one"
    assert elapsed_seconds(directory, "dora", 2) == []
    directory.close()


@pytest.mark.parametrize(
    ("n", "title"), [(1, "best cell of every method"), (2, "median and range over seeds, best cell")]
)
def test_figure_names_a_range_where_there_is_one(n, title, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("matplotlib.figure.Figure.suptitle", lambda self, text, **options: said.append(text))
    directory = RunDirectory(tmp_path / "run", {})
    members = [f"lora-seed={seed}" for seed in range(n)]
    shared = {"kind": "evaluation", "population": "lora", "step": 0, "evaluation_loss": 1.0}
    directory.append({**shared, "member": member} for member in members)
    loss_curves(
        directory, [{"population": "lora", "best": {}, "members": members, "n": n, "runs": n}], tmp_path / "x.png"
    )
    directory.close()
    assert len(said) == 1
    assert said[0].startswith(title)


def test_rows_are_the_best_cells(finished):
    folder, rows = finished
    results = [line for line in records(folder) if line["kind"] == "result"]
    for row in rows:
        cells = {}
        for line in results:
            if line["population"] == row["population"]:
                cells.setdefault(re.search(r"learning_rate=([^-]+(?:-\d+)?)", line["member"])[1], []).append(line)
        means = {rate: np.mean([line["evaluation_loss"] for line in lines]) for rate, lines in cells.items()}
        best = min(means, key=means.get)
        assert row["best"] == {"optimizer.learning_rate": float(best)}
        assert row["n"] == 2
        assert row["diverged"] == 0
        assert row["runs"] == 6
        assert row["evaluation_loss"]["mean"] == pytest.approx(means[best])
        assert row["evaluation_loss"]["std"] == pytest.approx(
            np.std([line["evaluation_loss"] for line in cells[best]], ddof=1)
        )
        assert row["on_edge"] == (["optimizer.learning_rate"] if float(best) != 1e-2 else [])


def test_balora_is_balanced_and_lora_is_not(finished):
    lora, balora = finished[1]
    assert balora["gap_mean"]["mean"] < 1e-5 < 1e-1 < lora["gap_mean"]["mean"]


def test_sizes_are_recorded(finished):
    """Two layers of three projections 16 x 24, rank 3; Adam keeps two moments, and some counters."""
    folder, rows = finished
    trained = 2 * 3 * 3 * (16 + 24)
    for found in (*rows, *(line for line in records(folder) if line["kind"] == "result")):
        assert found["trained_parameters"] == trained
        assert 0 < found["state_bytes"] - 2 * 4 * trained < 50


def answers(folder):
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_answers_are_kept_to_look_at(finished, config):
    found = answers(finished[0])
    assert len(found) == 12 * 10
    for result in (line for line in records(finished[0]) if line["kind"] == "result"):
        own = [answer for answer in found if answer["member"] == result["member"]]
        assert len(own) == 10
        assert np.mean([answer["right"] for answer in own]) == pytest.approx(result["accuracy"])
        assert all((answer["step"], answer["population"]) == (6, result["population"]) for answer in own)
    assert {answer["module"] for answer in found} <= set(config.data.modules)
    assert all(a["right"] == (a["answer"].strip() == a["expected"].strip()) and a["prompt"] for a in found)


def test_a_method_without_pairs_has_no_gap(config, tmp_path):
    short = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=1))
    (row,) = run(short, {"method": ("full",)}, tmp_path / "full", QUIET)
    for line in records(tmp_path / "full"):
        assert not any("gap" in key for key in line)
    assert row["trained_parameters"] == 2 * 3 * 16 * 24
    assert "gap_mean" not in row
    assert re.search(r"full .* 1 +- ", (tmp_path / "full" / "results.txt").read_text())
    markdown = runpy.run_path(str(Path(__file__).parents[2] / "experiments" / "update_readme.py"))["markdown"]
    assert "| 1 | - |" in markdown(tmp_path / "full")


def test_finished_run_is_not_done_again(finished, config):
    folder, rows = finished
    before = (folder / "metrics.jsonl").read_text()
    assert run(config, SWEEP, folder, QUIET) == rows
    assert (folder / "metrics.jsonl").read_text() == before


def test_members_of_one_seed_see_the_same_data_in_every_method(finished):
    first = {}
    for line in records(finished[0]):
        if line["kind"] == "train" and line["step"] == 1:
            first.setdefault(line["member"].rsplit("seed=", 1)[1], set()).add(round(line["loss"], 5))
    assert {seed: len(losses) for seed, losses in first.items()} == {"0": 1, "1": 1}
    assert first["0"] != first["1"]


def script(config, folder):
    """A config file that rebuilds the tiny config, slow enough to be interrupted."""
    file = folder / "tiny.py"
    file.write_text(
        "from balora_jax.data.recipes import DataSettings\n"
        "from balora_jax.training import *\n"
        "from balora_jax.optimizers import OptimizerSettings\n"
        f"config = {config!r}\n"
        'sweep = {"method": ("lora", "balora"), "seed": (0, 1)}\n'
    )
    return file


def recorded_step(folder, method):
    """The last training step of a method that has reached the disk."""
    try:
        text = (folder / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return 0
    steps = re.findall(rf'"kind": "train", "population": "{method}".*?"step": (\d+)', text)
    return int(steps[-1]) if steps else 0


def test_killed_run_goes_on_and_ends_with_the_same_numbers(config, tmp_path, capsys):
    """Killed in its second population, between two checkpoints; dropout makes the random state matter."""
    adapter = dataclasses.replace(config.adapter, dropout=0.3)
    config = dataclasses.replace(config, adapter=adapter, training=dataclasses.replace(config.training, steps=12))
    file = script(config, tmp_path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(["run", str(file), "--output", str(whole)]) == 0
    command = [sys.executable, "-m", "balora_jax.cli", "run", str(file), "--output", str(killed)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 250
    while recorded_step(killed, "balora") < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL, "the run ended before it was killed"
    capsys.readouterr()
    assert main(["run", str(file), "--output", str(killed)]) == 0
    assert "balora: going on from step" in capsys.readouterr().out
    assert without_time(records(killed)) == without_time(records(whole))
    assert answers(killed) == answers(whole)


def numbers(folder):
    """The records without times and without when checkpoints were made, in an order of their own."""
    kept = [record for record in without_time(records(folder)) if record["kind"] != "checkpoint"]
    return sorted(kept, key=lambda record: (record["kind"], record["member"], record["step"]))


@pytest.fixture(scope="module")
def two_seeds(config, tmp_path_factory):
    """A config with dropout and rare checkpoints, and the finished run of two of its seeds."""
    adapter = dataclasses.replace(config.adapter, dropout=0.3)
    training = dataclasses.replace(config.training, checkpoint_every=100)
    config = dataclasses.replace(config, adapter=adapter, training=training)
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(config, {"seed": (0, 1)}, folder, QUIET)
    return config, folder


@pytest.mark.parametrize(
    ("where", "call", "signals", "message", "saved"),
    [
        ((Feed, "__call__"), 2, [signal.SIGINT], "the same command goes on from step 2 of lora", 2),
        ((evaluator.Evaluator, "losses"), 2, [signal.SIGTERM], "the same command goes on from step 3 of lora", 3),
        ((evaluator.Evaluator, "losses"), 3, [signal.SIGINT], "the same command goes on from step 6 of lora", 6),
        ((evaluator.Evaluator, "losses"), 1, [signal.SIGINT], "the same command begins lora anew", None),
        ((Feed, "__call__"), 4, [signal.SIGINT] * 2, "the same command begins lora anew; 3 steps are lost", None),
    ],
)
def test_a_signal_saves_what_is_done(two_seeds, where, call, signals, message, saved, tmp_path, monkeypatch, capfd):
    config, whole = two_seeds
    calls, original = [], getattr(*where)

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            for number in signals:
                os.kill(os.getpid(), number)
        return original(*arguments)

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(*where, interrupted)
    with pytest.raises(Interrupted, match=f"^{message}$") as caught:
        run(config, {"seed": (0, 1)}, tmp_path / "out", QUIET)
    assert caught.value.signal == signals[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    checkpoints = tmp_path / "out" / "checkpoints" / "lora"
    assert [int(path.name) for path in checkpoints.iterdir()] == ([saved] if saved else [])
    monkeypatch.undo()
    run(config, {"seed": (0, 1)}, tmp_path / "out", QUIET)
    assert numbers(tmp_path / "out") == numbers(whole)


def test_a_finished_run_goes_on_to_more_steps(two_seeds, tmp_path):
    config, finished = two_seeds
    longer = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=9))
    run(longer, {"seed": (0, 1)}, tmp_path / "whole", QUIET)
    shutil.copytree(finished, tmp_path / "out")
    rows = run(longer, {"seed": (0, 1)}, tmp_path / "out", QUIET)
    assert numbers(tmp_path / "out") == numbers(tmp_path / "whole")
    assert answers(tmp_path / "out") == answers(tmp_path / "whole")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["lora-seed=0"]["training"]["steps"] == 9
    assert run(longer, {"seed": (0, 1)}, tmp_path / "out", QUIET) == rows
    with pytest.raises(ConfigError, match=r"a run with training\.steps = 9, and not 6, in lora-seed=0; choose another"):
        run(config, {"seed": (0, 1)}, tmp_path / "out", QUIET)


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("optimizer__schedule", "cosine", r"the learning rate falls to zero at its end \(optimizer\.schedule cosine\)"),
        ("method", "adalora", "the phases of adalora are shares of it"),
    ],
)
def test_a_run_whose_steps_depend_on_their_number_is_not_made_longer(field, value, why, members, tmp_path):
    short, longer = (members(training__steps=steps, **{field: value}) for steps in (6, 9))
    RunDirectory(tmp_path / "run", {"x": short}).close()
    before = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(ConfigError, match=rf"holds a run of 6 steps, which cannot go on to 9: {why}; choose another"):
        RunDirectory(tmp_path / "run", {"x": longer})
    assert (tmp_path / "run" / "config.json").read_text() == before


def test_a_longer_run_forgets_what_was_recorded_because_it_ended(members, tmp_path):
    short, longer = (members(training__steps=steps, training__eval_every=4) for steps in (6, 9))
    shared = {"population": "lora", "member": "x"}
    kept = [{**shared, "kind": "evaluation", "step": step} for step in (0, 4)] + [
        {**shared, "kind": "train", "step": 6}
    ]
    directory = RunDirectory(tmp_path / "run", {"x": short})
    directory.append([*kept, *({**shared, "kind": kind, "step": 6} for kind in ("evaluation", "result"))])
    directory.append([{"kind": "checkpoint", "population": "lora", "step": 6}])
    directory.close()
    RunDirectory(tmp_path / "run", {"x": longer}).close()
    assert records(tmp_path / "run") == [*kept, {"kind": "checkpoint", "population": "lora", "step": 6}]


def test_results_that_were_recorded_in_part_are_recorded_again(two_seeds, tmp_path):
    config, whole = two_seeds
    shutil.copytree(whole, tmp_path / "out")
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out" / "metrics.jsonl").write_text("".join(lines[:-1]))
    run(config, {"seed": (0, 1)}, tmp_path / "out", QUIET)
    assert without_time(records(tmp_path / "out")) == without_time(records(whole))
    assert answers(tmp_path / "out") == answers(whole)


@pytest.fixture
def stopped(finished, tmp_path):
    """A copy of the run as if it had been stopped in its second population, after the checkpoint of step 4."""
    folder = tmp_path / "stopped"
    shutil.copytree(finished[0], folder)
    shutil.rmtree(folder / "checkpoints" / "balora" / "6")
    kept = [r for r in records(folder) if r["population"] == "lora" or (r["kind"] != "result" and r["step"] <= 4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    return folder


def test_stopped_run_goes_on(stopped, finished, config):
    run(config, SWEEP, stopped, QUIET)
    assert without_time(records(stopped)) == without_time(records(finished[0]))


def damage_nothing_left(folder):
    shutil.rmtree(folder / "checkpoints" / "balora")


def damage_truncated(folder):
    for file in (folder / "checkpoints" / "balora" / "4" / "state").rglob("*"):
        if file.is_file() and file.stat().st_size > 10:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def damage_one_file_missing(folder):
    files = [f for f in (folder / "checkpoints" / "balora" / "4" / "state").rglob("*") if f.is_file()]
    max(files, key=lambda file: file.stat().st_size).unlink()


def damage_meta(folder):
    file = folder / "checkpoints" / "balora" / "4" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps({**meta, "checksum": [0] * len(meta["checksum"])}))


def damage_config(folder):
    (folder / "config.json").write_text("{")


def damage_record(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[3] = lines[3][:10]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def damage_foreign_line(folder):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("5\n")


def damage_other_json(folder):
    (folder / "config.json").write_text("[]")


def damage_lost_record(folder):
    lines = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"population": "lora"' in line]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def damage_lines(change, **fields):
    """Changes the lines of the first records that have these fields."""

    def damage(folder):
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        place = next(i for i, line in enumerate(lines) if fields.items() <= json.loads(line).items())
        lines[place : place + 1] = change(lines[place])
        (folder / "metrics.jsonl").write_text("".join(lines))

    return damage


def lost(line):
    return []


def doubled(line):
    return [line, line]


def of_another(line):
    return [line.replace("seed=0", "seed=7")]


def without_step(line):
    return [re.sub(r'"step": (\d+)', r'"step": "\1"', line)]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            damage_lines(lost, kind="train", population="balora", step=3),
            r"lacks records of balora up to its checkpoint of step 4: the train record of step 3 of balora-",
        ),
        (
            damage_lines(doubled, kind="train", population="balora", step=3),
            "holds twice records of balora .* step 3 of",
        ),
        (
            damage_lines(lost, kind="evaluation", population="balora", step=3),
            "the evaluation record of step 3 of balora",
        ),
        (
            damage_lines(doubled, kind="evaluation", population="balora", step=0),
            "the evaluation record of step 0 of bal",
        ),
        (
            damage_lines(lost, kind="train", population="lora", step=2),
            r"lacks records of lora up to its last step 6: the train record of step 2 of lora-learning_rate=",
        ),
        (
            damage_lines(doubled, kind="result", population="lora"),
            "holds twice .* the result record of step 6 of lora-lea",
        ),
        (
            damage_lines(lost, kind="evaluation", population="lora", step=6),
            "the evaluation record of step 6 of lora-learn",
        ),
        (damage_lines(of_another, kind="train", population="lora", step=2), "line .* is no record of a run"),
        (damage_lines(without_step, kind="train", population="lora", step=2), "line .* is no record of a run"),
        (damage_nothing_left, "tells of a checkpoint of balora at step 4"),
        (damage_truncated, "balora/4 is broken"),
        (damage_one_file_missing, "balora/4 is broken"),
        (damage_meta, "balora/4 is broken .*not those that were saved"),
        (damage_config, "config.json is not JSON"),
        (damage_record, "metrics.jsonl, line 4 is not JSON"),
        (damage_foreign_line, "is no record of a run"),
        (damage_other_json, "must hold a JSON dict"),
        (damage_lost_record, "lacks records of balora up to its checkpoint of step 4"),
    ],
)
def test_damage_is_reported(stopped, config, damage, message):
    damage(stopped)
    before = (stopped / "metrics.jsonl").read_text()
    with pytest.raises(RunError, match=message):
        run(config, SWEEP, stopped, QUIET)
    assert (stopped / "metrics.jsonl").read_text() == before, "nothing may be lost"


def with_weight(folder, target, name, value):
    """A copy of a model with one number of a tensor changed."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    tensors[name].flat[5] = value
    save_file(tensors, target / "model.safetensors")
    return str(target)


UP = "model.layers.1.mlp.up_proj.weight"


def test_a_loss_that_is_not_finite_before_the_first_step_stops_the_run(members, model_folder, tmp_path):
    model = with_weight(model_folder, tmp_path / "nan", UP, np.nan)
    with pytest.raises(ConfigError, match=f"lora: the evaluation loss must be finite before .* nan; the weight {UP} h"):
        run(members(model__path=model), {}, tmp_path / "out", QUIET)
    assert not (tmp_path / "out" / "metrics.jsonl").exists(), "the same command begins anew"


def test_a_first_batch_whose_loss_is_not_finite_stops_the_run(members, model_folder, tmp_path, monkeypatch):
    """As where a token is in the training data alone."""
    fine = Losses(np.ones(1), {})
    monkeypatch.setattr(evaluator, "evaluate_loss", lambda *arguments, **options: fine)
    model = with_weight(model_folder, tmp_path / "nan", UP, np.inf)
    with pytest.raises(
        ConfigError, match=f"lora: the loss of the first batch must be finite .*; the weight {UP} holds"
    ):
        run(members(model__path=model), {}, tmp_path / "out", QUIET)
    assert {record["kind"] for record in records(tmp_path / "out")} == {"evaluation"}


def test_model_broken_by_its_last_update_counts_as_diverged(members, tmp_path):
    config = members(training__steps=1, optimizer__learning_rate=1e16)
    (row,) = run(config, {}, tmp_path / "out", QUIET)
    assert row["diverged"] == 1
    assert "best" not in row


def test_values_that_print_alike_keep_their_runs(config):
    close = {
        "optimizer.b2": (0.9999991, 0.9999992),
        "model.path": ("a/b", "a_b"),
        "data.modules": (tuple(f"m{i:02}" for i in range(40)), ("n",)),
    }
    populations = sort_into_populations(expand(config, close))
    assert sum(map(len, populations.values())) == 8
    assert len(populations) == 4
    assert max(map(len, populations)) < 200


def test_run_killed_before_its_first_file_goes_on(config, tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / "config.json.tmp").write_text("{")
    assert run(config, {}, tmp_path, QUIET)


def test_output_that_cannot_be_written_is_refused(config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write to the output folder"):
        run(config, {}, tmp_path / "file" / "out", QUIET)


def test_half_a_line_at_the_end_is_forgiven(stopped, finished, config):
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')
    run(config, SWEEP, stopped, QUIET)
    assert without_time(records(stopped)) == without_time(records(finished[0]))


def test_directory_of_another_config_is_refused(finished, config):
    other = dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, rank=4))
    with pytest.raises(ConfigError, match=r"adapter\.rank = 3, and not 4"):
        run(other, SWEEP, finished[0], QUIET)
    with pytest.raises(ConfigError, match="other members"):
        run(config, {**SWEEP, "seed": (0,)}, finished[0], QUIET)


def test_foreign_directory_is_refused(config, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"holds files but no config\.json"):
        run(config, SWEEP, tmp_path, QUIET)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_directory_in_use_is_refused(finished, config):
    members = {name: m for p in sort_into_populations(expand(config, SWEEP)).values() for name, m in p.items()}
    holder = RunDirectory(finished[0], members)
    with pytest.raises(RunError, match="another process"):
        run(config, SWEEP, finished[0], QUIET)
    holder.close()


def test_populations_differ_in_structure_and_members_in_numbers(config):
    sweep = {"adapter.rank": (2, 3), "method": ("lora", "balora"), "seed": (0, 1), "adapter.alpha": (1.0, 2.0)}
    populations = sort_into_populations(expand(config, sweep))
    assert set(populations) == {"lora-rank=2", "lora-rank=3", "balora-rank=2", "balora-rank=3"}
    assert set(populations["lora-rank=2"]) == {
        f"lora-rank=2-alpha={alpha}-seed={seed}" for seed in (0, 1) for alpha in (1, 2)
    }


def test_diverged_cells_are_counted_and_never_best(config, tmp_path):
    (row,) = run(config, {"optimizer.learning_rate": (1e-2, 1e12)}, tmp_path / "out", QUIET)
    assert row["diverged"] == 1
    assert row["runs"] == 2
    assert row["best"] == {"optimizer.learning_rate": 1e-2}
    statuses = {r["member"]: r["status"] for r in records(tmp_path / "out") if r["kind"] == "result"}
    assert statuses == {"lora-learning_rate=0.01": "finished", "lora-learning_rate=1e+12": "diverged"}
