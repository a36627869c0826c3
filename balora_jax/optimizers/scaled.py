"""Gradients of LoRA pairs scaled by the Gram matrices of their partners: ScaledGD and Riemannian preconditioned LoRA.

Further preconditioners of pairs are built from the same parts: `precondition`, `gram_spectra` and `damped_inverse`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from balora_jax.factors import working_dtype
from balora_jax.linalg import eigh, matmul, split
from balora_jax.pairs import ArrayPair, Pairs, PairSearch


def precondition_by_grams(
    *, damping: jax.typing.ArrayLike = 1e-6, pairs: Pairs | None = None
) -> optax.GradientTransformation:
    """Scales the gradients of every LoRA pair by the inverse Gram matrix of the other factor.

    `g_A <- g_A (B B^T + d I)^-1`, `g_B <- (A^T A + d I)^-1 g_B`, both Gram matrices of the present parameters. Leaves
    that belong to no pair keep their gradients.

    Args:
        damping: d, at least 0. Authors tune it per task, from 1e-6 to 100.
        pairs: names the pairs if their leaves have other names than `find_pairs` knows; see there.

    Returns:
        An `optax.GradientTransformation` without state, to stand in front of an optimizer.

    Raises:
        ValueError: `damping` is negative; from `init`, the parameters hold no pair or an unpaired factor; from
            `update`, `params` was not given.

    Notes:
        Costs O((a + b) r^2) and two r x r eigendecompositions per pair and step. Directions in which a damped Gram
        matrix is below rounding, r eps times its largest eigenvalue, count as absent: their gradients vanish anyway,
        and nothing is divided by 0 for `B = 0`, even without damping. Non-finite numbers in one pair stay in that pair.
        Preconditioned gradients change with the gauge as the factors do, `(g_A R, R^-1 g_B)`, not as gradients do:
        `balora` around what follows needs `transport=False`. The released code scales the second factor by the first
        after its step; the paper, as here, by the first before it.

    Source: arXiv 2402.02347; without damping ScaledGD of arXiv 2005.08898.

    Examples:
        >>> params = {"lora_a": 2.0 * jnp.eye(3, 2), "lora_b": jnp.zeros((2, 3))}
        >>> tx = precondition_by_grams(damping=0.0)
        >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        >>> updates["lora_b"].tolist()
        [[0.25, 0.25, 0.25], [0.25, 0.25, 0.25]]
    """
    check_interval("damping", damping, 0)

    def scaled(factors, gradients):
        spectra = gram_spectra([gram for a, b in factors for gram in (matmul(a.mT, a), matmul(b, b.mT))])
        inverses = [damped_inverse(values, vectors, damping) for values, vectors in spectra]
        return [
            (matmul(g_a, inverse_b), matmul(inverse_a, g_b))
            for (g_a, g_b), inverse_a, inverse_b in zip(gradients, inverses[::2], inverses[1::2], strict=True)
        ]

    return precondition(scaled, pairs)


def scaled_gd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    damping: jax.typing.ArrayLike = 1e-6,
    momentum: jax.typing.ArrayLike | None = None,
    pairs: Pairs | None = None,
) -> optax.GradientTransformation:
    """Gradient descent on gradients scaled by Gram matrices; other leaves descend their plain gradients.

    `A <- A - lr g_A (B B^T + d I)^-1`, `B <- B - lr (A^T A + d I)^-1 g_B`, see `precondition_by_grams`.

    Args:
        learning_rate: a number or a schedule.
        damping: d, at least 0.
        momentum: of the scaled gradients, in [0, 1); None for none.
        pairs: names the pairs if their leaves have other names than `find_pairs` knows; see there.

    Returns:
        An `optax.GradientTransformation`.

    Raises:
        ValueError: as `precondition_by_grams`, or `momentum` is out of range.

    Notes:
        Without damping, all products `A B` of a run, with momentum too, are the same for the starts `(A, B)` and
        `(A R, R^-1 B)`. Keeps nothing without momentum, and the size of the parameters with it.

    Source: arXiv 2005.08898 (ScaledGD); arXiv 2402.02347 (for LoRA). Neither has momentum.

    Examples:
        >>> params = {"lora_a": 2.0 * jnp.eye(3, 2), "lora_b": jnp.zeros((2, 3))}
        >>> tx = scaled_gd(1.0, damping=0.0)
        >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        >>> updates["lora_b"][0].tolist()
        [-0.25, -0.25, -0.25]
    """
    check_interval("momentum", momentum, 0, 1)
    return optax.chain(precondition_by_grams(damping=damping, pairs=pairs), optax.sgd(learning_rate, momentum))


def scaled_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    weight_decay: jax.typing.ArrayLike = 0.0,
    damping: jax.typing.ArrayLike = 1e-6,
    pairs: Pairs | None = None,
) -> optax.GradientTransformation:
    """AdamW whose both moments are those of gradients scaled by Gram matrices; other leaves have plain AdamW.

    `g_A (B B^T + d I)^-1` and `(A^T A + d I)^-1 g_B` take the place of the gradients, see `precondition_by_grams`.

    Args:
        learning_rate: a number or a schedule.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        damping: d, at least 0.
        pairs: names the pairs if their leaves have other names than `find_pairs` knows; see there.

    Returns:
        An `optax.GradientTransformation`.

    Raises:
        ValueError: as `precondition_by_grams`, or another number is out of its range.

    Notes:
        Cost as `precondition_by_grams`, and AdamW's state, twice the parameters. Defaults are those of the authors'
        runs on Mistral-7B; they leave out the correction of Adam's bias, which is made here. So eps is added to the
        corrected root, `sqrt(v / (1 - b2^t)) + eps`, theirs to `sqrt(v)`. The moments are entrywise,
        so that runs depend on the gauge of the start.

    Source: arXiv 2402.02347 (scaled AdamW).

    Examples:
        >>> params = {"lora_a": jnp.eye(3, 2), "lora_b": jnp.zeros((2, 3))}
        >>> tx = scaled_adamw(0.1)
        >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        >>> bool(jnp.allclose(updates["lora_b"], -0.1, atol=1e-5))
        True
    """
    check_adamw(b1, b2, eps, weight_decay)
    return optax.chain(
        precondition_by_grams(damping=damping, pairs=pairs),
        optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay),  # type: ignore[arg-type]
    )


def precondition(
    adjust: Callable[[list[ArrayPair], list[ArrayPair]], list[ArrayPair]], pairs: Pairs | None
) -> optax.GradientTransformation:
    """Returns the stateless transformation that adjusts the gradients of all pairs and leaves the others.

    Args:
        adjust: from the factors `(n, a, r)`, `(n, r, b)` of all pairs and their gradients, each pair in float32 or
            wider, to the new gradients.
        pairs: as for `find_pairs`.
    """

    find = PairSearch(pairs)

    def init_fn(params):
        find.at_init(params)
        return optax.EmptyState()

    def update_fn(updates, state, params=None):
        check_params(params)
        found = find(params)
        factors, gradients = found.read(params), found.read(updates)
        wide = [working_dtype(*pair, *grads) for pair, grads in zip(factors, gradients, strict=True)]
        widened = [
            [(a.astype(dtype), b.astype(dtype)) for (a, b), dtype in zip(side, wide, strict=True)]
            for side in (factors, gradients)
        ]
        new = [
            (h_a.astype(g_a.dtype), h_b.astype(g_b.dtype))
            for (h_a, h_b), (g_a, g_b) in zip(adjust(*widened), gradients, strict=True)
        ]
        return found.write(updates, new), state

    return optax.GradientTransformation(init_fn, update_fn)


def gram_spectra(grams: list[jax.Array]) -> list[ArrayPair]:
    """Returns eigenvalues `(n, r)`, none negative, and eigenvectors `(n, r, r)` of positive semidefinite matrices.

    Matrices of one size go through together. The eigenvalues of a matrix that is not finite are NaN.

    Args:
        grams: `(n, r, r)` each, n and r its own.
    """
    groups: dict[tuple, list[int]] = {}
    for i, gram in enumerate(grams):
        groups.setdefault((gram.shape[-1], gram.dtype), []).append(i)
    spectra: dict[int, ArrayPair] = {}
    for members in groups.values():
        stack = jnp.concatenate([grams[i] for i in members])
        finite = jnp.isfinite(stack).all((1, 2))
        values, vectors = eigh(jnp.where(finite[:, None, None], stack, 0))
        values = jnp.where(finite[:, None], jnp.maximum(values, 0), jnp.nan)
        sizes = [grams[i] for i in members]
        spectra |= dict(zip(members, zip(split(values, sizes), split(vectors, sizes), strict=True), strict=True))
    return [spectra[i] for i in range(len(grams))]


def damped_inverse(values: jax.Array, vectors: jax.Array, damping: jax.typing.ArrayLike) -> jax.Array:
    """Returns the pseudo-inverses `(n, r, r)` of `V diag(values + damping) V^T`, given `(n, r)` and `V (n, r, r)`."""
    return matmul(vectors * reciprocal(values + jnp.asarray(damping, values.dtype))[:, None, :], vectors.mT)


def reciprocal(values: jax.Array) -> jax.Array:
    """Returns `1 / values (n, ..., r)`, none negative, and 0 below the rounding of the largest of each r x r matrix."""
    largest = values.max(range(1, values.ndim), keepdims=True)
    kept = values > values.shape[-1] * jnp.finfo(values.dtype).eps * largest
    return jnp.where(kept, 1 / jnp.where(kept, values, 1), 0 * values)  # NaN stays NaN


def check_params(params: Any) -> None:
    """Raises if an update was called without the parameters."""
    if params is None:
        raise ValueError("the optimizer needs the parameters: call `update(updates, state, params)`")


def check_adamw(b1, b2, eps, weight_decay) -> None:
    """Raises if a hyper-parameter of AdamW is a plain number out of its range."""
    check_interval("b1", b1, 0, 1)
    check_interval("b2", b2, 0, 1)
    check_interval("eps", eps, 0)
    check_interval("weight_decay", weight_decay, 0)


def check_interval(name: str, value: Any, low: float, high: float = math.inf, *, above: bool = False) -> None:
    """Raises if a plain number is not in `[low, high)`, or not in `(low, high)` if it must be `above`."""
    if isinstance(value, int | float) and not (low <= value < high and (value > low or not above)):
        raise ValueError(f"{name} must be in {'(' if above else '['}{low}, {high}), got {value!r}")


def check_count(name: str, value: Any) -> None:
    """Raises if a plain number is not an integer of at least 1."""
    if isinstance(value, int | float) and (not isinstance(value, int) or value < 1):
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
