"""What a population is evaluated on: its losses while it trains, and its results at the end, as they are recorded."""

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from balora_jax.errors import ConfigError
from balora_jax.methods import get_method
from balora_jax.training.evaluation import (
    EvaluationSet,
    Losses,
    accuracies,
    answer,
    evaluate_loss,
    sample_answers,
    what_is_not_finite,
)
from balora_jax.training.loading import load_data, load_evaluations
from balora_jax.training.populations import Members
from balora_jax.training.program import Program
from balora_jax.training.progress import TrainingProgress
from balora_jax.training.records import Record, RunDirectory
from balora_jax.training.selection import Selection
from balora_jax.training.spectra import conditions, diagnoses, of_members
from balora_jax.training.state import TrainState

OWN = ""
"""The name of the evaluation set of a run's own data; the others are named in the config."""


class Evaluator:
    """The evaluations of one population.

    Attributes:
        notes: what is not as asked for in the evaluation sets.
    """

    def __init__(self, name: str, members: Members, program: Program, directory: RunDirectory):
        self._name, self._members, self._program, self._directory = name, members, program, directory
        self._config = next(iter(members.values()))
        self._has_pairs = get_method(self._config.method).has_pairs
        _, own, notes = load_data(self._config.data, self._config.model.path)
        others, notes_of_others = load_evaluations(self._config)
        self._sets: dict[str, EvaluationSet] = {OWN: own, **others}
        self.notes = [*notes["evaluation"], *notes_of_others]

    def is_due(self, step: int) -> bool:
        """Whether there is an evaluation after a step."""
        training = self._config.training
        return step % training.eval_every == 0 or step == training.steps

    def is_missing(self, step: int) -> bool:
        """Whether the record lacks an evaluation that is due; of one that it holds in part it forgets the rest."""
        found = self._directory.of("evaluation", population=self._name, step=step)
        if not self.is_due(step) or len(found) == len(self._members):
            return False
        self._directory.forget(found)
        return True

    def losses(self, state: TrainState, step: int, progress: TrainingProgress) -> dict[str, Losses]:
        """Returns the losses of all members on each set."""
        batch_size = self._config.training.eval_batch_size
        with progress.phase(f"step {step}/{self._config.training.steps}: evaluating") as say:
            found = {
                name: evaluate_loss(self._program, state, examples, batch_size=batch_size)
                for name, examples in self._sets.items()
            }
            say(_shown(dict(zip(self._members, found[OWN].total.tolist(), strict=True))))
        return found

    def record(self, losses: Mapping[str, Losses], state: TrainState, step: int) -> None:
        """Adds an evaluation to the record: the losses, and how well the pairs are conditioned."""
        if step == 0:
            self.check_start(losses[OWN].total, "evaluation loss")
        own = losses[OWN]
        others = {name: found.total for name, found in losses.items() if name != OWN}
        pairs = None
        if self._has_pairs:
            pairs = [conditions(one) for one in of_members(self._program.fetched(state.adapters))]
        records = []
        for index, member in enumerate(self._members):
            record = {"kind": "evaluation", "population": self._name, "member": member, "step": step}
            record["evaluation_loss"] = number(own.total[index])
            record["by_module"] = {name: number(loss[index]) for name, loss in own.by_module.items()}
            if others:
                record["others"] = {name: number(loss[index]) for name, loss in others.items()}
            if pairs is not None:
                record |= {name: number(value) for name, value in pairs[index].items()}
            records.append(record)
        self._directory.append(records)

    def record_results(self, state: TrainState, step: int, progress: TrainingProgress) -> None:
        """Adds the results to the record, in the place of any that are there.

        Args:
            state: after the last step.
            step: the last one.
            progress: where it is shown.
        """
        self._directory.forget(self._directory.of("result", population=self._name))
        shares = self._answer_all(state.selected, step, progress)
        selection = None
        if state.selection is not None:
            selection = self._program.fetched(state.selection._replace(adapters=nnx.State({})))
        diverged, sizes = np.array(self._program.fetched(state.diverged_at)), self._program.sizes(state)
        records = []
        for index, member in enumerate(self._members):
            selected = self._selected_step(selection, index, step)
            evaluation = self._of(member, "evaluation", selected)
            if diverged[index] < 0 and not np.isfinite(float(self._of(member, "evaluation", step)["evaluation_loss"])):
                diverged[index] = step  # the last update broke the model
            own, *others = (
                {
                    "evaluation_loss": evaluation["others"][name] if name else evaluation["evaluation_loss"],
                    "score": examples.score_name,
                    "accuracy": shares[name][index]["all"] if name in shares else None,
                }
                for name, examples in self._sets.items()
            )
            by_module = dict(shares[OWN][index]) if OWN in shares else {}
            by_module.pop("all", None)
            record = {"kind": "result", "population": self._name, "member": member, "step": step}
            record |= own | {"accuracy_by_module": by_module}
            if others:
                record["others"] = dict(zip(list(self._sets)[1:], others, strict=True))
            record |= {"diverged_at": int(diverged[index])}
            record |= {"status": "finished" if diverged[index] < 0 else "diverged"}
            if selection is not None:
                record |= {"selected_step": selected, "stopped_at": int(selection.stopped_at[index])}
            trained = self._of(member, "train", selected) if selected else {}
            record |= {name: trained[name] for name in ("gap_mean", "gap_worst") if name in trained}
            records.append(record | sizes)
        self._write_spectra(state.selected, step)
        self._directory.append(records)

    def check_start(self, losses: Any, what: str) -> None:
        """Raises `ConfigError` if a loss that comes before the first update is not finite: no training mends that."""
        for member, loss in zip(self._members, np.asarray(losses).tolist(), strict=True):
            if not np.isfinite(loss):
                raise ConfigError(
                    f"{member}: the {what} must be finite before training, got {loss}; "
                    f"{what_is_not_finite(self._program.base)}"
                )

    def _answer_all(
        self, state: TrainState, step: int, progress: TrainingProgress
    ) -> dict[str, list[dict[str, float]]]:
        """The shares of right answers of every member, on the sets that have answers; some answers are written."""
        settings, shares, kept = self._config.training, {}, []
        for name, examples in self._sets.items():
            if examples.score is None:
                continue
            with progress.phase(f"answering the questions of {name or 'the evaluation'}") as say:
                texts = answer(
                    self._program,
                    state,
                    examples,
                    batch_size=settings.eval_batch_size,
                    max_new_tokens=settings.max_new_tokens,
                    say=say,
                )
            shares[name] = [accuracies(own, examples) for own in texts]
            for member, own in zip(self._members, texts, strict=True):
                whose = {"member": member, "step": step} | ({"evaluation": name} if name else {})
                kept += [whose | shown for shown in sample_answers(own, examples)]
        if kept:
            self._directory.write_lines("answers.jsonl", self._name, kept)
        return shares

    def _write_spectra(self, state: TrainState, step: int) -> None:
        """Writes every pair in numbers: its balance and condition, and the singular values of `s A B`."""
        if not self._has_pairs:
            return
        lines = []
        for (member, config), adapters in zip(
            self._members.items(), of_members(self._program.fetched(state.adapters)), strict=True
        ):
            for name, found in diagnoses(adapters, self._program.scale(config)):
                line = {"member": member, "step": step, "pair": name, "gap": found.gap}
                line |= {"condition": number(found.condition_number)}
                line |= {"least_condition": number(found.least_condition_number)}
                lines.append(line | {"singular_values": [float(f"{x:.6g}") for x in found.singular_values]})
        self._directory.write_lines("spectra.jsonl", self._name, lines)

    def _selected_step(self, selection: Selection | None, index: int, step: int) -> int:
        """The step whose adapters a member ends with."""
        if selection is None or self._config.training.select == "last":
            return step
        return int(selection.step[index])

    def _of(self, member: str, kind: str, step: int) -> Record:
        return self._directory.of(kind, population=self._name, member=member, step=step)[-1]


def median(losses: Iterable[float]) -> float:
    """Returns the median of those that are finite; nan if none is."""
    finite = [loss for loss in np.asarray(losses).tolist() if np.isfinite(loss)]
    return statistics.median(finite) if finite else float("nan")


def number(value: Any) -> float | int | str:
    """Returns a JSON number; what JSON has no number for (nan, inf) becomes text."""
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, int) or np.isfinite(value) else str(value)


def _shown(losses: Mapping[str, float]) -> str:
    """Evaluation losses in a line: the best member's, and the median if there are several."""
    best = min(losses, key=lambda name: losses[name] if np.isfinite(losses[name]) else float("inf"))
    if len(losses) == 1:
        return f"evaluation loss {losses[best]:.4f}"
    return f"evaluation loss {losses[best]:.4f} at best ({best}), median {median([*losses.values()]):.4f}"
