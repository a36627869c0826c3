"""Calculus: derivatives of polynomials."""

import random

from balora_jax.data.mathematics.problems import (
    VARIABLES,
    Problem,
    area,
    draw_polynomial,
    longest_answer,
    phrase,
    polynomial,
)

MODULES, problem = area("calculus")

_FIRST = (
    "Differentiate {1} with respect to {0}.",
    "What is the derivative of {1} with respect to {0}?",
    "Find the derivative of {1}.",
    "Differentiate {1}.",
)
_SECOND = (
    "What is the second derivative of {1} with respect to {0}?",
    "Find the second derivative of {1}.",
    "Give the second derivative of {1}.",
)


@problem
def differentiate(rng: random.Random, difficulty: int) -> Problem:
    """Differentiate a polynomial of degree at most `difficulty + 2` and at most `difficulty + 1` terms (5).

    Coefficients are naturals at difficulty 1 and have signs from 2; second derivatives come too from 4.
    """
    variable = rng.choice(VARIABLES)
    order = 2 if difficulty > 3 and rng.random() < 0.5 else 1
    while True:
        degree = rng.randint(max(order, min(difficulty - 1, 5)), difficulty + 2)
        terms = rng.randint(max(1, min(difficulty - 1, 3)), min(difficulty + 1, 5))
        coefficients = draw_polynomial(rng, degree, 5 + 4 * difficulty, negative=difficulty > 1, terms=terms)
        derivative = coefficients
        for _ in range(order):
            derivative = [power * c for power, c in enumerate(derivative)][1:]
        answer = polynomial(derivative, variable)
        if len(answer) <= longest_answer(difficulty):
            break
    return phrase(rng, _FIRST if order == 1 else _SECOND, variable, polynomial(coefficients, variable)), answer
