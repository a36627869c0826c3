"""Where adapters start: the factors of a fresh pair, from the weight that it adapts.

An initialisation whose product `A B` is not zero is taken out of the base again, so that a fresh adapter changes
nothing; see `LoRALinear.offset`. Weights are `W (in, out)`, as Flax keeps them: the transposes of torch's.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import lax

from balora_jax.linalg import matmul, qr, svd
from balora_jax.settings import Option

Factors = tuple[jax.Array, jax.Array]

_EXACT_SIDE = 1024
"""Weights with a shorter side up to this get an exact SVD."""
_OVERSAMPLING, _POWER_ITERATIONS = 16, 12


@dataclass(frozen=True)
class Initialisation:
    """A start of the factors.

    Attributes:
        factors: `(key, weight, rank, scale) -> (lora_a, lora_b)`, arrays `(..., in, out)` to `(..., in, r)` and
            `(..., r, out)`, float32. The weight may be stacked; `scale` is s, which may be traced.
        offset: whether the product is not zero and is taken out of the base.
        options: numbers of its own.
    """

    factors: Callable[[jax.Array, jax.Array, int, jax.typing.ArrayLike], Factors]
    offset: bool = True
    options: Mapping[str, Option] = field(default_factory=dict)


def uniform_and_zero(key: jax.Array, weight: jax.Array, rank: int, scale: jax.typing.ArrayLike) -> Factors:
    """`A ~ U(-1/sqrt(in), 1/sqrt(in))`, `B = 0`: LoRA as PEFT starts it (arXiv 2106.09685)."""
    *leading, rows, columns = weight.shape
    bound = 1 / math.sqrt(rows)
    lora_a = jax.random.uniform(key, (*leading, rows, rank), jnp.float32, -bound, bound)
    return lora_a, jnp.zeros((*leading, rank, columns), jnp.float32)


def xavier_normal(key: jax.Array, weight: jax.Array, rank: int, scale: jax.typing.ArrayLike) -> Factors:
    """Both factors normal with variance `2 / (rows + columns)` of the factor (LORO's start)."""
    *leading, rows, columns = weight.shape
    keys = jax.random.split(key)
    shapes = (*leading, rows, rank), (*leading, rank, columns)
    return tuple(  # type: ignore[return-value]
        math.sqrt(2 / (shape[-2] + shape[-1])) * jax.random.normal(key, shape, jnp.float32)
        for key, shape in zip(keys, shapes, strict=True)
    )


def kaiming_uniform(key: jax.Array, weight: jax.Array, rank: int, scale: jax.typing.ArrayLike) -> Factors:
    """`A ~ U(-1/sqrt(in), 1/sqrt(in))`, `B ~ U(-1/sqrt(r), 1/sqrt(r))`, as torch draws its layers (RefLoRA's start)."""
    keys = jax.random.split(key)
    lora_a, zeros = uniform_and_zero(keys[0], weight, rank, scale)
    bound = 1 / math.sqrt(rank)
    return lora_a, jax.random.uniform(keys[1], zeros.shape, jnp.float32, -bound, bound)


def olora(key: jax.Array, weight: jax.Array, rank: int, scale: jax.typing.ArrayLike) -> Factors:
    """`B = Q_r^T`, `A = R_r^T` from the QR decomposition of the transposed weight, `W^T = Q R` (arXiv 2406.01775).

    The first r columns of Q and rows of R are used. `B` has orthonormal rows and A the norm of the weight: the pair is
    far from balance.
    """
    q, _ = qr(jnp.asarray(weight[..., :rank, :].mT, jnp.float32))  # the first r columns of W^T have the same Q_r
    return matmul(jnp.asarray(weight, jnp.float32), q), q.mT


def pissa(key: jax.Array, weight: jax.Array, rank: int, scale: jax.typing.ArrayLike) -> Factors:
    """`A = U_r (S_r / s)^1/2`, `B = (S_r / s)^1/2 V_r^T` from the SVD of the weight (arXiv 2404.02948): hyper-balanced.

    Weights of more than 1024 x 1024 get a randomized SVD, as the authors offer it. The scale must be positive.
    """
    u, s, vt = leading_svd(weight, rank, key)
    root = jnp.sqrt(s / scale)
    return u * root[..., None, :], root[..., :, None] * vt


def leading_svd(weight: jax.Array, rank: int, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The first singular triplets `(..., a, rank)`, `(..., rank)`, `(..., rank, b)`, one matrix after the other.

    Args:
        weight: `(..., a, b)`; each matrix is cast to float32 by itself.
        rank: how many; at most the shorter side.
        key: for large weights: subspace iteration from a random start (Halko et al., arXiv 0909.4061).

    Notes:
        The working memory is that of one matrix.
    """
    rows, columns = weight.shape[-2:]
    width = rank + _OVERSAMPLING

    def one(item):
        matrix, key = item
        matrix = matrix.astype(jnp.float32)
        if min(rows, columns) <= max(_EXACT_SIDE, width):
            u, s, vt = svd(matrix)
        else:
            basis = qr(matmul(matrix, jax.random.normal(key, (columns, width), jnp.float32)))[0]
            for _ in range(_POWER_ITERATIONS):
                basis = qr(matmul(matrix, qr(matmul(matrix.T, basis))[0]))[0]
            u, s, vt = svd(matmul(basis.T, matrix))
            u = matmul(basis, u)
        return u[:, :rank], s[:rank], vt[:rank]

    flat = weight.reshape(-1, rows, columns)
    out = lax.map(one, (flat, jax.random.split(key, len(flat))))
    return jax.tree.map(lambda x: x.reshape(*weight.shape[:-2], *x.shape[1:]), out)


LORA = Initialisation(uniform_and_zero, offset=False)
OLORA = Initialisation(olora)
PISSA = Initialisation(pissa)
XAVIER = Initialisation(xavier_normal)
KAIMING = Initialisation(kaiming_uniform)
