"""What training takes on accelerators that are not there, reckoned by `balora_jax.training.estimate`.

    pip install 'balora-jax[estimate-gpu,estimate-tpu]'
    JAX_PLATFORMS=cpu python benchmarks/targets.py [--models M ...] [--targets T ...] [--ranks R ...] [--record FOLDER]

Steps of BaLoRA on the MLPs of published models, of which nothing but the shape is needed: a bfloat16 base whose
activations are recomputed, rows of 1,024 tokens, 8 rows a device. Of the meshes `data`, `fsdp` and `fsdp x tensor 4`
the first that fits is taken. Where there is one device, XLA's compiler for CPUs tells the memory of the same program
too (in parentheses), without the float32 copies that it makes of bfloat16 weights.

`--record` keeps the rows that the record has of the same version of jax, and adds those that are asked for and are not
there: compiling all takes half an hour or more. Delete the record to reckon anew.
"""

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
from record_files import add_record_flag, write

from balora_jax.settings import ParallelSettings
from balora_jax.training import AdapterSettings, Config, DataSettings, ModelSettings, TrainingSettings
from balora_jax.training.estimate import Estimate, estimate
from balora_jax.training.estimate_tables import seconds
from balora_jax.training.targets import Target, parse_target

GIB = 2**30
COMMON = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "torch_dtype": "bfloat16"}
QWEN = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_theta": 1e6, "vocab_size": 151_936}
MODELS = {
    "Qwen2.5-3B": QWEN
    | {"hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36, "num_attention_heads": 16}
    | {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "Llama-3.1-8B": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_theta": 5e5}
    | {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False},
    "Qwen2.5-72B": QWEN
    | {"vocab_size": 152_064, "hidden_size": 8192, "intermediate_size": 29_568, "num_hidden_layers": 80}
    | {"num_attention_heads": 64, "num_key_value_heads": 8, "tie_word_embeddings": False},
}
TARGETS = {"h100:1": "H100", "h100:8": "8 H100", "v5e:4x4": "v5e-16", "v5p:2x4x4": "v5p-64 (32 chips)"}

RECORD = "targets.md"
COLUMNS = (
    *("model", "rank", "on", "data x fsdp x tensor", "peak, GiB (for a CPU)", "a step", "bound by", "tokens / s"),
    "balancing",
)


def meshes(devices: int) -> Iterator[ParallelSettings]:
    """The meshes that are tried, in order."""
    yield ParallelSettings(data=devices)
    if devices > 1:
        yield ParallelSettings(data=1, fsdp=devices)
        yield ParallelSettings(data=1, fsdp=devices // 4, tensor=4)


def first_that_fits(config: Config, target: Target) -> Estimate:
    """The estimate of a step on the first mesh on which it fits, or on the last."""
    for parallel in meshes(target.size):
        found = estimate([replace(config, parallel=parallel)], target)
        if found.whole and found.step.peak <= target.chip.memory:
            break
    return found


def line(model: str, folder: Path, rank: int, target: Target) -> str:
    """A row of the table."""
    config = Config(
        name="targets",
        method="balora",
        model=ModelSettings(path=str(folder), dtype="bfloat16", param_dtype="bfloat16", remat=True),
        adapter=AdapterSettings(rank=rank, alpha=2.0 * rank),
        data=DataSettings(length=1024),
        training=TrainingSettings(batch_size=8 * target.size),
    )
    found = first_that_fits(config, target)
    whole, projection = found.whole, found.projection
    known = [model, str(rank), called(target), " x ".join(map(str, found.mesh))]
    peak = f"{found.step.peak / GIB:.1f} of {target.chip.memory / GIB:.1f}"
    if whole is None or projection is None or found.step.peak > target.chip.memory:
        return f"| {' | '.join([*known, f'{peak}: does not fit', '', '', '', ''])} |"
    if target.size == 1:
        on_cpu = estimate([config])
        peak += f" ({(on_cpu.narrow_step or on_cpu.step).peak / GIB:.1f})"
    known += [
        peak,
        f"{seconds(whole.fastest)} to {seconds(whole.slowest)}",
        whole.bound,
        f"{found.tokens / whole.slowest:,.0f} to {found.tokens / whole.fastest:,.0f}",
        f"{projection.slowest / whole.slowest:.2%}",
    ]
    return f"| {' | '.join(known)} |"


def called(target: Target) -> str:
    """A target's name in the table."""
    return TARGETS.get(str(target), str(target))


def recorded(folder: Path | None, head: list[str]) -> dict[tuple[str, ...], str]:
    """The rows of a record that begins as this one will, by model, rank and target."""
    file = folder and folder / RECORD
    lines = file.read_text().splitlines() if file and file.exists() else []
    rows = lines[len(head) :] if lines[: len(head)] == head else []
    return {tuple(cells(row)[:3]): row for row in rows}


def cells(row: str) -> list[str]:
    """What a row of the table says."""
    return [cell.strip() for cell in row.strip("|").split("|")]


def place(row: str) -> tuple[int, int, int]:
    """Where a row stands: by target and model as they are listed, and by rank."""
    model, rank, target = cells(row)[:3]
    targets = [*TARGETS.values(), target]
    return targets.index(target), list(MODELS).index(model), int(rank)


def main() -> None:
    """Estimates, prints, and records where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 128])
    add_record_flag(parser)
    options = parser.parse_args()
    head = [f"jax {jax.__version__}, `JAX_PLATFORMS=cpu python benchmarks/targets.py --record benchmarks/recorded`", ""]
    head += [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    rows = recorded(options.record, head)
    print("\n".join([*head, *rows.values()]))
    with tempfile.TemporaryDirectory() as root:
        for model in options.models:
            folder = Path(root, model)
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(COMMON | MODELS[model]))
        for name, model, rank in itertools.product(options.targets, options.models, options.ranks):
            key = model, str(rank), called(parse_target(name))
            if key not in rows:
                rows[key] = line(model, Path(root, model), rank, parse_target(name))
                print(rows[key], flush=True)
                write(options.record, RECORD, "\n".join([*head, *sorted(rows.values(), key=place)]))


if __name__ == "__main__":
    main()
