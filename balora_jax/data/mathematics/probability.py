"""Probability: letters picked from a bag without replacement."""

import math
import random
from collections import Counter
from fractions import Fraction
from string import ascii_lowercase

from balora_jax.data.mathematics.problems import Problem, area, phrase

MODULES, problem = area("probability")

_LEVEL_SET = (
    "Pick {0} letters without replacement from {1}. Prob of {2}?",
    "{0} letters picked without replacement from {1}. Give prob of {2}.",
    "What is prob of {2} in {0} letters picked without replacement from {1}?",
)
_SEQUENCE = (
    "Pick letters without replacement from {0}. Prob of sequence {1}?",
    "Letters picked without replacement from {0}. Give prob of sequence {1}.",
    "What is prob of sequence {1} picked without replacement from {0}?",
)


def _bag(rng: random.Random, size: int, kinds: int) -> str:
    """Draw a bag of `size` letters of exactly `kinds` kinds."""
    letters = rng.sample(ascii_lowercase, kinds)
    letters += rng.choices(letters, k=size - kinds)
    rng.shuffle(letters)
    return "".join(letters)


@problem
def swr_p_level_set(rng: random.Random, difficulty: int) -> Problem:
    """Find the probability of how often each letter comes up, in 2 picks from at most 5 letters at first.

    The bag grows by 2 letters per step of difficulty (to 15), the picks by one per two steps (to 4).
    """
    picks = min(2 + (difficulty - 1) // 2, 4)
    size = rng.randint(min(difficulty + 2, 8), min(3 + 2 * difficulty, 15))
    bag = _bag(rng, size, min(2 + difficulty // 3, 4))
    counts = Counter(bag)
    event = Counter(rng.sample(bag, picks) if rng.random() < 0.8 else rng.choices(sorted(counts), k=picks))
    ways = math.prod(math.comb(counts[letter], times) for letter, times in event.items())
    text = " and ".join(f"{times} {letter}" for letter, times in sorted(event.items()))
    return phrase(rng, _LEVEL_SET, picks, bag, text), str(Fraction(ways, math.comb(size, picks)))


@problem
def swr_p_sequence(rng: random.Random, difficulty: int) -> Problem:
    """Find the probability of a sequence of letters, of one letter from at most 5 at difficulty 1.

    The bag grows by 2 letters per step (to 15), the sequence by one per two steps (to 4).
    """
    picks = min(1 + difficulty // 2, 4)
    size = rng.randint(min(difficulty + 2, 8), min(3 + 2 * difficulty, 15))
    bag = _bag(rng, size, min(2 + difficulty // 3, 4))
    left = Counter(bag)
    sequence = rng.sample(bag, picks) if rng.random() < 0.8 else rng.choices(sorted(left), k=picks)
    probability = Fraction(1)
    for drawn, letter in enumerate(sequence):
        probability *= Fraction(left[letter], size - drawn)
        left[letter] -= 1
        if not probability:
            break
    return phrase(rng, _SEQUENCE, bag, "".join(sequence)), str(probability)
