"""Member-steps per second of a population of runs in one program, and of one process for each run.

    python benchmarks/sweep.py [--members N] [--at-once K ...] [--rank R] [--rounds N] [--record FOLDER]

A member is a LoRA run of the shipped model, 4 rows of 128 tokens a step. The population is trained K members at a time,
as `training.members_at_once` has it; processes run as many at a time as there are cores, one thread each. They take
turns; a number is the median over rounds of a pass over all members, the ratio the median of those within a round, in
brackets its quartiles. Starting a process and compiling its step, which each run of its own pays, is told apart.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

from peft_step import processor
from record_files import add_record_flag, write

STEPS = 5  # of a process's turn


def stepper(members: int, at_once: int, rank: int):
    """A function that takes a step of every member."""
    import jax

    from balora_jax.models.weights import load_decoder
    from balora_jax.settings import AdapterSettings, Config, DataSettings, TrainingSettings
    from balora_jax.training.feed import Feed
    from balora_jax.training.loading import load_data
    from balora_jax.training.program import Program

    configs = [
        Config(
            name="sweep",
            seed=seed,
            adapter=AdapterSettings(rank=rank, alpha=2.0 * rank),
            data=DataSettings(train_examples=2_000, eval_examples=100),
            training=TrainingSettings(batch_size=4, members_at_once=at_once),
        )
        for seed in range(members)
    ]
    config = configs[0]
    program = Program(config, load_decoder(config.model.path))
    rows, _, _ = load_data(config.data)
    state, feed = program.initial_state(configs), Feed(rows, [c.seed for c in configs], config.training, None)
    batch = feed(1)[0]

    def step():
        nonlocal state
        state, metrics = program.step(state, program.base, batch)
        jax.block_until_ready(metrics)

    return step


def work(rank: int) -> None:
    """Takes STEPS steps of one member for every line that comes in."""
    step = stepper(1, 1, rank)
    step()
    print("ready", flush=True)
    for _ in sys.stdin:
        for _ in range(STEPS):
            step()
        print("done", flush=True)


class Processes:
    """One process for each core, each with a member of its own."""

    def __init__(self, rank: int):
        command = [sys.executable, __file__, "--work", "--rank", str(rank)]
        start = time.perf_counter()
        self._workers = [
            subprocess.Popen(["taskset", "-c", str(core), *command], stdin=-1, stdout=-1, text=True)
            for core in sorted(os.sched_getaffinity(0))
        ]
        self._hear()
        self.seconds_to_start = time.perf_counter() - start

    def _hear(self):
        for worker in self._workers:
            if not worker.stdout.readline():
                raise SystemExit("a process could not be measured; see its error above")

    def rate(self) -> float:
        """Member-steps per second."""
        start = time.perf_counter()
        for worker in self._workers:
            print("go", file=worker.stdin, flush=True)
        self._hear()
        return STEPS * len(self._workers) / (time.perf_counter() - start)

    def close(self):
        """Ends them."""
        for worker in self._workers:
            worker.stdin.close()
            worker.wait()


def main() -> None:
    """Prints the table, and records it where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=64, help="runs of the population")
    parser.add_argument("--at-once", nargs="+", type=int, default=(1, 2, 4, 8, 16, 64), help="members at a time")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    add_record_flag(parser)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.rank)
        return
    processes = Processes(arguments.rank)
    steppers = {k: stepper(arguments.members, k, arguments.rank) for k in arguments.at_once}
    rates: dict[int, list[float]] = {k: [] for k in (0, *steppers)}
    for turn in range(arguments.rounds + 1):
        found = {0: processes.rate()}
        for k, step in steppers.items():
            start = time.perf_counter()
            step()
            found[k] = arguments.members / (time.perf_counter() - start)
        for k, rate in found.items() if turn else ():
            rates[k].append(rate)
    processes.close()
    cores = len(os.sched_getaffinity(0))
    lines = [f"{processor()}, {cores} cores, `{' '.join(['python', *sys.argv])}`", ""]
    lines += ["| members at once | member-steps / s | against a process each |", "|---|---|---|"]
    lines += [f"| a process each, {cores} at a time | {statistics.median(rates[0]):.1f} | - |"]
    for k in steppers:
        ratios = [one / other for one, other in zip(rates[k], rates[0], strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
        lines.append(f"| {k} | {statistics.median(rates[k]):.1f} | {ratio:.2f} ({low:.2f} to {high:.2f}) |")
    lines += ["", f"A process takes {processes.seconds_to_start:.1f} s to its first step."]
    print("\n".join(lines))
    write(arguments.record, "sweep-cpu.md", "\n".join(lines))


if __name__ == "__main__":
    main()
