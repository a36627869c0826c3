"""GaLore: Adam on gradients compressed to a few of their singular directions, for full weight matrices."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from balora_jax.factors import working_dtype
from balora_jax.linalg import matmul, svd
from balora_jax.optimizers.scaled import check_adamw, check_count, check_interval, check_params
from balora_jax.trees import leaves_by_path, only_leaves, with_leaves


class GaloreState(NamedTuple):
    """State of the compression.

    Attributes:
        count: int32, number of updates so far.
        bases: `(..., min(m, n), k)` in the place of every matrix `(..., m, n)`: orthonormal directions of its shorter
            side.
        inner: the state of Adam on the compressed gradients.
    """

    count: jax.Array  # type: ignore[assignment]
    bases: Any
    inner: optax.OptState


def galore(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int = 128,
    update_interval: jax.typing.ArrayLike = 200,
    scale: jax.typing.ArrayLike = 0.25,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    weight_decay: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformation:
    """AdamW whose moments of a weight matrix live in a low-rank subspace that follows its gradients.

    With the SVD `G = U S V^T` of the gradient `(m, n)` at steps 1, 1 + interval, ..., and k the smaller of `rank` and
    `min(m, n)`: the shorter side is compressed, `R = G V_k` for `m >= n`, else `R = U_k^T G`, and
    `W <- W - lr (scale Adam(R) V_k^T + wd W)`, else with `scale U_k Adam(R)`.

    Args:
        learning_rate: a number or a schedule.
        rank: number of directions kept.
        update_interval: steps from one basis to the next.
        scale: multiplies Adam's step of matrices.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay, not scaled.

    Returns:
        An `optax.GradientTransformation`.

    Raises:
        ValueError: a number is out of its range; from `update`, `params` was not given.

    Notes:
        Every leaf with two or more axes is a matrix, leading axes a stack of them; others have plain AdamW. The authors
        compress the matrices of attention and MLP only: give embeddings, and norms stacked over layers, to AdamW by
        `optax.partition`. The state of a matrix, `m >= n`, is `k n` for the basis and `2 k m` for the moments. One SVD
        of every matrix per interval, one after the other; else two products. Moments stay as they are when the basis
        changes, as the authors have it, whatever the signs and the order of the new directions. Non-finite numbers stay
        in their matrix, which keeps its basis then.

        `optax.contrib.galore` cannot stand here: it compresses the longer side (the authors' variant "reverse_std"),
        passes over stacked matrices, decomposes in float32 also under x64 and, under `vmap` over runs, at every step
        and in batched LAPACK calls, which can deadlock on CPUs.

        Of a square weight, kept as `(in, out)` here and as `(out, in)` by torch, this compresses the output side, and
        the released code the input side.

    Source: arXiv 2403.03507 (Algorithm 2). Its released AdamW adds eps before the bias of the moments is corrected, the
    algorithm, as here, after.

    Examples:
        >>> params = {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)}
        >>> tx = galore(0.1, rank=1, scale=1.0)
        >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        >>> state[0].bases["kernel"].shape, bool(jnp.allclose(jnp.linalg.norm(updates["kernel"], axis=1), 0.1))
        ((3, 1), True)
    """
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be an integer of at least 1, got {rank!r}")
    check_count("update_interval", update_interval)
    check_interval("scale", scale, 0)
    check_adamw(b1, b2, eps, weight_decay)
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)  # type: ignore[arg-type]

    def init_fn(params):
        leaves = _matrices(params)
        bases = {path: jnp.zeros(_basis_shape(x, rank), working_dtype(x)) for path, x in leaves.items()}
        compressed = {path: jax.eval_shape(_compress, x, bases[path]) for path, x in leaves.items()}
        moments = adam.init(with_leaves(params, compressed))
        return GaloreState(jnp.zeros((), jnp.int32), only_leaves(params, bases), moments)

    def update_fn(updates, state, params=None):
        check_params(params)
        leaves, due = _matrices(updates), state.count % update_interval == 0
        old_bases = _matrices(state.bases)
        wide = {path: x.astype(old_bases[path].dtype) for path, x in leaves.items()}
        bases = {path: _followed(due, x, old_bases[path]) for path, x in wide.items()}
        compressed = {path: _compress(x, bases[path]) for path, x in wide.items()}
        steps, inner = adam.update(with_leaves(updates, compressed), state.inner)
        steps_by_path = leaves_by_path(steps)
        full = {
            path: (scale * _expand(steps_by_path[path], bases[path], x.shape)).astype(x.dtype)
            for path, x in leaves.items()
        }
        count = optax.safe_increment(state.count)
        return with_leaves(steps, full), GaloreState(count, only_leaves(updates, bases), inner)

    return optax.chain(
        optax.GradientTransformation(init_fn, update_fn),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def _matrices(tree):
    """The leaves with two or more axes, by their paths."""
    return {path: x for path, x in leaves_by_path(tree).items() if getattr(x, "ndim", 0) >= 2}


def _basis_shape(matrix, rank):
    """The shape of a basis of the shorter side, the second one where both are equal."""
    shorter = min(matrix.shape[-2:])
    return (*matrix.shape[:-2], shorter, min(rank, shorter))


def _compress(matrix, basis):
    """`G V` of tall matrices, `U^T G` of wide ones."""
    return matmul(matrix, basis) if matrix.shape[-2] >= matrix.shape[-1] else matmul(basis.mT, matrix)


def _expand(matrix, basis, shape):
    """Compressed matrices in their full shape."""
    return matmul(matrix, basis.mT) if shape[-2] >= shape[-1] else matmul(basis, matrix)


def _followed(due, gradient, basis):
    """The basis of the gradient's largest singular directions if it is due, else the one that was."""
    stack = gradient.reshape(-1, *gradient.shape[-2:])
    new = _followed_stack(jnp.broadcast_to(due, len(stack)), stack, basis.reshape(len(stack), *basis.shape[-2:]))
    return new.reshape(basis.shape)


@jax.custom_batching.custom_vmap
def _followed_stack(due, gradients, bases):
    """As `_followed` over a leading axis.

    Under `vmap` the members join that axis: the SVD stays behind one condition, where batching a `lax.cond` would make
    every step pay for it.
    """

    def decomposed():
        finite = jnp.isfinite(gradients).all((1, 2))
        u, _, vt = svd(jnp.where(finite[:, None, None], gradients, 0))
        vectors = vt.mT if gradients.shape[1] >= gradients.shape[2] else u
        return jnp.where((due & finite)[:, None, None], vectors[:, :, : bases.shape[2]], bases)

    return jax.lax.cond(due.any(), decomposed, lambda: bases)


@_followed_stack.def_vmap
def _(axis_size, in_batched, *arguments):
    """The members in the leading axis."""
    full = (
        x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
        for x, batched in zip(arguments, in_batched, strict=True)
    )
    new = _followed_stack(*(x.reshape(-1, *x.shape[2:]) for x in full))
    return new.reshape(axis_size, -1, *new.shape[1:]), True
