"""Time of a training step of every method, on the device that JAX finds.

    python benchmarks/methods.py [METHOD ...] [--config FILE] [--repeats N] [--record FOLDER]

Model, data and rank are those of a config file, by default `configs/compare_methods.py`. Steps of the methods are run
in turn, one of each in every repeat, so that a noisy machine harms them alike; a time is the median over repeats, "of
LoRA" is the median of the ratios within a repeat. What is not done at every step (GaLore's decompositions, LORO's exact
step) hardly shows in a median. With `--record` the table is written as `methods-DEVICE.json`.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from record_files import add_record_flag, with_environment, write

from balora_jax.methods import METHODS
from balora_jax.models.weights import load_decoder
from balora_jax.training import load_config
from balora_jax.training.loading import load_data
from balora_jax.training.program import Program

CONFIG = Path(__file__).parent.parent / "configs" / "compare_methods.py"


def stepper(config):
    """A function that does the next training step of one run of a config."""
    data, _, _ = load_data(config.data)
    program = Program(config, load_decoder(config.model.path))
    count, rows = program.gradient_batches
    gradient = None
    if count:
        arrays = data[: count * rows].arrays()
        gradient = {config.seed: {name: x.reshape(count, rows, -1) for name, x in arrays.items()}}
    state = program.initial_state([config], gradient)
    batch = {name: x[None, None] for name, x in data[: config.training.batch_size].arrays().items()}

    def step():
        nonlocal state
        state, _ = program.step(state, program.base, batch)
        jax.block_until_ready(state.step)

    return step


def measure(config, methods, repeats):
    """Seconds of each step, `(methods, repeats)`; the first step of each compiles and does not count."""
    steps = []
    for method in methods:
        steps.append(stepper(replace(config, method=method)))
        steps[-1]()
        print(f"compiled {method}", flush=True)
    seconds = np.zeros((len(methods), repeats))
    for repeat in range(repeats):
        for index, step in enumerate(steps):
            start = time.perf_counter()
            step()
            seconds[index, repeat] = time.perf_counter() - start
    return seconds


def main() -> None:
    """Measures, prints, and records where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="which methods; all if none is named")
    parser.add_argument("--config", type=Path, default=CONFIG, help="the config file")
    parser.add_argument("--repeats", type=int, default=60, help="steps of each method")
    add_record_flag(parser)
    arguments = parser.parse_args()
    config, _ = load_config(arguments.config)
    methods = list(dict.fromkeys(["lora", *(arguments.methods or METHODS)]))
    seconds = measure(config, methods, arguments.repeats)
    ratios = np.median(seconds / seconds[:1], axis=1)
    rows = [
        {"method": method, "milliseconds": 1e3 * float(np.median(times)), "of_lora": float(ratio), "n": len(times)}
        for method, times, ratio in zip(methods, seconds, ratios, strict=True)
    ]
    for row in rows:
        print(f"{row['method']:16} {row['milliseconds']:8.1f} ms {row['of_lora']:6.2f} of LoRA")
    write(arguments.record, f"methods-{jax.devices()[0].platform}.json", with_environment(rows))


if __name__ == "__main__":
    main()
