"""Tokens per second of greedy generation here and in transformers, on the CPU: the same model, prompts and answers.

    python benchmarks/generation.py [--texts N ...] [--prompt-length N] [--new-tokens N] [--rounds N] [--record FOLDER]

Needs the extra `parity` (torch, transformers). A model of the shape of SmolLM2-135M with random weights continues
random prompts of one length, in float32, to the last token. Each library works in a process of its own, and they take
turns. A time is that of all new tokens with the pass over the prompt, the median over rounds; the ratio is the median
of the ratios within a round, in brackets its quartiles. Both take the most likely token; the last column is the share
of texts in which all tokens are the same. On a machine that others use, give both one core (`taskset -c 0`): threads of
torch that wait for each other cost it much more than they cost XLA.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from peft_step import MODELS, processor
from record_files import add_record_flag, write

MODEL = MODELS["smollm2"]
LIBRARIES = ("balora_jax", "transformers")


def written_model(folder: str) -> None:
    """Writes the model with random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**MODEL.sizes, max_position_embeddings=2048, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def random_prompts(texts: int, length: int):
    """Tokens `(texts, length)`, the same in both processes."""
    import numpy as np

    return np.random.default_rng(0).integers(3, MODEL.sizes["vocab_size"], (texts, length))


def jax_generate(folder: str, texts: int, length: int, new_tokens: int):
    """A function that continues the prompts with this package."""
    import jax
    import numpy as np
    from flax import nnx

    from balora_jax.models import generate, load_decoder

    graph, parameters = nnx.split(load_decoder(folder))
    prompts = jax.numpy.asarray(random_prompts(texts, length))

    @jax.jit
    def continued(parameters, prompts):
        model = nnx.merge(graph, parameters, copy=True)
        return generate(model, prompts, jax.numpy.ones_like(prompts), new_tokens=new_tokens, eos_id=-2)

    return lambda: np.asarray(continued(parameters, prompts)).tolist()


def torch_generate(folder: str, texts: int, length: int, new_tokens: int):
    """A function that continues the prompts with transformers."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    prompts = torch.from_numpy(random_prompts(texts, length))
    config = transformers.GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )

    def call():
        with torch.inference_mode():
            mask = torch.ones_like(prompts)
            return model.generate(prompts, attention_mask=mask, generation_config=config)[:, length:].tolist()

    return call


def work(library: str, folder: str, shape: tuple[int, int, int]) -> None:
    """Tells the tokens, and then the seconds of a turn for every line that comes in."""
    generated = (jax_generate if library == "balora_jax" else torch_generate)(folder, *shape)
    print(json.dumps(generated()), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        generated()
        print(time.perf_counter() - start, flush=True)


def row(folder: str, texts: int, length: int, new_tokens: int, rounds: int) -> str:
    """A row of the table."""
    workers, tokens = {}, {}
    for library in LIBRARIES:
        command = [sys.executable, __file__, "--work", library, folder, "--texts", str(texts)]
        command += ["--prompt-length", str(length), "--new-tokens", str(new_tokens)]
        workers[library] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        answer = workers[library].stdout.readline()
        if not answer:
            raise SystemExit(f"{library} could not be measured; see its error above")
        tokens[library] = json.loads(answer)
    seconds: dict[str, list[float]] = {library: [] for library in LIBRARIES}
    for _ in range(rounds):
        for library, worker in workers.items():
            print("go", file=worker.stdin, flush=True)
            seconds[library].append(float(worker.stdout.readline()))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    ours, theirs = (texts * new_tokens / statistics.median(seconds[library]) for library in LIBRARIES)
    low, ratio, high = statistics.quantiles(
        [b / a for a, b in zip(*seconds.values(), strict=True)], n=4, method="inclusive"
    )
    same = statistics.mean(a == b for a, b in zip(*tokens.values(), strict=True))
    return f"| {texts} | {ours:.0f} | {theirs:.0f} | {ratio:.2f} ({low:.2f} to {high:.2f}) | {same:.0%} |"


def main() -> None:
    """Prints the table, and records it where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", type=int, default=[1, 8, 64], help="prompts at once")
    parser.add_argument("--prompt-length", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to generate for each")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each library")
    add_record_flag(parser)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    length, new_tokens = arguments.prompt_length, arguments.new_tokens
    if arguments.work:
        work(*arguments.work, (arguments.texts[0], length, new_tokens))
        return
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "torch", "transformers"))
    device = f"{processor()}, {len(os.sched_getaffinity(0))} cores"
    lines = [f"{device}, {versions}, `{' '.join(['python', *sys.argv])}`", ""]
    lines += ["| texts | balora_jax, tokens / s | transformers, tokens / s | ratio | same texts |", f"|{5 * '---|'}"]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        written_model(folder)
        for texts in arguments.texts:
            lines.append(row(folder, texts, length, new_tokens, arguments.rounds))
            print(lines[-1], flush=True)
    write(arguments.record, "generation-cpu.md", "\n".join(lines))


if __name__ == "__main__":
    main()
