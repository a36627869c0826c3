"""Condition numbers along fine-tuning: `python experiments/theory/language_model.py` (12 minutes on two CPU cores).

The closed forms are for one matrix and a quadratic loss; several adapted layers and cross-entropy are an open question
of arXiv 2605.31484. LoRA and BaLoRA (rank 8, AdamW, 150 steps, 3 seeds) fine-tune the shipped model on the data of
configs/gauges.py. At the start, in the middle and at the end, and for LoRA's end point once more after balancing, which
does not change the model, Lanczos' method (float32) measures the Gauss-Newton matrix and the Hessian of the mean loss
of 32 held-out examples over all factors, without the r^2 directions of each pair that do not change the product.

`largest` and `smallest` are the extreme eigenvalues found, `mean` is the trace over the dimension as the random start
vector sees it. There are more parameters than the examples determine, so that the smallest eigenvalue of the
Gauss-Newton matrix is 0 to rounding for every method; what is compared is the ratio of the largest to the mean. The
record has one value for each seed, in order.
"""

from pathlib import Path

import jax
import optax
from recording import write

from balora_jax import balance
from balora_jax.conditioning import extreme_eigenvalues, gauss_newton_product, hessian_product
from balora_jax.data.batches import batches
from balora_jax.models.weights import load_decoder
from balora_jax.pairs import find_pairs, read_pairs, write_pairs
from balora_jax.training import load_config
from balora_jax.training.fields import with_fields
from balora_jax.training.loading import load_data
from balora_jax.training.program import Program

CONFIG = Path(__file__).parents[2] / "configs" / "gauges.py"
SEEDS, RATE, MEASURED, EXAMPLES, PRODUCTS = (0, 1, 2), 1e-2, (0, 75, 150), 32, 80
STACK = ("tokens", "positions", "segment_ids", "loss_mask")


class Laboratory:
    """One method on one seed: training, and measuring between steps."""

    def __init__(self, method: str, seed: int):
        config, _ = load_config(CONFIG)
        config = with_fields(config, {"method": method, "seed": seed, "optimizer.learning_rate": RATE})
        self.program = Program(config, load_decoder(config.model.path))
        train, examples, _ = load_data(config.data)
        self.iterator = batches(train, batch_size=config.training.batch_size, seed=seed)
        self.batch = {name: examples.arrays[name][:EXAMPLES] for name in STACK}
        self.state = self.program.initial_state([config])
        self.measure = jax.jit(self._measure, static_argnames="kind")

    def train(self, steps: int) -> None:
        """Takes some steps."""
        for _ in range(steps):
            batch = {name: rows[None, None] for name, rows in next(self.iterator).items()}
            self.state, _ = self.program.step(self.state, self.program.base, batch)

    def member(self):
        """The state of the one member."""
        return jax.tree.map(lambda x: x[0], self.state)

    def balanced(self):
        """The same, with every pair balanced."""
        member = self.member()
        pairs = find_pairs(member.adapters)
        factors = [balance(*pair) for pair in read_pairs(member.adapters, pairs)]
        return member._replace(adapters=write_pairs(member.adapters, pairs, factors))

    def _measure(self, member, kind: str):
        def outputs(adapters):
            model = self.program.member_model(member._replace(adapters=adapters), self.program.base)
            return model(**{name: self.batch[name][:, :-1] for name in STACK[:3]})

        def loss(logits):
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, self.batch["tokens"][:, 1:])
            return losses.mean(where=self.batch["loss_mask"][:, 1:])

        adapters = member.adapters
        if kind == "gauss-newton":
            product = gauss_newton_product(outputs, loss, adapters)
        else:
            product = hessian_product(lambda adapters: loss(outputs(adapters)), adapters)
        found = extreme_eigenvalues(product, adapters, key=jax.random.key(0), iterations=PRODUCTS)
        mean = (found.weights * jax.numpy.nan_to_num(found.ritz_values)).sum()
        return {"largest": found.largest, "smallest": found.smallest, "mean": mean, "residual": found.residuals[0]}


def main() -> None:
    """Runs and records."""
    found: dict[tuple, list] = {}
    for seed in SEEDS:
        for method in ("lora", "balora"):
            laboratory, done = Laboratory(method, seed), 0
            for step in MEASURED:
                laboratory.train(step - done)
                done = step
                places = {(method, step): laboratory.member()}
                if method == "lora" and step == MEASURED[-1]:
                    places["lora, then balanced", step] = laboratory.balanced()
                for place, member in places.items():
                    for kind in ("gauss-newton", "hessian"):
                        values = {k: float(v) for k, v in laboratory.measure(member, kind).items()}
                        found.setdefault((*place, kind), []).append(values)
                        print(seed, *place, kind, {k: f"{v:.3g}" for k, v in values.items()}, flush=True)
    rows = []
    for (method, step, kind), values in found.items():
        by_name = {name: [value[name] for value in values] for name in values[0]}
        rows.append({"method": method, "step": step, "matrix": kind, **by_name})
    about = {"seeds": SEEDS, "learning_rate": RATE, "examples": EXAMPLES, "products": PRODUCTS}
    write("language_model", {"rows": rows, **about})


if __name__ == "__main__":
    main()
