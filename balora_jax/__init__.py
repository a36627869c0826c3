"""Balanced LoRA and its Riemannian geometry in JAX.

The core works on plain arrays and parameter trees and needs jax and optax alone. The layers, models, data and
training of the experiments live in the subpackages `adapters`, `models`, `data` and `training`.
"""

from balora_jax.balance import Balanced, balance, balance_pair, balance_pairs, balancing_gap
from balora_jax.gauge import GAUGES, ROUTES
from balora_jax.pairs import Pair, find_pairs
from balora_jax.transform import BaloraProjectState, BaloraState, balora, balora_project

__all__ = [
    "GAUGES",
    "ROUTES",
    "Balanced",
    "BaloraProjectState",
    "BaloraState",
    "Pair",
    "balance",
    "balance_pair",
    "balance_pairs",
    "balancing_gap",
    "balora",
    "balora_project",
    "find_pairs",
]
