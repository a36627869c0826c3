"""Singular values of the pairs of a run, and how well conditioned each pair is."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from balora_jax.pairs import find_pairs, read_pairs
from balora_jax.trees import path_text


class Spectrum(NamedTuple):
    """Singular values of one pair, each `(r,)`, descending, in float64.

    Attributes:
        name: the layer that it adapts; with `[i]` behind it in a stack.
        lora_a: those of A.
        lora_b: those of B.
        product: those of `A B`.
    """

    name: str
    lora_a: np.ndarray
    lora_b: np.ndarray
    product: np.ndarray

    @property
    def condition(self) -> float:
        """`(sigma_1(A)^2 + sigma_1(B)^2) / min(sigma_r(A), sigma_r(B))^2`, see `factorization_condition_number`."""
        return _ratio(self.lora_a[0] ** 2 + self.lora_b[0] ** 2, min(self.lora_a[-1], self.lora_b[-1]) ** 2)

    @property
    def least_condition(self) -> float:
        """`2 sigma_1(A B) / sigma_r(A B)`, that of the balanced pair of the same product."""
        return _ratio(2 * self.product[0], self.product[-1])


def spectra(adapters: nnx.State) -> Iterator[Spectrum]:
    """Yields the spectra of all pairs of one member.

    Args:
        adapters: its adapters.

    Notes:
        On the host, in O((a + b) r^2) for each pair.
    """
    adapters = jax.tree.map(np.asarray, adapters)
    pairs = find_pairs(adapters)
    for pair, factors in zip(pairs, read_pairs(adapters, pairs), strict=True):
        lora_a, lora_b = (np.asarray(factor, np.float64) for factor in factors)
        if not (np.isfinite(lora_a).all() and np.isfinite(lora_b).all()):
            continue
        right_a, right_b = (np.asarray(np.linalg.qr(factor, mode="r")) for factor in (lora_a, lora_b.mT))
        values = (np.linalg.svd(x, compute_uv=False) for x in (right_a, right_b, right_a @ right_b.mT))
        name = path_text(pair.path_a).rpartition("/")[0]
        for index, (of_a, of_b, of_product) in enumerate(zip(*values, strict=True)):
            yield Spectrum(name if len(lora_a) == 1 else f"{name}[{index}]", of_a, of_b, of_product)


def conditions(adapters: nnx.State) -> dict[str, float]:
    """Returns medians over the pairs of one member: `condition`, and `least_condition` of the same products."""
    found = [(one.condition, one.least_condition) for one in spectra(adapters)]
    if not found:
        return {}
    return dict(zip(("condition", "least_condition"), np.median(found, axis=0).tolist(), strict=True))


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator > 0 else float("inf")
