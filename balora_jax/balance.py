"""Balancing of one LoRA pair: the mathematics, batched over leading axes; it knows no parameter trees.

A pair is `lora_a (..., a, r)` and `lora_b (..., r, b)`; the adapter is the product `lora_a @ lora_b`. For every
invertible `R` the pair `(A R, R^-1 B)` is the same adapter. The pair is *balanced* when `A^T A = B B^T`; among all
pairs of one product the balanced ones are the best conditioned (arXiv 2605.31484).
"""

from functools import cache, partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax

Gauge = Literal["svd", "raw_svd", "nearest", "symmetric"]
GAUGES: tuple[str, ...] = get_args(Gauge)

_matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


class Balanced(NamedTuple):
    """The outcome of `balance_pair`.

    Attributes:
        lora_a: `(..., a, r)`, the new left factor.
        lora_b: `(..., r, b)`, the new right factor.
        untouched: `(...)` bool, the pair was left as it came: its product has numerical rank below `r`, or the balanced
            factors are too large for their dtype.
        nonfinite: `(...)` bool, the pair holds a NaN or an infinity; it was left as it came.
    """

    lora_a: jax.Array
    lora_b: jax.Array
    untouched: jax.Array
    nonfinite: jax.Array


def balance(lora_a: jax.Array, lora_b: jax.Array, *, gauge: Gauge = "svd") -> tuple[jax.Array, jax.Array]:
    """Returns the balanced pair with the same product: `A'^T A' = B' B'^T`, `A' B' = A B`.

    With thin QR factorisations `A = Q_A T_A`, `B^T = Q_B T_B` and the SVD `T_A T_B^T = U S V^T`, the pair
    `(Q_A U S^1/2, S^1/2 V^T Q_B^T)` is balanced with diagonal Gram matrices. Every other balanced pair differs from
    it by one r x r rotation, which the gauge chooses.

    Args:
        lora_a: `(..., a, r)` left factor, floating point.
        lora_b: `(..., r, b)` right factor with the same leading axes.
        gauge: which of the balanced pairs to return.

            * `"svd"`: diagonal Gram matrices; columns ordered and signed as those of the incoming pair, so that an
              optimizer's per-entry state keeps its meaning.
            * `"raw_svd"`: diagonal Gram matrices; singular values descend, signs as the backend returns them, which
              flips columns from step to step. The paper's three SVDs flip more of them; kept for comparison.
            * `"nearest"`: the balanced pair closest to the incoming one in the Frobenius norm.
            * `"symmetric"`: `(A T, T^-1 B)` with `T` symmetric positive definite, the square root of the
              optimal-transport map between the Gaussians with covariances `A^T A` and `B B^T`.

    Returns:
        The two factors in the shapes and dtypes of the inputs. A pair whose product has numerical rank below `r` (a
        fresh adapter with `B = 0`, say) has no balanced form that keeps every direction trainable and is returned
        unchanged; so is a pair with a NaN or an infinity, or one whose balanced factors overflow their dtype.
        `balance_pair` tells which.

    Raises:
        TypeError: a factor is not a floating-point array, or the gauge is not a string.
        ValueError: the shapes do not form pairs, or the gauge is unknown.

    Notes:
        Costs O((a + b) r^2) per pair. Runs in float32 or wider and returns the input's dtype; half-precision factors
        lose about three digits of balance when they are rounded back.

    Source: arXiv 2605.31484 (the projection onto the hyper-balanced set).

    >>> import jax, jax.numpy as jnp
    >>> key_a, key_b = jax.random.split(jax.random.key(0))
    >>> a, b = jax.random.normal(key_a, (64, 4)), 0.01 * jax.random.normal(key_b, (4, 32))
    >>> new_a, new_b = balance(a, b)
    >>> bool(jnp.allclose(new_a @ new_b, a @ b, atol=1e-5)), float(balancing_gap(new_a, new_b)) < 1e-5
    (True, True)
    """
    balanced = balance_pair(lora_a, lora_b, gauge=gauge)
    return balanced.lora_a, balanced.lora_b


def balance_pair(lora_a: jax.Array, lora_b: jax.Array, *, gauge: Gauge = "svd") -> Balanced:
    """As `balance`, and tells which pairs were left untouched and why.

    Args:
        lora_a: `(..., a, r)` left factor, floating point.
        lora_b: `(..., r, b)` right factor with the same leading axes.
        gauge: as for `balance`.

    Returns:
        A `Balanced` with flags of the leading shape.

    Raises:
        TypeError: as for `balance`.
        ValueError: as for `balance`.
    """
    check_gauge(gauge)
    lora_a, lora_b = _checked(lora_a, lora_b)
    leading, (rows, rank), columns = lora_a.shape[:-2], lora_a.shape[-2:], lora_b.shape[-1]
    wide = working_dtype(lora_a, lora_b)
    flat_a, flat_b = lora_a.reshape(-1, rows, rank), lora_b.reshape(-1, rank, columns)
    nonfinite = ~_finite(flat_a, flat_b)
    if rank > min(rows, columns):  # the product can never have rank r
        new_a, new_b, untouched = flat_a, flat_b, jnp.ones(flat_a.shape[:1], bool)
    else:
        new_a, new_b, deficient = _balance_flat(gauge)(
            *(jnp.where(nonfinite[:, None, None], 0, x).astype(wide) for x in (flat_a, flat_b))
        )
        new_a, new_b = new_a.astype(lora_a.dtype), new_b.astype(lora_b.dtype)
        untouched = deficient | ~_finite(new_a, new_b)
        keep = (untouched | nonfinite)[:, None, None]
        new_a, new_b = jnp.where(keep, flat_a, new_a), jnp.where(keep, flat_b, new_b)
    return Balanced(
        new_a.reshape(lora_a.shape),
        new_b.reshape(lora_b.shape),
        (untouched & ~nonfinite).reshape(leading),
        nonfinite.reshape(leading),
    )


def balancing_gap(lora_a: jax.Array, lora_b: jax.Array, *, relative: bool = True) -> jax.Array:
    """Returns how far a pair is from balance: `||A^T A - B B^T||_F / (||A^T A||_F + ||B B^T||_F)`.

    Args:
        lora_a: `(..., a, r)` left factor, floating point.
        lora_b: `(..., r, b)` right factor with the same leading axes.
        relative: whether to divide by the size of the Gram matrices, which gives a number between 0 (balanced) and 1
            (one factor vanishes against the other).

    Returns:
        `(...)` in float32 or wider. The relative gap of a pair of zeros is 0.

    Raises:
        TypeError: a factor is not a floating-point array.
        ValueError: the shapes do not form pairs.

    >>> float(balancing_gap(jnp.ones((3, 1)), jnp.zeros((1, 5))))
    1.0
    """
    lora_a, lora_b = _checked(lora_a, lora_b)
    wide = working_dtype(lora_a, lora_b)
    lora_a, lora_b = lora_a.astype(wide), lora_b.astype(wide)
    exponent = _exponent(jnp.maximum(_largest(lora_a), _largest(lora_b)))
    lora_a, lora_b = _scaled(lora_a, -exponent), _scaled(lora_b, -exponent)
    gram_a = _matmul(lora_a.mT, lora_a)
    gram_b = _matmul(lora_b, lora_b.mT)
    gap = jnp.linalg.norm(gram_a - gram_b, axis=(-2, -1))
    size = jnp.linalg.norm(gram_a, axis=(-2, -1)) + jnp.linalg.norm(gram_b, axis=(-2, -1))
    if relative:
        return jnp.where(size == 0, 0, gap / jnp.where(size == 0, 1, size))
    return jnp.ldexp(gap, 2 * exponent)


def check_gauge(gauge: str) -> None:
    """Raises if `gauge` is not one of `GAUGES`."""
    if not isinstance(gauge, str):
        raise TypeError(f"gauge must be one of {', '.join(GAUGES)}, got {gauge!r}")
    if gauge not in GAUGES:
        raise ValueError(f"gauge must be one of {', '.join(GAUGES)}, got {gauge!r}")


def working_dtype(*arrays: jax.Array) -> jax.typing.DTypeLike:
    """Returns the dtype of the arithmetic on some arrays: float64 if one of them is, else float32."""
    return jnp.float64 if any(array.dtype == jnp.float64 for array in arrays) else jnp.float32


def _checked(lora_a, lora_b) -> tuple[jax.Array, jax.Array]:
    """The factors as arrays, after their shapes and dtypes were checked."""
    factors = {"lora_a": jnp.asarray(lora_a), "lora_b": jnp.asarray(lora_b)}
    for name, factor in factors.items():
        if not jnp.issubdtype(factor.dtype, jnp.floating):
            raise TypeError(f"`{name}` must be a floating-point array, got dtype {factor.dtype}")
        if factor.ndim < 2:
            raise ValueError(f"`{name}` must have at least two axes, got shape {factor.shape}")
    shape_a, shape_b = factors["lora_a"].shape, factors["lora_b"].shape
    if shape_a[:-2] != shape_b[:-2] or shape_a[-1] != shape_b[-2]:
        raise ValueError(
            f"`lora_a` (..., a, r) and `lora_b` (..., r, b) must share the leading axes and the rank r, "
            f"got shapes {shape_a} and {shape_b}"
        )
    if 0 in shape_a + shape_b:
        raise ValueError(f"`lora_a` and `lora_b` must not be empty, got shapes {shape_a} and {shape_b}")
    return factors["lora_a"], factors["lora_b"]


def _finite(lora_a: jax.Array, lora_b: jax.Array) -> jax.Array:
    """Whether all entries of each pair are finite, `(...)`."""
    return jnp.isfinite(lora_a).all((-2, -1)) & jnp.isfinite(lora_b).all((-2, -1))


def _largest(factor: jax.Array) -> jax.Array:
    """The largest absolute entry of each matrix, `(...)`."""
    return jnp.abs(factor).max((-2, -1))


def _exponent(number: jax.Array) -> jax.Array:
    """The power of two above a number, int32; 0 for zero."""
    return jnp.frexp(number)[1]


def _scaled(factor: jax.Array, exponent: jax.Array) -> jax.Array:
    """Each matrix times `2 ** exponent`, exactly."""
    return jnp.ldexp(factor, exponent[..., None, None])


@cache
def _balance_flat(gauge: str):
    """The compiled projection of `(n, a, r), (n, r, b)` to `(new_a, new_b, deficient)`, one pair after the other.

    Pairs run one by one because XLA's CPU backend deadlocks when two batched LAPACK calls of one program wait for each
    other; a call on a single matrix runs in place. A `vmap` outside would put the batch back, so it is turned into a
    longer loop instead.
    """

    @jax.custom_batching.custom_vmap
    def run(lora_a, lora_b):
        return lax.map(lambda pair: _balance_one(pair[0], pair[1], gauge), (lora_a, lora_b))

    @run.def_vmap
    def _(axis_size, in_batched, lora_a, lora_b):
        factors = [
            x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            for x, batched in zip((lora_a, lora_b), in_batched, strict=True)
        ]
        n = factors[0].shape[1]
        out = run(*(x.reshape(axis_size * n, *x.shape[2:]) for x in factors))
        out = jax.tree.map(lambda x: x.reshape(axis_size, n, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return jax.jit(run)


def _balance_one(lora_a, lora_b, gauge):
    """Balances one pair `(a, r), (r, b)` with `r <= min(a, b)`; returns it and whether its product lacks rank."""
    exponent_a, exponent_b = _exponent(_largest(lora_a)), _exponent(_largest(lora_b))
    exponent_a = exponent_a + (exponent_a + exponent_b) % 2  # so that the square root below is exact
    q_a, t_a = jnp.linalg.qr(_scaled(lora_a, -exponent_a))
    q_b, t_b = jnp.linalg.qr(_scaled(lora_b, -exponent_b).T)
    u, s, vt = jnp.linalg.svd(_matmul(t_a, t_b.T), full_matrices=False)
    rank = s.shape[0]
    resolution = rank * jnp.finfo(s.dtype).eps * jnp.linalg.norm(t_a) * jnp.linalg.norm(t_b)
    deficient = ~(s[-1] > resolution)
    root = jnp.sqrt(jnp.where(deficient, 1, s))
    core_a, core_b = u * root[None, :], root[:, None] * vt
    # What the new pair has in common with each incoming factor, both factors scaled to about size 1.
    overlap_a, overlap_b = _matmul(core_a.T, t_a), _matmul(core_b, t_b)
    if gauge == "svd":
        rotation = _signed_permutation(overlap_a + overlap_b, 2 * root**2, jnp.sum(t_a**2 + t_b**2, axis=0))
    elif gauge == "nearest":  # here their true sizes count; the polar factor does not see a common scale
        smaller = -jnp.abs(exponent_a - exponent_b)
        a_is_smaller = exponent_a < exponent_b
        rotation = _polar(
            _scaled(overlap_a, jnp.where(a_is_smaller, smaller, 0))
            + _scaled(overlap_b, jnp.where(a_is_smaller, 0, smaller))
        )
    elif gauge == "symmetric":  # the orthogonal factor that makes T = T_B^T V S^-1/2 symmetric
        rotation = _polar(_matmul(vt / root[:, None], t_b))
    else:
        rotation = jnp.eye(rank, dtype=s.dtype)
    half = (exponent_a + exponent_b) // 2
    new_a = _scaled(_matmul(q_a, _matmul(core_a, rotation)), half)
    new_b = _scaled(_matmul(_matmul(rotation.T, core_b), q_b.T), half)
    return new_a, new_b, deficient


def _polar(matrix):
    """The orthogonal factor of the polar decomposition of a square matrix."""
    u, _, vt = jnp.linalg.svd(matrix)
    return _matmul(u, vt)


def _signed_permutation(overlap, new_size, incoming_size):
    """The signed permutation that aligns columns to the incoming ones, `(r, r)`.

    Pairs every new column with an incoming one by the greedy rule (largest |cosine| first): in each round all pairs
    that prefer each other are taken at once.

    Args:
        overlap: `(new, incoming)` inner products of the columns of the stacked factors `[A; B^T]`.
        new_size: `(new,)` squared norms of the new columns, positive.
        incoming_size: `(incoming,)` squared norms of the incoming columns.
    """
    rank = overlap.shape[0]
    incoming_norm = jnp.sqrt(jnp.where(incoming_size > 0, incoming_size, 1))
    cosine = jnp.abs(overlap) / (jnp.sqrt(new_size)[:, None] * incoming_norm[None, :])
    indices = jnp.arange(rank)

    def unfinished(carry):
        rounds, chosen = carry
        return (rounds < rank) & ~chosen.any(axis=1).all()

    def match(carry):
        rounds, chosen = carry
        free = ~(chosen.any(axis=1)[:, None] | chosen.any(axis=0)[None, :])
        score = jnp.where(free, cosine, -1.0)
        best_incoming, best_new = score.argmax(axis=1), score.argmax(axis=0)
        mutual = (best_incoming[:, None] == indices[None, :]) & (best_new[None, :] == indices[:, None]) & free
        return rounds + 1, chosen | mutual

    _, chosen = lax.while_loop(unfinished, match, (0, jnp.zeros((rank, rank), bool)))
    return jnp.where(chosen, jnp.where(overlap < 0, -1.0, 1.0), 0.0).astype(overlap.dtype)
