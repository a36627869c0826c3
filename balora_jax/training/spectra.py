"""What the pairs of a run are like: their spectra, and how well they are conditioned."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from balora_jax.adapters.diagnosis import Diagnosis, diagnose
from balora_jax.pairs import find_pairs, read_pairs
from balora_jax.trees import path_text


def diagnoses(adapters: Any, scale: float = 1.0) -> Iterator[tuple[str, Diagnosis]]:
    """Yields every pair of one member in numbers, but for those that are not finite.

    Args:
        adapters: its adapters, on the host.
        scale: by which the products are multiplied.

    Yields:
        The layer that a pair adapts, with `[i]` behind it in a stack, and the diagnosis.

    Notes:
        In O((a + b) r^2) for each pair.
    """
    pairs = find_pairs(adapters)
    for pair, factors in zip(pairs, read_pairs(adapters, pairs), strict=True):
        name = path_text(pair.path_a).rpartition("/")[0]
        for index, (lora_a, lora_b) in enumerate(zip(*map(np.asarray, factors), strict=True)):
            if np.isfinite(lora_a).all() and np.isfinite(lora_b).all():
                yield name if len(factors[0]) == 1 else f"{name}[{index}]", diagnose(lora_a, lora_b, scale)


def conditions(adapters: Any) -> dict[str, float]:
    """Returns medians over the pairs of one member: `condition`, and `least_condition` of the same products.

    Args:
        adapters: its adapters, on the host.

    Returns:
        Nothing if no pair is finite.
    """
    found = [(one.condition_number, one.least_condition_number) for _, one in diagnoses(adapters)]
    if not found:
        return {}
    return dict(zip(("condition", "least_condition"), np.median(found, axis=0).tolist(), strict=True))


def of_members(adapters: Any) -> list[Any]:
    """Returns the adapters of each member of a population, which are on the host."""
    return [jax.tree.map(lambda x, i=i: x[i], adapters) for i in range(len(jax.tree.leaves(adapters)[0]))]
