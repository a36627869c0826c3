"""Generation of examples: balanced over modules, deterministic, and split by content."""

import difflib
import random
from collections.abc import Sequence
from typing import Literal, NamedTuple

from balora_jax.data.mathematics import (
    algebra,
    arithmetic,
    calculus,
    comparison,
    measurement,
    numbers,
    polynomials,
    probability,
)
from balora_jax.data.mathematics.problems import ProblemFunction, check_difficulty
from balora_jax.data.mathematics.split import is_evaluation_question

_AREAS = (algebra, arithmetic, calculus, comparison, measurement, numbers, polynomials, probability)
_TABLE: dict[str, ProblemFunction] = {name: f for part in _AREAS for name, f in part.MODULES.items()}

MODULES: tuple[str, ...] = tuple(sorted(_TABLE))
"""Names of all modules."""

MAX_TRIES = 10_000
"""Draws for one example before a module counts as exhausted."""

Split = Literal["train", "evaluation"]


class Example(NamedTuple):
    """One question of a module, with its answer."""

    module: str
    question: str
    answer: str


def generate(
    modules: Sequence[str],
    count: int,
    *,
    difficulty: int | Sequence[int] = 1,
    seed: int = 0,
    split: Split = "train",
) -> list[Example]:
    """Draw examples of one split, the modules in turn.

    Every module draws from its own stream, which `seed`, `split`, `difficulty` and its name determine:
    example `i` is the same in every process, and a longer list starts with the shorter one. No question of
    the split `"evaluation"` is ever in the split `"train"`, for any seed, difficulty and module; see
    `is_evaluation_question`.

    Args:
        modules: Names out of `MODULES`.
        count: Number of examples.
        difficulty: Difficulty from 1 to 8, or several to draw from uniformly. Up to 6, questions have at most
            120 characters and answers at most 30.
        seed: Seed of the draws.
        split: `"train"`, where questions may repeat, or `"evaluation"`, where all are distinct.

    Returns:
        `count` examples.

    Raises:
        ValueError: If a module is unknown, an argument is out of range, or a module has fewer distinct
            evaluation questions than its share of `count`.

    Examples:
        >>> [example.answer for example in generate(["numbers__is_prime"], 3, seed=1)]
        ['False', 'True', 'True']
    """
    names = (modules,) if isinstance(modules, str) else tuple(modules)
    _check_arguments(names, count, split)
    difficulties = (difficulty,) if isinstance(difficulty, int) else tuple(difficulty)
    if not difficulties:
        raise ValueError("`difficulty` must name at least one difficulty, got an empty sequence")
    for item in difficulties:
        check_difficulty(item)
    # A text seeds through SHA-512, which is the same in every process, unlike `hash`.
    streams = {name: random.Random(f"{seed} {split} {difficulties} {name}") for name in names}
    seen: dict[str, set[str]] = {name: set() for name in names}
    evaluation = split == "evaluation"
    examples = []
    for i in range(count):
        name = names[i % len(names)]
        function, rng, questions = _TABLE[name], streams[name], seen[name]
        for _ in range(MAX_TRIES):
            question, answer = function(rng, rng.choice(difficulties))
            if is_evaluation_question(question) == evaluation and question not in questions:
                break
        else:
            raise ValueError(
                f"`count` asks module {name!r} for more {split} questions than it has at difficulty "
                f"{difficulty!r}: found {len(questions)} distinct ones, and no other in {MAX_TRIES} draws"
            )
        if evaluation:
            questions.add(question)
        examples.append(Example(name, question, answer))
    return examples


def _check_arguments(names: tuple[str, ...], count: int, split: str) -> None:
    """Raise for modules, a count or a split that `generate` cannot serve."""
    if not names:
        raise ValueError("`modules` must name at least one module, got none")
    for name in names:
        if name not in _TABLE:
            near = difflib.get_close_matches(str(name), MODULES, n=1, cutoff=0.0)[0]
            raise ValueError(f"`modules` must be names out of MODULES, got {name!r}; the nearest is {near!r}")
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise ValueError(f"`count` must be an integer of at least 0, got {count!r}")
    if split not in ("train", "evaluation"):
        raise ValueError(f'`split` must be "train" or "evaluation", got {split!r}')
