"""Polynomials in one unknown: values, products, sums, like terms."""

import random
from itertools import zip_longest

from balora_jax.data.mathematics.problems import (
    VARIABLES,
    Problem,
    area,
    draw_polynomial,
    join_terms,
    longest_answer,
    nonzero,
    phrase,
    polynomial,
    polynomial_product,
    term,
)

MODULES, problem = area("polynomials")

_EVALUATE = (
    "Let f({0}) = {1}. Find f({2}).",
    "What is {1} when {0} = {2}?",
    "Calculate {1} for {0} = {2}.",
    "Evaluate {1} at {0} = {2}.",
)
_EXPAND = ("Expand {0}.", "Expand and simplify {0}.", "What is {0} expanded?")
_ADD = ("Simplify {0}.", "Work out {0}.", "What is {0}?")
_COLLECT = ("Collect the terms in {0}.", "Simplify {0}.", "Collect terms: {0}.")


@problem
def evaluate(rng: random.Random, difficulty: int) -> Problem:
    """Evaluate a polynomial of degree `difficulty` (at most 4) at a small integer.

    Coefficients are naturals to 9 at difficulty 1; from 2 they have signs and grow by 5 per step.
    """
    variable = rng.choice(VARIABLES)
    degree, negative = min(difficulty, 4), difficulty > 1
    coefficients = draw_polynomial(rng, degree, 4 + 5 * difficulty, negative=negative)
    point = nonzero(rng, 3 + difficulty) if negative else rng.randint(0, 9)
    value = 0
    for c in reversed(coefficients):
        value = value * point + c
    return phrase(rng, _EVALUATE, variable, polynomial(coefficients, variable), point), str(value)


@problem
def expand(rng: random.Random, difficulty: int) -> Problem:
    """Expand a product.

    A number times a binomial at difficulty 1, two monic binomials at 2, with leading coefficients at 3, a
    binomial times a trinomial at 4, and three binomials from 5, whose numbers grow.
    """
    variable = rng.choice(VARIABLES)
    while True:
        factors = _factors(rng, difficulty)
        product = [1]
        for factor in factors:
            product = polynomial_product(product, factor)
        answer = polynomial(product, variable)
        if len(answer) <= longest_answer(difficulty):
            break
    # A bare number or a bare power of the unknown needs no brackets as the first factor.
    texts = [polynomial(factor, variable) for factor in factors]
    texts = [text if sum(map(bool, f)) == 1 else f"({text})" for text, f in zip(texts, factors, strict=True)]
    return phrase(rng, _EXPAND, "*".join(texts)), answer


def _factors(rng: random.Random, difficulty: int) -> list[list[int]]:
    """Draw the factors, as ascending coefficients, of a product to expand."""
    if difficulty == 1:
        return [[rng.randint(2, 9)], [nonzero(rng, 9), 1 if rng.random() < 0.5 else rng.randint(2, 5)]]
    if difficulty == 2:
        return [[nonzero(rng, 9), 1], [nonzero(rng, 9), 1]]
    if difficulty == 3:
        return [[nonzero(rng, 9), nonzero(rng, 5)], [nonzero(rng, 9), nonzero(rng, 5)]]
    if difficulty == 4:
        return [[nonzero(rng, 9), nonzero(rng, 4)], [nonzero(rng, 6), rng.randint(-4, 4), nonzero(rng, 3)]]
    bound = 3 + 2 * (difficulty - 5)
    binomials = [[nonzero(rng, bound + 2), nonzero(rng, bound)] for _ in range(2)]
    return [*binomials, [nonzero(rng, 3 + bound // 2), 1]]


@problem
def add(rng: random.Random, difficulty: int) -> Problem:
    """Add or subtract two polynomials of degree about `difficulty / 2 + 1`, at most 3.

    Numbers are naturals at difficulty 1; from 3 each polynomial is multiplied by a number first.
    """
    variable = rng.choice(VARIABLES)
    degree, negative = min(1 + difficulty // 2, 3), difficulty > 1
    terms = None if degree < 3 else 3
    while True:
        left, right = (
            draw_polynomial(rng, degree, 5 + 2 * difficulty, negative=negative, terms=terms) for _ in range(2)
        )
        first, second = (rng.randint(1, difficulty), rng.randint(1, difficulty)) if difficulty > 2 else (1, 1)
        sign = rng.choice((1, -1))
        total = [first * p + sign * second * q for p, q in zip_longest(left, right, fillvalue=0)]
        answer = polynomial(total, variable)
        if len(answer) <= longest_answer(difficulty):
            break
    texts = [
        f"({polynomial(c, variable)})" if factor == 1 else f"{factor}*({polynomial(c, variable)})"
        for factor, c in ((first, left), (second, right))
    ]
    return phrase(rng, _ADD, (" + " if sign > 0 else " - ").join(texts)), answer


@problem
def collect(rng: random.Random, difficulty: int) -> Problem:
    """Collect like terms of a sum of `difficulty + 2` terms of degree at most `difficulty`, at most 3."""
    variable = rng.choice(VARIABLES)
    degree, bound = min(difficulty, 3), 7 + 3 * difficulty
    while True:
        total, texts = [0] * (degree + 1), []
        for _ in range(difficulty + 2):
            power, c = rng.randint(0, degree), nonzero(rng, bound, negative=difficulty > 1)
            total[power] += c
            texts.append(term(c, power, variable))
        answer = polynomial(total, variable)
        # At least two terms must be alike, and not all be numbers.
        if any(total[1:]) and sum(map(bool, total)) < len(texts) and len(answer) <= longest_answer(difficulty):
            return phrase(rng, _COLLECT, join_terms(texts)), answer
