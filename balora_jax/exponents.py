"""Scaling by powers of two: it is exact, and squares of entries stay within the range of a dtype.

`jnp.ldexp` and `jnp.frexp` are not used: under `jax.enable_x64` in a jitted function jax 0.12 traces them wrongly.
"""

import jax
import jax.numpy as jnp
from jax import lax

from balora_jax.gauge import Change, column_norms

# A factor that is smaller than the other by more than this power of two has no share in sums of both.
_LARGEST_SHARE = 30


@jax.jit
def times_two_to(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """Returns `x 2^k`, exactly where the dtype (float32 or float64) can hold it.

    Args:
        x: numbers of any shape.
        exponent: k, int32, of a shape that broadcasts with it; at most 252 in size.
    """
    half = exponent // 2  # so that the powers themselves are within the range of float32
    return x * _two_to(half, x.dtype) * _two_to(exponent - half, x.dtype)


def exponents(sizes: jax.Array) -> jax.Array:
    """Returns int32 exponents of two near positive sizes of any shape; 0 for what is zero or not finite."""
    usable = jnp.isfinite(sizes) & (sizes > 0)
    return jnp.floor(jnp.log2(jnp.where(usable, sizes, jnp.ones_like(sizes)))).astype(jnp.int32)


def even_exponents(sizes: jax.Array) -> jax.Array:
    """Returns `exponents`, rounded to even ones."""
    return 2 * (exponents(sizes) // 2)


@jax.jit
def near_one(gram_a: jax.Array, gram_b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the Gram matrices of pairs `(2^-i A, 2^-j B)` whose longest columns are about 1, and i and j `(n)`."""
    i, j = (even_exponents(column_norms(gram).max(1)) for gram in (gram_a, gram_b))
    return times_two_to(gram_a, -2 * i[:, None, None]), times_two_to(gram_b, -2 * j[:, None, None]), i, j


def of_unscaled(change: Change, i: jax.Array, j: jax.Array) -> Change:
    """Returns the change of gauge of pairs from that of the pairs `(2^-i A, 2^-j B)`."""
    half = ((j - i) // 2)[:, None, None]
    T, T_inv = times_two_to(change.T, half), times_two_to(change.T_inv, -half)
    return change._replace(T=T, T_inv=T_inv, values=times_two_to(change.values, (i + j)[:, None]))


def at_one_scale(change: Change, gram_a: jax.Array, gram_b: jax.Array, i: jax.Array, j: jax.Array):
    """Returns what belongs to the pairs `(c A, c B)` from what belongs to `(2^-i A, 2^-j B)`, with `c^2 = 2^-(i + j)`.

    These differ from `(A, B)` by their scale alone, so the change of gauge is the same, as far as sums with terms of
    both factors can tell it.
    """
    half = jnp.clip((j - i) // 2, -_LARGEST_SHARE, _LARGEST_SHARE)[:, None, None]
    T, T_inv = times_two_to(change.T, half), times_two_to(change.T_inv, -half)
    change = change._replace(T=T, T_inv=T_inv)
    return change, times_two_to(gram_a, -2 * half), times_two_to(gram_b, 2 * half)


def _two_to(exponent, dtype):
    """The power of two whose bits these are: an exponential need not be exact."""
    finfo = jnp.finfo(dtype)
    bits = jnp.int64 if finfo.bits == 64 else jnp.int32
    exponent = jnp.clip(exponent, finfo.minexp, -finfo.minexp).astype(bits)
    return lax.bitcast_convert_type((exponent - (finfo.minexp - 1)) << finfo.nmant, dtype)
