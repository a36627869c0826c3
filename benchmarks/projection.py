"""Speed, memory and accuracy of the balanced projection on the device that JAX finds.

    python benchmarks/projection.py [TABLE ...] [--ranks R ...] [--repeats N] [--record FOLDER]

Tables (all if none is named):

pairs    one pass over the 108 MLP pairs of Qwen2.5-3B (36 x [2048 x r, r x 11008], twice, and [11008 x r, r x 2048]),
         against the floor (the Gram products and the applications alone), NumPy and, if torch is installed,
         the paper's algorithm as written: three thin SVDs a pair
routes   the exact and the iterative route on pairs as a training step leaves them; above rank 128 on 12 of them
step     what the projection adds to a training step (hidden 256, 6 layers, batch 8 x 256, AdamW on the MLPs' adapters)
memory   bytes that the compiled projection needs beside its arguments and results, in copies of the factors

Times are medians over repeats; the things that a row compares are run in turn, one of each in every repeat, so that a
noisy machine harms them alike. With `--record` each table is written to a file too, as README.md shows it.
"""

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from record_files import add_record_flag, write

from balora_jax import balance_pairs, balora, balora_project
from balora_jax.adapters import add_adapters
from balora_jax.models.cross_entropy import token_cross_entropy
from balora_jax.models.decoder import Decoder, DecoderConfig

LAYERS = 36
SHAPES = ((2048, 11008), (2048, 11008), (11008, 2048))
matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def seconds(functions: dict, repeats: int) -> dict[str, float]:
    """Median times of functions without arguments, run in turn; the first call of each does not count."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            if repeat:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def random_pairs(rank: int, *, stacked: bool = False, layers: int = LAYERS) -> list[tuple[jax.Array, jax.Array]]:
    """The pairs of some layers with standard normal entries, one by one or in three stacks."""
    rng = np.random.default_rng(0)
    leading = (layers,) if stacked else ()
    return [
        tuple(jnp.asarray(rng.standard_normal((*leading, *shape)), jnp.float32) for shape in ((a, rank), (rank, b)))
        for _ in range(1 if stacked else layers)
        for a, b in SHAPES
    ]


def after_a_step(pairs, size: float = 0.01):
    """Hyper-balanced pairs of the same products after an update of a relative size, all entries alike as Adam's."""

    @jax.jit
    def stepped(pairs):
        moved = []
        for i, outcome in enumerate(balance_pairs(pairs)):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(1), i))
            factors = outcome[:2]
            moved.append(
                tuple(
                    x + size * jnp.sqrt(jnp.mean(x**2)) * jnp.sign(jax.random.normal(key, x.shape))
                    for x, key in zip(factors, keys, strict=True)
                )
            )
        return moved

    return stepped(pairs)


@jax.jit
def floor(pairs, changes):
    """What no algorithm of this kind can do without: two Gram products and two applications a pair."""
    return [
        (matmul(a.mT, a), matmul(b, b.mT), matmul(a, change), matmul(change, b))
        for (a, b), change in zip(pairs, changes, strict=True)
    ]


def paper_numpy(a, b):
    """The paper's projection as written (arXiv 2605.31484): two polar decompositions and an SVD, all thin SVDs."""
    u_a, s_a, v_a = np.linalg.svd(a, full_matrices=False)
    u_b, s_b, v_b = np.linalg.svd(b, full_matrices=False)
    u, s, v = np.linalg.svd((v_a.T * s_a) @ v_a @ ((u_b * s_b) @ u_b.T))
    root = np.sqrt(s)
    return (u_a @ v_a) @ (u * root), (root[:, None] * v) @ (u_b @ v_b)


def paper_torch(a, b):
    """The same in torch."""
    import torch

    u_a, s_a, v_a = torch.linalg.svd(a, full_matrices=False)
    u_b, s_b, v_b = torch.linalg.svd(b, full_matrices=False)
    u, s, v = torch.linalg.svd((v_a.T * s_a) @ v_a @ ((u_b * s_b) @ u_b.T))
    root = s.sqrt()
    return (u_a @ v_a) @ (u * root), (root[:, None] * v) @ (u_b @ v_b)


def reference(library: str, rank: int) -> float:
    """Seconds of the paper's projection of all pairs, from a sixth of them; for a process of its own."""
    rng = np.random.default_rng(0)
    shapes = SHAPES * (LAYERS // 6)
    pairs = [tuple(rng.standard_normal(shape, np.float32) for shape in ((a, rank), (rank, b))) for a, b in shapes]
    project = paper_numpy
    if library == "torch":
        import torch

        torch.set_num_threads(os.cpu_count() or 1)
        pairs, project = [tuple(torch.from_numpy(x) for x in pair) for pair in pairs], paper_torch
    taken = []
    for _ in range(4):
        start = time.perf_counter()
        for pair in pairs:
            project(*pair)
        taken.append(time.perf_counter() - start)
    return 6 * statistics.median(taken[1:])


def reference_apart(library: str, rank: int) -> float | None:
    """`reference` in a process of its own, where no thread of XLA is in its way; None if the library is missing."""
    if not importlib.util.find_spec(library):
        return None
    command = [sys.executable, __file__, "--reference", library, "--ranks", str(rank)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def errors(pairs, outcomes) -> tuple[float, float]:
    """The worst relative errors of product and balance, in float64, of some pairs."""
    product, gap = 0.0, 0.0
    for old, new in zip(pairs[:3], outcomes[:3], strict=True):
        (a, b), (x, y) = ([np.asarray(f, np.float64) for f in pair[:2]] for pair in (old, new))
        # ||x y - a b||_F through r x r Gram matrices would cancel; a thin QR of [x a] does not
        q, t = np.linalg.qr(np.concatenate([x, a], axis=1))
        del q
        rank = a.shape[1]
        difference = t[:, :rank] @ y - t[:, rank:] @ b
        product = max(product, np.linalg.norm(difference) / np.linalg.norm(t[:, rank:] @ b))
        p, q = x.T @ x, y @ y.T
        gap = max(gap, np.linalg.norm(p - q) / (np.linalg.norm(p) + np.linalg.norm(q)))
    return product, gap


def pairs_table(ranks, repeats):
    """The table `pairs`."""
    yield (
        "rank | floor, ms | balance | balora_project | balora_project, stacked | "
        "NumPy SVDs | torch SVDs | product error | gap"
    )
    for rank in ranks:
        pairs = random_pairs(rank)
        changes = [jnp.eye(rank) for _ in pairs]
        balanced = jax.jit(lambda pairs: [outcome[:2] for outcome in balance_pairs(pairs)])
        functions = {"floor": partial(floor, pairs, changes), "balance": partial(balanced, pairs)}
        functions["project"] = projection(after_a_step(pairs))
        functions["stacked"] = projection(after_a_step(random_pairs(rank, stacked=True)))
        taken = seconds(functions, repeats)
        references = {library: reference_apart(library, rank) for library in ("numpy", "torch")}
        again = seconds({"balance": functions["balance"]}, repeats)["balance"]
        product, gap = errors(pairs, balanced(pairs))

        def cell(name, taken=taken):
            return f"{1e3 * taken[name]:.0f} ({taken[name] / taken['floor']:.2f} x)"

        def ratio(library, references=references, again=again):
            found = references[library]
            return f"{found:.2f} s ({found / again:.1f} x balance)" if found else "not installed"

        yield (
            f"{rank} | {1e3 * taken['floor']:.1f} | {cell('balance')} | {cell('project')} | {cell('stacked')} | "
            f"{ratio('numpy')} | {ratio('torch')} | {product:.1e} | {gap:.1e}"
        )


def as_tree(pairs):
    """A parameter tree of pairs."""
    return {f"layer_{i}": {"lora_a": a, "lora_b": b} for i, (a, b) in enumerate(pairs)}


def projection(pairs):
    """A call of the compiled `balora_project` on pairs and small updates."""
    params = as_tree(pairs)
    updates = jax.tree.map(lambda x: 1e-3 * x, params)
    transformation = balora_project()
    return partial(jax.jit(transformation.update), updates, transformation.init(params), params)


def routes_table(ranks, repeats):
    """The table `routes`."""
    yield "rank | floor, ms | exact | iterative | product error | gap | product error, iterative | gap, iterative"
    for rank in ranks:
        pairs = after_a_step(random_pairs(rank, layers=LAYERS if rank <= 128 else 4))
        changes = [jnp.eye(rank) for _ in pairs]
        routes = {
            route: jax.jit(lambda pairs, route=route: [x[:2] for x in balance_pairs(pairs, route=route)])
            for route in ("exact", "iterative")
        }
        calls = {route: partial(function, pairs) for route, function in routes.items()}
        taken = seconds({"floor": partial(floor, pairs, changes)} | calls, repeats)
        found = [f"{error:.1e}" for call in calls.values() for error in errors(pairs, call())]
        times = " | ".join(f"{1e3 * taken[r]:.0f} ({taken[r] / taken['floor']:.2f} x)" for r in routes)
        yield f"{rank} | {1e3 * taken['floor']:.1f} | {times} | {' | '.join(found)}"


def step_table(ranks, repeats):
    """The table `step`."""
    yield "rank | step with AdamW, ms | projection | with transport | every=10, a step between"
    config = DecoderConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        qkv_bias=True,
    )
    tokens = jax.random.randint(jax.random.key(0), (8, 257), 0, config.vocab_size)
    for rank in ranks:
        model = Decoder(config, rngs=nnx.Rngs(0))
        targets = ("gate_proj", "up_proj", "down_proj")
        add_adapters(model, targets=targets, rank=rank, alpha=2.0 * rank, rngs=nnx.Rngs(params=1, dropout=2))
        graph, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)
        # factors as they are during training, not the zeros of the start
        adapters = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(2), x.shape), adapters)

        def loss(adapters, rest, graph=graph):
            model = nnx.merge(graph, adapters, rest, copy=True)
            return token_cross_entropy(model, model.hidden_states(tokens[:, :-1])[0], tokens[:, 1:]).mean()

        def run(transformation, loss=loss, adapters=adapters, rest=rest):
            @jax.jit
            def step(adapters, state, rest):
                updates, state = transformation.update(jax.grad(loss)(adapters, rest), state, adapters)
                return optax.apply_updates(adapters, updates), state

            carry = step(adapters, transformation.init(adapters), rest)

            def call():
                nonlocal carry
                carry = step(*carry, rest)
                return carry

            return call

        adam = optax.adamw(1e-4)
        taken = seconds(
            {
                "adamw": run(adam),
                "project": run(optax.chain(adam, balora_project())),
                "transport": run(balora(adam)),
                "between": run(optax.chain(adam, balora_project(every=1_000_000))),
            },
            3 * repeats,
        )
        share = {name: f"{100 * (t / taken['adamw'] - 1):+.1f} %" for name, t in taken.items()}
        yield (f"{rank} | {1e3 * taken['adamw']:.0f} | {share['project']} | {share['transport']} | {share['between']}")


def memory_table(ranks, repeats):
    """The table `memory`."""
    del repeats
    yield "rank | balance_pairs | balora_project | balora_project, stacked"
    for rank in ranks:
        cells = []
        for stacked, transform in ((False, False), (False, True), (True, True)):
            leading = (LAYERS,) if stacked else ()
            pairs = [
                (
                    jax.ShapeDtypeStruct((*leading, a, rank), jnp.float32),
                    jax.ShapeDtypeStruct((*leading, rank, b), jnp.float32),
                )
                for _ in range(1 if stacked else LAYERS)
                for a, b in SHAPES
            ]
            if transform:
                params, tx = as_tree(pairs), balora_project()
                compiled = jax.jit(tx.update).lower(params, jax.eval_shape(tx.init, params), params).compile()
            else:
                compiled = jax.jit(lambda x: [y[:2] for y in balance_pairs(x)]).lower(pairs).compile()
            size = sum(4 * x.size for pair in pairs for x in pair)
            cells.append(f"{compiled.memory_analysis().temp_size_in_bytes / size:.2f}")
        yield f"{rank} | {' | '.join(cells)}"


TABLES = {
    "pairs": (pairs_table, (8, 16, 32, 64, 128)),
    "routes": (routes_table, (8, 16, 32, 64, 128, 256, 512)),
    "step": (step_table, (8, 64)),
    "memory": (memory_table, (8, 64)),
}


def main() -> None:
    """Prints the tables, and records them where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], help="which tables; all if none is named")
    parser.add_argument("--ranks", nargs="+", type=int, help="ranks instead of each table's own")
    parser.add_argument("--repeats", type=int, default=9, help="measurements of each time")
    add_record_flag(parser)
    parser.add_argument("--reference", choices=["numpy", "torch"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.reference:
        print(reference(arguments.reference, arguments.ranks[0]))
        return
    device = jax.devices()[0]
    cores = f", {os.cpu_count()} cores" if device.platform == "cpu" else ""
    heading = f"{device.device_kind}{cores}, jax {jax.__version__}, `{' '.join(['python', *sys.argv])}`"
    print(heading)
    for name in arguments.tables or TABLES:
        table, ranks = TABLES[name]
        lines = [heading, ""]
        print(f"\n{name}")
        for i, row in enumerate(table(arguments.ranks or ranks, arguments.repeats)):
            print(row, flush=True)
            lines.append(f"| {row} |")
            if i == 0:
                lines.append(f"|{'---|' * (row.count('|') + 1)}")
        write(arguments.record, f"projection-{name}-{device.platform}.md", "\n".join(lines))


if __name__ == "__main__":
    main()
