"""Matrix functions whose derivatives stay finite where singular values are equal.

Automatic differentiation of an eigenvalue or singular value decomposition divides by differences of its values. What is
needed of them here, the solution of linear matrix equations, orthogonal polar factors and the balanced pair of a
product, is smooth there, and is differentiated from its defining equation instead: to every order, but for
`truncated`, whose derivative exists once.

All functions work on the last two axes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from balora_jax.balance import balance_pair
from balora_jax.linalg import eigh, matmul, qr, svd

_DIRECTIONS, _MOST_PRODUCTS = 40, 200  # of the iteration for linear equations


def sylvester(p: jax.Array, q: jax.Array, c: jax.Array) -> jax.Array:
    """Solves `P X + X Q = C` for symmetric P and Q whose eigenvalues have positive sums.

    Args:
        p: `(..., m, m)`.
        q: `(..., n, n)`.
        c: `(..., m, n)`.
    """
    (values_p, u), (values_q, v) = (eigh(lax.stop_gradient(x)) for x in (p, q))
    sums = values_p[..., :, None] + values_q[..., None, :]

    def solve(_, c):
        return matmul(matmul(u, matmul(matmul(u.mT, c), v) / sums), v.mT)

    return lax.custom_linear_solve(lambda x: matmul(p, x) + matmul(x, q), c, solve, symmetric=True)


def lyapunov(g: jax.Array, c: jax.Array) -> jax.Array:
    """Solves `G X + X G = C` for symmetric positive definite G.

    Args:
        g: `(..., r, r)`.
        c: `(..., r, r)`, perhaps with more leading axes.
    """
    values, u = eigh(lax.stop_gradient(g))
    sums = values[..., :, None] + values[..., None, :]

    def solve(_, c):
        return matmul(matmul(u, matmul(matmul(u.mT, c), u) / sums), u.mT)

    return lax.custom_linear_solve(lambda x: matmul(g, x) + matmul(x, g), c, solve, symmetric=True)


def solve(p: jax.Array, c: jax.Array) -> jax.Array:
    """Solves `P X = C` for symmetric positive definite P.

    Args:
        p: `(..., m, m)`.
        c: `(..., m, n)`.
    """
    values, u = eigh(lax.stop_gradient(p))

    def inverse(_, c):
        return matmul(u, matmul(u.mT, c) / values[..., :, None])

    return lax.custom_linear_solve(lambda x: matmul(p, x), c, inverse, symmetric=True)


def sylvester_of_roots(left: jax.Array, right: jax.Array, c: jax.Array) -> jax.Array:
    """Solves `L L^T X + X R R^T = C`; of small singular values of L and R more is left than of their products.

    Args:
        left: `(..., m, m)`, invertible.
        right: `(..., n, n)`, invertible.
        c: `(..., m, n)`.
    """
    (u, values_l, _), (v, values_r, _) = (svd(lax.stop_gradient(x)) for x in (left, right))
    sums = values_l[..., :, None] ** 2 + values_r[..., None, :] ** 2

    def apply(x):
        return matmul(left, matmul(left.mT, x)) + matmul(matmul(x, right), right.mT)

    def solve(_, c):
        return matmul(matmul(u, matmul(matmul(u.mT, c), v) / sums), v.mT)

    return lax.custom_linear_solve(apply, c, solve, symmetric=True)


def divide(root: jax.Array, c: jax.Array) -> jax.Array:
    """Solves `R X = C` for an invertible R.

    Args:
        root: `(..., m, m)`.
        c: `(..., m, n)`.
    """
    u, values, vt = svd(lax.stop_gradient(root))

    def solve(_, c):
        return matmul(vt.mT, matmul(u.mT, c) / values[..., :, None])

    def transpose_solve(_, c):
        return matmul(u, matmul(vt, c) / values[..., :, None])

    return lax.custom_linear_solve(lambda x: matmul(root, x), c, solve, transpose_solve)


def solve_linear(operator: Callable, right: Any, *, tolerance: float) -> Any:
    """Solves `operator(x) = right` by conjugate residuals, as GMRES, for operators that are near the identity.

    Args:
        operator: a linear function of a tree of arrays.
        right: a tree of arrays of one dtype.
        tolerance: of the residual, relative to the right-hand side.

    Source: Eisenstat, Elman and Schultz 1983 (generalized conjugate residuals, the last `_DIRECTIONS` of them).
    """

    vector, tree = ravel_pytree(right)  # one array: of several, all would have to depend on what is differentiated

    def flat(x):
        return ravel_pytree(operator(tree(x)))[0]

    def iterate(operator, right):
        def unfinished(carry):
            count, _, residual, *_ = carry
            return (count < _MOST_PRODUCTS) & (jnp.linalg.norm(residual) > tolerance * jnp.linalg.norm(right))

        def improve(carry):
            count, x, residual, directions, images = carry
            direction, image = residual, operator(residual)
            for _ in range(2):  # the second for what rounding left
                weights = images @ image
                direction, image = direction - weights @ directions, image - weights @ images
            size = jnp.linalg.norm(image)
            direction, image = direction / size, image / size
            share, place = image @ residual, count % _DIRECTIONS
            directions, images = directions.at[place].set(direction), images.at[place].set(image)
            return count + 1, x + share * direction, residual - share * image, directions, images

        blank = jnp.zeros((_DIRECTIONS, right.size), right.dtype)
        return lax.while_loop(unfinished, improve, (0, 0 * right, right, blank, blank))[1]

    return tree(lax.custom_linear_solve(flat, vector, iterate, iterate))


@jax.custom_jvp
def orthogonal_triangular(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The thin QR decomposition of a matrix of full column rank: `(..., m, n)`, `(..., n, n)`.

    Args:
        matrix: `(..., m, n)`, `n <= m`.
    """
    return qr(matrix)


@orthogonal_triangular.defjvp
def _(primals, tangents):
    (matrix,), (step,) = primals, tangents
    q, r = orthogonal_triangular(matrix)
    step = divide(r.mT, step.mT).mT
    inside = matmul(q.mT, step)
    lower = jnp.tril(inside, -1)
    turn = lower - lower.mT
    return (q, r), (step + matmul(q, turn - inside), matmul(inside - turn, r))


@jax.custom_jvp
def polar(matrix: jax.Array) -> jax.Array:
    """The orthogonal factor O of `matrix = O H`, H symmetric positive semidefinite; smooth where H is definite.

    Args:
        matrix: `(..., r, r)`.
    """
    u, _, vt = svd(matrix)
    return matmul(u, vt)


@polar.defjvp
def _(primals, tangents):
    (matrix,), (step,) = primals, tangents
    orthogonal = polar(matrix)
    definite = matmul(orthogonal.mT, matrix)
    turned = matmul(orthogonal.mT, step)
    return orthogonal, matmul(orthogonal, sylvester(definite, definite, turned - turned.mT))


@jax.custom_jvp
def balanced(lora_a: jax.Array, lora_b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`balance(lora_a, lora_b, gauge="symmetric")` with derivatives, of pairs whose product has rank r.

    Args:
        lora_a: `(..., a, r)`.
        lora_b: `(..., r, b)`.
    """
    return balance_pair(lora_a, lora_b, gauge="symmetric")[:2]


@balanced.defjvp
def _(primals, tangents):
    """From `M P M = Q` with `M = T^2`."""
    (lora_a, lora_b), (step_a, step_b) = primals, tangents
    new_a, new_b = balanced(lora_a, lora_b)
    # T and its inverse as functions of the factors, for derivatives of higher order
    gram, left = matmul(lora_a.mT, lora_a), matmul(lora_b, lora_b.mT)
    change = solve(gram, matmul(lora_a.mT, new_a))
    inverse = solve(left, matmul(lora_b, new_b.mT)).mT
    gram_step, left_step = (matmul(x.mT, y) for x, y in ((lora_a, step_a), (lora_b.mT, step_b.mT)))
    gram_step, left_step = gram_step + gram_step.mT, left_step + left_step.mT
    common = matmul(new_a.mT, new_a)
    moved = matmul(matmul(inverse, left_step), inverse.mT) - matmul(matmul(change.mT, gram_step), change)
    middle = matmul(matmul(change, sylvester(common, common, moved)), change.mT)
    change_step = sylvester(change, change, middle)
    return (new_a, new_b), (
        matmul(step_a, change) + matmul(lora_a, change_step),
        matmul(inverse, step_b) - matmul(matmul(inverse, change_step), new_b),
    )


@jax.custom_jvp
def truncated(left: jax.Array, right: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The balanced pair `(U S^1/2, S^1/2 V^T)` of the best approximation of `left @ right` of rank r.

    The pair is given up to a rotation; its derivative is the horizontal one, which serves every function of it that a
    rotation does not change. It exists once, where the r-th singular value is above the next.

    Args:
        left: `(..., a, k)`.
        right: `(..., k, b)`.
        size: array of r entries, of which only the number counts.
    """
    return _truncated(left, right, size.shape[-1])[0]


@truncated.defjvp
def _(primals, tangents):
    (left, right, size), (step_left, step_right, _) = primals, tangents
    rank = size.shape[-1]
    (new_a, new_b), (u, s, vt, u_rest, s_rest, vt_rest) = _truncated(left, right, rank)
    s, s_rest, root = s[..., None, :], s_rest[..., :, None], jnp.sqrt(s)

    def times(x):
        return matmul(step_left, matmul(right, x)) + matmul(left, matmul(step_right, x))

    def transposed_times(y):
        return matmul(right.mT, matmul(step_left.mT, y)) + matmul(step_right.mT, matmul(left.mT, y))

    forth, back = times(vt.mT), transposed_times(u)  # dX V, dX^T U
    inside = matmul(u.mT, forth)
    shared = inside / (s.mT + s)

    def outside(u, forth, u_rest, back, v_rest):
        """`(I - U U^T) dU`, where dU are the steps of the singular vectors."""
        forth = (forth - matmul(u, matmul(u.mT, forth))) / s
        cross = matmul(u_rest.mT, forth) * s**2 + s_rest * matmul(v_rest.mT, back)
        cross = cross / (s**2 - s_rest**2) - matmul(u_rest.mT, forth)
        return forth + matmul(u_rest, cross)

    v, v_rest = vt.mT, vt_rest.mT
    step_a = matmul(u, shared) * root[..., None, :] + outside(u, forth, u_rest, back, v_rest) * root[..., None, :]
    step_b = matmul(v, shared.mT) * root[..., None, :] + outside(v, back, v_rest, forth, u_rest) * root[..., None, :]
    return (new_a, new_b), (step_a, step_b.mT)


@jax.custom_jvp
def core_singular_values(left: jax.Array, right: jax.Array) -> jax.Array:
    """The singular values of `left @ right`, descending, `(..., k)`.

    Of equal ones only the sum has a derivative: `u_i^T dX v_i` for any choice of their singular vectors.

    Args:
        left: `(..., a, k)`, `k <= a`.
        right: `(..., k, b)`, `k <= b`.
    """
    return _core_svd(left, right)[1]


@core_singular_values.defjvp
def _(primals, tangents):
    (left, right), (step_left, step_right) = primals, tangents
    u, s, v = _core_svd(left, right)
    step = matmul(matmul(u.mT, step_left), matmul(right, v)) + matmul(matmul(u.mT, left), matmul(step_right, v))
    return s, jnp.diagonal(step, axis1=-2, axis2=-1)


def _core_svd(left, right):
    """U, S and V of `left @ right`, within the span of the factors."""
    (basis_a, upper_a), (basis_b, upper_b) = qr(left), qr(right.mT)
    u, s, vt = svd(matmul(upper_a, upper_b.mT))
    return matmul(basis_a, u), s, matmul(basis_b, vt.mT)


def _truncated(left, right, rank):
    """The truncated pair, and `U S V^T` of what was kept and of the rest, within the span of the factors."""
    if left.shape[-1] >= min(left.shape[-2], right.shape[-1]):
        u, s, vt = svd(matmul(left, right))
    else:
        u, s, v = _core_svd(left, right)
        vt = v.mT
    kept, rest = (u[..., :rank], s[..., :rank], vt[..., :rank, :]), (u[..., rank:], s[..., rank:], vt[..., rank:, :])
    root = jnp.sqrt(kept[1])
    return (kept[0] * root[..., None, :], root[..., :, None] * kept[2]), (*kept, *rest)
