"""Speed and memory of training at the shape of a published model, on the device that JAX finds.

    python benchmarks/published_shapes.py [--ranks R ...] [--methods M ...] [--repeats N] [--record FOLDER]

The model has the shape of Qwen2.5-3B and random weights, so that nothing is downloaded: a bfloat16 base whose
activations are recomputed, adapters on the MLPs, AdamW, batches of 8 x 1024 tokens, all of them learned. Every row is
measured in a process of its own, so that the peak memory of the device is that of its method; what the compiler
estimates stands beside it, and alone where a device does not tell its peak. A time is the median over repeats, the last
column compares it with LoRA's of the same rank. Other shapes have flags; for a try on a CPU:

    python benchmarks/published_shapes.py --layers 1 --hidden 64 --intermediate 128 --heads 2 --kv-heads 1 \\
        --head-dim 32 --vocab 256 --batch 2 --length 32 --ranks 4 --repeats 3
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
from flax import nnx
from record_files import add_record_flag, write

from balora_jax.data.recipes import DataSettings
from balora_jax.models import Decoder, DecoderConfig
from balora_jax.training import AdapterSettings, Config, TrainingSettings
from balora_jax.training.program import Program
from balora_jax.training.records import environment

GIB = 2**30


def random_decoder(options: argparse.Namespace) -> Decoder:
    """A decoder of the given shape with random weights in bfloat16."""
    shape = DecoderConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        head_dim=options.head_dim,
        rope_theta=1e6,
        qkv_bias=True,
        dtype="bfloat16",
        param_dtype="bfloat16",
        remat=True,
    )
    return Decoder(shape, rngs=nnx.Rngs(0))


def measure(options: argparse.Namespace, method: str, rank: int) -> dict:
    """Seconds of a step, and its memory in bytes, of one method at one rank."""
    config = Config(
        name="published_shapes",
        method=method,
        adapter=AdapterSettings(rank=rank, alpha=2.0 * rank),
        data=DataSettings(length=options.length),
        training=TrainingSettings(batch_size=options.batch),
    )
    program = Program(config, random_decoder(options))
    shape = (1, 1, options.batch, options.length)  # runs, micro-batches, rows, tokens
    batch = {
        "tokens": jax.random.randint(jax.random.key(0), shape, 0, options.vocab, jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(options.length, dtype=jnp.int32), shape),
        "segment_ids": jnp.ones(shape, jnp.int32),
        "loss_mask": jnp.ones(shape, bool),
    }
    state = program.initial_state([config])
    step = program.step.lower(state, program.base, batch).compile()
    taken = []
    for repeat in range(options.repeats + 2):
        start = time.perf_counter()
        state, metrics = step(state, program.base, batch)
        jax.block_until_ready(state)
        if repeat > 1:  # the first steps warm up, and pairs become balanced
            taken.append(time.perf_counter() - start)
    analysis, device = step.memory_analysis(), jax.devices()[0]
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return {
        "method": method,
        "rank": rank,
        "seconds": statistics.median(taken),
        "n": len(taken),
        "tokens_per_second": options.batch * options.length / statistics.median(taken),
        "peak_bytes": peak,
        "compiler_bytes": analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + new,
        "loss": float(metrics["loss"][0]),
        "platform": device.platform,
        "environment": environment(),
    }


def measure_apart(method: str, rank: int) -> dict:
    """`measure` in a process of its own, with the flags of this one."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", method, str(rank)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags; their defaults are the shape of Qwen2.5-3B."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 36, "hidden": 2048, "intermediate": 11008, "heads": 16, "kv-heads": 2, "head-dim": 128}
    for name, default in {**sizes, "vocab": 151_936, "batch": 8, "length": 1024, "repeats": 20}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 128])
    parser.add_argument(
        "--methods", nargs="+", default=["lora", "balora"], help="the first is what others are compared to"
    )
    add_record_flag(parser)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Measures, prints, and records where that is asked for."""
    options = parse()
    if options.one:
        print(json.dumps(measure(options, options.one[0], int(options.one[1]))))
        return
    print("rank | method | ms / step | tokens / s | peak, GiB | compiler's estimate, GiB | more time than the first")
    rows = []
    for rank in options.ranks:
        for method in options.methods:
            row = measure_apart(method, rank)
            first = next((other for other in rows if other["rank"] == rank), row)
            row["more_time"] = row["seconds"] / first["seconds"] - 1
            rows.append(row)
            peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / GIB:.2f}"
            print(
                f"{rank} | {method} | {1e3 * row['seconds']:.1f} | {row['tokens_per_second']:,.0f} | {peak} | "
                f"{row['compiler_bytes'] / GIB:.2f} | {row['more_time']:+.1%}",
                flush=True,
            )
    write(options.record, f"published-shapes-{rows[0]['platform']}.json", json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
