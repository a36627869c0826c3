"""Scaling stacked pairs by powers of two: it is exact, and squares of entries stay within the range of a dtype."""

import jax
import jax.numpy as jnp

from balora_jax.gauge import Change, column_norms

# A factor that is smaller than the other by more than this power of two has no share in sums of both.
_LARGEST_SHARE = 30


def even_exponents(sizes: jax.Array) -> jax.Array:
    """Returns even exponents of two near positive sizes `(n)`; 0 for what is zero or not finite."""
    usable = jnp.isfinite(sizes) & (sizes > 0)
    return 2 * (jnp.frexp(jnp.where(usable, sizes, 1))[1] // 2)


def near_one(gram_a: jax.Array, gram_b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the Gram matrices of pairs `(2^-i A, 2^-j B)` whose longest columns are about 1, and i and j `(n)`."""
    i, j = (even_exponents(column_norms(gram).max(1)) for gram in (gram_a, gram_b))
    return jnp.ldexp(gram_a, -2 * i[:, None, None]), jnp.ldexp(gram_b, -2 * j[:, None, None]), i, j


def of_unscaled(change: Change, i: jax.Array, j: jax.Array) -> Change:
    """Returns the change of gauge of pairs from that of the pairs `(2^-i A, 2^-j B)`."""
    half = ((j - i) // 2)[:, None, None]
    forward, inverse = jnp.ldexp(change.forward, half), jnp.ldexp(change.inverse, -half)
    return change._replace(forward=forward, inverse=inverse, values=jnp.ldexp(change.values, (i + j)[:, None]))


def at_one_scale(change: Change, gram_a: jax.Array, gram_b: jax.Array, i: jax.Array, j: jax.Array):
    """Returns what belongs to the pairs `(c A, c B)` from what belongs to `(2^-i A, 2^-j B)`, with `c^2 = 2^-(i + j)`.

    These differ from `(A, B)` by their scale alone, so the change of gauge is the same, as far as sums with terms of
    both factors can tell it.
    """
    half = jnp.clip((j - i) // 2, -_LARGEST_SHARE, _LARGEST_SHARE)[:, None, None]
    forward, inverse = jnp.ldexp(change.forward, half), jnp.ldexp(change.inverse, -half)
    change = change._replace(forward=forward, inverse=inverse)
    return change, jnp.ldexp(gram_a, -2 * half), jnp.ldexp(gram_b, 2 * half)
