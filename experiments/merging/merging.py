"""Two fine-tunings of the shipped model merged, three ways: `python experiments/merging/merging.py`.

BaLoRA of rank 8 is trained for 100 steps, twice on three modules of school mathematics with other seeds, and once on
two other modules. Between two of these adapters lie three paths: the geodesic of the updates, averages of the factors,
and averages of the updates cut to rank 8 (`interpolate_adapters`). The evaluation loss along them, on what either end
has learned, goes into `merging.json` and `merging.png`.
"""

import json
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
from flax import nnx
from rich.console import Console

from balora_jax.adapters import export_adapters, interpolate_adapters, load_adapters
from balora_jax.training import AdapterSettings, Config, DataSettings, OptimizerSettings, TrainingSettings, run
from balora_jax.training.evaluation import evaluate_loss
from balora_jax.training.loading import load_data, load_model
from balora_jax.training.records import environment
from balora_jax.training.single import Single, nothing_trained
from balora_jax.training.trained import load_trained

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
TASKS = {
    "linear equations, bases": ("algebra__linear_2d", "arithmetic__add_or_sub_in_base"),
    "derivatives, polynomials": ("calculus__differentiate", "polynomials__add", "polynomials__expand"),
}
WEIGHTS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
WAYS = ("geodesic", "factors", "products")


def config_of(task, seed):
    """What one fine-tuning is."""
    return Config(
        name="merging",
        method="balora",
        seed=seed,
        adapter=AdapterSettings(rank=8, alpha=16.0),
        optimizer=OptimizerSettings(learning_rate=5e-3),
        data=DataSettings(modules=TASKS[task], difficulty=(1, 2), train_examples=5000, eval_examples=120, length=128),
        training=TrainingSettings(steps=100, batch_size=8, eval_every=100, checkpoint_every=100),
    )


def trained(task, seed):
    """The adapter of one fine-tuning."""
    config = config_of(task, seed)
    with tempfile.TemporaryDirectory() as folder:
        run(config, {}, Path(folder) / "run", Console(quiet=True))
        return export_adapters(load_trained(Path(folder) / "run").model, base=config.model.path)


class Losses:
    """Evaluation losses of adapters on a task; programs are compiled once."""

    def __init__(self, task):
        """Takes the task."""
        self._config = config_of(task, 0)
        self._examples = load_data(self._config.data, self._config.model.path)[1]
        self._program = None

    def __call__(self, adapter):
        """The loss of an adapter."""
        model = load_model(self._config.model)
        load_adapters(model, adapter)
        if self._program is None:
            self._program = Single(model)
        model.eval()
        self._program.base = nnx.split(model)[1]
        size = self._config.training.eval_batch_size
        return float(evaluate_loss(self._program, nothing_trained(), self._examples, batch_size=size).total[0])


def main() -> None:
    """Trains, merges, draws and records."""
    first, second = TASKS
    adapters = {key: trained(*key) for key in ((second, 0), (second, 1), (first, 0))}
    losses = {task: Losses(task) for task in TASKS}
    pairs = {
        "one task, two seeds": (adapters[second, 0], adapters[second, 1], [second]),
        "two tasks": (adapters[second, 0], adapters[first, 0], [second, first]),
    }
    rows = []
    figure, axes = plt.subplots(1, len(pairs), figsize=(9, 3.4), layout="constrained")
    for axis, (name, (start, end, tasks)) in zip(axes, pairs.items(), strict=True):
        for how in WAYS:
            along = []
            for weight in WEIGHTS:
                between = interpolate_adapters(start, end, weight, how=how)
                found = {task: losses[task](between) for task in tasks}
                along.append(float(np.mean(list(found.values()))))
                rows.append({"pair": name, "how": how, "weight": weight, "loss": along[-1], "losses": found})
            print(name, how, [round(loss, 3) for loss in along], flush=True)
            axis.plot(WEIGHTS, along, "o-", label=how)
        axis.set(title=name, xlabel="weight")
    axes[0].set_ylabel("evaluation loss, mean over the tasks")
    axes[0].legend(frameon=False)
    figure.savefig(HERE / "merging.png", dpi=110, metadata={"Software": None})
    record = {"environment": environment(), "rows": rows}
    (HERE / "merging.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
