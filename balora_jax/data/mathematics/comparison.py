"""Comparison: which of some numbers is bigger, closest, or comes first."""

import random
from fractions import Fraction

from balora_jax.data.mathematics.problems import Problem, area, decimal, distinct, phrase

MODULES, problem = area("comparison")

_BIGGER = (
    "Which is bigger: {0} or {1}?",
    "Which is greater: {0} or {1}?",
    "What is the bigger of {0} and {1}?",
)
_SMALLER = ("Which is smaller: {0} or {1}?", "What is the smaller of {0} and {1}?")
_IS_GREATER = ("Is {0} greater than {1}?", "Is {0} bigger than {1}?", "Is it true that {0} is more than {1}?")
_IS_LESS = ("Is {0} less than {1}?", "Is {0} smaller than {1}?")
_ASCENDING = ("Sort {0}.", "Put {0} in increasing order.", "Sort {0} in ascending order.")
_DESCENDING = ("Put {0} in decreasing order.", "Sort {0} in descending order.")
_KTH = ("What is the {0} value in {1}?", "Which is the {0} number in {1}?", "Find the {0} of {1}.")
_RANKS = ("", "second ", "third ", "fourth ", "fifth ")
_CLOSEST = (
    "Which of {1} is closest to {0}?",
    "What is the closest to {0} in {1}?",
    "Which is closest to {0}: {1}?",
)


def _number(rng: random.Random, difficulty: int) -> tuple[str, Fraction]:
    """Draw an integer; a decimal or a proper fraction too from difficulty 3."""
    kind = rng.randrange(4) if difficulty > 2 else 0
    if kind < 2:
        bound = 30 if difficulty == 1 else 10**difficulty
        whole = rng.randint(0 if difficulty == 1 else -bound, bound)
        return str(whole), Fraction(whole)
    numerator = rng.randint(-(10 ** (difficulty - 1)), 10 ** (difficulty - 1))
    if kind == 2:
        value = Fraction(numerator, 10 ** (difficulty - 2))
        return decimal(value), value
    value = Fraction(numerator, rng.randint(2, 3 * difficulty))
    return str(value), value


@problem
def pair(rng: random.Random, difficulty: int) -> Problem:
    """Compare two different integers up to 10^`difficulty` (30 at 1), decimals and fractions too from 3.

    From difficulty 2 one pair of integers in two lies close together.
    """
    (p, p_value), (q, q_value) = _number(rng, difficulty), _number(rng, difficulty)
    if difficulty > 1 and p_value.denominator == 1 and rng.random() < 0.5:
        q_value = p_value + rng.choice((-1, 1)) * rng.randint(1, 10)
        q = str(q_value)
    if p_value == q_value:
        q_value += 1
        q = str(q_value) if "/" in q or q_value.denominator == 1 else decimal(q_value)
    kind = rng.randrange(4)
    if kind == 0:
        return phrase(rng, _BIGGER, p, q), p if p_value > q_value else q
    if kind == 1:
        return phrase(rng, _SMALLER, p, q), p if p_value < q_value else q
    if kind == 2:
        return phrase(rng, _IS_GREATER, p, q), str(p_value > q_value)
    return phrase(rng, _IS_LESS, p, q), str(p_value < q_value)


@problem
def sort(rng: random.Random, difficulty: int) -> Problem:
    """Sort `difficulty + 2` (at most 8) different integers: 0 to 20 at difficulty 1, -9 to 99 from 2."""
    low, high = (0, 20) if difficulty == 1 else (-9, 99)
    items = distinct(rng, min(difficulty + 2, 8), low, high)
    descending = rng.random() < 1 / 3
    answer = ", ".join(map(str, sorted(items, reverse=descending)))
    return phrase(rng, _DESCENDING if descending else _ASCENDING, ", ".join(map(str, items))), answer


@problem
def kth_biggest(rng: random.Random, difficulty: int) -> Problem:
    """Find the k-th biggest or smallest of `difficulty + 2` (at most 8) different integers.

    Numbers have `difficulty` digits (at most 4), with signs from difficulty 2; k is up to half of the items.
    """
    count = min(difficulty + 2, 8)
    bound = 20 if difficulty == 1 else 10 ** min(difficulty, 4)
    items = distinct(rng, count, 0 if difficulty == 1 else -bound, bound)
    rank = rng.randrange((count + 1) // 2)
    biggest = rng.random() < 0.5
    answer = sorted(items, reverse=biggest)[rank]
    name = _RANKS[rank] + ("biggest" if biggest else "smallest")
    return phrase(rng, _KTH, name, ", ".join(map(str, items))), str(answer)


@problem
def closest(rng: random.Random, difficulty: int) -> Problem:
    """Find the one of `difficulty + 2` (at most 8) integers that is closest to a given number; no ties.

    Numbers have `difficulty` digits (at most 4), with signs from difficulty 2.
    """
    count = min(difficulty + 2, 8)
    high = 20 if difficulty == 1 else 10 ** min(difficulty, 4)
    low = 0 if difficulty == 1 else -high
    while True:
        items, target = distinct(rng, count, low, high), rng.randint(low, high)
        nearest, next_nearest = sorted(items, key=lambda item: abs(item - target))[:2]
        if abs(nearest - target) < abs(next_nearest - target):
            return phrase(rng, _CLOSEST, target, ", ".join(map(str, items))), str(nearest)
