"""Every answer is found again from the text of its question, by another way than the module's."""

import itertools
import re
from collections import Counter
from datetime import datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest

from balora_jax.data.mathematics import MODULES, generate

DIFFICULTIES = range(1, 7)


def integers(text):
    return [int(item) for item in re.findall(r"-?\d+", text)]


def value(text, **variables):
    """Evaluate an expression exactly."""
    return eval(re.sub(r"\d+", r"Fraction(\g<0>)", text), {"Fraction": Fraction} | variables)


def operands_to_expression(question):
    """Write `Add 3 and 4.` and the like with an operator."""
    for words, operator in ((" minus ", "-"), (" times ", "*"), (" divided by ", "/")):
        question = question.replace(words, f" {operator} ")
    words = {"Add": "+", "Multiply": "*", "Divide": "/"}
    first = question.split()[0]
    if first in words:
        question = re.sub(r" (and|by) ", f" {words[first]} ", question)
    return re.sub(r"^[A-Za-z ]*", "", question).rstrip(".?")


def arithmetic(question):
    return str(value(operands_to_expression(question)))


def add_or_sub_in_base(question):
    base = int(re.search(r"base (\d+)", question)[1])
    p, operator, q = re.search(r"([0-9a-f]+) ([-+]) ([0-9a-f]+)", question.replace("base", ""))[0].split()
    result = int(p, base) + int(operator + q, base)
    return np.base_repr(result, base).lower()


def nearest_integer_root(question):
    degree = next(k for word, k in (("square", 2), ("cube", 3), ("fourth", 4)) if word in question)
    with localcontext(prec=50):
        root = Decimal(integers(question)[0]) ** (1 / Decimal(degree))
        return str(root.quantize(Decimal(1), ROUND_HALF_UP))


def divisors(number):
    small = [k for k in range(1, int(number**0.5) + 1) if number % k == 0]
    return {*small, *(number // k for k in small)}


def gcd(question):
    p, q = integers(question)
    return str(max(divisors(p) & divisors(q)))


def lcm(question):
    p, q = integers(question)
    return str(p * q // max(divisors(p) & divisors(q)))


def is_prime(question):
    return str(len(divisors(integers(question)[0])) == 2)


def is_factor(question):
    p, q = integers(question)
    number, factor = (p, q) if "divisible by" in question else (q, p)
    return str(Fraction(number, factor).denominator == 1)


def div_remainder(question):
    number, divisor = integers(question)
    return str(number - divisor * int(Fraction(number, divisor)))


def place_value(question):
    places = ["units", "tens", "hundreds", "thousands", "ten thousands", "hundred thousands", "millions"]
    name, number = re.search(r"the (.*) digit of (\d+)", question).groups()
    return number[-1 - places.index(name)]


def round_number(question):
    number = Decimal(re.search(r"-?[\d.]*\d", question)[0])
    if found := re.search(r"(\d) decimal", question):
        return str(number.quantize(Decimal(10) ** -int(found[1]), ROUND_HALF_UP))
    sizes = {"ten": 1, "hundred": 2, "thousand": 3, "ten thousand": 4, "hundred thousand": 5, "million": 6}
    power = sizes[re.search(r"nearest ([a-z ]+)", question)[1]]
    # The nearest one of the multiples around, of which no two may be as near.
    unit = 10**power
    multiples = [int(number) // unit * unit + k * unit for k in (-1, 0, 1, 2)]
    nearest, next_nearest = sorted(multiples, key=lambda item: abs(item - number))[:2]
    assert abs(nearest - number) != abs(next_nearest - number)
    return str(nearest)


def base_conversion(question):
    number, source = re.search(r"([0-9a-f]+) \(base (\d+)\)", question).groups()
    target = int(re.search(r"(?:to|in) base (\d+)", question)[1])
    return np.base_repr(int(number, int(source)), target).lower()


def list_prime_factors(question):
    candidates = sorted(divisors(integers(question)[0]) - {1})
    return ", ".join(str(d) for d in candidates if not any(d % e == 0 for e in candidates if e < d))


def pair(question):
    texts = re.findall(r"-?\d+(?:[./]\d+)?", question)
    numbers = [Fraction(text) for text in texts]
    assert numbers[0] != numbers[1]
    big = any(word in question for word in ("bigger", "greater", "more"))
    if question.startswith("Is"):
        return str((numbers[0] - numbers[1] > 0) == big)
    return texts[numbers.index(max(numbers) if big else min(numbers))]


def sort(question):
    items = integers(question)
    descending = "descending" in question or "decreasing" in question
    orders = itertools.permutations(items) if len(items) < 5 else [sorted(items)[:: -1 if descending else 1]]
    step = -1 if descending else 1
    order = next(o for o in orders if all((b - a) * step > 0 for a, b in itertools.pairwise(o)))
    return ", ".join(map(str, order))


def kth_biggest(question):
    items, sign = integers(question), 1 if "biggest" in question else -1
    ranks = ("second", "third", "fourth", "fifth")
    rank = next((k for k, word in enumerate(ranks, start=1) if word in question), 0)
    return str(next(x for x in items if sum(sign * y > sign * x for y in items) == rank))


def closest(question):
    target = int(re.search(r"closest to (-?\d+)", question)[1])
    items = integers(question)
    items.remove(target)
    distances = Counter(abs(item - target) for item in items)
    assert distances[min(distances)] == 1
    return str(next(x for x in items if abs(x - target) == min(distances)))


def unknown_and_equations(question):
    found = re.search(r"for ([a-z])\.|(?:Find|is) ([a-z]) if", question)
    return found[1] or found[2], re.sub(r".* if |Solve | for .*|[.?]$", "", question).split(", ")


def linear_1d(question):
    variable, (equation,) = unknown_and_equations(question)
    left, right = equation.split(" = ")
    at_0, at_1 = (value(left, **{variable: x}) - value(right, **{variable: x}) for x in (0, 1))
    return str(Fraction(-at_0, at_1 - at_0))


def linear_2d(question):
    variable, equations = unknown_and_equations(question)
    (other,) = set(re.findall(r"[a-z]", "".join(equations))) - {variable}
    rows = []
    for equation in equations:
        left, right = equation.split(" = ")
        row = [value(left, **{variable: x, other: y}) for x, y in ((0, 0), (1, 0), (0, 1))]
        rows.append((row[1] - row[0], row[2] - row[0], value(right) - row[0]))
    (a, b, c), (d, e, f) = rows
    return str((c * e - b * f) / (a * e - b * d))


def sequence_next_term(question):
    terms = integers(question)
    # Lagrange's formula for the polynomial through all terms, at the next point.
    total = Fraction(0)
    for i, y in enumerate(terms):
        weight = Fraction(y)
        for j in range(len(terms)):
            if i != j:
                weight *= Fraction(len(terms) - j, i - j)
        total += weight
    return str(total)


def polynomial_roots(question):
    text = re.search("(?:Solve|with|that) (.*) = 0", question)[1]
    (variable,) = set(re.findall("[a-z]", text))
    degree = max([1, *map(int, re.findall(r"\*\*(\d)", text))])
    points = np.arange(degree + 1)
    values = [int(value(text, **{variable: int(x)})) for x in points]
    coefficients = np.linalg.solve(np.vander(points).astype(float), np.array(values, float))
    roots = np.roots(coefficients)
    assert np.abs(roots - np.round(roots.real)).max() < 0.01
    return ", ".join(str(root) for root in sorted({round(root.real) for root in roots}))


def evaluate(question):
    found = re.search(r"f\(([a-z])\) = (.*)\. Find f\((-?\d+)\)", question)
    if found:
        variable, text, point = found.groups()
    else:
        pattern = r"^(?:What is|Calculate|Evaluate) (.*) (?:when|for|at) ([a-z]) = (-?\d+)"
        text, variable, point = re.search(pattern, question).groups()
    return str(value(text, **{variable: int(point)}))


def canonical_terms(answer):
    """Check that a polynomial is in its one form: falling powers, no coefficient of 0 or 1."""
    terms = re.sub(r" ([-+]) ", r" \1", answer).split(" ")
    powers = []
    for i, term in enumerate(terms):
        found = re.fullmatch(r"([-+]?)(?:(\d+)\*)?([a-z])(?:\*\*(\d+))?|([-+]?)(\d+)", term)
        assert found, term
        sign, coefficient, letter, power, number_sign, number = found.groups()
        assert coefficient not in ("0", "1")
        assert number != "0" or len(terms) == 1
        assert power not in ("0", "1")
        assert i == 0 or sign or number_sign
        assert i > 0 or (sign or number_sign) != "+"
        powers.append(int(power or 1) if letter else 0)
    assert powers == sorted(set(powers), reverse=True)


def same_polynomial(question, answer):
    canonical_terms(answer)
    text = re.search(
        r"^(?:[A-Z][a-z]+(?: and simplify| the terms in| terms:| out| is)?) (.*?)(?: expanded)?[.?]$",
        question,
    )[1]
    (variable,) = set(re.findall("[a-z]", text))
    return all(value(text, **{variable: x}) == value(answer, **{variable: x}) for x in range(-4, 5))


def derivative(question, answer):
    canonical_terms(answer)
    text = re.search(r"(?:Differentiate|of) (.*?)(?: with respect.*)?[.?]$", question)[1]
    (variable,) = set(re.findall("[a-z]", text))
    step = Fraction(1, 10**6)
    for k in range(-6, 7):
        x = Fraction(k, 4)
        below, here, above = (value(text, **{variable: x + i * step}) for i in (-1, 0, 1))
        slope = (above - below) / (2 * step)
        if "second" in question:
            slope = (above - 2 * here + below) / step**2
        if abs(slope - value(answer, **{variable: x})) > 1e-4:
            return False
    return True


def conversion(question):
    prefixes = {
        "milli": Fraction(1, 1000),
        "centi": Fraction(1, 100),
        "kilo": Fraction(1000),
        "": Fraction(1),
    }
    sizes = {p + unit: size for p, size in prefixes.items() for unit in ("meters", "grams", "liters")}
    sizes |= {
        "tonnes": sizes["kilograms"] * 1000,
        "seconds": 1,
        "minutes": 60,
        "hours": 3600,
        "days": 24 * 3600,
    }
    sizes |= {"weeks": 7 * 24 * 3600, "months": Fraction(1, 12), "years": 1, "decades": 10, "centuries": 100}
    number = Decimal(re.search(r"[\d.]*\d", question)[0])
    units = [word for word in re.findall("[a-z]+", question) if word in sizes]
    target, source = units if question.startswith("How") else units[::-1]
    result = Fraction(number) * sizes[source] / sizes[target]
    text = f"{Decimal(result.numerator) / Decimal(result.denominator):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def time(question):
    clocks = [datetime.strptime(text, "%I:%M %p") for text in re.findall(r"\d+:\d\d [AP]M", question)]
    if len(clocks) == 2:
        return str((clocks[1] - clocks[0]).seconds // 60)
    amounts = {unit: int(number) for number, unit in re.findall(r"(\d+) (minutes|hours)", question)}
    sign = 1 if "after" in question else -1
    return f"{clocks[0] + sign * timedelta(**amounts):%I:%M %p}".removeprefix("0")


def level_set(question):
    picks = int(re.search(r"(\d) letters", question)[1])
    bag = re.search(r"from ([a-z]+)", question)[1]
    event = {letter: int(times) for times, letter in re.findall(r"(\d) ([a-z])\b", question)}
    assert sum(event.values()) == picks
    draws = Counter(tuple(sorted(draw)) for draw in itertools.combinations(bag, picks))
    wanted = tuple(sorted("".join(letter * times for letter, times in event.items())))
    return str(Fraction(draws[wanted], sum(draws.values())))


def sequence(question):
    bag = re.search(r"from ([a-z]+)", question)[1]
    wanted = re.search(r"sequence ([a-z]+)", question)[1]
    draws = list(itertools.permutations(bag, len(wanted)))
    return str(Fraction(draws.count(tuple(wanted)), len(draws)))


SOLVERS = {
    "algebra__linear_1d": linear_1d,
    "algebra__linear_2d": linear_2d,
    "algebra__polynomial_roots": polynomial_roots,
    "algebra__sequence_next_term": sequence_next_term,
    "arithmetic__add_or_sub": arithmetic,
    "arithmetic__add_or_sub_in_base": add_or_sub_in_base,
    "arithmetic__div": arithmetic,
    "arithmetic__mixed": arithmetic,
    "arithmetic__mul": arithmetic,
    "arithmetic__nearest_integer_root": nearest_integer_root,
    "comparison__closest": closest,
    "comparison__kth_biggest": kth_biggest,
    "comparison__pair": pair,
    "comparison__sort": sort,
    "measurement__conversion": conversion,
    "measurement__time": time,
    "numbers__base_conversion": base_conversion,
    "numbers__div_remainder": div_remainder,
    "numbers__gcd": gcd,
    "numbers__is_factor": is_factor,
    "numbers__is_prime": is_prime,
    "numbers__lcm": lcm,
    "numbers__list_prime_factors": list_prime_factors,
    "numbers__place_value": place_value,
    "numbers__round_number": round_number,
    "polynomials__evaluate": evaluate,
    "probability__swr_p_level_set": level_set,
    "probability__swr_p_sequence": sequence,
}
CHECKS = {
    "calculus__differentiate": derivative,
    "polynomials__add": same_polynomial,
    "polynomials__collect": same_polynomial,
    "polynomials__expand": same_polynomial,
} | {name: lambda question, answer, solver=solver: solver(question) == answer for name, solver in SOLVERS.items()}


def test_all_areas_are_there():
    assert set(CHECKS) == set(MODULES)
    assert list(MODULES) == sorted(MODULES)
    assert len({name.split("__")[0] for name in MODULES}) == 8


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_answers_are_right_and_short(module, difficulty):
    for _, question, answer in generate([module], 40, difficulty=difficulty, seed=5):
        assert CHECKS[module](question, answer), (question, answer)
        assert 8 <= len(question) <= 120
        assert 1 <= len(answer) <= 30
        assert (question + answer).isascii()
        assert (question + answer).isprintable()


@pytest.mark.parametrize("module", MODULES)
def test_checks_reject_another_answer(module):
    examples = generate([module], 30, difficulty=2, seed=6)
    answers = sorted({example.answer for example in examples})
    for example in examples:
        wrong = answers[(answers.index(example.answer) + 1) % len(answers)]
        # A polynomial in another letter cannot even be evaluated with the question's.
        try:
            assert not CHECKS[module](example.question, wrong), (example.question, wrong)
        except NameError:
            assert module.split("__")[0] in ("polynomials", "calculus")
