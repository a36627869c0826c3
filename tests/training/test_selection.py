"""The best checkpoint, early stopping, and several evaluation sets."""

import dataclasses
import json
import os
import signal

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from balora_jax.console import PlainConsole
from balora_jax.training import ConfigError, EvaluationSettings, TrainingSettings, run
from balora_jax.training.checks import check
from balora_jax.training.config import expand
from balora_jax.training.evaluation import evaluate_loss
from balora_jax.training.feed import Feed
from balora_jax.training.interruption import Interrupted
from balora_jax.training.loading import load_data, load_evaluation
from balora_jax.training.selection import nothing_seen, seen
from balora_jax.training.single import Single, nothing_trained
from balora_jax.training.trained import load_trained

QUIET = Console(quiet=True)
OTHER = EvaluationSettings(
    "harder", "mathematics", modules=("arithmetic__add_or_sub",), difficulty=(2,), examples=7, seed=3
)


@pytest.fixture(scope="module")
def overfitting(config):
    """Evaluated at each of its 12 steps, with a rate at which the loss soon rises."""
    training = dataclasses.replace(config.training, steps=12, eval_every=1, checkpoint_every=5)
    optimizer = dataclasses.replace(config.optimizer, learning_rate=0.3)
    return dataclasses.replace(config, training=training, optimizer=optimizer, evaluations=(OTHER,))


def chosen(config, **values):
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **values))


def records(folder, kind):
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in record.items() if k != "seconds"} for record in found if record["kind"] == kind]


@pytest.fixture(scope="module")
def best(overfitting, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "best"
    rows = run(chosen(overfitting, select="best"), {"seed": (0, 1)}, folder, QUIET)
    return folder, rows


def test_laws_of_the_selection():
    """Against the rule in plain Python, for losses that rise, fall, repeat and are not finite."""
    rng = np.random.default_rng(0)
    for patience in (1, 2, None):
        losses = rng.choice([1.0, 2.0, 3.0, np.nan, np.inf], 12)
        state = nothing_seen(nnx.State({"a": nnx.Param(jnp.zeros(()))}), keep=True)
        least, at, waited, stopped = np.inf, 0, 0, -1
        for step, loss in enumerate(losses.tolist(), start=1):
            adapters = nnx.State({"a": nnx.Param(jnp.float32(step))})
            state = seen(state, adapters, loss=jnp.float32(loss), step=jnp.int32(step), patience=patience)
            least, at, waited = (loss, step, 0) if loss < least else (least, at, waited + 1)
            if patience is not None and stopped < 0 and waited >= patience:
                stopped = step
            assert (state.loss, state.step, state.waited, state.stopped_at) == (least, at, waited, stopped)
            assert float(state.adapters["a"][...]) == at


def test_a_run_ends_with_its_best_adapters(best, overfitting):
    folder, rows = best
    config = chosen(overfitting, select="best")
    data = load_data(config.data, config.model.path)[1]
    other = load_evaluation(OTHER, config.data, config.model.path)[0]
    losses, steps = [], []
    for result in records(folder, "result"):
        own = [r for r in records(folder, "evaluation") if r["member"] == result["member"]]
        least = min(own, key=lambda record: record["evaluation_loss"])
        assert result["evaluation_loss"] == least["evaluation_loss"]
        assert (result["selected_step"], result["step"]) == (least["step"], 12)
        assert result["others"]["harder"]["evaluation_loss"] == least["others"]["harder"]
        trained = load_trained(folder, result["member"])
        assert trained.step == least["step"]
        for examples, loss in ((data, least["evaluation_loss"]), (other, least["others"]["harder"])):
            found = evaluate_loss(Single(trained.model), nothing_trained(), examples, batch_size=4)
            np.testing.assert_allclose(found.total, loss, rtol=1e-5)
        losses.append(least["evaluation_loss"])
        steps.append(least["step"])
    assert 0 < min(steps) < 12, "the last is not always the best"
    assert rows[0]["evaluation_loss"]["values"] == losses


def test_what_is_selected_changes_nothing_before(best, overfitting, tmp_path):
    run(overfitting, {"seed": (0, 1)}, tmp_path / "last", QUIET)
    for kind in ("train", "evaluation"):
        assert records(tmp_path / "last", kind) == records(best[0], kind)


def test_a_run_stops_when_its_patience_runs_out(best, overfitting, tmp_path):
    config = chosen(overfitting, select="best", patience=2)
    with (tmp_path / "said.txt").open("w") as file:
        rows = run(config, {"seed": (0, 1)}, tmp_path / "out", PlainConsole(file=file))
    results = records(tmp_path / "out", "result")
    ends = [result["stopped_at"] for result in results]
    assert [result["step"] for result in results] == [max(ends)] * 2
    assert 0 < min(ends) <= max(ends) < 12
    assert (
        f"ends at step {max(ends)}: no run was better in the last 2 evaluations" in (tmp_path / "said.txt").read_text()
    )
    for result, end in zip(results, ends, strict=True):
        curve = [r["evaluation_loss"] for r in records(best[0], "evaluation") if r["member"] == result["member"]]
        least = int(np.argmin(curve[: end + 1]))
        assert (result["selected_step"], end) == (least, least + 2)
        np.testing.assert_allclose(result["evaluation_loss"], curve[least], rtol=1e-6)
    assert run(config, {"seed": (0, 1)}, tmp_path / "out", QUIET) == rows, "it has finished"


@pytest.mark.parametrize("call", [2, 5])
def test_an_interrupted_run_selects_the_same(overfitting, call, tmp_path, monkeypatch):
    config = chosen(overfitting, select="best", patience=2)
    run(config, {"seed": (0, 1)}, tmp_path / "whole", QUIET)
    calls, original = [], Feed.__call__

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(Feed, "__call__", interrupted)
    with pytest.raises(Interrupted):
        run(config, {"seed": (0, 1)}, tmp_path / "out", QUIET)
    monkeypatch.undo()
    run(config, {"seed": (0, 1)}, tmp_path / "out", QUIET)
    for kind in ("train", "evaluation", "result"):
        assert records(tmp_path / "out", kind) == records(tmp_path / "whole", kind)


def test_other_sets_are_in_the_table_and_in_the_answers(best):
    folder, rows = best
    assert "harder" in (folder / "results.txt").read_text()
    found = rows[0]["others"]["harder"]
    assert found["score"] == "exact match"
    assert len(found["evaluation_loss"]["values"]) == len(found["accuracy"]["values"]) == 2
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert sum(answer.get("evaluation") == "harder" for answer in answers) == 2 * 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluations": (OTHER, OTHER)}, r"evaluations\[0\]\.name must be of this one alone, got 'harder'"),
        ({"evaluations": (dataclasses.replace(OTHER, name="a/b"),)}, r"evaluations\[0\]\.name must be a word"),
        ({"evaluations": (dataclasses.replace(OTHER, examples=0),)}, r"evaluations\[0\]\.examples must be from 1"),
        (
            {"evaluations": (dataclasses.replace(OTHER, seed="1"),)},
            r"evaluations\[0\]\.seed must be of type int, got '1'",
        ),
        ({"evaluations": (dataclasses.replace(OTHER, seed=-1),)}, r"evaluations\[0\]\.seed must be from 0"),
        ({"evaluations": ("gsm8k",)}, r"evaluations must be of type .*EvaluationSettings"),
        ({"training": TrainingSettings(patience=0)}, r"training\.patience must be at least 1 or None, got 0"),
        ({"training": TrainingSettings(select="first")}, r"training\.select must be of type .*, got 'first'"),
    ],
)
def test_wrong_settings(config, changes, message):
    with pytest.raises(ConfigError, match=message):
        check(dataclasses.replace(config, **changes))


def test_a_set_that_cannot_be_read_is_named(config, tmp_path):
    missing = EvaluationSettings("mine", "gsm8k", path=str(tmp_path / "none.jsonl"))
    with pytest.raises(ConfigError, match=r"evaluations, mine: data\.path: there is no file or folder"):
        run(dataclasses.replace(config, evaluations=(missing,)), {}, tmp_path / "out", QUIET)
    assert not (tmp_path / "out").exists()


def test_they_may_be_swept(config):
    assert len(expand(config, {"training.select": ("last", "best"), "evaluations": ((), (OTHER,))})) == 4


def test_a_run_that_has_chosen_out_of_turn_cannot_go_on(config, tmp_path):
    """Its state knows an evaluation that a run of more steps does not have."""
    short = chosen(config, steps=4, eval_every=3, select="best")
    run(short, {}, tmp_path / "out", QUIET)
    with pytest.raises(ConfigError, match=r"4 steps, which cannot go on to 6: its last evaluation, which came out"):
        run(chosen(short, steps=6), {}, tmp_path / "out", QUIET)
    run(chosen(short, steps=3), {}, tmp_path / "in turn", QUIET)
    run(chosen(short, steps=6), {}, tmp_path / "in turn", QUIET)
    run(chosen(short, steps=6), {}, tmp_path / "whole", QUIET)
    for kind in ("train", "evaluation", "result"):
        assert records(tmp_path / "in turn", kind) == records(tmp_path / "whole", kind)
