"""LoRA-RITE: adaptive steps of LoRA pairs that do not depend on how the product is split into two factors.

The gradient of one factor is taken in an orthonormal basis of the other, which leaves only the product in it; second
moments are r x r matrices in that basis, and all moments follow the basis as it turns from step to step.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from balora_jax.factors import working_dtype
from balora_jax.linalg import eigh, matmul, qr, split, svd
from balora_jax.optimizers.scaled import check_adamw, check_interval, check_params, reciprocal
from balora_jax.pairs import Pairs, PairSearch


class LoraRiteState(NamedTuple):
    """State of the part of `lora_rite` that serves the pairs; trees of the parameters, a stack of n for each factor.

    Of factors `(a, r)` whose partners, transposed, are `(b, r)`, with `k = min(a, r)` and `l = min(b, r)`:

    Attributes:
        count: int32, number of updates so far.
        skipped: int32, factors whose gradients the last update skipped.
        basis: `(n, a, k)`, an orthonormal basis of the factor's columns at the last update.
        first: `(n, a, l)`, the first moment, in the partner's basis.
        second: `(n, l, l)`, the second moment, in the partner's basis.
    """

    count: jax.Array  # type: ignore[assignment]
    skipped: jax.Array
    basis: Any
    first: Any
    second: Any


def lora_rite(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    weight_decay: jax.typing.ArrayLike = 0.0,
    skip: jax.typing.ArrayLike | None = 1.0,
    clip_norm: jax.typing.ArrayLike | None = 1.0,
    pairs: Pairs | None = None,
) -> optax.GradientTransformation:
    """LoRA-RITE: robust invariant transformation equilibration, an adaptive optimizer of the product `A B`.

    With thin factorizations `A = U_A R_A`, `B^T = U_B R_B` and `beta_t = beta (1 - beta^(t-1)) / (1 - beta^t)`:

    * `H = g_A R_B^+`; 0 if its root mean square is above `skip`; all H of all pairs scaled to `clip_norm` together;
    * `P = U_B^T U_B'`, where `U_B'` is the basis of the last step;
    * `V <- b2_t P V P^T + (1 - b2_t) H^T H / a`;
    * `M <- b1_t M P^T + (1 - b1_t) H (V^1/2 + eps I)^-1`;
    * `A <- A - lr (M R_B^+^T + weight_decay A)`,

    and B likewise, with the sides exchanged. Leaves that belong to no pair have AdamW with the same numbers, without
    skipping and clipping.

    Args:
        learning_rate: a number or a schedule.
        b1: decay of the first moments.
        b2: decay of the second moments.
        eps: added to the root of the second moments, positive.
        weight_decay: decoupled weight decay.
        skip: a factor's gradient H is left out if its root mean square is above this; None to leave out none.
        clip_norm: most that the norm of the gradients H of all pairs together may be; None for no clipping.
        pairs: names the pairs if their leaves have other names than `find_pairs` knows; see there.

    Returns:
        An `optax.GradientTransformation`; the pairs' part of its state is a `LoraRiteState`.

    Raises:
        ValueError: a number is out of its range; from `init`, the parameters hold no pair or an unpaired factor; from
            `update`, `params` was not given.

    Notes:
        Costs O((a + b) r^2) per pair and step: two thin QR factorizations, and of r x r matrices two SVDs and two
        eigendecompositions. The state is twice the factors, and two r x r matrices per pair.

        All products `A B` of a run are the same for the starts `(A, B)` and `(A R, R^-1 B)` with any invertible R, as
        long as each factor has full rank or is 0; the eps, skipping, clipping and weight decay change nothing about it.
        What remains is rounding: for R of condition c about 1e-13 c in float64 and 1e-5 c in float32 over ten steps.
        `balora(lora_rite(...), transport=False)` therefore changes no product: the moments need no carrying.

        Singular values of R below its rounding count as 0: with `B = 0` only B moves in the first step, and both after
        it. The clip couples the pairs; a pair whose gradient is not finite is left out of the norm, so that it breaks
        no other. The released PyTorch code is followed, with its eps, skipping and clipping; the paper's escape mass,
        which that code leaves off by default, is not here.

    Source: arXiv 2410.20625.

    Examples:
        >>> params = {"lora_a": 2.0 * jnp.eye(3, 2), "lora_b": jnp.zeros((2, 3))}
        >>> tx = lora_rite(0.1)
        >>> grads = {"lora_a": jnp.zeros((3, 2)), "lora_b": jnp.asarray([[0.3, 0.0, 0.0], [0.0, -0.1, 0.0]])}
        >>> updates, _ = tx.update(grads, tx.init(params), params)
        >>> bool(jnp.allclose(updates["lora_b"], jnp.asarray([[-0.0866, 0, 0], [0, 0.0866, 0]]), atol=1e-4))
        True
    """
    check_adamw(b1, b2, eps, weight_decay)
    for name, value in (("eps", eps), ("skip", skip), ("clip_norm", clip_norm)):
        check_interval(name, value, 0, above=True)
    find = PairSearch(pairs)

    def labels(tree):
        found, rest = find.at_init(tree), jax.tree.map(lambda _: "rest", tree)
        return found.with_leaves(rest, len(found.pairs) * [("pairs", "pairs")])

    kinds = {
        "pairs": _scale_by_lora_rite(find, b1, b2, eps, skip, clip_norm),
        "rest": optax.scale_by_adam(b1=b1, b2=b2, eps=eps),  # type: ignore[arg-type]
    }
    return optax.chain(
        optax.partition(kinds, labels),
        optax.add_decayed_weights(weight_decay),  # type: ignore[arg-type]
        optax.scale_by_learning_rate(learning_rate),
    )


def _scale_by_lora_rite(find, b1, b2, eps, skip, clip_norm) -> optax.GradientTransformation:
    """The direction `M R^+^T` of each factor; of a tree that holds factors alone."""

    def init_fn(params):
        found = find.at_init(params)
        factors = _sides(found.read(params))
        fresh = [_fresh(factor, partner) for factor, partner in zip(factors, _of_partners(factors), strict=True)]
        kinds = zip(*fresh, strict=True) if fresh else 3 * ((),)
        zeros = (found.with_leaves(params, _pairwise(kind)) for kind in kinds)
        return LoraRiteState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), *zeros)

    def update_fn(updates, state, params=None):
        check_params(params)
        found, count, skipped = find(params), optax.safe_increment(state.count), jnp.zeros((), jnp.int32)
        factors = _sides(found.read(params))
        kept = (state.basis, state.first, state.second)
        old_bases, firsts, seconds = ([x for pair in found.leaves(tree) for x in pair] for tree in kept)
        factors = [x.astype(old.dtype) for x, old in zip(factors, old_bases, strict=True)]
        bases, triangles = zip(*_together(qr, factors), strict=True)
        inverses = _pseudo_inverses(triangles)
        sides = zip(_sides(found.read(updates)), _of_partners(inverses), strict=True)
        gradients = [matmul(g.astype(inverse.dtype), inverse) for g, inverse in sides]
        if skip is not None:
            over = [_too_large(h, skip) for h in gradients]
            gradients = [jnp.where(large[:, None, None], 0, h) for h, large in zip(gradients, over, strict=True)]
            skipped += sum(large.sum(dtype=jnp.int32) for large in over)
        if clip_norm is not None:
            gradients = _clipped(gradients, clip_norm)
        turns = _of_partners([matmul(x.mT, old) for x, old in zip(bases, old_bases, strict=True)])
        firsts, seconds = _next_moments(firsts, seconds, gradients, turns, count, b1, b2, eps)
        steps = [matmul(first, x.mT) for first, x in zip(firsts, _of_partners(inverses), strict=True)]
        steps = found.write(updates, [(a, b.mT) for a, b in _pairwise(steps)])
        updates = jax.tree.map(lambda u, step: step.astype(u.dtype), updates, steps)
        new = (found.with_leaves(params, _pairwise(x)) for x in (bases, firsts, seconds))
        return updates, LoraRiteState(count, skipped, *new)

    return optax.GradientTransformation(init_fn, update_fn)


def _sides(factors):
    """All factors in one list, A and B^T of a pair one after the other."""
    return [side for a, b in factors for side in (a, b.mT)]


def _pairwise(sides):
    """What belongs to the two factors of each pair, from a list of all factors."""
    return list(zip(sides[::2], sides[1::2], strict=True))


def _of_partners(sides):
    """What belongs to the partner of each factor."""
    return [sides[j ^ 1] for j in range(len(sides))]


def _together(decompose, matrices):
    """The decompositions of stacks of matrices; all of one shape go together, which compiles one for each shape."""
    groups: dict[tuple, list[int]] = {}
    for i, matrix in enumerate(matrices):
        groups.setdefault((matrix.shape[1:], matrix.dtype), []).append(i)
    results: dict[int, tuple] = {}
    for members in groups.values():
        stacks = [matrices[i] for i in members]
        parts = (split(x, stacks) for x in decompose(jnp.concatenate(stacks)))
        results |= dict(zip(members, zip(*parts, strict=True), strict=True))
    return [results[i] for i in range(len(matrices))]


def _fresh(factor, partner):
    """Zeros for what is kept of factors `(n, a, r)` with partners `(n, b, r)`: basis, first and second moment."""
    dtype, (n, rows, rank), columns = working_dtype(factor, partner), factor.shape, min(partner.shape[1:])
    shapes = (n, rows, min(rows, rank)), (n, rows, columns), (n, columns, columns)
    return tuple(jnp.zeros(shape, dtype) for shape in shapes)


def _pseudo_inverses(matrices):
    """Pseudo-inverses of stacks of matrices; of a matrix that is not finite, 0, as its pair is lost anyway."""
    parts = _together(svd, [_finite_or_zero(matrix) for matrix in matrices])
    return [matmul(vt.mT * reciprocal(s)[:, None, :], u.mT) for u, s, vt in parts]


def _finite_or_zero(matrix):
    """Stacked matrices with 0 for those that are not finite, on which a decomposition might not end."""
    return jnp.where(jnp.isfinite(matrix).all((1, 2), keepdims=True), matrix, 0)


def _too_large(h, most):
    """Whether the root mean square of each gradient is too large; one that is not finite shall be seen, not skipped."""
    return (jnp.sqrt(jnp.mean(h**2, (1, 2))) > most) & jnp.isfinite(h).all((1, 2))


def _clipped(gradients, most):
    """The gradients, brought together to a norm of at most `most`."""
    squares = [jnp.sum(h**2, (1, 2)) for h in gradients]
    norm = jnp.sqrt(sum(jnp.where(jnp.isfinite(square), square, 0).sum() for square in squares))
    shrink = jnp.where(norm > most, most / jnp.where(norm > most, norm, 1), 1)
    return [h * shrink.astype(h.dtype) for h in gradients]


def _next_moments(firsts, seconds, gradients, turns, count, b1, b2, eps):
    """The first and second moments after gradients `(n, a, l)`, carried by the turns of the partners' bases."""
    new_firsts, new_seconds = [], []
    for second, h, turn in zip(seconds, gradients, turns, strict=True):
        decay = _corrected(b2, count, h.dtype)
        turned = matmul(matmul(turn, second), turn.mT)
        new_seconds.append(decay * turned + (1 - decay) * matmul(h.mT, h) / h.shape[1])
    spectra = _together(eigh, [_finite_or_zero(second) for second in new_seconds])
    for first, h, turn, (values, vectors) in zip(firsts, gradients, turns, spectra, strict=True):
        decay = _corrected(b1, count, h.dtype)
        roots = jnp.sqrt(jnp.maximum(values, 0)) + jnp.asarray(eps, h.dtype)
        direction = matmul(matmul(h, vectors) / roots[:, None, :], vectors.mT)
        new_firsts.append(decay * matmul(first, turn.mT) + (1 - decay) * direction)
    return new_firsts, new_seconds


def _corrected(beta, count, dtype):
    """The decay with Adam's correction of the bias within, 0 for the first update."""
    beta, t = jnp.asarray(beta, dtype), count.astype(dtype)
    return beta * (1 - beta ** (t - 1)) / (1 - beta**t)
