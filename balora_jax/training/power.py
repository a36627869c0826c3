"""What a number of seeds can show: the power of the paired t-test, by the noncentral t distribution."""

import math

import numpy as np
from scipy import optimize, stats

LEVEL, POWER = 0.05, 0.8
"""The two-sided level of a test, and the probability with which a difference is to be seen."""

MOST_SEEDS = 10**6


def power(difference: float, deviation: float, seeds: int) -> float:
    """Returns the probability that the paired t-test sees a difference.

    Args:
        difference: the mean of the paired differences.
        deviation: their standard deviation, positive.
        seeds: number of pairs, at least 2.

    Source: J. Cohen, Statistical Power Analysis for the Behavioral Sciences, 1988, chapter 2.
    """
    shift, limit = abs(difference) * math.sqrt(seeds) / deviation, stats.t.isf(LEVEL / 2, seeds - 1)
    other_side = np.nan_to_num(stats.nct.cdf(-limit, seeds - 1, shift))  # which underflows to nan
    return float(stats.nct.sf(limit, seeds - 1, shift) + other_side)


def smallest_difference(deviation: float, seeds: int) -> float:
    """Returns the difference that a number of seeds shows with probability `POWER`.

    Args:
        deviation: the standard deviation of the paired differences, positive.
        seeds: number of pairs, at least 2.
    """
    return float(optimize.brentq(lambda size: power(size, 1.0, seeds) - POWER, 0.0, 100.0)) * deviation


def seeds_needed(difference: float, deviation: float) -> int | None:
    """Returns how many seeds show a difference with probability `POWER`; None for more than a million.

    Args:
        difference: the mean of the paired differences, not zero.
        deviation: their standard deviation, positive.
    """
    low, high = 1, 2
    while power(difference, deviation, high) < POWER:
        low, high = high, 2 * high
        if high > MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(difference, deviation, middle) >= POWER else (middle, high)
    return high
