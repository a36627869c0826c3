"""Measurement: units of length, mass, volume and time, and the clock."""

import random
from fractions import Fraction

from balora_jax.data.mathematics.problems import Problem, area, decimal, phrase

MODULES, problem = area("measurement")

# Each kind of quantity: units from small to big, with their size in the smallest.
_KINDS = (
    (("millimeters", 1), ("centimeters", 10), ("meters", 1000), ("kilometers", 10**6)),
    (("milligrams", 1), ("grams", 1000), ("kilograms", 10**6), ("tonnes", 10**9)),
    (("milliliters", 1), ("centiliters", 10), ("liters", 1000)),
    (("seconds", 1), ("minutes", 60), ("hours", 3600), ("days", 86400), ("weeks", 604800)),
    (("months", 1), ("years", 12), ("decades", 120), ("centuries", 1200)),
)
_CONVERT = ("How many {2} are there in {0} {1}?", "Convert {0} {1} to {2}.", "What is {0} {1} in {2}?")
_BETWEEN = ("How many minutes are between {0} and {1}?", "How many minutes are there from {0} to {1}?")
_SHIFT = ("What is {0} {1} {2}?", "What time is it {0} {1} {2}?")
_DAY = 24 * 60


@problem
def conversion(rng: random.Random, difficulty: int) -> Problem:
    """Convert a quantity of `difficulty` digits between units.

    Difficulty 1 goes to the next smaller unit, from 2 either way, and from 3 over one unit too, with decimals
    in one question of two.
    """
    units = rng.choice(_KINDS)
    distance = rng.randint(1, 2) if difficulty > 2 else 1
    small = rng.randrange(len(units) - distance)
    (small_name, small_size), (big_name, big_size) = units[small], units[small + distance]
    factor = big_size // small_size
    value = Fraction(1)
    # Names of units are in the plural: a quantity of 1 never comes.
    while 1 in (value, value * factor):
        value = Fraction(rng.randint(2, 20 if difficulty == 1 else 10**difficulty))
        if difficulty > 2 and rng.random() < 0.5:
            value /= 10 ** rng.randint(1, 2)
    if difficulty > 1 and rng.random() < 0.5:
        question = phrase(rng, _CONVERT, decimal(value * factor), small_name, big_name)
        return question, decimal(value)
    return phrase(rng, _CONVERT, decimal(value), big_name, small_name), decimal(value * factor)


def _clock(minutes: int) -> str:
    """Write minutes since midnight on the 12-hour clock."""
    hours, minute = divmod(minutes % _DAY, 60)
    return f"{(hours - 1) % 12 + 1}:{minute:02d} {'AM' if hours < 12 else 'PM'}"


@problem
def time(rng: random.Random, difficulty: int) -> Problem:
    """Read the clock: minutes between two times, or the time some minutes or hours before or after another.

    Difficulty 1 keeps to five-minute marks and spans of up to an hour, 2 to spans of two hours; 3 reaches
    12 hours and 4 a day, and spans of hours and minutes come from 3. Beyond, spans grow by a day per step.
    """
    longest = (60, 120, 720, _DAY - 1)[difficulty - 1] if difficulty < 5 else (difficulty - 3) * _DAY
    step = 5 if difficulty == 1 else 1
    start = rng.randrange(0, _DAY, step)
    span = rng.randrange(max(step, 2), longest + 1, step)
    kind = rng.randrange(3)
    if kind == 0:
        span = span % _DAY or step
        return phrase(rng, _BETWEEN, _clock(start), _clock(start + span)), str(span)
    direction, sign = ("after", 1) if kind == 1 else ("before", -1)
    text = f"{span} minutes"
    if difficulty > 2 and span >= 120 and span % 60 > 1 and rng.random() < 0.5:
        text = f"{span // 60} hours and {span % 60} minutes"
    return phrase(rng, _SHIFT, text, direction, _clock(start)), _clock(start + sign * span)
