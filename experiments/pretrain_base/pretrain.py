"""Pre-trains the small decoder that ships with the package, on easy school mathematics.

    python experiments/pretrain_base/pretrain.py --out balora_jax/models/pretrained/school-math

The training questions never run out: every chunk of examples is drawn with a seed of its own. Writes the model in
Hugging Face's format, and beside this script `record.json`: settings, loss curve, evaluation per module, time.
"""

import argparse
import json
import platform
import shlex
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from balora_jax.data.batches import batches, encode, pack, pad
from balora_jax.data.mathematics import generate
from balora_jax.data.recipes import as_dataset
from balora_jax.data.tokenizer import CharTokenizer
from balora_jax.models import Decoder, DecoderConfig
from balora_jax.models.weights import save_decoder

MODULES = (
    "algebra__linear_1d",
    "algebra__sequence_next_term",
    "arithmetic__add_or_sub",
    "arithmetic__div",
    "arithmetic__mixed",
    "arithmetic__mul",
    "comparison__closest",
    "comparison__kth_biggest",
    "comparison__pair",
    "comparison__sort",
    "measurement__conversion",
    "measurement__time",
    "numbers__div_remainder",
    "numbers__gcd",
    "numbers__is_factor",
    "numbers__lcm",
    "numbers__place_value",
    "numbers__round_number",
    "polynomials__collect",
    "polynomials__evaluate",
)
DIFFICULTY = (1, 2)
CONFIG = DecoderConfig(
    vocab_size=CharTokenizer.vocab_size,
    hidden_size=160,
    intermediate_size=448,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=40,
    qk_norm=True,
)
LENGTH = 128
CHUNK = 65_536


def endless(batch_size: int, seed: int):
    """Batches of ever new examples."""
    tokenizer, chunk = CharTokenizer(), 0
    while True:
        examples = generate(MODULES, CHUNK, difficulty=DIFFICULTY, seed=seed + chunk, split="train")
        encoded = encode(as_dataset(examples), tokenizer, max_length=LENGTH)
        rows = pack(encoded, length=LENGTH, pad_id=tokenizer.pad_id)
        iterator = batches(rows, batch_size=batch_size, seed=chunk)
        for _ in range(len(rows) // batch_size):
            yield next(iterator)
        chunk += 1


def token_losses(graphdef, params, batch):
    """Per-token losses, their mask, and whether the most likely token is the right one."""
    inputs = {name: jnp.asarray(batch[name])[:, :-1] for name in ("tokens", "positions", "segment_ids")}
    logits = nnx.merge(graphdef, params)(**inputs)
    targets, mask = batch["tokens"][:, 1:], batch["loss_mask"][:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.where(mask, losses, 0), mask, logits.argmax(-1) == targets


def main():
    """Trains, evaluates and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--batch-size", type=int, default=32, help=f"rows of {LENGTH} tokens")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    graphdef, params = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(args.seed)))
    count = sum(x.size for x in jax.tree.leaves(params))
    schedule = optax.warmup_cosine_decay_schedule(0, args.learning_rate, 300, args.steps, args.learning_rate / 50)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05))
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state, batch):
        def objective(params):
            losses, mask, _ = token_losses(graphdef, params, batch)
            return losses.sum() / mask.sum()

        loss, grads = jax.value_and_grad(objective)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    tokenizer = CharTokenizer()
    held_out = generate(MODULES, 2000, difficulty=DIFFICULTY, seed=0, split="evaluation")
    encoded = encode(as_dataset(held_out), tokenizer, max_length=LENGTH)
    held_out_arrays = pad(encoded, length=LENGTH, pad_id=tokenizer.pad_id).arrays()

    @jax.jit
    def evaluate_batch(params, batch):
        losses, mask, right = token_losses(graphdef, params, batch)
        return losses.sum(1), mask.sum(1), (right | ~mask).all(1)

    def evaluate(params):
        parts = [
            evaluate_batch(params, {k: v[i : i + 200] for k, v in held_out_arrays.items()}) for i in range(0, 2000, 200)
        ]
        loss, tokens, exact = (np.concatenate(p) for p in zip(*parts, strict=True))
        modules = np.array([e.module for e in held_out])
        per_module = {m: round(float(exact[modules == m].mean()), 3) for m in MODULES}
        return float(loss.sum() / tokens.sum()), float(exact.mean()), per_module

    curve, losses, start = [], [], time.perf_counter()
    for number, batch in enumerate(endless(args.batch_size, args.seed * 1_000_000), start=1):
        params, opt_state, loss = step(params, opt_state, batch)
        losses.append(float(loss))
        if number % 500 == 0 or number == args.steps:
            evaluation, exact, per_module = evaluate(params)
            seconds = time.perf_counter() - start
            curve.append(
                {
                    "step": number,
                    "training_loss": round(float(np.mean(losses)), 5),
                    "evaluation_loss": round(evaluation, 5),
                    "exact_match": round(exact, 4),
                    "seconds": round(seconds, 1),
                }
            )
            losses = []
            print(json.dumps(curve[-1]), flush=True)
            save_decoder(nnx.merge(graphdef, params), args.out)
        if number == args.steps:
            break

    record = {
        "command": shlex.join(["python", "experiments/pretrain_base/pretrain.py", *sys.argv[1:]]),
        "parameters": count,
        "modules": MODULES,
        "difficulty": DIFFICULTY,
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "tokens_per_step": args.batch_size * LENGTH,
        "curve": curve,
        "exact_match_by_module": per_module,
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
    }
    (Path(__file__).parent / "record.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
