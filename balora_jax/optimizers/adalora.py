"""AdaLoRA: singular-value-like updates whose triplets compete for a budget that shrinks in training."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from balora_jax.factors import working_dtype
from balora_jax.linalg import matmul
from balora_jax.optimizers.scaled import check_count, check_interval, check_params
from balora_jax.pairs import Pair, TreePairs, find_pairs
from balora_jax.trees import KeyPath, is_masked, leaves_by_path, only_leaves, path_text, with_leaves


class AdaloraState(NamedTuple):
    """State of `adalora`; its trees are those of the parameters, of which they hold the factors P, E and Q alone.

    Attributes:
        count: int32, number of updates so far.
        sensitivity: smoothed `|p dL/dp|`, of the shape of the leaf.
        uncertainty: smoothed distance of `|p dL/dp|` from its smoothed value, likewise.
        kept: bool, of the leaves E alone: the triplets that the last allocation kept.
        inner: the state of the wrapped optimizer.
    """

    count: jax.Array  # type: ignore[assignment]
    sensitivity: Any
    uncertainty: Any
    kept: Any
    inner: optax.OptState


def adalora(
    inner: optax.GradientTransformation,
    *,
    total_steps: int,
    initial_steps: int = 0,
    final_steps: int = 0,
    interval: int = 1,
    target_share: float = 0.5,
    b1: jax.typing.ArrayLike = 0.85,
    b2: jax.typing.ArrayLike = 0.85,
    regularisation: jax.typing.ArrayLike = 0.5,
) -> optax.GradientTransformation:
    """Wraps an optimizer: keeps P and Q near orthogonal, and sets the least important entries of E to zero.

    For updates `P diag(E) Q` of n weights, `P (a, r)` in `lora_a`, `E (r)` in `lora_e`, `Q (r, b)` in `lora_b`, at
    step t = 1, 2, ...:

    * the gradient of `gamma / 2n sum (||P^T P - I||_F + ||Q Q^T - I||_F)` is added to those of P and Q;
    * with these gradients g, for every entry p: `I = |p g|`, `S <- b1 S + (1 - b1) I`, `U <- b2 U + (1 - b2) |I - S|`;
    * the optimizer makes its step;
    * if `t` is a multiple of `interval`, or in the last phase: of all triplets the `b_t` with the largest scores
      `(S U)(E_k) + mean_i (S U)(P_ik) + mean_j (S U)(Q_kj)` are kept, and E_k of the others becomes 0.

    The budget `b_t` is that of all triplets, N, for `t <= initial_steps`, when nothing is set to zero;
    `M = round(target_share N)` from `total_steps - final_steps` on; in between
    `floor(M + (N - M) (1 - (t - initial_steps) / (total_steps - final_steps - initial_steps))^3)`. In the last phase S
    and U, and so the triplets that are kept, stay as they are. Triplets that were set to zero can come back until then.

    Args:
        inner: the optimizer of all parameters.
        total_steps: number of updates of the whole run.
        initial_steps: first steps in which all triplets stay.
        final_steps: last steps in which the choice of triplets is fixed.
        interval: steps from one choice to the next.
        target_share: share of the triplets that remain in the end. The authors' runs start with 1.5 times the target
            rank (2 / 3); here it is half of the rank of the start.
        b1: decay of the sensitivity.
        b2: decay of the uncertainty.
        regularisation: gamma, PEFT's default; the authors' runs have 0.1 to 0.5.

    Returns:
        An `optax.GradientTransformation` whose state is an `AdaloraState`.

    Raises:
        ValueError: a number is out of its range; from `init`, the parameters hold no pair, an unpaired factor, or a
            pair without its E; from `update`, `params` was not given.

    Notes:
        The state is twice the factors, beside that of `inner`, which it wraps so that its own steps are not taken for
        sensitivities. Costs O((a + b) r^2) per pair and step for the regularizer, whose gradient is exact: losses are
        reported without it. Clipping belongs into `inner`. A triplet whose score is not a number counts as the least.
        Ties go to the triplets that come first.

        Weights and gradients of one step make the sensitivity, as in Algorithm 1 of the paper; the released code and
        PEFT take the weights after the step. Exactly `b_t` triplets are kept where these set all to zero that are at
        the threshold. As in PEFT the last phase begins at step `total_steps - final_steps`, whatever the interval.

    Source: arXiv 2303.10512 (Algorithm 1).

    Examples:
        >>> params = {"lora_a": jnp.eye(3, 2), "lora_e": jnp.asarray([3.0, 1.0]), "lora_b": jnp.eye(2, 3)}
        >>> tx = adalora(optax.sgd(0.1), total_steps=1)
        >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        >>> optax.apply_updates(params, updates)["lora_e"].tolist()  # 1 of 2 triplets is kept
        [2.9000000953674316, 0.0]
    """
    check_count("total_steps", total_steps)
    check_count("interval", interval)
    for name, steps in (("initial_steps", initial_steps), ("final_steps", final_steps)):
        check_interval(name, steps, 0, total_steps)
    if initial_steps + final_steps >= total_steps:
        raise ValueError(
            f"initial_steps and final_steps must be below total_steps ({total_steps}) together, got {initial_steps} "
            f"and {final_steps}"
        )
    check_interval("target_share", target_share, 0, above=True)
    if target_share > 1:
        raise ValueError(f"target_share must be in (0, 1], got {target_share!r}")
    check_interval("b1", b1, 0, 1)
    check_interval("b2", b2, 0, 1)
    check_interval("regularisation", regularisation, 0)
    last_phase = total_steps - final_steps

    def init_fn(params):
        triplets = _find_triplets(params) if jax.tree.leaves(params) else ()  # optax has an empty placeholder
        leaves = leaves_by_path(params)
        paths = [path for pair, path_e in triplets for path in (pair.path_a, path_e, pair.path_b)]
        zeros, more = (
            {path: jnp.zeros_like(leaves[path], working_dtype(leaves[path])) for path in paths} for _ in range(2)
        )
        kept = {path_e: jnp.ones(leaves[path_e].shape, bool) for _, path_e in triplets}
        zeros, more, kept = (only_leaves(params, x) for x in (zeros, more, kept))
        return AdaloraState(jnp.zeros((), jnp.int32), zeros, more, kept, inner.init(params))

    def update_fn(updates, state, params=None):
        check_params(params)
        triplets, count = _find_triplets(params), optax.safe_increment(state.count)
        updates = _regularised(updates, params, TreePairs([pair for pair, _ in triplets]), regularisation)
        old, gradients, learning = leaves_by_path(params), leaves_by_path(updates), count < last_phase
        sensitivity, uncertainty = {}, {}
        spreads, old_kept = leaves_by_path(state.uncertainty), leaves_by_path(state.kept)
        for path, mean in leaves_by_path(state.sensitivity).items():
            if is_masked(mean):
                continue
            now = jnp.abs(old[path].astype(mean.dtype) * gradients[path].astype(mean.dtype))
            smooth = b1 * mean + (1 - b1) * now
            spread = b2 * spreads[path] + (1 - b2) * jnp.abs(now - smooth)
            sensitivity[path] = jnp.where(learning, smooth, mean).astype(mean.dtype)
            uncertainty[path] = jnp.where(learning, spread, spreads[path]).astype(mean.dtype)
        scores = [_score(sensitivity, uncertainty, pair, path_e) for pair, path_e in triplets]
        done = (count - initial_steps) / (last_phase - initial_steps)
        due = (count > initial_steps) & (count % interval == 0) | (count >= last_phase)
        kept = {
            path_e: jnp.where(due, chosen.reshape(old[path_e].shape), old_kept[path_e])
            for (_, path_e), chosen in zip(triplets, _largest(scores, done, target_share), strict=True)
        }
        updates, moments = inner.update(updates, state.inner, params)
        steps = leaves_by_path(updates)
        masked = {
            path_e: jnp.where(due & ~kept[path_e], -old[path_e].astype(steps[path_e].dtype), steps[path_e])
            for _, path_e in triplets
        }
        sensitivity, uncertainty, kept = (only_leaves(params, x) for x in (sensitivity, uncertainty, kept))
        return with_leaves(updates, masked), AdaloraState(count, sensitivity, uncertainty, kept, moments)

    return optax.GradientTransformation(init_fn, update_fn)


def _find_triplets(params: Any) -> tuple[tuple[Pair, KeyPath], ...]:
    """The pairs `(P, Q)` of a tree, each with the path of its E."""
    leaves, found = leaves_by_path(params), []
    for pair in find_pairs(params):
        path_e = _path_of_middle(pair.path_a)
        n, _, rank = jax.eval_shape(pair.canonical_a, leaves[pair.path_a]).shape
        size = getattr(leaves.get(path_e), "size", None)
        if size != n * rank:
            raise ValueError(
                f"{path_text(path_e)} must hold the {n * rank} values between {path_text(pair.path_a)} and "
                f"{path_text(pair.path_b)}, got {'no such leaf' if size is None else f'{size} values'}"
            )
        found.append((pair, path_e))
    return tuple(found)


def _path_of_middle(path) -> KeyPath:
    """The path of E beside that of P: in the last key that names the factor, `lora_e` for `lora_a`."""
    if not path:
        return path
    *before, last = path
    if isinstance(last, tuple):
        return (*before, _path_of_middle(last))
    name, letter = ("lora_A", "E") if "lora_A" in str(last) else ("lora_a", "e")
    if name not in str(last):
        return (*_path_of_middle(tuple(before)), last)
    return (*before, f"lora_{letter}".join(str(last).rsplit(name, 1)))


def _regularised(updates, params, pairs, weight):
    """Gradients with those of `weight` times the mean of `||P^T P - I||` and `||Q Q^T - I||` over all matrices."""
    factors, gradients, new = pairs.read(params), pairs.read(updates), []
    each = weight / (2 * sum(len(a) for a, _ in factors))
    for (a, b), (g_a, g_b) in zip(factors, gradients, strict=True):
        slopes = each * _slope(a), each * _slope(b.mT).mT
        new.append(tuple((g + slope).astype(g.dtype) for g, slope in zip((g_a, g_b), slopes, strict=True)))
    return pairs.write(updates, new)


def _slope(factor):
    """The gradient of `||F^T F - I||_F` for stacked `(n, a, r)`: `2 F (F^T F - I) / ||F^T F - I||_F`."""
    factor = factor.astype(working_dtype(factor))
    residual = matmul(factor.mT, factor) - jnp.eye(factor.shape[-1], dtype=factor.dtype)
    norm = jnp.linalg.norm(residual, axis=(1, 2), keepdims=True)
    return 2 * matmul(factor, residual / jnp.where(norm > 0, norm, 1))


def _score(sensitivity, uncertainty, pair, path_e):
    """The scores `(n, r)` of the triplets of stacked weights."""
    a, e, b = (sensitivity[path] * uncertainty[path] for path in (pair.path_a, path_e, pair.path_b))
    a, b = pair.canonical_a(a).mean(1), pair.canonical_b(b).mean(2)
    return e.reshape(a.shape) + a + b


def _largest(scores, done, target_share):
    """Which triplets are among the largest of all, as many as the budget has left; `done` is 1 at the target."""
    flat = jnp.concatenate([score.ravel() for score in scores])
    target = round(target_share * flat.size)
    share = (1 - jnp.clip(done, 0, 1)) ** 3
    budget = target + jnp.floor((flat.size - target) * share + 1e-3)  # so that rounding loses no whole number
    place = jnp.argsort(jnp.argsort(-flat))
    ends = [sum(score.size for score in scores[: i + 1]) for i in range(len(scores))]
    return jnp.split(place < budget, ends[:-1])
