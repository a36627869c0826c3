"""What all areas share: the table of modules of one area, phrasings, and numbers and polynomials as text."""

import functools
import random
from collections.abc import Callable, Sequence
from fractions import Fraction

Problem = tuple[str, str]
"""A question and its one correct answer."""

ProblemFunction = Callable[[random.Random, int], Problem]
"""Draws a problem of a given difficulty."""

VARIABLES = "bcdghjklmnpqrstuvwxyz"
"""Letters that name unknowns: `a` is an article, and `e`, `f`, `i`, `o` read as something else."""

MAX_DIFFICULTY = 8
"""Beyond, factors and short answers would take too long to find."""


def area(name: str) -> tuple[dict[str, ProblemFunction], Callable[[ProblemFunction], ProblemFunction]]:
    """Start the table of modules of one area.

    Args:
        name: The area, the part of a module's name before the two underscores.

    Returns:
        The empty table, and a decorator that enters a problem function as `name__function` and makes it
        reject a difficulty out of range.
    """
    table: dict[str, ProblemFunction] = {}

    def problem(function: ProblemFunction) -> ProblemFunction:
        @functools.wraps(function)
        def checked(rng: random.Random, difficulty: int) -> Problem:
            return function(rng, check_difficulty(difficulty))

        table[f"{name}__{function.__name__}"] = checked
        return checked

    return table, problem


def check_difficulty(difficulty: int) -> int:
    """Return a difficulty that is an integer from 1 to `MAX_DIFFICULTY`, or raise.

    Raises:
        ValueError: If `difficulty` is anything else.
    """
    if not isinstance(difficulty, int) or isinstance(difficulty, bool) or not 1 <= difficulty <= MAX_DIFFICULTY:
        raise ValueError(f"`difficulty` must be an integer from 1 to {MAX_DIFFICULTY}, got {difficulty!r}")
    return difficulty


def longest_answer(difficulty: int) -> int:
    """Characters of the longest answer, above which modules draw again: 30, and more above difficulty 6."""
    return 30 + 10 * max(0, difficulty - 6)


def phrase(rng: random.Random, phrasings: Sequence[str], *fields: object) -> str:
    """Fill one of the phrasings of a question.

    A module calls it after all its other draws, so that the problem does not depend on the phrasing.
    """
    return rng.choice(phrasings).format(*fields)


def natural(rng: random.Random, digits: int) -> int:
    """Draw a number from 0 with at most `digits` decimal digits, seldom with fewer."""
    return rng.randrange(10**digits)


def signed(rng: random.Random, digits: int, *, negative: bool = True) -> int:
    """Draw a number with at most `digits` digits, below zero half of the time where `negative`."""
    value = natural(rng, digits)
    return -value if negative and rng.random() < 0.5 else value


def nonzero(rng: random.Random, bound: int, *, negative: bool = True) -> int:
    """Draw a number other than zero from `[-bound, bound]`, or from `[1, bound]` if not `negative`."""
    value = rng.randint(1, bound)
    return -value if negative and rng.random() < 0.5 else value


def distinct(rng: random.Random, count: int, low: int, high: int) -> list[int]:
    """Draw `count` different integers of `[low, high]` in random order."""
    return rng.sample(range(low, high + 1), count)


def in_base(value: int, base: int) -> str:
    """Write an integer in a base up to 16, with the digits `0-9a-f`."""
    if value == 0:
        return "0"
    digits, rest = [], abs(value)
    while rest:
        rest, digit = divmod(rest, base)
        digits.append("0123456789abcdef"[digit])
    return ("-" if value < 0 else "") + "".join(reversed(digits))


def decimal(value: Fraction) -> str:
    """Write a fraction that ends in decimals exactly, without zeros at the end."""
    places = 0
    while (value * 10**places).denominator != 1:
        places += 1
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    whole, part = (digits[:-places], "." + digits[-places:]) if places else (digits, "")
    return ("-" if value < 0 else "") + whole + part


def term(coefficient: int, power: int, variable: str) -> str:
    """Write one term of a polynomial: `4`, `x`, `-x`, `3*x`, `-x**2`."""
    if power == 0:
        return str(coefficient)
    symbol = variable if power == 1 else f"{variable}**{power}"
    if coefficient == 1:
        return symbol
    return f"-{symbol}" if coefficient == -1 else f"{coefficient}*{symbol}"


def join_terms(terms: Sequence[str]) -> str:
    """Write terms as a sum, with the sign of each between spaces: `3*x - 4`."""
    text = terms[0]
    for item in terms[1:]:
        text += f" - {item[1:]}" if item[0] == "-" else f" + {item}"
    return text


def polynomial(coefficients: Sequence[int], variable: str) -> str:
    """Write a polynomial in descending powers.

    Args:
        coefficients: Coefficients in ascending powers, the constant first.
        variable: The letter of the unknown.

    Returns:
        Text like `3*x**2 - x + 4`, or `0`.
    """
    terms = [term(c, power, variable) for power, c in enumerate(coefficients) if c]
    return join_terms(terms[::-1]) if terms else "0"


def polynomial_product(left: Sequence[int], right: Sequence[int]) -> list[int]:
    """Multiply polynomials given by ascending coefficients."""
    product = [0] * (len(left) + len(right) - 1)
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            product[i + j] += a * b
    return product


def draw_polynomial(
    rng: random.Random, degree: int, bound: int, *, negative: bool = True, terms: int | None = None
) -> list[int]:
    """Draw ascending coefficients of a polynomial of exactly this degree, with at most `terms` terms."""
    coefficients = [0] * degree + [nonzero(rng, bound, negative=negative)]
    others = degree if terms is None else min(degree, terms - 1)
    for power in rng.sample(range(degree), others):
        coefficients[power] = nonzero(rng, bound, negative=negative)
    return coefficients
