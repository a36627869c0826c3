"""The power of paired tests, against simulated ones."""

import numpy as np
import pytest
from scipy import stats

from balora_jax.training.power import POWER, power, seeds_needed, smallest_difference


@pytest.mark.parametrize(("difference", "deviation", "seeds"), [(0.5, 1.0, 5), (-0.03, 0.02, 4), (0.2, 1.0, 60)])
def test_power_is_that_of_simulated_tests(difference, deviation, seeds):
    drawn = np.random.default_rng(0).normal(difference, deviation, (20_000, seeds))
    found = (stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.05).mean()
    assert power(difference, deviation, seeds) == pytest.approx(found, abs=0.01)


@pytest.mark.parametrize("seeds", [2, 5, 27])
def test_the_smallest_difference_is_seen_with_the_power_asked_for(seeds):
    assert power(smallest_difference(0.3, seeds), 0.3, seeds) == pytest.approx(POWER)


def test_seeds_needed_are_the_fewest():
    for difference in (0.3, 0.05, 2.0):
        needed = seeds_needed(difference, 0.2)
        assert power(difference, 0.2, needed) >= POWER
        assert needed == 2 or power(difference, 0.2, needed - 1) < POWER
    assert seeds_needed(1e-9, 1.0) is None
