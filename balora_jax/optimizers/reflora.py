"""RefLoRA: gradient steps as from the balanced split of the product, without moving the factors; and a scalar variant.

A gradient step of balanced factors `(A T, T^-1 B)`, carried back, is one of `g_A S`, `S^-1 g_B` with `S = (T T^T)^-1`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from balora_jax.balance import balance_factors
from balora_jax.factors import working_dtype
from balora_jax.linalg import matmul
from balora_jax.optimizers.scaled import check_adamw, check_interval, check_params
from balora_jax.pairs import Pairs, PairSearch
from balora_jax.status import is_skipped
from balora_jax.transport import move_state


class RefloraState(NamedTuple):
    """State of `precondition_by_reflora`.

    Attributes:
        count: int32, number of updates so far.
        untouched: int32, pairs whose gradients the last update, if it was after the warm-up, left as they came.
    """

    count: jax.Array  # type: ignore[assignment]
    untouched: jax.Array


def precondition_by_reflora(
    *, warmup_steps: jax.typing.ArrayLike = 100, pairs: Pairs | None = None
) -> optax.GradientTransformation:
    """Preconditions the gradients of every LoRA pair by the geometric mean of its Gram matrices.

    `g_A <- g_A S`, `g_B <- S^-1 g_B` with `S = A^T A # (B B^T)^-1`, the symmetric positive definite solution of
    `S B B^T S = A^T A`. Leaves that belong to no pair keep their gradients.

    Args:
        warmup_steps: number of first updates that leave all gradients as they are.
        pairs: names the pairs if their leaves have other names than `find_pairs` knows; see there.

    Returns:
        An `optax.GradientTransformation` with a `RefloraState`, to stand in front of an optimizer.

    Raises:
        ValueError: `warmup_steps` is negative; from `init`, the parameters hold no pair or an unpaired factor; from
            `update`, `params` was not given.

    Notes:
        Costs O((a + b) r^2) per pair and step and keeps two counters. `S = (T T^T)^-1` comes from the change of gauge T
        that `balance` finds. A pair whose product has numerical rank below r, for which S does not exist, keeps its
        gradients: one with `B = 0`, or any with `r > min(a, b)`. The authors add the machine epsilon to singular values
        instead. Non-finite numbers in one pair stay in that pair. In front of plain gradient descent, without warm-up,
        all products `A B` of a run are the same for the starts `(A, B)` and `(A R, R^-1 B)`. Preconditioned gradients
        change with the gauge as the factors do, not as gradients do: `balora` around what follows needs
        `transport=False`. Without warm-up the authors draw both factors (Kaiming uniform) and take `s A B` from the
        frozen weight.

    Source: arXiv 2505.18877.

    Examples:
        >>> params = {"lora_a": 2.0 * jnp.eye(3, 2), "lora_b": jnp.eye(2, 3)}
        >>> tx = precondition_by_reflora(warmup_steps=0)
        >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        >>> bool(jnp.allclose(updates["lora_a"], 2.0)), bool(jnp.allclose(updates["lora_b"], 0.5))
        (True, True)
    """
    check_interval("warmup_steps", warmup_steps, 0)
    find = PairSearch(pairs)

    def init_fn(params):
        find.at_init(params)
        return RefloraState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None):
        check_params(params)
        found = find(params)
        if isinstance(warmup_steps, int) and warmup_steps == 0:
            updates, untouched = _preconditioned(updates, params, found)
        else:
            updates, untouched = jax.lax.cond(
                state.count >= warmup_steps,
                lambda updates: _preconditioned(updates, params, found),
                lambda updates: (updates, jnp.zeros((), jnp.int32)),
                updates,
            )
        return updates, RefloraState(optax.safe_increment(state.count), untouched)

    return optax.GradientTransformation(init_fn, update_fn)


def reflora(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: jax.typing.ArrayLike = 0.0,
    warmup_steps: jax.typing.ArrayLike = 100,
    pairs: Pairs | None = None,
) -> optax.GradientTransformation:
    """RefLoRA: AdamW of the gradients `g_A S`, `S^-1 g_B` of `precondition_by_reflora`; other leaves have plain AdamW.

    Args:
        learning_rate: a number or a schedule.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        warmup_steps: number of first updates with plain gradients.
        pairs: names the pairs if their leaves have other names than `find_pairs` knows; see there.

    Returns:
        An `optax.GradientTransformation`.

    Raises:
        ValueError: as `precondition_by_reflora`, or another number is out of its range.

    Notes:
        Cost as `precondition_by_reflora`, and AdamW's state, twice the parameters. Entrywise moments depend on the
        gauge of the start. The defaults are those of the authors' runs.

    Source: arXiv 2505.18877.

    Examples:
        >>> params = {"lora_a": jnp.eye(3, 2), "lora_b": jnp.zeros((2, 3))}
        >>> tx = reflora(0.1)
        >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        >>> bool(jnp.allclose(updates["lora_b"], -0.1))
        True
    """
    check_adamw(b1, b2, eps, weight_decay)
    return optax.chain(
        precondition_by_reflora(warmup_steps=warmup_steps, pairs=pairs),
        optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay),  # type: ignore[arg-type]
    )


class RefloraSState(NamedTuple):
    """State of `reflora_s`.

    Attributes:
        count: int32, number of updates so far.
        inner: the state of AdamW, in the present scale of the factors.
    """

    count: jax.Array  # type: ignore[assignment]
    inner: optax.OptState


def reflora_s(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: jax.typing.ArrayLike = 0.0,
    warmup_steps: jax.typing.ArrayLike = 100,
    pairs: Pairs | None = None,
) -> optax.GradientTransformation:
    """RefLoRA-S: AdamW, after whose steps the factors of each pair are brought to one Frobenius norm.

    `A <- p A`, `B <- B / p` with `p = (||B|| / ||A||)^1/2` after the step, and Adam's moments exactly with them:
    `m_A <- m_A / p`, `v_A <- v_A / p^2`, `m_B <- p m_B`, `v_B <- p^2 v_B`.

    Args:
        learning_rate: a number or a schedule.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        warmup_steps: the first rescaling follows the update of this number; 0 and 1 both mean the first.
        pairs: names the pairs if their leaves have other names than `find_pairs` knows; see there.

    Returns:
        An `optax.GradientTransformation` with a `RefloraSState`, the last of a chain: it must see the final update.

    Raises:
        ValueError: a number is out of its range; from `init`, the parameters hold no pair or an unpaired factor; from
            `update`, `params` was not given.

    Notes:
        Costs O((a + b) r^2) per pair and step, almost all in carrying the moments; the state is AdamW's, twice the
        parameters. A pair of which a factor is 0 or not finite is left as AdamW made it; non-finite numbers in one pair
        stay there. Without warm-up the authors rescale before the first step too.

    Source: arXiv 2505.18877 (the scalar refactoring).

    Examples:
        >>> params = {"lora_a": 4.0 * jnp.eye(3, 2), "lora_b": jnp.eye(2, 3)}
        >>> tx = reflora_s(0.01, warmup_steps=0)
        >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        >>> params = optax.apply_updates(params, updates)
        >>> bool(jnp.allclose(jnp.linalg.norm(params["lora_a"]), jnp.linalg.norm(params["lora_b"])))
        True
    """
    check_adamw(b1, b2, eps, weight_decay)
    check_interval("warmup_steps", warmup_steps, 0)
    find = PairSearch(pairs)
    inner = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)  # type: ignore[arg-type]

    def init_fn(params):
        find.at_init(params)
        return RefloraSState(jnp.zeros((), jnp.int32), inner.init(params))

    def update_fn(updates, state, params=None):
        check_params(params)
        updates, moments = inner.update(updates, state.inner, params)
        count = optax.safe_increment(state.count)
        updates, moments = _rescaled(updates, moments, params, find(params), count >= warmup_steps)
        return updates, RefloraSState(count, moments)

    return optax.GradientTransformation(init_fn, update_fn)


def _preconditioned(updates, params, found):
    """The gradients after the preconditioning, and the number of pairs that kept theirs."""
    ranked = [a.shape[2] <= min(a.shape[1], b.shape[2]) for a, b in found.read(params)]
    short = sum(n for n, full in zip(found.counts(params), ranked, strict=True) if not full)
    found = found.only(ranked)
    factors, gradients = found.read(params), found.read(updates)
    wide = [(a.astype(working_dtype(a, b)), b.astype(working_dtype(a, b))) for a, b in factors]
    outcomes = balance_factors(wide, gauge="svd", route="auto")
    new, untouched = [], jnp.asarray(short, jnp.int32)
    for (a, b), (g_a, g_b), outcome in zip(wide, gradients, outcomes, strict=True):
        skipped, T, T_inv = is_skipped(outcome.status), outcome.T, outcome.T_inv
        h_a = matmul(matmul(g_a.astype(a.dtype), T_inv.mT), T_inv)
        h_b = matmul(T, matmul(T.mT, g_b.astype(b.dtype)))
        h_a, h_b = (jnp.where(skipped[:, None, None], g, h.astype(g.dtype)) for g, h in ((g_a, h_a), (g_b, h_b)))
        new.append((h_a, h_b))
        untouched += skipped.sum(dtype=jnp.int32)
    return found.write(updates, new), untouched


def _rescaled(updates, moments, params, found, due):
    """Updates that lead to factors of one norm in each pair, and the moments there; as they came if it is not `due`."""
    steps, changes = [], []
    for factors, step in zip(found.read(params), found.read(updates), strict=True):
        old = [x.astype(working_dtype(*factors, *step)) for x in factors]
        a, b = (x + u.astype(x.dtype) for x, u in zip(old, step, strict=True))
        norm_a, norm_b = (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) for x in (a, b))
        usable = due & (norm_a > 0) & (norm_b > 0) & jnp.isfinite(norm_a) & jnp.isfinite(norm_b)
        p = jnp.sqrt(jnp.where(usable, norm_b, 1) / jnp.where(usable, norm_a, 1))
        new = zip(step, (p * a - old[0], b / p - old[1]), strict=True)
        u_a, u_b = (jnp.where(usable, x.astype(u.dtype), u) for u, x in new)
        steps.append((u_a, u_b))
        identity = jnp.eye(a.shape[2], dtype=a.dtype)[None]
        changes.append((p * identity, identity / p))
    return found.write(updates, steps), move_state(moments, found, changes)
