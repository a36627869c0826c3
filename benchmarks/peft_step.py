"""Tokens per second of a training step here and in PEFT, on the CPU: the same model, adapters, batch and AdamW.

    python benchmarks/peft_step.py [--model M] [--batches BxL ...] [--ranks R ...] [--rounds N] [--compile]
        [--record FOLDER]

Needs the extra `parity` (torch, transformers, peft). A model with random weights and adapters on its MLPs trains in
float32:

small    of Qwen2's form: hidden 256, 6 layers, vocabulary 4096
smollm2  the shape of SmolLM2-135M: hidden 576, 30 layers, vocabulary 49152, of Llama's form

Each library works in a process of its own; they take turns, a few steps at a time, so that a noisy machine harms them
alike and neither sees the other's threads. A time is the median over rounds, the ratio the median of the ratios within
a round, in brackets its quartiles. The memory is the most that a process held, with its libraries and the weights.
PEFT runs with torch's fused attention (`sdpa`), and with `--compile` under `torch.compile`.
"""

import argparse
import importlib.metadata
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from record_files import add_record_flag, write

TARGETS = ["gate_proj", "up_proj", "down_proj"]
LIBRARIES = ("balora_jax", "peft")


@dataclass(frozen=True)
class Model:
    """A model of the comparison.

    Attributes:
        family: whose form it has in transformers, `"Qwen2"` or `"Llama"`.
        sizes: the sizes that both libraries name alike.
        head_dim: width of a head.
        steps: steps of a turn.
        batches: `ROWSxLENGTH` that are measured by default.
        ranks: likewise.
    """

    family: str
    sizes: dict[str, int]
    head_dim: int
    steps: int
    batches: tuple[str, ...]
    ranks: tuple[int, ...]


MODELS = {
    "small": Model(
        "Qwen2",
        {
            "vocab_size": 4096,
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
        },
        head_dim=32,
        steps=3,
        batches=("8x256",),
        ranks=(8, 64),
    ),
    "smollm2": Model(
        "Llama",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
        },
        head_dim=64,
        steps=1,
        batches=("4x128", "4x512", "8x256"),
        ranks=(8,),
    ),
}


def jax_step(model: Model, rows: int, length: int, rank: int):
    """A function that does a training step with this package."""
    import jax
    import optax
    from flax import nnx

    from balora_jax.adapters import add_adapters
    from balora_jax.models.decoder import Decoder, DecoderConfig
    from balora_jax.training.step import token_losses

    config = DecoderConfig(**model.sizes, head_dim=model.head_dim, qkv_bias=model.family == "Qwen2", rope_theta=1e6)
    decoder = Decoder(config, rngs=nnx.Rngs(0))
    add_adapters(decoder, targets=TARGETS, rank=rank, alpha=2.0 * rank, rngs=nnx.Rngs(params=1))
    graph, adapters, rest = nnx.split(decoder, nnx.LoRAParam, ...)
    tokens = jax.random.randint(jax.random.key(0), (rows, length + 1), 0, config.vocab_size)
    ones = jax.numpy.ones_like(tokens)
    positions = jax.numpy.broadcast_to(jax.numpy.arange(length + 1), tokens.shape)
    batch = {"tokens": tokens, "positions": positions, "segment_ids": ones, "loss_mask": ones.astype(bool)}
    tx = optax.adamw(1e-4)
    state = tx.init(adapters)

    @jax.jit
    def step(adapters, state, rest, batch):
        def loss(adapters):
            losses, mask = token_losses(nnx.merge(graph, adapters, rest, copy=True), batch)
            return losses.sum() / mask.sum()

        value, grads = jax.value_and_grad(loss)(adapters)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    def call():
        nonlocal adapters, state
        adapters, state, value = step(adapters, state, rest, batch)
        return float(value)

    return call


def peft_step(model: Model, rows: int, length: int, rank: int, compiled: bool):
    """A function that does a training step with PEFT."""
    import peft
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    config = getattr(transformers, f"{model.family}Config")(
        **model.sizes, max_position_embeddings=1024, tie_word_embeddings=True, attn_implementation="sdpa"
    )
    decoder = getattr(transformers, f"{model.family}ForCausalLM")(config)
    lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS)
    decoder = peft.get_peft_model(decoder, lora).train()
    optimizer = torch.optim.AdamW([p for p in decoder.parameters() if p.requires_grad], lr=1e-4, weight_decay=1e-4)
    tokens = torch.randint(0, model.sizes["vocab_size"], (rows, length))
    if compiled:
        decoder.compile()

    def call():
        optimizer.zero_grad()
        loss = decoder(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return call


def work(library: str, model: Model, batch: str, rank: int, compiled: bool) -> None:
    """Does a turn for every line that comes in; answers with the seconds of a step and the bytes held at the most."""
    shape = (model, *sizes_of(batch), rank)
    step = jax_step(*shape) if library == "balora_jax" else peft_step(*shape, compiled)
    step(), step()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        for _ in range(model.steps):
            step()
        taken = (time.perf_counter() - start) / model.steps
        print(taken, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)


def sizes_of(batch: str) -> tuple[int, int]:
    """Rows and length of a batch `ROWSxLENGTH`."""
    rows, length = map(int, batch.split("x"))
    return rows, length


def measure(name: str, batch: str, rank: int, rounds: int, compiled: bool) -> tuple[dict, dict]:
    """Seconds of a step in every round, and the bytes held at the most, of each library."""
    workers = {}
    for library in LIBRARIES:
        command = [sys.executable, __file__, "--work", library, "--model", name, "--batches", batch]
        command += ["--ranks", str(rank), *["--compile"] * compiled]
        workers[library] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if workers[library].stdout.readline().strip() != "ready":
            raise SystemExit(f"{library} could not be measured; see its error above")
    seconds: dict[str, list[float]] = {library: [] for library in LIBRARIES}
    held = {}
    for _ in range(rounds):
        for library, worker in workers.items():
            print("go", file=worker.stdin, flush=True)
            taken, held[library] = map(float, worker.stdout.readline().split())
            seconds[library].append(taken)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return seconds, held


def row(name: str, batch: str, rank: int, rounds: int, compiled: bool) -> str:
    """A row of the table."""
    seconds, held = measure(name, batch, rank, rounds, compiled)
    rows, length = sizes_of(batch)
    ours, theirs = (rows * length / statistics.median(seconds[library]) for library in LIBRARIES)
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
    memory = " | ".join(f"{held[library] / 1e9:.2f}" for library in LIBRARIES)
    return f"| {batch} | {rank} | {ours:.0f} | {theirs:.0f} | {ratio:.2f} ({low:.2f} to {high:.2f}) | {memory} |"


def processor() -> str:
    """The name of the processor, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")


def main() -> None:
    """Prints the table, and records it where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="small", help="which model trains")
    parser.add_argument("--batches", nargs="+", metavar="BxL", help="rows x length, instead of the model's own")
    parser.add_argument("--ranks", nargs="+", type=int, help="ranks of the adapters, instead of the model's own")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each library")
    parser.add_argument("--compile", action="store_true", help="torch.compile for PEFT")
    add_record_flag(parser)
    parser.add_argument("--work", choices=LIBRARIES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    model = MODELS[arguments.model]
    batches, ranks = arguments.batches or model.batches, arguments.ranks or model.ranks
    if arguments.work:
        work(arguments.work, model, batches[0], ranks[0], arguments.compile)
        return
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "torch", "peft"))
    device = f"{processor()}, {len(os.sched_getaffinity(0))} cores"
    lines = [f"{device}, {versions}, `{' '.join(['python', *sys.argv])}`", ""]
    lines += ["| batch | rank | balora_jax, tokens / s | PEFT, tokens / s | ratio | memory, GB | PEFT's, GB |"]
    lines += [f"|{7 * '---|'}"]
    print("\n".join(lines), flush=True)
    for batch in batches:
        for rank in ranks:
            lines.append(row(arguments.model, batch, rank, arguments.rounds, arguments.compile))
            print(lines[-1], flush=True)
    suffix = "-compiled" if arguments.compile else ""
    write(arguments.record, f"peft-step-{arguments.model}{suffix}-cpu.md", "\n".join(lines))


if __name__ == "__main__":
    main()
