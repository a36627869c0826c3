"""Training of one population: its steps, its checkpoints, and where it goes on after an interruption."""

import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import numpy as np
from rich.console import Console

from balora_jax.data.batches import Arrays
from balora_jax.training.checkpoints import Checkpoints
from balora_jax.training.evaluation import Losses
from balora_jax.training.evaluator import OWN, Evaluator, median, number
from balora_jax.training.feed import Feed
from balora_jax.training.interruption import Interrupted, Interruptions
from balora_jax.training.loading import load_data
from balora_jax.training.memory import memory_limit, shown, step_memory
from balora_jax.training.populations import Members
from balora_jax.training.processes import any_process
from balora_jax.training.program import Program
from balora_jax.training.progress import TrainingProgress, phase
from balora_jax.training.records import RunDirectory, RunError
from balora_jax.training.state import TrainState
from balora_jax.training.step import Batch
from balora_jax.transform import check_projection, projection_states


class Trainer:
    """Training of one population."""

    def __init__(self, name: str, members: Members, program: Program, directory: RunDirectory, console: Console):
        self._name, self._members, self._program = name, members, program
        self._directory, self._console = directory, console
        self._config = next(iter(members.values()))
        rows, _, notes = load_data(self._config.data, self._config.model.path)
        self._evaluator = Evaluator(name, members, program, directory)
        for note in (*notes["training"], *self._evaluator.notes):
            console.print(f"{name}: {note}", markup=False, highlight=False, soft_wrap=True)
        seeds = [member.seed for member in members.values()]
        self._feed = Feed(rows, seeds, self._config.training, program.layout)
        self._done = self._saved = 0  # steps
        self._is_alone = jax.process_count() == 1

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
                if self._evaluator.is_missing(self._done):  # the first, or one that a signal has broken off
                    state = self._recorded(state, self._evaluator.losses(state, self._done, progress), progress)
                if not self._has_ended(state):
                    state = self._steps(state, checkpoints, progress)
                self._evaluator.record_results(state, self._done, progress)
        except KeyboardInterrupt as interruption:
            self._record_checkpoint(checkpoints.wait())
            raise Interrupted(self._what_is_left(), getattr(interruption, "signal", signal.SIGINT)) from None
        finally:
            checkpoints.close()

    def _what_is_left(self) -> str:
        """Says from where a run that stops now goes on."""
        where = f"goes on from step {self._saved} of {self._name}" if self._saved else f"begins {self._name} anew"
        lost = self._done - self._saved
        return f"the same command {where}" + (f"; {lost} steps are lost" if lost else "")

    def _has_ended(self, state: TrainState) -> bool:
        """Whether there is no step left, or patience has run out for every member that has not diverged."""
        if self._done == self._config.training.steps:
            return True
        return self._config.training.patience is not None and not self._program.fetched(state.changes).any()

    def _recorded(self, state: TrainState, losses: Mapping[str, Losses], progress: TrainingProgress) -> TrainState:
        """Records an evaluation, of which the state knows then."""
        self._evaluator.record(losses, state, self._done)
        state = self._program.after_evaluation(state, losses[OWN].total)
        training = self._config.training
        if self._has_ended(state) and self._done < training.steps:
            last = f"the last {training.patience} evaluations" if training.patience != 1 else "the last evaluation"
            progress.note(f"ends at step {self._done}: no run was better in {last} (training.patience)")
        return state

    def _resume(self, checkpoints: Checkpoints) -> TrainState:
        """The state of the latest checkpoint, or the first one; the record is that of its step."""
        gradient_batches = self._feed.first(*self._program.gradient_batches)
        state = self._program.initial_state(list(self._members.values()), gradient_batches)
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
        self._directory.check_complete(self._name, self._members, self._config.training, checkpoint=step)
        state = checkpoints.restore(step, state)
        self._directory.rewind(self._name, step)
        if not self._directory.of("checkpoint", population=self._name, step=step):  # it was on disk before its record
            self._record_checkpoint(step)
        self._done = self._saved = step
        self._console.print(f"{self._name}: going on from step {step}", markup=False)
        return state

    def _steps(self, state, checkpoints: Checkpoints, progress: TrainingProgress) -> TrainState:
        """Trains to the end. The device works on a step while the host prepares the next and shows the last."""
        settings = self._config.training
        compiled_step, steps = None, _Steps(progress)
        with Interruptions() as interruptions:
            for step in range(self._done + 1, settings.steps + 1):
                batch, tokens = self._feed(step)
                compiled_step = compiled_step or self._compiled_step(state, batch, progress)
                start = time.perf_counter()
                state, metrics = compiled_step(state, self._program.base, batch)
                steps.begun(step, metrics, start=start, tokens=tokens)
                if step == 1:
                    self._evaluator.check_start(metrics["loss"], "loss of the first batch")
                self._done = step
                stop = self._signal(interruptions, step)
                evaluating = self._evaluator.is_due(step) and not stop
                saving = step == settings.steps or step % settings.checkpoint_every == 0
                if evaluating or saving or stop:
                    self._record_steps(steps.all())
                    self._check_balance(state)
                elif step % settings.log_every == 0:
                    self._record_steps(steps.done())
                if evaluating:
                    with interruptions.at_once(self._is_alone):
                        losses = self._evaluator.losses(state, step, progress)
                    stop = (interruptions.received or 0) if self._is_alone else 0
                    if not stop:
                        state = self._recorded(state, losses, progress)
                ended = evaluating and self._has_ended(state)
                if saving or ended or stop:
                    self._save(checkpoints, state)
                if stop:
                    self._record_checkpoint(checkpoints.wait())
                    raise Interrupted(signal=stop)
                if ended:
                    break
        self._record_checkpoint(checkpoints.wait())
        return state

    def _signal(self, interruptions: Interruptions, step: int) -> int:
        """The signal at which training stops after this step, or 0; several processes ask each other now and then."""
        received = interruptions.received or 0
        if self._is_alone:
            return received
        return any_process(received) if step % self._config.training.log_every == 0 else 0

    def _save(self, checkpoints: Checkpoints, state: TrainState) -> None:
        """Begins to write a checkpoint; that it is there is recorded when it is."""
        self._record_checkpoint(checkpoints.wait())
        checkpoints.save(self._done, state)

    def _record_checkpoint(self, step: int | None) -> None:
        if step is not None:
            self._directory.append([{"kind": "checkpoint", "population": self._name, "step": step}])
            self._saved = step

    def _compiled_step(self, state: TrainState, batch: Batch | Arrays, progress: TrainingProgress) -> Callable:
        """The step, compiled before the first, so that its time and its memory can be told."""
        with progress.phase("compiling the step") as say:
            compiled = self._program.step.lower(state, self._program.base, batch).compile()
            memory = step_memory(compiled)
            if memory is not None:
                say(f"a step needs {shown(memory.peak)} of {shown(memory_limit())}")
        return compiled

    def _record_steps(self, steps: "list[_Step]") -> None:
        """Writes the metrics of some steps."""
        records = []
        for step in steps:
            values = {name: np.asarray(value) for name, value in jax.device_get(step.metrics).items()}
            for index, member in enumerate(self._members):
                record = {"kind": "train", "population": self._name, "member": member, "step": step.number}
                record |= {name: number(value[index]) for name, value in values.items()}
                if index == 0 and step.seconds is not None:  # the time of the population's step
                    record["seconds"] = step.seconds
                records.append(record)
        self._directory.append(records)

    def _check_balance(self, state: TrainState) -> None:
        """Raises if the optimizer of a method undoes the balancing of its pairs."""
        if projection_states(state.opt_state):
            try:
                check_projection(state.opt_state)
            except ValueError as error:
                raise RunError(f"{self._name}: {error}") from error


@dataclass
class _Step:
    """A step that was handed to the device, and the time that it took."""

    number: int
    metrics: dict[str, jax.Array]
    tokens: int
    start: float
    seconds: float | None = None


class _Steps:
    """Steps that are not recorded yet. While the device works on one, the one before it is shown."""

    def __init__(self, progress: TrainingProgress):
        self._progress = progress
        self._running: _Step | None = None
        self._done: list[_Step] = []
        self._is_first = True

    def begun(self, number: int, metrics: dict[str, jax.Array], *, start: float, tokens: int) -> None:
        """Takes a step that was just handed to the device, and waits for the one before it."""
        before, self._running = self._running, _Step(number, metrics, tokens, start)
        if before is not None:
            self._finish(before)
            self._running.start = time.perf_counter()

    def done(self) -> list[_Step]:
        """Returns the steps that are done, but for those that were returned before."""
        done, self._done = self._done, []
        return done

    def all(self) -> list[_Step]:
        """As `done`, after it has waited for the one that is not."""
        if self._running is not None:
            self._finish(self._running)
            self._running = None
        return self.done()

    def _finish(self, step: _Step) -> None:
        loss = median(step.metrics["loss"])  # waits for it
        if not self._is_first:  # which takes longer
            step.seconds = time.perf_counter() - step.start
        self._is_first = False
        self._progress.update(step.number, loss, step.tokens)
        self._done.append(step)
