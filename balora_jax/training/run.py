"""A whole run: its members sorted into populations, each trained, evaluated and recorded; resumed where it stopped."""

import json
import re
import signal
import statistics
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from rich.console import Console

from balora_jax.console import PlainConsole
from balora_jax.data.batches import Arrays, batches
from balora_jax.files import whole_file
from balora_jax.training import figures, report, results
from balora_jax.training.checkpoints import Checkpoints
from balora_jax.training.config import (
    NUMERIC_FIELDS,
    Config,
    ConfigError,
    Sweep,
    expand,
    field_names,
    get_field,
)
from balora_jax.training.evaluation import (
    Losses,
    accuracies,
    answer,
    evaluate_loss,
    sample_answers,
    what_is_not_finite,
)
from balora_jax.training.interruption import Interrupted, Interruptions
from balora_jax.training.live import LiveLog
from balora_jax.training.loading import base_model, load_data
from balora_jax.training.memory import check_evaluation, check_step, memory_limit, shown, step_memory
from balora_jax.training.plan import plan
from balora_jax.training.progress import TrainingProgress, phase
from balora_jax.training.records import RunDirectory, RunError
from balora_jax.training.step import Program, TrainState
from balora_jax.transform import check_projection, projection_states

Members = dict[str, Config]


def run(config: Config, sweep: Sweep, output: Path, console: Console, *, log: str | None = None) -> list[dict]:
    """Trains every member of a sweep, or goes on where an earlier call was stopped.

    Args:
        config: what the members have in common.
        sweep: the fields in which they differ.
        output: the run directory.
        console: where progress is shown.
        log: a name in `balora_jax.training.live.LIBRARIES`: where the metrics are shown while the run goes on.

    Returns:
        The rows of the result's table, which is also written to the run directory.

    Raises:
        ConfigError: the config cannot be run, or the directory belongs to another config.
        RunError: the directory cannot be used: broken, or in use; or the disk is full.
        Interrupted: a signal came; the message says from where the same call goes on.
    """
    populations = sort_into_populations(expand(config, sweep))
    everyone = {name: member for members in populations.values() for name, member in members.items()}
    programs = {}  # fails before files are made
    for name, members in populations.items():
        with phase(console, f"{name}: reading the base and the data"):
            programs[name] = _program(name, members)
    directory = RunDirectory(output, everyone)
    if log is not None:
        identity, resumed = f"{output.resolve()} {directory.started}", bool(directory.records)
        directory.watch(LiveLog(log, output, everyone, identity=identity, resumed=resumed))
    try:
        for line in plan(populations, programs, output, len(directory.of("result"))):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        for name, members in populations.items():
            if len(directory.of("result", population=name)) < len(members):
                Trainer(name, members, programs[name], directory, console).train()
            steps, eval_every = programs[name].config.training.steps, programs[name].config.training.eval_every
            directory.check_complete(name, members, step=steps, eval_every=eval_every, finished=True)
        axes = {name: results.numeric_axes(members.values(), NUMERIC_FIELDS) for name, members in populations.items()}
        rows = results.summarise(directory, everyone, axes)
        with whole_file(output / "results.json") as file:
            file.write(json.dumps(rows, indent=2) + "\n")
        with whole_file(output / "results.txt") as file:
            PlainConsole(file=file, width=results.TABLE_WIDTH).print(results.table(rows))
        with whole_file(output / "figure.png", "wb") as file:
            figures.loss_curves(directory, rows, file)
        report.write_if_possible(output)
    except OSError as error:
        raise RunError(
            f"cannot write to {output} ({error.strerror or error}); once that is mended, the same command goes on"
        ) from error
    finally:
        directory.close()
    return rows


def sort_into_populations(configs: Sequence[Config]) -> dict[str, Members]:
    """Returns the members by name, sorted into those that differ in numeric fields alone.

    Populations are named by the structural fields that differ in the sweep, members by these and the numeric ones.
    """
    differing = [name for name in field_names() if len({get_field(config, name) for config in configs}) > 1]
    structural = [name for name in differing if name not in NUMERIC_FIELDS]
    numeric = sorted((name for name in differing if name in NUMERIC_FIELDS), key="seed".__eq__)  # the seed last
    populations: dict[str, Members] = {}
    for config in configs:
        parts = [_label(config, name) for name in structural if name != "method"]
        population = "-".join([config.method, *parts])
        member = "-".join([population, *(_label(config, name) for name in numeric)])
        if member in populations.setdefault(population, {}):
            raise ConfigError(f"sweep: two runs would have the name {member}; their values differ too little to tell")
        populations[population][member] = config
    return populations


class Trainer:
    """Training of one population."""

    def __init__(self, name: str, members: Members, program: Program, directory: RunDirectory, console: Console):
        self._name, self._members, self._program = name, members, program
        self._directory, self._console = directory, console
        self._config = next(iter(members.values()))
        self._train_rows, self._examples, notes = load_data(self._config.data, self._config.model.path)
        for note in (*notes["training"], *notes["evaluation"]):
            console.print(f"{name}: {note}", markup=False, highlight=False, soft_wrap=True)
        seeds = sorted({member.seed for member in members.values()})
        self._iterators = {seed: self._batches(seed) for seed in seeds}
        self._done = self._saved = 0  # steps

    def train(self) -> None:
        """Trains to the last step, from the latest checkpoint if there is one, and records the results.

        Raises:
            Interrupted: a signal came; between two steps, what has been done is saved first.
        """
        settings = self._config.training
        checkpoints = Checkpoints(self._directory.path / "checkpoints" / self._name, keep=settings.keep_checkpoints)
        try:
            with phase(self._console, f"{self._name}: starting the adapters"):
                state = self._resume(checkpoints)
            with TrainingProgress(self._console, self._name, settings.steps, self._done) as progress:
                if self._lacks_evaluation(self._done):  # the first, or one that a signal has broken off
                    self._record_evaluation(self._losses(state, progress), self._done)
                state = self._steps(state, checkpoints, progress)
                self._record_results(state, progress)
        except KeyboardInterrupt as interruption:
            raise Interrupted(self._what_is_left(), getattr(interruption, "signal", signal.SIGINT)) from None
        finally:
            checkpoints.close()

    def _what_is_left(self) -> str:
        """Says from where a run that stops now goes on."""
        where = f"goes on from step {self._saved} of {self._name}" if self._saved else f"begins {self._name} anew"
        lost = self._done - self._saved
        return f"the same command {where}" + (f"; {lost} steps are lost" if lost else "")

    def _evaluates_at(self, step: int) -> bool:
        return step % self._config.training.eval_every == 0 or step == self._config.training.steps

    def _lacks_evaluation(self, step: int) -> bool:
        """Whether the record lacks an evaluation; of one that it holds in part it forgets the rest."""
        found = self._directory.of("evaluation", population=self._name, step=step)
        if not self._evaluates_at(step) or len(found) == len(self._members):
            return False
        self._directory.forget(found)
        return True

    def _resume(self, checkpoints: Checkpoints) -> TrainState:
        """The state of the latest checkpoint, or the first one; the record is that of its step."""
        state = self._program.initial_state(list(self._members.values()), self._gradient_batches())
        step = checkpoints.latest_step()
        if step is None:
            recorded = self._directory.of("checkpoint", population=self._name)
            if recorded:
                raise RunError(
                    f"the record tells of a checkpoint of {self._name} at step {recorded[-1]['step']}, but there is "
                    f"none in {self._directory.path / 'checkpoints' / self._name}; put it back, or delete the run "
                    f"directory to start again"
                )
            self._directory.rewind(self._name, -1)
            return state
        eval_every = self._config.training.eval_every
        self._directory.check_complete(self._name, self._members, step=step, eval_every=eval_every)
        state, place = checkpoints.restore(step, state)
        for seed, iterator in self._iterators.items():
            iterator.set_state(place[str(seed)])
        self._directory.rewind(self._name, step)
        self._done = self._saved = step
        self._console.print(f"{self._name}: going on from step {step}", markup=False)
        return state

    def _steps(self, state, checkpoints: Checkpoints, progress: TrainingProgress) -> TrainState:
        settings = self._config.training
        waiting: list[tuple[int, dict, float]] = []
        compiled_step, first = None, self._done + 1
        with Interruptions() as interruptions:
            for step in range(self._done + 1, settings.steps + 1):
                batch = self._next_batch()
                compiled_step = compiled_step or self._compiled_step(state, batch, progress)
                start = time.perf_counter()
                state, metrics = compiled_step(state, self._program.base, batch)
                jax.block_until_ready(state.step)
                seconds = time.perf_counter() - start
                progress.update(step, _median(metrics["loss"]), int((batch["segment_ids"] > 0).sum()))
                if step == 1:
                    self._check_start(metrics["loss"], "loss of the first batch")
                waiting.append((step, metrics, seconds if step > first else float("nan")))
                self._done = step
                stopping = interruptions.received is not None
                evaluating = self._evaluates_at(step) and not stopping
                saving = step == settings.steps or step % settings.checkpoint_every == 0
                if evaluating or saving or stopping or step % settings.log_every == 0:
                    self._record_steps(waiting)
                    self._check_balance(state)
                    waiting = []
                if evaluating:
                    with interruptions.at_once():
                        losses = self._losses(state, progress)
                    if interruptions.received is None:
                        self._record_evaluation(losses, step)
                if saving or interruptions.received is not None:
                    self._save(checkpoints, state)
                if interruptions.received is not None:
                    raise Interrupted(signal=interruptions.received)
        return state

    def _save(self, checkpoints: Checkpoints, state: TrainState) -> None:
        place = {str(seed): iterator.get_state() for seed, iterator in self._iterators.items()}
        checkpoints.save(self._done, state, place)
        self._directory.append([{"kind": "checkpoint", "population": self._name, "step": self._done}])
        self._saved = self._done

    def _compiled_step(self, state: TrainState, batch: Arrays, progress: TrainingProgress) -> Callable:
        """The step, compiled before the first, so that its time and its memory can be told."""
        with progress.phase("compiling the step") as say:
            compiled = self._program.step.lower(state, self._program.base, batch).compile()
            memory = step_memory(compiled)
            if memory is not None:
                say(f"a step needs {shown(memory.peak)} of {shown(memory_limit())}")
        return compiled

    def _record_steps(self, waiting: list[tuple[int, dict, float]]) -> None:
        """Writes the metrics of some steps."""
        records = []
        for step, metrics, seconds in waiting:
            values = {name: np.asarray(value) for name, value in metrics.items()}
            for index, member in enumerate(self._members):
                record = {"kind": "train", "population": self._name, "member": member, "step": step}
                record |= {name: _number(value[index]) for name, value in values.items()}
                if index == 0 and seconds == seconds:  # the time of the population's step
                    record["seconds"] = seconds
                records.append(record)
        self._directory.append(records)

    def _check_balance(self, state: TrainState) -> None:
        """Raises if the optimizer of a method undoes the balancing of its pairs."""
        if projection_states(state.opt_state):
            try:
                check_projection(state.opt_state)
            except ValueError as error:
                raise RunError(f"{self._name}: {error}") from error

    def _check_start(self, losses: Any, what: str) -> None:
        """Raises if a loss that comes before the first update is not finite: there is nothing to train from."""
        for member, loss in zip(self._members, np.asarray(losses).tolist(), strict=True):
            if not np.isfinite(loss):
                raise ConfigError(
                    f"{member}: the {what} must be finite before training, got {loss}; "
                    f"{what_is_not_finite(self._program.base)}"
                )

    def _losses(self, state: TrainState, progress: TrainingProgress) -> Losses:
        batch_size = self._config.training.eval_batch_size
        with progress.phase(f"step {self._done}/{self._config.training.steps}: evaluating") as say:
            losses = evaluate_loss(self._program, state, self._examples, batch_size=batch_size)
            say(_shown(dict(zip(self._members, losses.total.tolist(), strict=True))))
        return losses

    def _record_evaluation(self, losses: Losses, step: int) -> None:
        if step == 0:
            self._check_start(losses.total, "evaluation loss")
        self._directory.append(
            {
                "kind": "evaluation",
                "population": self._name,
                "member": member,
                "step": step,
                "evaluation_loss": _number(losses.total[index]),
                "by_module": {name: _number(loss[index]) for name, loss in losses.by_module.items()},
            }
            for index, member in enumerate(self._members)
        )

    def _record_results(self, state: TrainState, progress: TrainingProgress) -> None:
        steps = self._config.training.steps
        self._directory.forget(self._directory.of("result", population=self._name))  # some, if that was interrupted
        if self._examples.score is None:
            shares: list[dict] = [{"all": None} for _ in self._members]
        else:
            settings = self._config.training
            with progress.phase("answering the questions of the evaluation"):
                texts = answer(
                    self._program,
                    state,
                    self._examples,
                    batch_size=settings.eval_batch_size,
                    max_new_tokens=settings.max_new_tokens,
                )
            shares = [accuracies(own, self._examples) for own in texts]
            self._directory.write_answers(
                self._name,
                (
                    {"member": member, "step": steps} | shown
                    for member, own in zip(self._members, texts, strict=True)
                    for shown in sample_answers(own, self._examples)
                ),
            )
        diverged, sizes = np.array(state.diverged_at), self._program.sizes(state)
        records = []
        for index, member in enumerate(self._members):
            evaluation = self._directory.of("evaluation", population=self._name, member=member, step=steps)[-1]
            last = self._directory.of("train", population=self._name, member=member, step=steps)[-1]
            accuracy = shares[index]
            if diverged[index] < 0 and not np.isfinite(float(evaluation["evaluation_loss"])):
                diverged[index] = steps  # the last update broke the model
            records.append(
                {
                    "kind": "result",
                    "population": self._name,
                    "member": member,
                    "step": steps,
                    "evaluation_loss": evaluation["evaluation_loss"],
                    "score": self._examples.score_name,
                    "accuracy": accuracy.pop("all"),
                    "accuracy_by_module": accuracy,
                    "diverged_at": int(diverged[index]),
                    "status": "finished" if diverged[index] < 0 else "diverged",
                }
                | {name: last[name] for name in ("gap_mean", "gap_worst") if name in last}
                | sizes
            )
        self._directory.append(records)

    def _gradient_batches(self) -> dict[int, Arrays]:
        """The first rows that each seed's start from gradients sees, `(batches, rows, length)`."""
        count, rows = self._program.gradient_batches
        found = {}
        for seed in self._iterators if count else ():
            iterator = batches(self._train_rows, batch_size=rows, seed=seed)
            drawn = [next(iterator) for _ in range(count)]
            found[seed] = {name: np.stack([batch[name] for batch in drawn]) for name in drawn[0]}
        return found

    def _batches(self, seed: int) -> grain.DatasetIterator:
        settings = self._config.training
        return batches(self._train_rows, batch_size=settings.batch_size * settings.accumulate, seed=seed)

    def _next_batch(self) -> Arrays:
        """Arrays `(members, accumulate, rows, length)`; members of one seed see the same rows."""
        settings = self._config.training
        by_seed = {seed: next(iterator) for seed, iterator in self._iterators.items()}
        rows = [by_seed[member.seed] for member in self._members.values()]
        shape = (len(rows), settings.accumulate, settings.batch_size, -1)
        return {name: np.stack([row[name] for row in rows]).reshape(shape) for name in rows[0]}


def _program(name: str, members: Mapping[str, Config]) -> Program:
    config = next(iter(members.values()))
    try:
        program = Program(config, base_model(config.model))
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"{name}: {error}") from error
    rows, examples, _ = load_data(config.data, config.model.path)
    model, limit = base_model(config.model).config, memory_limit()
    check_step(config, model, members=len(members), length=rows.length, limit=limit)
    check_evaluation(config.training, model, examples, limit=limit)
    return program


def _label(config: Config, field: str) -> str:
    value = get_field(config, field)
    if field == "options":
        return "-".join(f"{name}={number:g}" for name, number in value) or "no_options"
    text = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
    text = re.sub(r"[^\w.+-]+", "_", text)
    if len(text) > 40 or (isinstance(value, str) and text != value):
        text = f"{text[:24]}~{zlib.crc32(repr(value).encode()):08x}"
    return f"{field.rsplit('.', 1)[-1]}={text}"


def _median(losses: Any) -> float:
    """Of those that are finite; nan if none is."""
    finite = [loss for loss in np.asarray(losses).tolist() if np.isfinite(loss)]
    return statistics.median(finite) if finite else float("nan")


def _shown(losses: Mapping[str, float]) -> str:
    """Evaluation losses in a line: the best member's, and the median if there are several."""
    best = min(losses, key=lambda name: losses[name] if np.isfinite(losses[name]) else float("inf"))
    if len(losses) == 1:
        return f"evaluation loss {losses[best]:.4f}"
    return f"evaluation loss {losses[best]:.4f} at best ({best}), median {_median([*losses.values()]):.4f}"


def _number(value) -> float | int | str:
    """A JSON number; what JSON has no number for (nan, inf) becomes text."""
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, int) or np.isfinite(value) else str(value)
