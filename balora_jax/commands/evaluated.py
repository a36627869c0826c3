"""Loss and accuracy of a model, perhaps with an adapter, as values of JSON and as a table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from balora_jax.adapters import load_adapters, read_peft
from balora_jax.commands.folders import explained
from balora_jax.data.hub_tokenizer import files_fingerprint, tokenizer_files
from balora_jax.errors import ConfigError
from balora_jax.settings import Config, TrainingSettings
from balora_jax.training.evaluation import EvaluationSet, accuracies, answer, evaluate_loss, what_is_not_finite
from balora_jax.training.layout import layout_of
from balora_jax.training.loading import load_data, load_evaluations, load_model, load_shapes
from balora_jax.training.memory import check_evaluation, memory_limit
from balora_jax.training.single import Single, nothing_trained


def evaluated(config: Config, adapter: Path | None) -> dict[str, Any]:
    """Returns loss and accuracy of a model, over all examples and by module, as values of JSON.

    Args:
        config: its model, data, evaluations, `training.eval_batch_size` and `training.max_new_tokens` are used.
        adapter: a PEFT folder, or None for the base alone.

    Returns:
        `model`, `adapter`, `score` (what right answers are called, or None), `modules`: for each part of the data, and
        last for `all` of it, `examples`, `evaluation_loss` and `accuracy` (None without answers); `others`: the `score`
        and the `modules` of each of the config's `evaluations`, by name; and `notes`.

    Raises:
        ConfigError: the config cannot be evaluated, or the adapter does not fit the model.
    """
    peft = None
    if adapter is not None:
        with explained("--adapter"):
            peft = read_peft(adapter)
    layout = layout_of(config, load_shapes(config.model), members=1)
    model = load_model(config.model, layout.mesh if layout else None)
    if peft is not None:
        with explained("--adapter"):
            load_adapters(model, peft)
    _, examples, said = load_data(config.data, config.model.path)
    others, notes_of_others = load_evaluations(config)
    notes = [*said["evaluation"], *notes_of_others]
    own = files_fingerprint(adapter) if adapter is not None and tokenizer_files(adapter) else None
    if own not in (None, examples.tokenizer.fingerprint):
        notes.append(f"the adapter has a tokenizer of its own, which is not used; --data.tokenizer {adapter} takes it")
    for found in (examples, *others.values()):
        check_evaluation(config.training, model.config, found, limit=memory_limit())
    program = Single(model, layout)
    return {
        "model": config.model.path,
        "adapter": None if adapter is None else str(adapter),
        **_measured(program, examples, config.training),
        "others": {name: _measured(program, found, config.training) for name, found in others.items()},
        "notes": notes,
    }


def _measured(program: Single, examples: EvaluationSet, settings: TrainingSettings) -> dict[str, Any]:
    """The score of a set and its modules."""
    batch_size = settings.eval_batch_size
    losses = evaluate_loss(program, nothing_trained(), examples, batch_size=batch_size)
    if not np.isfinite(losses.total[0]):
        raise ConfigError(
            f"the evaluation loss must be finite, got {losses.total[0]}; {what_is_not_finite(program.base)}"
        )
    accuracy: dict[str, float] = {}
    if examples.score is not None:
        new_tokens = settings.max_new_tokens
        (texts,) = answer(program, nothing_trained(), examples, batch_size=batch_size, max_new_tokens=new_tokens)
        accuracy = accuracies(texts, examples)
    modules = {
        name: {
            "examples": len(examples.modules) if name == "all" else int((examples.modules == name).sum()),
            "evaluation_loss": float(loss[0]),
            "accuracy": accuracy.get(name),
        }
        for name, loss in [*losses.by_module.items(), ("all", losses.total)]
    }
    return {"score": examples.score_name, "modules": modules}


def report(found: Mapping[str, Any], console: Console) -> None:
    """Prints an evaluation as a table.

    Args:
        found: from `evaluated`.
        console: where it goes.
    """
    for note in found["notes"]:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    about = f"{found['model']}, adapter: {found['adapter'] or 'none'}"
    for name, one in {"": found, **found["others"]}.items():
        table = Table(box=box.SIMPLE_HEAD, caption=f"{name}: {about}" if name else about)
        for column in ("module", "examples", "evaluation loss", one["score"] or "right answers"):
            table.add_column(column, justify="left" if column == "module" else "right")
        for module, row in one["modules"].items():
            right = "-" if row["accuracy"] is None else f"{100 * row['accuracy']:.1f} %"
            table.add_row(module, str(row["examples"]), f"{row['evaluation_loss']:.4f}", right)
        console.print(table)
