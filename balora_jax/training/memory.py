"""What a run needs at the least, reckoned before it is tried: a system that is short of memory kills processes."""

import os
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from balora_jax.errors import ConfigError
from balora_jax.models import DecoderConfig
from balora_jax.models.attention import MOST_BLOCKS
from balora_jax.settings import Config, TrainingSettings
from balora_jax.training.evaluation import EvaluationSet

MEMBERS_ON_CPUS = 2
"""Members at a time on one CPU device, where the data of more do not stay in the cache (benchmarks/sweep.py)."""

NO_MACHINE = 2**50
"""Bytes that no machine has."""

_BATCH_BYTES = 13  # of a token in a batch: three int32 and a bool


@dataclass(frozen=True)
class StepMemory:
    """Memory of a compiled step, in bytes.

    Attributes:
        arguments: the base, the states of all runs and a batch.
        temporaries: everything that lives within a step.
    """

    arguments: int
    temporaries: int

    @property
    def peak(self) -> int:
        """Both together."""
        return self.arguments + self.temporaries


def step_memory(compiled: jax.stages.Compiled) -> StepMemory | None:
    """Returns the memory of a compiled step, or None where the compiler does not tell."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes  # what does not take the place of an argument
    return StepMemory(analysis.argument_size_in_bytes, analysis.temp_size_in_bytes + new)


def shown(number: float) -> str:
    """Returns a number of bytes as people write it."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"


def memory_limit() -> int:
    """Returns the bytes of memory of the device, or of the machine where the device does not tell."""
    told = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if told is None and not hasattr(os, "sysconf"):  # on Windows
        return NO_MACHINE
    return told or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_step(config: Config, model: DecoderConfig, *, members: int, length: int, limit: int) -> None:
    """Raises `ConfigError` if a step of training can never fit.

    Args:
        config: of runs that are trained together.
        model: their base.
        members: number of runs.
        length: tokens of a row.
        limit: bytes that there are.
    """
    training = config.training
    batch = members * training.accumulate * training.batch_size * length * _BATCH_BYTES
    most = MEMBERS_ON_CPUS if jax.default_backend() == "cpu" else members
    together = min(members, training.members_at_once or most)
    needed = max(batch, together * _scores(model, training.batch_size, length, length))
    fields = "data.length, training.batch_size or training.accumulate"
    rows = f"{members} x {training.accumulate} x {training.batch_size}"
    _check(f"a step of {rows} rows of {length} tokens", fields, needed, limit)


def check_evaluation(settings: TrainingSettings, model: DecoderConfig, examples: EvaluationSet, *, limit: int) -> None:
    """Raises `ConfigError` if an evaluation can never fit.

    Args:
        settings: of the loop.
        model: that is evaluated.
        examples: what it is evaluated on.
        limit: bytes that there are.
    """
    count, length = len(examples.encoded.tokens), examples.longest
    rows = min(settings.eval_batch_size, count)
    fields = "data.length or training.eval_batch_size"
    _check(f"an evaluation of {rows} rows of {length} tokens", fields, _scores(model, rows, length, length), limit)
    if examples.score is not None and examples.choices is None:
        prompts = examples.encoded.prompt_lengths
        longest = max(len(tokens) - prompt for tokens, prompt in zip(examples.encoded.tokens, prompts, strict=True))
        new_tokens, field = settings.max_new_tokens or longest, "training.max_new_tokens or training.eval_batch_size"
        check_answers(model, rows=rows, prompt=max(prompts), new_tokens=new_tokens, field=field, limit=limit)


def check_answers(model: DecoderConfig, *, rows: int, prompt: int, new_tokens: int, field: str, limit: int) -> None:
    """Raises `ConfigError` if the generation of answers can never fit.

    Args:
        model: that answers.
        rows: prompts that are answered together.
        prompt: tokens of the longest.
        new_tokens: the longest answer.
        field: what to make smaller.
        limit: bytes that there are.
    """
    slot = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * jnp.dtype(model.dtype).itemsize
    length = prompt + new_tokens
    needed = max(rows * length * slot, _scores(model, rows, prompt, length))
    _check(f"answering {rows} prompts of {prompt} tokens with {new_tokens} each", field, needed, limit)


def _scores(model: DecoderConfig, rows: int, queries: int, keys: int) -> int:
    """The bytes of the scores of a block of queries."""
    return 4 * rows * model.num_attention_heads * queries * keys // MOST_BLOCKS


def _check(what: str, fields: str, needed: int, limit: int) -> None:
    if needed > limit:
        sizes = f"{needed / 2**30:,.0f} GiB of memory, and there are {limit / 2**30:,.0f}"
        raise ConfigError(f"{what} needs at least {sizes}; make {fields} smaller")
