"""Numbers: divisors, primes, remainders, digits, rounding and bases."""

import functools
import math
import random
from fractions import Fraction

from balora_jax.data.mathematics.problems import Problem, area, decimal, in_base, phrase

MODULES, problem = area("numbers")

_GCD = (
    "What is the greatest common divisor of {0} and {1}?",
    "Calculate the highest common factor of {0} and {1}.",
    "Find the greatest common factor of {0} and {1}.",
    "What is gcd({0}, {1})?",
)
_LCM = (
    "What is the least common multiple of {0} and {1}?",
    "Calculate the lowest common multiple of {0} and {1}.",
    "Find the smallest common multiple of {0} and {1}.",
    "What is lcm({0}, {1})?",
)
_PRIME = ("Is {0} prime?", "Is {0} a prime number?", "Is it true that {0} is prime?")
_FACTOR = ("Is {0} a factor of {1}?", "Does {0} divide {1}?", "Is {1} divisible by {0}?")
_REMAINDER = (
    "What is the remainder when {0} is divided by {1}?",
    "Find the remainder of {0} divided by {1}.",
    "What is {0} mod {1}?",
)
_PLACE = ("What is the {0} digit of {1}?", "Give the {0} digit of {1}.", "Find the {0} digit of {1}.")
_PLACES = (
    "units",
    "tens",
    "hundreds",
    "thousands",
    "ten thousands",
    "hundred thousands",
    "millions",
)
_ROUND = ("Round {0} to {1}.", "What is {0} rounded to {1}?", "Write {0} rounded to {1}.")
_CONVERT = (
    "What is {0} (base {1}) in base {2}?",
    "Convert {0} (base {1}) to base {2}.",
    "Write {0} (base {1}) in base {2}.",
)
_PRIME_FACTORS = (
    "List the prime factors of {0}.",
    "What are the prime factors of {0}?",
    "Find the prime factors of {0}.",
)


@functools.cache
def _primes() -> tuple[int, ...]:
    """Primes below 10,000, enough to factor numbers below 10^8."""
    sieve = bytearray([1]) * 10_000
    sieve[:2] = b"\0\0"
    for i in range(2, 100):
        if sieve[i]:
            sieve[i * i :: i] = bytes(len(range(i * i, 10_000, i)))
    return tuple(i for i, prime in enumerate(sieve) if prime)


def prime_factors(number: int) -> list[int]:
    """Distinct prime factors in ascending order of an integer of at least 1."""
    factors, rest = [], number
    for p in _primes():
        if p * p > rest:
            break
        if rest % p == 0:
            factors.append(p)
            while rest % p == 0:
                rest //= p
    else:
        p = _primes()[-1] + 2
        while p * p <= rest:
            if rest % p == 0:
                factors.append(p)
                while rest % p == 0:
                    rest //= p
            p += 2
    return [*factors, rest] if rest > 1 else factors


def _with_common_factor(rng: random.Random, bound: int) -> tuple[int, int]:
    """Two numbers from 1 to `bound` with a common factor that is often above 1."""
    common = rng.randint(1, math.isqrt(bound))
    return common * rng.randint(1, bound // common), common * rng.randint(1, bound // common)


@problem
def gcd(rng: random.Random, difficulty: int) -> Problem:
    """Find the greatest common divisor of numbers up to 5 * 10^`difficulty`."""
    p, q = _with_common_factor(rng, 5 * 10**difficulty)
    return phrase(rng, _GCD, p, q), str(math.gcd(p, q))


@problem
def lcm(rng: random.Random, difficulty: int) -> Problem:
    """Find the least common multiple of numbers up to 2 * 10^`difficulty`."""
    p, q = _with_common_factor(rng, 2 * 10**difficulty)
    return phrase(rng, _LCM, p, q), str(math.lcm(p, q))


@problem
def is_prime(rng: random.Random, difficulty: int) -> Problem:
    """Recognize primes among numbers up to 2 * 10^(`difficulty` + 1); half of the numbers are prime."""
    bound, wanted = 2 * 10 ** (difficulty + 1), rng.random() < 0.5
    while True:
        # Numbers above 5 that are even or end in 5 are recognized at sight: they are drawn less often.
        number = rng.randint(2, bound)
        if number > 5 and (number % 2 == 0 or number % 5 == 0) and rng.random() < 0.7:
            continue
        if (prime_factors(number) == [number]) == wanted:
            return phrase(rng, _PRIME, number), str(wanted)


@problem
def is_factor(rng: random.Random, difficulty: int) -> Problem:
    """Recognize factors of numbers up to 10^(`difficulty` + 1); half of the answers are True."""
    bound = 10 ** (difficulty + 1)
    factor = rng.randint(2, 12 if difficulty == 1 else 10 ** (difficulty // 2) * 12)
    number = factor * rng.randint(1, bound // factor)
    if rng.random() < 0.5:
        number += rng.randrange(1, factor)
    return phrase(rng, _FACTOR, factor, number), str(number % factor == 0)


@problem
def div_remainder(rng: random.Random, difficulty: int) -> Problem:
    """Find the remainder of a number of `difficulty + 1` digits divided by one of half as many digits."""
    divisor = rng.randint(2, 10 if difficulty == 1 else 10 ** (difficulty // 2 + 1) // 2)
    number = rng.randint(divisor, 10 ** (difficulty + 1) - 1)
    return phrase(rng, _REMAINDER, number, divisor), str(number % divisor)


@problem
def place_value(rng: random.Random, difficulty: int) -> Problem:
    """Read a digit of a number of at most `difficulty + 1` digits, and at most 7."""
    digits = min(difficulty, 6) + 1
    number = rng.randint(10, 10**digits - 1)
    place = rng.randrange(len(str(number)))
    return phrase(rng, _PLACE, _PLACES[place], number), str(number // 10**place % 10)


@problem
def round_number(rng: random.Random, difficulty: int) -> Problem:
    """Round a number of about `difficulty + 1` digits, to one or two decimal places too from difficulty 3.

    A number halfway between two answers never comes, nor an answer whose last decimal is zero; signs come
    from difficulty 3.
    """
    if difficulty > 2 and rng.random() < 0.5:
        return _round_decimal(rng, difficulty)
    names = ("ten", "hundred", "thousand", "ten thousand", "hundred thousand", "million")
    power = rng.randint(1, min(difficulty + 1, len(names)))
    unit = 10**power
    number = rng.randint(unit // 10, 10 ** max(power + 1, difficulty + 1) - 1)
    if number % unit == unit // 2:
        number += 1
    if difficulty > 2 and rng.random() < 0.5:
        number = -number
    answer = (number + unit // 2) // unit * unit
    return phrase(rng, _ROUND, number, f"the nearest {names[power - 1]}"), str(answer)


def _round_decimal(rng: random.Random, difficulty: int) -> Problem:
    """Round a number with two to `difficulty` decimals."""
    places = rng.randint(1, 2)
    more = rng.randint(1, max(1, difficulty - 2))
    while True:
        scaled = rng.randint(1, 10 ** (places + more + 1) - 1)
        rest = scaled % 10**more
        answer = (scaled + 10**more // 2) // 10**more
        if scaled % 10 and rest != 5 * 10 ** (more - 1) and answer % 10:
            break
    if rng.random() < 0.5:
        scaled, answer = -scaled, -answer
    number = decimal(Fraction(scaled, 10 ** (places + more)))
    target = "1 decimal place" if places == 1 else "2 decimal places"
    return phrase(rng, _ROUND, number, target), decimal(Fraction(answer, 10**places))


@problem
def base_conversion(rng: random.Random, difficulty: int) -> Problem:
    """Convert numbers up to 6 * 10^`difficulty` between base 10 and bases to 9, or any two to 16 from 3."""
    number = rng.randint(1, 6 * 10**difficulty)
    if difficulty < 3:
        bases = [10, rng.randint(2, 9)]
        rng.shuffle(bases)
    else:
        bases = rng.sample(range(2, 17), 2)
    source, target = bases
    return phrase(rng, _CONVERT, in_base(number, source), source, target), in_base(number, target)


@problem
def list_prime_factors(rng: random.Random, difficulty: int) -> Problem:
    """List the distinct prime factors, ascending, of a number up to 2 * 10^(`difficulty` + 1)."""
    number = rng.randint(2, 2 * 10 ** (difficulty + 1))
    return phrase(rng, _PRIME_FACTORS, number), ", ".join(map(str, prime_factors(number)))
