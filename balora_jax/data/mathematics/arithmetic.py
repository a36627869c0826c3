"""Arithmetic: sums, products, quotients, mixed expressions, other bases, roots."""

import random
from fractions import Fraction

from balora_jax.data.mathematics.problems import Problem, area, in_base, phrase, signed

MODULES, problem = area("arithmetic")

_ADD = ("What is {0} + {1}?", "Calculate {0} + {1}.", "Work out {0} + {1}.", "Add {0} and {1}.")
_SUBTRACT = ("What is {0} - {1}?", "Calculate {0} - {1}.", "Work out {0} - {1}.", "What is {0} minus {1}?")
_MULTIPLY = ("What is {0} * {1}?", "Calculate {0}*{1}.", "Multiply {0} and {1}.", "What is {0} times {1}?")
_DIVIDE = ("Divide {0} by {1}.", "What is {0} divided by {1}?", "Calculate {0}/{1}.")
_EXPRESSION = ("What is {0}?", "Calculate {0}.", "Evaluate {0}.", "What is the value of {0}?")
_BASE = ("In base {0}, what is {1}?", "Calculate {1} in base {0}.", "Work out {1} in base {0}.")
_ROOT = (
    "What is the {0} root of {1} to the nearest integer?",
    "Find the {0} root of {1} to the nearest integer.",
    "Nearest integer to the {0} root of {1}?",
)
_ROOT_NAMES = {2: "square", 3: "cube", 4: "fourth"}


@problem
def add_or_sub(rng: random.Random, difficulty: int) -> Problem:
    """Add or subtract two integers of `difficulty` digits, below zero too from difficulty 3."""
    p, q = (signed(rng, difficulty, negative=difficulty > 2) for _ in range(2))
    if rng.random() < 0.5:
        return phrase(rng, _ADD, p, q), str(p + q)
    return phrase(rng, _SUBTRACT, p, q), str(p - q)


@problem
def mul(rng: random.Random, difficulty: int) -> Problem:
    """Multiply: tables up to 12 at difficulty 1, then `difficulty` digits by half as many, signed from 3."""
    if difficulty == 1:
        p, q = rng.randint(0, 12), rng.randint(0, 12)
    else:
        negative = difficulty > 2
        p = signed(rng, difficulty, negative=negative)
        q = signed(rng, (difficulty + 1) // 2, negative=negative)
        if rng.random() < 0.5:
            p, q = q, p
    return phrase(rng, _MULTIPLY, p, q), str(p * q)


@problem
def div(rng: random.Random, difficulty: int) -> Problem:
    """Divide: tables up to 12 at difficulty 1, then dividends of about `difficulty + 1` digits.

    From difficulty 2 one answer in three is a reduced fraction; signs come from difficulty 3.
    """
    if difficulty == 1:
        divisor, quotient = rng.randint(1, 12), rng.randint(0, 12)
        return phrase(rng, _DIVIDE, divisor * quotient, divisor), str(quotient)
    negative = difficulty > 2
    divisor = rng.randint(2, 9 if difficulty == 2 else 10 ** ((difficulty + 1) // 2))
    if negative and rng.random() < 0.5:
        divisor = -divisor
    if rng.random() < 1 / 3:
        dividend = signed(rng, difficulty, negative=negative)
    else:
        dividend = divisor * signed(rng, difficulty - difficulty // 3, negative=negative)
    return phrase(rng, _DIVIDE, dividend, divisor), str(Fraction(dividend, divisor))


@problem
def mixed(rng: random.Random, difficulty: int) -> Problem:
    """Evaluate an expression of `difficulty + 1` operations on one-digit numbers.

    Difficulty 1 adds, subtracts and multiplies; 2 also divides without a remainder; from 3 on answers can
    be fractions.
    """
    operators = "++--**" if difficulty == 1 else "++--**/"
    while True:
        drawn = _expression(rng, difficulty + 1, operators)
        if drawn is None:
            continue
        text, value, _ = drawn
        if difficulty < 3 and value.denominator != 1:
            continue
        if abs(value.numerator) < 10**4 and value.denominator < 100:
            return phrase(rng, _EXPRESSION, text), str(value)


def _expression(rng: random.Random, operations: int, operators: str) -> tuple[str, Fraction, int] | None:
    """Draw text, value and precedence of an expression; None where it would divide by zero."""
    if operations == 0:
        value = rng.randint(1, 9)
        return str(value), Fraction(value), 3
    left_operations = rng.randrange(operations)
    left = _expression(rng, left_operations, operators)
    right = _expression(rng, operations - 1 - left_operations, operators)
    if left is None or right is None:
        return None
    operator = rng.choice(operators)
    precedence = 1 if operator in "+-" else 2
    (left_text, left_value, left_precedence), (right_text, right_value, right_precedence) = left, right
    if left_precedence < precedence:
        left_text = f"({left_text})"
    if right_precedence < precedence or (right_precedence == precedence and operator != "+"):
        right_text = f"({right_text})"
    if operator == "+":
        return f"{left_text} + {right_text}", left_value + right_value, precedence
    if operator == "-":
        return f"{left_text} - {right_text}", left_value - right_value, precedence
    if operator == "*":
        return f"{left_text}*{right_text}", left_value * right_value, precedence
    if right_value == 0:
        return None
    return f"{left_text}/{right_text}", left_value / right_value, precedence


@problem
def add_or_sub_in_base(rng: random.Random, difficulty: int) -> Problem:
    """Add or subtract numbers of `difficulty + 1` digits in a base to 4 + 2 `difficulty`, at most 16."""
    base = rng.randint(2, min(16, 4 + 2 * difficulty))
    p, q = (rng.randrange(base ** (difficulty + 1)) for _ in range(2))
    operator, value = ("+", p + q) if rng.random() < 0.5 else ("-", p - q)
    return phrase(rng, _BASE, base, f"{in_base(p, base)} {operator} {in_base(q, base)}"), in_base(value, base)


@problem
def nearest_integer_root(rng: random.Random, difficulty: int) -> Problem:
    """Round a root of a number up to 10^(`difficulty + 1`), and up to 250 at difficulty 1.

    Square roots at difficulty 1, cube roots too from 2, fourth roots too from 4.
    """
    degree = rng.choice((2, 2, 2, 3, 3, 4)[: 3 if difficulty == 1 else 5 if difficulty < 4 else 6])
    number = rng.randint(1, 250 if difficulty == 1 else 10 ** (difficulty + 1))
    root = round(number ** (1 / degree))
    # Compare (2 root - 1)^k <= 2^k number < (2 root + 1)^k in integers: a halfway root is never an integer.
    while (2 * root + 1) ** degree <= 2**degree * number:
        root += 1
    while root and (2 * root - 1) ** degree > 2**degree * number:
        root -= 1
    return phrase(rng, _ROOT, _ROOT_NAMES[degree], number), str(root)
