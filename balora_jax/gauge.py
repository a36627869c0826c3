"""The change of gauge that balances a pair, from its two Gram matrices alone: r x r mathematics, stacked over pairs.

A pair `(A, B)` with `P = A^T A` and `Q = B B^T` becomes `(A T, T^-1 B)`. `T` balances it when
`T^T P T = T^-1 Q T^-T`, and the balanced pair is hyper-balanced when this common matrix is diagonal. Two routes lead
there:

* *exact*: Cholesky factors `P = L_A L_A^T`, `Q = L_B L_B^T`, the SVD `L_A^T L_B = U S V^T`, and then
  `T = L_B V S^-1/2`, `T^-1 = S^-1/2 U^T L_A^T` (square-root balancing of control theory; nothing is inverted).
* *iterative*: matrix products and elementwise work only. Every entry pair (i, j) of the correction is the Jacobi
  rotation that would diagonalize `(P + Q) / 2` there plus the smallest symmetric move that would cancel `P - Q`, and
  all entries move at once. It converges quadratically from a nearly hyper-balanced pair, as a training step leaves it.

Every other balanced pair differs from the hyper-balanced one by a rotation, `rotation`, which the gauge chooses.
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax

from balora_jax.linalg import matmul, orthonormal
from balora_jax.settings import Gauge

GAUGES: tuple[str, ...] = get_args(Gauge)
Route = Literal["auto", "exact", "iterative"]
ROUTES: tuple[str, ...] = get_args(Route)

_MOST_STEPS = 24
# The longest step of each part of the iteration's correction, in the spectral norm.
_LONGEST_STEP = 0.6


class Change(NamedTuple):
    """A change of gauge for each of n pairs.

    Attributes:
        T: `(n, r, r)`, T.
        T_inv: `(n, r, r)`, T^-1.
        values: `(n, r)`, the singular values of A B: the squared norms of the columns of A T, in their order.
        found: `(n)` bool, whether the route found T.
    """

    T: jax.Array
    T_inv: jax.Array
    values: jax.Array
    found: jax.Array


def check_gauge(gauge: str) -> None:
    """Raises if `gauge` is not one of `GAUGES`."""
    _check_choice("gauge", gauge, GAUGES)


def check_route(route: str, gauge: str) -> None:
    """Raises if `route` is not one of `ROUTES`, or cannot give the gauge."""
    _check_choice("route", route, ROUTES)
    if route == "iterative" and gauge != "svd":
        raise ValueError(f"route 'iterative' gives the gauge 'svd' alone, got gauge {gauge!r}")


def column_norms(gram: jax.Array) -> jax.Array:
    """The norms `(n, r)` of the columns whose Gram matrices `(n, r, r)` these are."""
    return jnp.sqrt(_diagonal(gram))


@jax.jit
def exact_change(gram_a: jax.Array, gram_b: jax.Array) -> Change:
    """Returns the hyper-balancing change of gauge by Cholesky factorizations and an SVD, singular values descending.

    Pairs run one after the other: XLA's CPU backend can deadlock when two batched LAPACK calls of one program wait for
    each other, and its GPU backend runs such a batch one by one anyway.

    Args:
        gram_a: `(n, r, r)`, P.
        gram_b: `(n, r, r)`, Q.
    """
    norm_a, norm_b = column_norms(gram_a), column_norms(gram_b)
    usable = _positive(norm_a) & _positive(norm_b)
    norm_a, norm_b = (jnp.where(usable[:, None], norm, 1) for norm in (norm_a, norm_b))
    identity = jnp.eye(gram_a.shape[-1], dtype=gram_a.dtype)

    def decompose(pair):
        scaled_a, scaled_b, weight = pair
        lower_a, lower_b = (jnp.linalg.cholesky(x, symmetrize_input=False) for x in (scaled_a, scaled_b))
        core = matmul(lower_a.T * weight[None, :], lower_b)
        finite = jnp.isfinite(core).all()
        u, s, vt = jnp.linalg.svd(jnp.where(finite, core, identity))
        return lower_a, lower_b, u, s, vt, finite & (s[-1] > 0)

    # columns scaled to norm 1: an ill-scaled Gram matrix costs Cholesky factors nothing then
    scaled_a, scaled_b = (
        jnp.where(usable[:, None, None], gram / (norm[:, :, None] * norm[:, None, :]), identity[None])
        for gram, norm in ((gram_a, norm_a), (gram_b, norm_b))
    )
    lower_a, lower_b, u, s, vt, found = lax.map(decompose, (scaled_a, scaled_b, norm_a * norm_b))
    root = jnp.sqrt(jnp.where(found[:, None], s, 1))
    T = norm_b[:, :, None] * matmul(lower_b, vt.mT / root[:, None, :])
    T_inv = matmul(u.mT / root[:, :, None], lower_a.mT) * norm_a[:, None, :]
    return _polished(Change(T, T_inv, root**2, found & usable), gram_a, gram_b)


def _polished(change, gram_a, gram_b):
    """The change followed by Newton steps for its inverse and for balance.

    An SVD finds small singular values to the rounding of the largest alone; here each column's is what counts.
    """
    T, T_inv = change.T, change.T_inv
    T_inv = refined_inverse(T, T_inv)
    p, q = _congruent(gram_a, T), _congruent(gram_b, T_inv.mT)
    w = (_diagonal(p) + _diagonal(q)) / 2
    step = _shortened((q - p) / (2 * (w[:, :, None] + w[:, None, :])), jnp.finfo(p.dtype).eps ** 0.25)
    even = jnp.eye(step.shape[-1], dtype=step.dtype)[None] + matmul(step, step) / 2
    return change._replace(T=matmul(T, even + step), T_inv=matmul(even - step, T_inv))


def iterative_change(gram_a: jax.Array, gram_b: jax.Array) -> Change:
    """Returns the hyper-balancing change of gauge of nearly hyper-balanced pairs, by matrix products alone.

    The columns keep their order and signs. A step is `T <- T exp(F)` with
    `F_ij = (Q - P)_ij / (2 (w_i + w_j)) - t_ij`, where `w` is the diagonal of `(P + Q) / 2` and `t_ij` is the tangent
    of the Jacobi rotation that diagonalizes `(P + Q) / 2` in the plane (i, j).

    Args:
        gram_a: `(n, r, r)`, P.
        gram_b: `(n, r, r)`, Q.

    Returns:
        The change; `found` is false where the steps did not become small.
    """
    rank, dtype = gram_a.shape[-1], gram_a.dtype
    identity = jnp.eye(rank, dtype=dtype)[None]
    rounding = 4 * jnp.finfo(dtype).eps * rank**0.5
    upper = jnp.triu(jnp.ones((1, rank, rank), dtype), 1)
    sense = upper - upper.mT  # of the rotation between two equal values

    def grams(T, T_inv):
        return _congruent(gram_a, T), _congruent(gram_b, T_inv.mT)

    def correction(p, q):
        w = (_diagonal(p) + _diagonal(q)) / 2
        w_i, w_j = w[:, :, None], w[:, None, :]
        move = (q - p) / (2 * (w_i + w_j))
        tilt = jnp.where(identity > 0, 0, p + q)  # twice the off-diagonal part of (P + Q) / 2
        tilt = jnp.where(jnp.abs(tilt) > 2 * rounding * jnp.sqrt(w_i * w_j), tilt, 0)
        apart = w_i - w_j
        tangent = tilt / (jnp.abs(apart) + jnp.sqrt(apart**2 + tilt**2) + jnp.finfo(dtype).tiny)
        turn = tangent * jnp.where(apart == 0, sense, jnp.sign(apart))
        # not finished while anything turns: equal values may turn far, which a step of the last size does not settle
        error = (jnp.maximum(jnp.abs(q - p), 2 * jnp.abs(tilt)) / jnp.sqrt(w_i * w_j)).max((1, 2))
        return _shortened(move, _LONGEST_STEP) - _shortened(turn, _LONGEST_STEP), error

    def unfinished(carry):
        steps, _, _, error = carry
        return (steps < _MOST_STEPS) & (error > 4 * rounding).any()  # false for the NaN of a pair that broke

    def improve(carry):
        steps, T, T_inv, _ = carry
        step, error = correction(*grams(T, T_inv))
        square = matmul(step, step)
        odd, even = step + matmul(square, step) / 6, identity + square / 2
        T, T_inv = matmul(T, even + odd), matmul(even - odd, T_inv)
        return steps + 1, T, refined_inverse(T, T_inv), error

    norm_a, norm_b = column_norms(gram_a), column_norms(gram_b)
    usable = _positive(norm_a) & _positive(norm_b)
    stretch = jnp.sqrt(jnp.where(usable[:, None], norm_b, 1) / jnp.where(usable[:, None], norm_a, 1))
    start = (
        jnp.zeros((), jnp.int32),
        stretch[:, :, None] * identity,
        identity / stretch[:, :, None],
        jnp.where(usable, jnp.inf, jnp.nan).astype(dtype),
    )
    _, T, T_inv, error = lax.while_loop(unfinished, improve, start)
    p, q = grams(T, T_inv)
    balanced = _norm(q - p) <= 8 * jnp.finfo(dtype).eps * _norm(p)
    values = _diagonal(p)
    return Change(T, T_inv, values, balanced & (error <= 4 * rounding) & _positive(values))


def identity_change(gram: jax.Array) -> Change:
    """The change that leaves pairs as they are, for stacked Gram matrices of this shape."""
    identity = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype)[None], gram.shape)
    return Change(identity, identity, jnp.ones(gram.shape[:2], gram.dtype), jnp.zeros(gram.shape[:1], bool))


def select(condition: jax.Array, change: Change, other: Change) -> Change:
    """One change where a condition `(n)` holds, another elsewhere."""

    return jax.tree.map(lambda x, y: jnp.where(condition.reshape(-1, *(x.ndim - 1) * (1,)), x, y), change, other)


@jax.jit
def refined_inverse(T: jax.Array, T_inv: jax.Array) -> jax.Array:
    """A step of Newton's method for inverses `(n, r, r)`: the product A B rests on them.

    `T^-1 T` is what must be rounded, not `T T^-1`: its errors meet the balanced factors, which are well-conditioned.
    """
    return 2 * T_inv - matmul(matmul(T_inv, T), T_inv)


def turned(change: Change, turn: jax.Array) -> Change:
    """The change followed by a rotation `(n, r, r)` of the balanced pairs."""
    return change._replace(T=matmul(change.T, turn), T_inv=matmul(turn.mT, change.T_inv))


def rotation(change: Change, gram_a: jax.Array, gram_b: jax.Array, gauge: str) -> jax.Array:
    """Returns the rotations `(n, r, r)` that take hyper-balanced pairs into a gauge.

    Args:
        change: from the incoming pairs to the hyper-balanced ones.
        gram_a: `(n, r, r)`, Gram matrices of the incoming pairs.
        gram_b: `(n, r, r)`.
        gauge: one of `GAUGES`.
    """
    if gauge == "raw_svd":
        return jnp.broadcast_to(jnp.eye(gram_a.shape[-1], dtype=gram_a.dtype), gram_a.shape)
    if gauge == "symmetric":
        return orthogonal_factor(change.T).mT
    overlap_a, overlap_b = matmul(change.T.mT, gram_a), matmul(change.T_inv, gram_b)
    if gauge == "nearest":
        return orthogonal_factor(overlap_a + overlap_b)
    return matching(overlap_a, overlap_b, change.values, column_norms(gram_a), column_norms(gram_b))


@jax.jit
def orthogonal_factor(matrix: jax.Array) -> jax.Array:
    """The orthogonal factors of the polar decompositions of stacked matrices `(n, k, r)`, `k <= r`."""

    def one(matrix):
        finite = jnp.isfinite(matrix).all()
        u, _, vt = jnp.linalg.svd(jnp.where(finite, matrix, 0), full_matrices=False)
        return orthonormal(matmul(u, vt))

    return lax.map(one, matrix)


@jax.jit
def matching(
    overlap_a: jax.Array, overlap_b: jax.Array, values: jax.Array, norm_a: jax.Array, norm_b: jax.Array
) -> jax.Array:
    """The signed permutations that align new columns to the incoming ones, `(n, k, r)`.

    Pairs every new column with an incoming one by the greedy rule, largest |cosine| first: in each round all pairs that
    prefer each other are taken at once.

    Args:
        overlap_a: `(n, k, r)`, inner products of new columns of A with incoming ones.
        overlap_b: `(n, k, r)`, of new rows of B with incoming ones.
        values: `(n, k)`, squared norms of the new columns and rows, positive.
        norm_a: `(n, r)`, norms of the incoming columns of A.
        norm_b: `(n, r)`, norms of the incoming rows of B.
    """
    norm_a, norm_b = (jnp.where(norm > 0, norm, jnp.inf)[:, None, :] for norm in (norm_a, norm_b))
    cosine = (overlap_a / norm_a + overlap_b / norm_b) / jnp.sqrt(values)[:, :, None]
    likeness = jnp.nan_to_num(jnp.abs(cosine), nan=0.0)
    rows, columns = likeness.shape[1:]
    row, column = jnp.arange(rows)[None, :, None], jnp.arange(columns)[None, None, :]

    def unfinished(carry):
        rounds, chosen = carry
        return (rounds < 2 * rows) & ~chosen.any(2).all()

    def first_mutual(score):
        """Unique choices also where several scores are equal."""
        best_in_row, best_in_column = score == score.max(2, keepdims=True), score == score.max(1, keepdims=True)
        first_column = jnp.where(best_in_row, column, columns).min(2, keepdims=True)
        first_row = jnp.where(best_in_column, row, rows).min(1, keepdims=True)
        return (first_column == column) & (first_row == row) & (score >= 0)

    def match(carry):
        rounds, chosen = carry
        free = ~(chosen.any(2)[:, :, None] | chosen.any(1)[:, None, :])
        score = jnp.where(free, likeness, -1.0)
        mutual = free & (score == score.max(2, keepdims=True)) & (score == score.max(1, keepdims=True))
        tied = ((mutual.sum(2) > 1).any(1) | (mutual.sum(1) > 1).any(1)).any()
        return rounds + 1, chosen | lax.cond(tied, first_mutual, lambda _: mutual, score)

    start = (jnp.zeros((), jnp.int32), jnp.zeros(likeness.shape, bool))
    _, chosen = lax.while_loop(unfinished, match, start)
    return jnp.where(chosen, jnp.where(cosine < 0, -1.0, 1.0), 0.0).astype(overlap_a.dtype)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _diagonal(matrix):
    return jnp.diagonal(matrix, axis1=1, axis2=2)


def _norm(matrix):
    return jnp.linalg.norm(matrix, axis=(1, 2))


def _positive(numbers):
    """Whether all numbers of each row are positive and finite."""
    return ((numbers > 0) & jnp.isfinite(numbers)).all(1)


def _congruent(gram, change):
    """`T^T P T`, stacked."""
    return matmul(matmul(change.mT, gram), change)


def _shortened(step, longest):
    """Symmetric or skew steps `(n, r, r)`, scaled down where their spectral norm may exceed a length."""
    length = jnp.sqrt(jnp.abs(matmul(step, step)).sum(2).max(1))  # at least the spectral norm
    return step * jnp.minimum(1, longest / jnp.where(length > 0, length, 1))[:, None, None]
