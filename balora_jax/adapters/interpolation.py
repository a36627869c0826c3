"""Between two adapters of one base: along a geodesic of the updates, or by averages of factors or of products."""

from collections import defaultdict
from dataclasses import replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from balora_jax import bures
from balora_jax.adapters.peft import PeftAdapter, PeftModule, tensor_name
from balora_jax.balance import balance_pair
from balora_jax.bures.matrix_functions import truncated

How = Literal["geodesic", "factors", "products"]


def interpolate_adapters(
    first: PeftAdapter, second: PeftAdapter, weight: float, *, how: How = "geodesic"
) -> PeftAdapter:
    """The adapter that is a share of the way from one adapter to another, of the same rank.

    Args:
        first: at weight 0; its config, dtypes and other tensors are kept.
        second: at weight 1; an adapter of the same modules, shapes and ranks, its scale may be another.
        weight: from 0 to 1.
        how: which way.

            * `"geodesic"`: the shortest path of the updates `s A B` among the matrices of their rank, under the Bures
              metric. It does not depend on the gauges.
            * `"factors"`: averages of the factors, as weights are averaged. It depends on the gauges: two pairs of one
              update can have an average that is another.
            * `"products"`: averages of the updates, and the nearest matrices of the same rank to them.

    Returns:
        The adapter; its pairs are balanced but for `"factors"`.

    Raises:
        ValueError: the adapters do not have the same modules and shapes, or are not plain LoRA; the weight is out of
            range; an update lacks rank, or no geodesic joins two of them.

    Notes:
        Float64; pairs of one shape go together. A geodesic between updates that are far apart takes a second or two for
        each pair of rank 8, averages nothing beside it.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must be from 0 to 1, got {weight}")
    modules = first.modules(), second.modules()
    _check_alike(*modules)
    groups: dict[tuple, list[str]] = defaultdict(list)
    for name, low_rank in modules[0].items():
        groups[low_rank.lora_a.shape, low_rank.lora_b.shape].append(name)
    tensors = dict(first.tensors)
    with jax.enable_x64(True):
        for names in groups.values():
            pairs = [_stacked([side[name] for name in names]) for side in modules]
            factors = [np.asarray(x) for x in _WAYS[how](*pairs, weight)]
            for i, name in enumerate(names):
                new = _unscaled(modules[0][name].scale, *(x[i] for x in factors))
                if not all(np.isfinite(x).all() for x in new):
                    raise ValueError(f"{name}: {_reason(how, *((x[i], y[i]) for x, y in pairs))}")
                for part, factor in zip(("lora_A.weight", "lora_B.weight"), new, strict=True):
                    key = tensor_name(name, part)
                    tensors[key] = factor.T.astype(first.tensors[key].dtype)
    return replace(first, tensors=tensors)


def _check_alike(first: dict[str, PeftModule], second: dict[str, PeftModule]) -> None:
    """Raises a `ValueError` unless adapters have the same modules, and plain pairs of the same shapes."""
    if missing := sorted(first.keys() ^ second.keys()):
        raise ValueError(f"both adapters must have the same modules, but only one has {missing[0]}")
    for name, low_rank in first.items():
        shapes = [(x.lora_a.shape, x.lora_b.shape) for x in (low_rank, second[name])]
        if shapes[0] != shapes[1]:
            (a, b), (c, d) = shapes
            raise ValueError(f"{name}: the factors must have the same shapes in both, got {a}, {b} and {c}, {d}")
        for adapter in (low_rank, second[name]):
            if adapter.magnitude is not None:
                raise ValueError(f"{name}: the adapter must be plain LoRA, got DoRA")
            if adapter.scale == 0:
                raise ValueError(f"{name}: the scale must not be 0: the update is 0 then")


def _stacked(adapters: list[PeftModule]) -> tuple[np.ndarray, np.ndarray]:
    """The factors of updates, with half of the scale in each."""
    roots = np.array([abs(adapter.scale) ** 0.5 for adapter in adapters])[:, None, None]
    signs = np.sign([adapter.scale for adapter in adapters])[:, None, None]
    lefts, rights = (
        np.stack([np.asarray(x, float) for x in side]) for side in zip(*(x[:2] for x in adapters), strict=True)
    )
    return roots * lefts, signs * roots * rights


def _unscaled(scale, lora_a, lora_b):
    """The factors without the scale."""
    root = abs(scale) ** 0.5
    return lora_a / root, np.sign(scale) * lora_b / root


def _reason(how, *pairs):
    """Why there is nothing between two updates."""
    lacking = any(np.linalg.matrix_rank(np.linalg.qr(a)[1] @ np.linalg.qr(b.T)[1].T) < a.shape[1] for a, b in pairs)
    if lacking or how != "geodesic":
        return "the update lacks rank, or is not finite, in one of the adapters"
    return "no geodesic was found from one update to the other: they are too far from each other"


def _geodesic(first, second, weight):
    points = []
    for pair in (first, second):
        outcome = balance_pair(*pair)
        left = (outcome.untouched | outcome.nonfinite)[:, None, None]
        points.append(bures.Point(*(jnp.where(left, jnp.nan, x) for x in outcome[:2])))
    start, end = points
    return tuple(bures.interpolation(start, end, weight))


def _factors(first, second, weight):
    return tuple((1 - weight) * x + weight * y for x, y in zip(first, second, strict=True))


def _products(first, second, weight):
    left = jnp.concatenate([(1 - weight) * first[0], weight * second[0]], -1)
    right = jnp.concatenate([first[1], second[1]], -2)
    return truncated(left, right, jnp.zeros(first[0].shape[-1]))


_WAYS = {"geodesic": jax.jit(_geodesic), "factors": jax.jit(_factors), "products": jax.jit(_products)}
