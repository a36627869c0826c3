"""Condition numbers of LoRA factors: closed forms for matrix factorization, and measurements for any loss.

The factorization loss is `f(A, B) = 1/2 ||A B - Z||_F^2`. At a minimizer its Hessian has r^2 zero eigenvalues, because
`(A R, R^-1 B)` is the same product; the condition number is the ratio of the extreme other ones. For `r < min(a, b)` no
minimizer has a smaller one than the balanced ones (arXiv 2605.31484). For other losses `extreme_eigenvalues` measures
the ratio through products with the Hessian, without those directions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from balora_jax import bures
from balora_jax.pairs import Pairs, find_pairs, read_pairs, write_pairs


def factorization_eigenvalues(lora_a: ArrayLike, lora_b: ArrayLike, rest: ArrayLike | tuple[()] = ()) -> np.ndarray:
    """The eigenvalues of the Hessian of `1/2 ||A B - Z||^2` at a minimizer, less the r^2 zeros of the orbit.

    With `P = A^T A` and `Q = B B^T` they are `sigma_i(A)^2 + sigma_j(B)^2` for i, j up to r; for every singular value
    `tau_k` of Z beyond r the 2r eigenvalues of `[[Q, -tau_k I], [-tau_k I, P]]`, which are `sigma_i(Z) +- tau_k` if the
    pair is balanced; and those of Q and P once more for each row and column of Z that is left.

    Args:
        lora_a: `(..., a, r)`.
        lora_b: `(..., r, b)`; `A B` is the best approximation of rank r of Z.
        rest: `(..., k)`, the singular values of Z beyond the r-th, those that are 0 left out or not; none if Z has
            rank r.

    Returns:
        `(..., r (a + b - r))`, descending, in float64 on the host.

    Raises:
        ValueError: the shapes do not form a pair, or there are more singular values than Z can have.

    Notes:
        O((a + b) r^2). Small eigenvalues keep their relative precision, to the square root of the condition number.

    Source: arXiv 2605.31484 for rank r and for balanced pairs; the blocks for any pair follow from the second
    derivative `||dA B + A dB||^2 + 2 <A B - Z, dA dB>`.

    Examples:
        >>> factorization_eigenvalues([[2.0], [0.0]], [[1.0, 0.0, 0.0]])
        array([5., 4., 4., 1.])
    """
    parts = _eigenvalues_with_counts(lora_a, lora_b, rest)
    return -np.sort(-np.concatenate([np.repeat(values, count, axis=-1) for values, count in parts], -1), axis=-1)


def _eigenvalues_with_counts(lora_a, lora_b, rest):
    """The eigenvalues as arrays `(..., n)`, each with how often it comes."""
    a, b, rest = np.asarray(lora_a, float), np.asarray(lora_b, float), np.atleast_1d(np.asarray(rest, float))
    if a.ndim < 2 or b.ndim < 2 or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise ValueError(f"lora_a must be (..., a, r) and lora_b (..., r, b), got shapes {a.shape} and {b.shape}")
    leading, rank = a.shape[:-2], a.shape[-1]
    rows, columns = a.shape[-2] - rank, b.shape[-1] - rank
    if min(rows, columns) < 0:
        raise ValueError(f"r must be at most min(a, b), got shapes {a.shape} and {b.shape}")
    count = rest.shape[-1]
    if count > min(rows, columns):
        raise ValueError(f"rest must hold at most min(a, b) - r = {min(rows, columns)} singular values, got {count}")
    if rest.shape[:-1] not in ((), leading):
        raise ValueError(f"rest must have the leading axes {leading} of the pair or none, got shape {rest.shape}")
    if np.any(rest < 0):
        raise ValueError(f"rest must hold singular values, which are not negative, got {rest.min()}")
    rest = np.broadcast_to(rest, (*leading, count))
    values_a, values_b = (np.linalg.svd(x, compute_uv=False) for x in (a, b))
    parts = _of_product(values_a, values_b, rows - count, columns - count)
    if count:
        parts.append((_block_eigenvalues(a, b, rest).reshape(*leading, -1), 1))
    return parts


def _of_product(values_a, values_b, rows, columns):
    """Those with counts where Z has rank r, by the singular values `(..., r)` of the factors.

    `rows` and `columns` are how many of Z's are beyond r.
    """
    square_a, square_b = values_a**2, values_b**2
    inside = (square_a[..., :, None] + square_b[..., None, :]).reshape(*values_a.shape[:-1], -1)
    return [(inside, 1), (square_b, rows), (square_a, columns)]


def _ratio_of_extremes(parts):
    """The greatest eigenvalue by the least, `(...)`; infinite where that is not positive."""
    values = np.concatenate([values for values, count in parts if count], -1)
    least = values.min(-1)
    return np.where(least > 0, values.max(-1) / np.where(least > 0, least, 1), np.inf)


def _block_eigenvalues(a, b, rest):
    """The eigenvalues `(..., k, 2 r)` of `[[Q, -tau_k I], [-tau_k I, P]]`.

    With `A = Q_A R` and `B^T = Q_B S` the block is `F^T F` for `F = [[N, 0], [-tau R^-T, R]]`, where `N^T N` is the
    Schur complement `R^-1 (R S^T S R^T - tau^2) R^-T`: singular values of F keep digits that the eigenvalues of the
    block lose. It needs a product whose singular values are at least tau; else the block is taken as it is.
    """
    rank, tau = a.shape[-1], rest[..., :, None, None]
    identity = np.eye(rank)
    roots = [np.linalg.qr(x)[1][..., None, :, :] for x in (a, b.mT)]
    p, q = (np.broadcast_to(x.mT @ x, (*rest.shape, rank, rank)) for x in roots)
    block = np.concatenate([np.concatenate([q, -tau * identity], -1), np.concatenate([-tau * identity, p], -1)], -2)
    plain = np.linalg.eigvalsh(block)
    u, s, _ = np.linalg.svd(roots[0] @ roots[1].mT)
    left, values, right = np.linalg.svd(roots[0])
    usable = (s.min(-1) >= rest) & (values.min(-1) > np.finfo(float).eps * values.max(-1))
    inverse = (left / np.where(values > 0, values, 1)[..., None, :]) @ right  # R^-T
    apart = np.sqrt(np.maximum((s - rest[..., None]) * (s + rest[..., None]), 0))
    schur = apart[..., :, None] * (u.mT @ inverse)
    zero = np.zeros_like(schur)
    below = [-tau * inverse, np.broadcast_to(roots[0], schur.shape)]
    factor = np.concatenate([np.concatenate([schur, zero], -1), np.concatenate(below, -1)], -2)
    return np.where(usable[..., None], np.linalg.svd(factor, compute_uv=False)[..., ::-1] ** 2, plain)


def factorization_condition_number(
    lora_a: ArrayLike, lora_b: ArrayLike, rest: ArrayLike | tuple[()] = ()
) -> np.ndarray:
    """The ratio of the extreme `factorization_eigenvalues`, `(...)`; infinite where the least is not positive.

    For Z of rank `r < a, b` it is `(sigma_1(A)^2 + sigma_1(B)^2) / min(sigma_r(A), sigma_r(B))^2`.

    Args:
        lora_a: as for `factorization_eigenvalues`.
        lora_b: as for `factorization_eigenvalues`.
        rest: as for `factorization_eigenvalues`.
    """
    return _ratio_of_extremes(_eigenvalues_with_counts(lora_a, lora_b, rest))


def condition_number_by_values(values_a: np.ndarray, values_b: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """`factorization_condition_number` at `Z = A B`, `(...)`, from the singular values of the factors.

    Args:
        values_a: `(..., r)`, of A.
        values_b: `(..., r)`, of B.
        shape: `(a, b)` of Z, each at least r.
    """
    rank = values_a.shape[-1]
    return _ratio_of_extremes(_of_product(values_a, values_b, shape[0] - rank, shape[1] - rank))


def least_condition_number(singular_values: ArrayLike, rank: int) -> np.ndarray:
    """The least condition number over all pairs of the best product, `2 sigma_1 / (sigma_r - sigma_{r+1})`.

    Balanced pairs have it. Needs `r < min(a, b)`: where one side has the length r, other pairs can have a smaller one.

    Args:
        singular_values: `(..., k)`, k at least r, descending, of Z; those beyond are taken for 0.
        rank: r.

    Raises:
        ValueError: the rank is out of range, or the values do not descend.

    Source: arXiv 2605.31484.
    """
    values = np.atleast_1d(np.asarray(singular_values, float))
    if not 1 <= rank <= values.shape[-1]:
        raise ValueError(f"rank must be from 1 to the number of singular values, {values.shape[-1]}, got {rank}")
    if np.any(np.diff(values, axis=-1) > 0) or np.any(values < 0):
        raise ValueError("singular_values must descend and not be negative")
    following = values[..., rank] if rank < values.shape[-1] else 0.0
    gap = values[..., rank - 1] - following
    return np.where(gap > 0, 2 * values[..., 0] / np.where(gap > 0, gap, 1), np.inf)


def optimal_step(largest: ArrayLike, smallest: ArrayLike) -> np.ndarray:
    """The step size of gradient descent with the best rate near a minimizer, `2 / (largest + smallest)`.

    Args:
        largest: eigenvalue of the Hessian.
        smallest: nonzero eigenvalue of the Hessian.
    """
    return 2 / (np.asarray(largest, float) + np.asarray(smallest, float))


def predicted_rate(condition_number: ArrayLike) -> np.ndarray:
    """By what a step of gradient descent of the optimal size multiplies the error, `(kappa - 1) / (kappa + 1)`.

    Args:
        condition_number: kappa, at least 1; infinity gives 1.
    """
    return 1 - 2 / (np.asarray(condition_number, float) + 1)


def hessian_product(loss: Callable[[Any], jax.Array], params: Any) -> Callable[[Any], Any]:
    """The function `v -> H v` for the Hessian of a loss at some parameters.

    Args:
        loss: `params -> ()`, twice differentiable.
        params: any tree of arrays.
    """
    return lambda vector: jax.jvp(jax.grad(loss), (params,), (vector,))[1]


def gauss_newton_product(
    outputs: Callable[[Any], Any], loss: Callable[[Any], jax.Array], params: Any
) -> Callable[[Any], Any]:
    """The function `v -> J^T H J v` for the Gauss-Newton matrix: J of the outputs, H the Hessian of their loss.

    For a convex loss (cross-entropy of logits) it is positive semidefinite, and it is zero along the orbit at any
    parameters, where the Hessian is so at stationary ones alone.

    Args:
        outputs: `params -> outputs`, the logits, say.
        loss: `outputs -> ()`.
        params: any tree of arrays.
    """

    def product(vector):
        value, pushed = jax.jvp(outputs, (params,), (vector,))
        curved = jax.jvp(jax.grad(loss), (value,), (pushed,))[1]
        return jax.vjp(outputs, params)[1](curved)[0]

    return product


class Extremes(NamedTuple):
    """What Lanczos' method found.

    Attributes:
        largest: `()`, the largest eigenvalue found, of the operator without the directions of the orbits.
        smallest: `()`, the smallest.
        residuals: `(2,)`, the norms `||H v - lambda v||` of the two, to which rounding adds about `eps ||H||`.
        ritz_values: `(iterations,)`, the eigenvalues of the tridiagonal matrix, ascending; NaN beyond the invariant
            subspace, where the iteration ends early.
        weights: `(iterations,)`, of the Ritz values in the spectral density that the start vector sees; they sum to 1.
    """

    largest: jax.Array
    smallest: jax.Array
    residuals: jax.Array
    ritz_values: jax.Array
    weights: jax.Array

    @property
    def condition_number(self) -> jax.Array:
        """`largest / smallest`; infinite where the smallest is not positive."""
        return jnp.where(self.smallest > 0, self.largest / jnp.where(self.smallest > 0, self.smallest, 1), jnp.inf)


def extreme_eigenvalues(
    product: Callable[[Any], Any],
    params: Any,
    *,
    key: jax.Array,
    iterations: int = 64,
    pairs: Pairs | None = None,
    deflate: bool = True,
) -> Extremes:
    """The extreme eigenvalues of a symmetric operator on LoRA factors, less the zeros that their orbits make.

    Lanczos' method with full reorthogonalisation, on the complement of the directions `(A M, -M B)` of every pair,
    r^2 of them, which do not change the product. Extreme eigenvalues come first; the smallest of an ill-conditioned
    operator takes many iterations, and `residuals` tells how far it is from one.

    Args:
        product: `v -> H v` on trees like `params`, from `hessian_product` or `gauss_newton_product`, say.
        params: a tree with LoRA pairs; other leaves take part whole.
        key: of the random start vector.
        iterations: number of products; at most the dimension of the space is used.
        pairs: which leaves are pairs, as for `find_pairs`.
        deflate: whether to leave out the directions of the orbits.

    Returns:
        `Extremes`.

    Raises:
        ValueError: there are no pairs, or `iterations` is not a positive integer.

    Notes:
        At least one factor of each pair must have full rank; else everything is NaN.
    """
    from matfree.decomp import tridiag_sym

    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations must be a positive integer, got {iterations}")
    found = find_pairs(params, pairs)
    factors = read_pairs(params, found)
    flat, unravel = ravel_pytree(params)
    orbit = sum(a.shape[0] * a.shape[2] ** 2 for a, _ in factors) if deflate else 0
    depth = min(iterations, flat.size - orbit)

    def free(tree):
        if not deflate:
            return tree
        steps = read_pairs(tree, found)
        new = [
            bures.projection(bures.Point(*pair), bures.Tangent(*step))
            for pair, step in zip(factors, steps, strict=True)
        ]
        return write_pairs(tree, found, new)

    def matvec(vector):
        return ravel_pytree(free(product(free(unravel(vector)))))[0]

    start = ravel_pytree(free(unravel(jax.random.normal(key, flat.shape, flat.dtype))))[0]
    decomposition = tridiag_sym(depth, materialize=False, custom_vjp=False)(matvec, start)
    diagonal, beside = decomposition.J_small
    # an invariant subspace was found where a number beside the diagonal vanishes; what follows is made of rounding
    size = jnp.abs(diagonal).max() + jnp.abs(beside).max(initial=0)
    ended = jnp.cumsum(jnp.abs(beside) <= 64 * jnp.finfo(flat.dtype).eps * size) > 0
    alive = jnp.concatenate([jnp.ones(1, bool), ~ended])
    kept = jnp.where(ended, 0, beside)
    tridiagonal = jnp.diag(jnp.where(alive, diagonal, 4 * size)) + jnp.diag(kept, 1) + jnp.diag(kept, -1)
    # of the vectors of the dead part, whose eigenvalues come last, nothing reaches into the others
    values, vectors = jnp.linalg.eigh(tridiagonal)
    count = alive.sum()
    inside = jnp.arange(depth) < count
    onward = jnp.append(jnp.abs(beside), jnp.linalg.norm(decomposition.residual))[count - 1]
    residuals = onward * jnp.abs(vectors[count - 1])
    return Extremes(
        largest=values[count - 1],
        smallest=values[0],
        residuals=jnp.stack([residuals[count - 1], residuals[0]]),
        ritz_values=jnp.where(inside, values, jnp.nan),
        weights=jnp.where(inside, vectors[0] ** 2, 0),
    )
