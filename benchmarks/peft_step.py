"""Tokens per second of a training step here and in PEFT, on the CPU: the same model, adapters, batch and AdamW.

    python benchmarks/peft_step.py [--ranks R ...] [--rounds N] [--record FOLDER]

Needs the extra `parity` (torch, transformers, peft). A model of Qwen2's form (hidden 256, 6 layers, vocabulary 4096)
with adapters on its MLPs trains on 8 x 256 tokens, float32. Each library works in a process of its own; they take
turns, a few steps at a time, so that a noisy machine harms them alike and neither sees the other's threads. A time is
the median over rounds, the ratio the median of the ratios within a round.
"""

import argparse
import importlib.metadata
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from record_files import add_record_flag, write

SIZES = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
BATCH, LENGTH, STEPS = 8, 256, 3
TARGETS = ["gate_proj", "up_proj", "down_proj"]
LIBRARIES = ("balora_jax", "peft")


def jax_step(rank: int):
    """A function that does a training step with this package."""
    import jax
    import optax
    from flax import nnx

    from balora_jax.adapters import add_adapters
    from balora_jax.models.decoder import Decoder, DecoderConfig
    from balora_jax.training.step import token_losses

    config = DecoderConfig(**SIZES, head_dim=32, qkv_bias=True, rope_theta=1e6)
    model = Decoder(config, rngs=nnx.Rngs(0))
    add_adapters(model, targets=TARGETS, rank=rank, alpha=2.0 * rank, rngs=nnx.Rngs(params=1))
    graph, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)
    tokens = jax.random.randint(jax.random.key(0), (BATCH, LENGTH + 1), 0, config.vocab_size)
    ones = jax.numpy.ones_like(tokens)
    positions = jax.numpy.broadcast_to(jax.numpy.arange(LENGTH + 1), tokens.shape)
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


def peft_step(rank: int):
    """A function that does a training step with PEFT."""
    import peft
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**SIZES, max_position_embeddings=1024, tie_word_embeddings=True)
    model = transformers.Qwen2ForCausalLM(config)
    lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS)
    model = peft.get_peft_model(model, lora).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=1e-4)
    tokens = torch.randint(0, SIZES["vocab_size"], (BATCH, LENGTH))

    def call():
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return call


def work(library: str, rank: int) -> None:
    """Does `STEPS` steps for every line that comes in, and answers with the seconds of one."""
    step = {"balora_jax": jax_step, "peft": peft_step}[library](rank)
    step(), step()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        print((time.perf_counter() - start) / STEPS, flush=True)


def measure(rank: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step in every round."""
    workers = {}
    for library in LIBRARIES:
        command = [sys.executable, __file__, "--work", library, "--ranks", str(rank)]
        workers[library] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if workers[library].stdout.readline().strip() != "ready":
            raise SystemExit(f"{library} could not be measured; see its error above")
    seconds = {library: [] for library in LIBRARIES}
    for _ in range(rounds):
        for library, worker in workers.items():
            print("go", file=worker.stdin, flush=True)
            seconds[library].append(float(worker.stdout.readline()))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return seconds


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
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64], help="ranks of the adapters")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each library")
    add_record_flag(parser)
    parser.add_argument("--work", choices=LIBRARIES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work, arguments.ranks[0])
        return
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "torch", "peft"))
    device = f"{processor()}, {len(os.sched_getaffinity(0))} cores"
    lines = [f"{device}, {versions}, `{' '.join(['python', *sys.argv])}`", ""]
    lines += ["| rank | balora_jax, tokens / s | PEFT, tokens / s | ratio |", "|---|---|---|---|"]
    for rank in arguments.ranks:
        seconds = measure(rank, arguments.rounds)
        ours, theirs = (BATCH * LENGTH / statistics.median(seconds[library]) for library in LIBRARIES)
        ratio = statistics.median(b / a for a, b in zip(*seconds.values(), strict=True))
        lines.append(f"| {rank} | {ours:.0f} | {theirs:.0f} | {ratio:.2f} |")
    print("\n".join(lines))
    write(arguments.record, "peft-step-cpu.md", "\n".join(lines))


if __name__ == "__main__":
    main()
