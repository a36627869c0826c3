"""LoRA+: the factors B of all pairs learn faster than the factors A, under any optimizer."""

import jax
import optax

from balora_jax.optimizers.scaled import check_params
from balora_jax.pairs import Pairs, PairSearch


def lora_plus(
    inner: optax.GradientTransformation, *, ratio: jax.typing.ArrayLike = 16.0, pairs: Pairs | None = None
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer: the learning rate of the factors B is `ratio` times that of everything else.

    `B <- B + ratio u_B`, where `u_B` is the update of the wrapped optimizer; all other updates stay as they are.

    Args:
        inner: the optimizer of all parameters, its learning rate that of A.
        ratio: learning rate of B over that of A, at least 1.
        pairs: names the pairs if their leaves have other names than `find_pairs` knows; see there.

    Returns:
        An `optax.GradientTransformationExtraArgs` whose state is that of `inner`.

    Raises:
        ValueError: `ratio` is below 1; from `init`, the parameters hold no pair or an unpaired factor; from `update`,
            `params` was not given.

    Notes:
        Costs one product per entry of B and keeps nothing. Decoupled weight decay of B is multiplied too, as a learning
        rate of its own would do. The authors recommend a ratio of about 2^4, tune it together with the learning rate,
        and show examples with 10 to 80. Their code gives biases and norms B's learning rate and embeddings one of their
        own; here all that is no B has A's. A wrapped optimizer that reads its own updates back (`balora`, or a clip of
        the updates) sees them before the multiplication: to balance, put `balora` around `lora_plus`.

    Source: arXiv 2402.12354.

    Examples:
        >>> import jax.numpy as jnp
        >>> params = {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.zeros((2, 3))}
        >>> tx = lora_plus(optax.sgd(0.5), ratio=4.0)
        >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        >>> float(updates["lora_a"][0, 0]), float(updates["lora_b"][0, 0])
        (-0.5, -2.0)
    """
    if isinstance(ratio, int | float) and not 1 <= ratio < float("inf"):
        raise ValueError(f"ratio must be at least 1 and finite, got {ratio!r}")
    find = PairSearch(pairs)
    if not isinstance(inner, optax.MultiSteps):  # which passes extra arguments on by itself
        inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        find.at_init(params)
        return inner.init(params)

    def update_fn(updates, state, params=None, **extra_args):
        check_params(params)
        updates, state = inner.update(updates, state, params, **extra_args)
        found = find(params)
        faster = [(None, (step_b * ratio).astype(step_b.dtype)) for _, step_b in found.leaves(updates)]
        return found.with_leaves(updates, faster), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
