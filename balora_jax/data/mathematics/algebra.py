"""Algebra: linear equations, sequences, roots of polynomials."""

import random

from balora_jax.data.mathematics.problems import (
    VARIABLES,
    Problem,
    area,
    join_terms,
    nonzero,
    phrase,
    polynomial,
    polynomial_product,
    term,
)

MODULES, problem = area("algebra")

_SOLVE = ("Solve {1} for {0}.", "Find {0} if {1}.", "What is {0} if {1}?")
_NEXT = ("What is the next term in {0}?", "What comes next: {0}?", "Find the next term of {0}.")
_ROOTS = ("Solve {1} = 0 for {0}.", "Find all {0} with {1} = 0.", "Find {0} such that {1} = 0.")


@problem
def linear_1d(rng: random.Random, difficulty: int) -> Problem:
    """Solve a linear equation with an integer solution.

    Difficulty 1 takes one step (`x + 3 = 7`, `3*x = 12`), 2 takes two, from 3 on the unknown stands on both
    sides; coefficients grow with the difficulty.
    """
    variable = rng.choice(VARIABLES)
    if difficulty == 1:
        solution, number = rng.randint(0, 10), rng.randint(1, 10)
        kind = rng.randrange(3)
        if kind == 0:
            return _equation(rng, variable, [number, 1], [solution + number], solution)
        if kind == 1:
            return _equation(rng, variable, [-number, 1], [solution - number], solution)
        return _equation(rng, variable, [0, number + 1], [(number + 1) * solution], solution)
    bound = 3**difficulty + 1
    solution = rng.randint(-bound, bound)
    slope, offset = nonzero(rng, bound), rng.randint(-3 * bound, 3 * bound)
    if difficulty == 2:
        return _equation(rng, variable, [offset, slope], [slope * solution + offset], solution)
    other = nonzero(rng, bound)
    while other == slope:
        other = nonzero(rng, bound)
    left, right = [offset, slope], [(slope - other) * solution + offset, other]
    return _equation(rng, variable, left, right, solution)


def _equation(rng: random.Random, variable: str, left: list[int], right: list[int], solution: int) -> Problem:
    """Write the equation of two polynomials, either side first."""
    sides = [polynomial(left, variable), polynomial(right, variable)]
    if rng.random() < 0.25:
        sides.reverse()
    return phrase(rng, _SOLVE, variable, " = ".join(sides)), str(solution)


@problem
def linear_2d(rng: random.Random, difficulty: int) -> Problem:
    """Solve two linear equations for one of the unknowns.

    Coefficients are up to `difficulty + 1`, and can be zero at difficulty 1; solutions are up to
    5 `difficulty`, with signs from difficulty 2.
    """
    first, second = sorted(rng.sample(VARIABLES, 2))
    bound = difficulty + 1
    while True:
        p, q, r, s = (rng.randint(-bound, bound) for _ in range(4))
        if p * s != q * r and (difficulty == 1 or p * q * r * s):
            break
    low = 0 if difficulty == 1 else -5 * difficulty
    x, y = rng.randint(low, 5 * difficulty), rng.randint(low, 5 * difficulty)
    equations = [
        join_terms([term(c, 1, name) for c, name in ((a, first), (b, second)) if c]) + f" = {a * x + b * y}"
        for a, b in ((p, q), (r, s))
    ]
    variable, solution = (first, x) if rng.random() < 0.5 else (second, y)
    return phrase(rng, _SOLVE, variable, ", ".join(equations)), str(solution)


@problem
def sequence_next_term(rng: random.Random, difficulty: int) -> Problem:
    """Continue a sequence: the values of the polynomial of lowest degree through the given terms.

    The degree is 1 at difficulties 1 and 2, 2 at 3 and 4, and 3 above. Numbers grow; from 2 they have signs.
    """
    degree = min((difficulty + 1) // 2, 3)
    if difficulty == 1:
        differences = [rng.randint(0, 20), rng.randint(1, 10)]
    else:
        bound = 10 * (difficulty + 1) ** 2
        differences = [rng.randint(-bound, bound)]
        differences += [nonzero(rng, max(2, bound // 4**k)) for k in range(1, degree + 1)]
    terms = []
    for _ in range(degree + 4):
        terms.append(differences[0])
        for k in range(degree):
            differences[k] += differences[k + 1]
    return phrase(rng, _NEXT, ", ".join(map(str, terms[:-1]))), str(terms[-1])


@problem
def polynomial_roots(rng: random.Random, difficulty: int) -> Problem:
    """Find the integer roots of a polynomial; each is written once, ascending.

    Monic quadratics with roots to 5 at difficulty 1 and to 10 at 2, with a leading coefficient from 3; cubics
    at 4 and 5, quartics from 6.
    """
    variable = rng.choice(VARIABLES)
    degree = 2 if difficulty < 4 else 3 if difficulty < 6 else 4
    bound = (5, 10, 12, 6, 9, 6)[min(difficulty, 6) - 1]
    roots = [rng.randint(-bound, bound) for _ in range(degree)]
    coefficients = [nonzero(rng, 5) if difficulty in (3, 5) else 1]
    for root in roots:
        coefficients = polynomial_product(coefficients, [-root, 1])
    answer = ", ".join(map(str, sorted(set(roots))))
    return phrase(rng, _ROOTS, variable, polynomial(coefficients, variable)), answer
