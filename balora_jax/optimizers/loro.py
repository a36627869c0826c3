"""LORO: Adam's steps of the factors, and every so often a Riemannian step of their product."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from balora_jax.factors import working_dtype
from balora_jax.linalg import matmul, qr, split, svd
from balora_jax.optimizers.scaled import check_adamw, check_count, check_params
from balora_jax.pairs import Pairs, PairSearch


class LoroState(NamedTuple):
    """State of `loro`.

    Attributes:
        count: int32, number of updates so far.
        mu: first moments of all parameters, in float32 or wider.
        nu: second moments.
    """

    count: jax.Array  # type: ignore[assignment]
    mu: optax.Params
    nu: optax.Params


def loro(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    weight_decay: jax.typing.ArrayLike = 0.0,
    period: jax.typing.ArrayLike = 100,
    pairs: Pairs | None = None,
) -> optax.GradientTransformation:
    """Low-rank Riemannian optimizer: Adam on the factors, an exact step on the rank-r matrices in every period.

    With Adam's moments `m, v` of each factor, `d = m / (sqrt(v) + eps)` and `lr_t = lr sqrt(1 - b2^t) / (1 - b1^t)`:

    * most steps: `A <- (1 - lr_t wd) (A - lr_t d_A)`, `B` likewise;
    * steps `t = period, 2 period, ...`: `A B <- truncated SVD_r (A B - lr_t D)`, returned balanced as
      `(U S^1/2, S^1/2 V^T)`, without weight decay. D is the tangent matrix that belongs to the directions:
      `D = F Q_B^T + Q_A E (I - Q_B Q_B^T)` with `A = Q_A R_A`, `B^T = Q_B R_B`, `F = d_A R_B^-1`, `E = R_A^-T d_B`.

    Leaves that belong to no pair have AdamW with the same numbers.

    Args:
        learning_rate: a number or a schedule.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay, of the steps between the exact ones.
        period: steps from one exact step to the next; the first is step number `period`.
        pairs: names the pairs if their leaves have other names than `find_pairs` knows; see there.

    Returns:
        An `optax.GradientTransformation` whose state is a `LoroState`.

    Raises:
        ValueError: a number is out of its range; from `init`, the parameters hold no pair or an unpaired factor; from
            `update`, `params` was not given.

    Notes:
        An exact step costs O((a + b) r^2): QR of `(a, r)` and `(b, r)` twice and an SVD of `(2 r, 2 r)`; no a x b
        matrix is formed. The state is AdamW's, twice the parameters. Exact steps leave the moments as they are, though
        the gauge of the factors changes. Entrywise directions depend on the gauge, so no step is invariant.

        The method starts with both factors drawn (Xavier normal) and `s A B` taken from the frozen weight. From `B = 0`
        training starts as with Adam: a pair of which a factor is deficient in float32 or wider, or that is not finite,
        takes the ordinary step also when the exact one is due. Where B is still small, `R_B^-1` makes exact steps
        long. Non-finite numbers in one pair stay in that pair.

        The signs of the singular vectors after an exact step are as the backend's SVD returns them, so that two
        platforms may go on from factors that differ in the signs of columns, and Adam's moments with them.

        Adam's directions are no gradients of one matrix: `Q_A^T F` and `E Q_B` differ, and the first is taken for both,
        as in the released code. That code can also reset moments at exact steps and scale the ordinary steps' learning
        rate for pre-training; its fine-tuning runs, followed here, do neither.

    Source: "Parameter and Memory Efficient Pretraining via Low-rank Riemannian Optimization", ICLR 2025.

    Examples:
        >>> params = {"lora_a": jnp.eye(4, 2), "lora_b": 2.0 * jnp.eye(2, 3)}
        >>> tx = loro(0.1, period=1)
        >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        >>> a, b = optax.apply_updates(params, updates).values()
        >>> bool(jnp.allclose(a.T @ a, b @ b.T, atol=1e-5))
        True
    """
    check_adamw(b1, b2, eps, weight_decay)
    check_count("period", period)
    find = PairSearch(pairs)

    def init_fn(params):
        find.at_init(params)
        mu, nu = (jax.tree.map(lambda x: jnp.zeros_like(x, dtype=working_dtype(x)), params) for _ in range(2))
        return LoroState(jnp.zeros((), jnp.int32), mu, nu)

    def update_fn(updates, state, params=None):
        check_params(params)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: (b1 * m + (1 - b1) * g).astype(m.dtype), state.mu, updates)
        nu = jax.tree.map(lambda v, g: (b2 * v + (1 - b2) * g.astype(v.dtype) ** 2).astype(v.dtype), state.nu, updates)
        bias_1, bias_2 = 1 - b1**count, 1 - b2**count

        def adamw(m, v, x, g):
            step = m / bias_1 / (jnp.sqrt(v / bias_2) + eps) + weight_decay * x
            return (-rate * step).astype(g.dtype)

        found = find(params)
        directions = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)
        steps = _steps(
            *(found.read(tree) for tree in (params, directions, updates)),
            exact=count % period == 0,
            rate=rate * jnp.sqrt(bias_2) / bias_1,
            weight_decay=weight_decay,
        )
        return found.write(jax.tree.map(adamw, mu, nu, params, updates), steps), LoroState(count, mu, nu)

    return optax.GradientTransformation(init_fn, update_fn)


def _steps(factors, directions, gradients, *, exact, rate, weight_decay):
    """The steps of all pairs in the dtypes of their gradients; pairs of one shape go through together."""
    groups: dict[tuple, list[int]] = {}
    for i, (a, b) in enumerate(factors):
        groups.setdefault((*a.shape[1:], b.shape[2], working_dtype(a, b)), []).append(i)
    steps: dict[int, tuple[jax.Array, jax.Array]] = {}
    for (*_, dtype), members in groups.items():
        old_a, old_b, *along = (
            jnp.concatenate([pairs[i][side].astype(dtype) for i in members])
            for pairs in (factors, directions)
            for side in (0, 1)
        )
        numbers = (jnp.broadcast_to(x, len(old_a)) for x in (rate, 1 - rate * weight_decay))
        new_a, new_b = _stepped(
            jnp.broadcast_to(exact, len(old_a)), *(x.astype(dtype) for x in numbers), old_a, old_b, *along
        )
        sizes = [factors[i][0] for i in members]
        for i, step_a, step_b in zip(members, split(new_a - old_a, sizes), split(new_b - old_b, sizes), strict=True):
            steps[i] = step_a.astype(gradients[i][0].dtype), step_b.astype(gradients[i][1].dtype)
    return [steps[i] for i in range(len(factors))]


@jax.custom_batching.custom_vmap
def _stepped(exact, rate, shrink, lora_a, lora_b, d_a, d_b):
    """Pairs after an ordinary or an exact step, all arguments over a leading axis of pairs.

    Under `vmap` the members join that axis: the exact step stays behind one condition, where batching a `lax.cond`
    would make every step pay for both.
    """
    along, shrink = rate[:, None, None], shrink[:, None, None]
    near_a, near_b = shrink * (lora_a - along * d_a), shrink * (lora_b - along * d_b)
    if lora_a.shape[2] > min(lora_a.shape[1], lora_b.shape[2]):
        return near_a, near_b  # the product cannot have rank r

    def riemannian():
        far_a, far_b, found = _retracted(lora_a, lora_b, d_a, d_b, along)
        take = (exact & found)[:, None, None]
        return jnp.where(take, far_a, near_a), jnp.where(take, far_b, near_b)

    return jax.lax.cond(exact.any(), riemannian, lambda: (near_a, near_b))


@_stepped.def_vmap
def _(axis_size, in_batched, *arguments):
    """The members in the leading axis of pairs."""
    full = (
        x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
        for x, batched in zip(arguments, in_batched, strict=True)
    )
    stepped = _stepped(*(x.reshape(-1, *x.shape[2:]) for x in full))
    return tuple(x.reshape(axis_size, -1, *x.shape[1:]) for x in stepped), (True, True)


def _retracted(lora_a, lora_b, d_a, d_b, rate):
    """The balanced pairs of `truncated SVD_r (A B - rate D)`, and which pairs have them, `(n)`."""
    rank = lora_a.shape[2]
    finite = jnp.stack([jnp.isfinite(x).all((1, 2)) for x in (lora_a, lora_b, d_a, d_b)]).all(0)
    lora_a, lora_b, d_a, d_b = (jnp.where(finite[:, None, None], x, 0) for x in (lora_a, lora_b, d_a, d_b))
    (basis_a, upper_a), (basis_b, upper_b) = qr(lora_a), qr(lora_b.mT)
    (inverse_a, full_a), (inverse_b, full_b) = _inverse(upper_a), _inverse(upper_b)
    f, e = matmul(d_a, inverse_b), matmul(inverse_a.mT, d_b)
    core = matmul(basis_a.mT, f)
    left, upper_left = qr(f - matmul(basis_a, core))
    right, upper_right = qr((e - matmul(matmul(e, basis_b), basis_b.mT)).mT)
    upper = jnp.concatenate([matmul(upper_a, upper_b.mT) - rate * core, -rate * upper_right.mT], 2)
    lower = jnp.concatenate([-rate * upper_left, jnp.zeros_like(core)], 2)
    block = jnp.concatenate([upper, lower], 1)
    found = finite & full_a & full_b & jnp.isfinite(block).all((1, 2))
    u, values, vt = svd(jnp.where(found[:, None, None], block, 0))
    root = jnp.sqrt(values[:, :rank])
    new_a = matmul(jnp.concatenate([basis_a, left], 2), u[:, :, :rank] * root[:, None, :])
    new_b = matmul(root[:, :, None] * vt[:, :rank], jnp.concatenate([basis_b, right], 2).mT)
    return new_a, new_b, found


def _inverse(matrix):
    """The inverses of matrices `(n, r, r)`, and whether they have full rank to working precision, `(n)`."""
    u, values, vt = svd(matrix)
    full = values[:, -1] > matrix.shape[-1] * jnp.finfo(matrix.dtype).eps * values[:, 0]
    return matmul(vt.mT / jnp.where(full[:, None], values, 1)[:, None, :], u.mT), full
