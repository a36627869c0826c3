"""LoRA-GA: adapters that start along the leading singular directions of the gradient of the full weights."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from balora_jax.adapters.contraction import contraction_of
from balora_jax.adapters.initialisation import Factors, Initialisation
from balora_jax.adapters.lora import LoRALinear
from balora_jax.adapters.model import add_adapters, iter_adapters
from balora_jax.linalg import qr, svd
from balora_jax.pairs import find_pairs, read_pairs, write_pairs
from balora_jax.settings import Option


class Triplets(NamedTuple):
    """Leading singular triplets of the gradient of one layer's weights, n of them if layers are stacked.

    Attributes:
        left: `(n, in, k)`.
        values: `(n, k)`, descending.
        right: `(n, k, out)`.
    """

    left: jax.Array
    values: jax.Array
    right: jax.Array


def _zeros(key, weight, rank, scale) -> Factors:
    *leading, rows, columns = weight.shape
    return jnp.zeros((*leading, rows, rank)), jnp.zeros((*leading, rank, columns))


LORA_GA = Initialisation(
    _zeros,
    options={
        "gamma": Option(16.0, "the larger, the smaller the start"),
        "gradient_batches": Option(64, "batches whose gradients are averaged"),
        "gradient_batch_size": Option(2, "rows of each"),
    },
)
"""Room for a start that `start_at` fills in."""


def gradient_triplets(
    model: nnx.Module,
    loss: Callable[[nnx.Module, Any], jax.Array],
    batches: Any,
    *,
    targets: str | Sequence[str],
    rank: int,
    key: jax.Array,
    iterations: int = 4,
) -> dict[str, Triplets]:
    """Leading singular triplets of the mean gradient of the weights of some layers, without forming it.

    Adapters of the rank asked for probe the model without changing it: at `(0, R^T)` the gradient of A is `G R`, at
    `(Q, 0)` that of B is `Q^T G`. With these products, for all layers in one pass, runs the subspace iteration of
    `torch.svd_lowrank`, which LoRA-GA's authors use; it is exact where the rank is the shorter side.

    Args:
        model: without adapters on the targets.
        loss: `(model, batch) -> ()`, the mean loss of a batch.
        batches: a tree of arrays with a leading axis of batches.
        targets: which layers, see `add_adapters`.
        rank: k, how many triplets; fewer where the shorter side is.
        key: of the random start.
        iterations: power iterations.

    Returns:
        The triplets of each layer, by its dotted path.

    Notes:
        `2 iterations + 2` passes over the batches. The memory is that of adapters of rank k and one batch, where the
        gradient of the weights would take that of the weights. A dropout of the model must be off.

    Source: arXiv 0909.4061 (algorithm 4.4); arXiv 2407.05000 for its use.
    """
    structure, state = nnx.split(model)
    probe = nnx.merge(structure, state, copy=True)
    add_adapters(probe, targets=targets, rank=rank, layer=_at_most, rngs=nnx.Rngs(0))
    graph, *states = nnx.split(probe, nnx.LoRAParam, ...)
    factors, rest = jax.tree.map(jnp.zeros_like, states[0]), states[1]
    pairs = find_pairs(factors)

    @jax.jit
    def gradients(factors, rest):
        def add(total, batch):
            new = jax.grad(lambda factors: loss(nnx.merge(graph, factors, rest, copy=True), batch))(factors)
            return jax.tree.map(jnp.add, total, new), None

        return read_pairs(jax.lax.scan(add, jax.tree.map(jnp.zeros_like, factors), batches)[0], pairs)

    count = len(jax.tree.leaves(batches)[0])
    zeros = read_pairs(factors, pairs)
    keys = jax.random.split(key, len(pairs))
    right = [jax.random.normal(k, b.shape, b.dtype) for k, (_, b) in zip(keys, zeros, strict=True)]
    for step in range(iterations + 1):
        at_right = [(a, b) for (a, _), b in zip(zeros, right, strict=True)]
        left = [qr(g)[0] for g, _ in gradients(write_pairs(factors, pairs, at_right), rest)]
        at_left = [(q, b) for q, (_, b) in zip(left, zeros, strict=True)]
        core = [g for _, g in gradients(write_pairs(factors, pairs, at_left), rest)]
        if step < iterations:
            right = [qr(g.mT)[0].mT for g in core]
    triplets = {}
    for pair, q, c in zip(pairs, left, core, strict=True):
        u, values, vt = svd(c / count)
        triplets[".".join(map(str, pair.path_a[:-1]))] = Triplets(q @ u, values, vt)
    return triplets


def lora_ga_start(
    model: nnx.Module,
    loss: Callable[[nnx.Module, Any], jax.Array],
    batches: Any,
    *,
    targets: str | Sequence[str],
    rank: int,
    key: jax.Array,
    gamma: float = 16.0,
) -> dict[str, Factors]:
    """LoRA-GA's start: `A = c U_{1..r}`, `B = c V_{r+1..2r}^T`, `c = out^(1/4) / gamma^(1/2)`, from `G = U S V^T`.

    G `(in, out)` is the mean gradient of a layer's weight. This is the authors' "ArB2r" direction with their "stable"
    scale; singular values are not used, and the pair is balanced.

    Args:
        model: as for `gradient_triplets`.
        loss: as for `gradient_triplets`.
        batches: as for `gradient_triplets`; the authors take 64 of 2 examples.
        targets: as for `gradient_triplets`.
        rank: r of the adapters.
        key: of the random start of the singular value decomposition.
        gamma: the larger, the smaller the start.

    Returns:
        The factors `(n, in, r)`, `(n, r, out)` of each layer, by its dotted path, for `start_at`.

    Raises:
        ValueError: a layer has a side below 2 r.

    Notes:
        As the authors, of the first `min(4 r, in, out)` triplets by a randomized decomposition. PEFT's version scales
        B alone and is not this.

    Source: arXiv 2407.05000.
    """
    starts = {}
    triplets = gradient_triplets(model, loss, batches, targets=targets, rank=4 * rank, key=key)
    for path, (left, values, right) in triplets.items():
        if values.shape[-1] < 2 * rank:
            raise ValueError(
                f"{path}: LoRA-GA needs 2 rank singular directions, so a rank of at most {values.shape[-1] // 2} here, "
                f"got {rank}"
            )
        size = right.shape[-1] ** 0.25 / gamma**0.5
        starts[path] = size * left[..., :rank], size * right[:, rank : 2 * rank]
    return starts


def start_at(model: nnx.Module, starts: Mapping[str, Factors]) -> None:
    """Sets factors of adapters that were made with `LORA_GA`, and takes their products out of the base; in place.

    Args:
        model: with adapters.
        starts: factors by the dotted path of the layer.

    Raises:
        ValueError: an adapter has no start, a start has no adapter, or the adapter has no room for it.
    """
    adapters = dict(iter_adapters(model))
    if adapters.keys() != starts.keys():
        odd = sorted(adapters.keys() ^ starts.keys())[0]
        raise ValueError(f"starts must be for {', '.join(adapters)}, got {', '.join(starts)}: {odd} is in one alone")
    for path, adapter in adapters.items():
        if not isinstance(adapter, LoRALinear) or adapter.offset_a is None or adapter.offset_b is None:
            raise ValueError(f"{path} must have been made with an initialisation that leaves room for an offset")
        for factor, offset, start in zip(
            (adapter.lora_a, adapter.lora_b), (adapter.offset_a, adapter.offset_b), starts[path], strict=True
        ):
            factor[...] = start.reshape(factor.shape)
            offset[...] = factor[...].copy()


def _at_most(base, *, rank: int, **options) -> LoRALinear:
    """An adapter of the rank, or of the shorter side of its weight if that is less."""
    weight = jax.eval_shape(contraction_of(base).matrices, base.kernel[...])
    return LoRALinear(base, rank=min(rank, *weight.shape[-2:]), **options)
