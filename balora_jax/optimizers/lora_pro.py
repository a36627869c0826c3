"""LoRA-Pro: factor gradients adjusted so that the step of the product is the projected full gradient."""

import jax
import jax.numpy as jnp
import optax

from balora_jax.linalg import matmul
from balora_jax.optimizers.scaled import (
    check_adamw,
    check_interval,
    damped_inverse,
    gram_spectra,
    precondition,
    reciprocal,
)
from balora_jax.pairs import Pairs


def precondition_by_lora_pro(
    *,
    scale: jax.typing.ArrayLike = 1.0,
    damping: jax.typing.ArrayLike = 1e-8,
    pairs: Pairs | None = None,
) -> optax.GradientTransformation:
    """Adjusts the gradients of every LoRA pair so that they move the weight along the projected full gradient.

    For `W = W_0 + s A B` with `P = A^T A`, `Q = B B^T`, and `d` the damping,

        h_A = s^-2 (I - A (P + d I)^-1 A^T) g_A (Q + d I)^-1 - A X
        h_B = s^-2 (P + d I)^-1 g_B + X B
        P X + X Q = -s^-2 (P + d I)^-1 g_B B^T

    take the place of the gradients. Without damping, `s (A h_B + h_A B)` is the orthogonal projection of the gradient
    of W on the tangent space of the matrices of rank r; X makes `(h_A, h_B)` the nearest such pair to `(g_A, g_B)`.
    Leaves that belong to no pair keep their gradients.

    Args:
        scale: s, the number that the product is multiplied with, alpha / rank for LoRA; positive.
        damping: d, at least 0.
        pairs: names the pairs if their leaves have other names than `find_pairs` knows; see there.

    Returns:
        An `optax.GradientTransformation` without state, to stand in front of an optimizer.

    Raises:
        ValueError: a number is out of its range; from `init`, the parameters hold no pair or an unpaired factor; from
            `update`, `params` was not given.

    Notes:
        Costs O((a + b) r^2) and two r x r eigendecompositions per pair and step, which also solve the equation for X.
        With gradients of a loss and without damping, the step of the product that `(h_A, h_B)` makes is the same in
        every gauge, to first order in the learning rate; the split into the factors, by X, is not. Directions in which
        a damped Gram matrix is below rounding, r eps times its largest eigenvalue, count as absent, as in the
        pseudo-inverses of the authors' code. For `B = 0`, `h_A = 0` and `h_B = s^-2 (P + d I)^-1 g_B`, which is also
        their first step. Where B is small h_A is large, like 1 / B. Non-finite numbers in one pair stay in that pair.
        What comes out is a step of the factors more than a gradient: `balora` around what follows needs
        `transport=False`.

    Source: arXiv 2407.18242 (Theorems 2.1 and 2.3).

    Examples:
        >>> params = {"lora_a": jnp.eye(3, 2), "lora_b": jnp.zeros((2, 3))}
        >>> tx = precondition_by_lora_pro(scale=0.5)
        >>> updates, _ = tx.update({"lora_a": jnp.zeros((3, 2)), "lora_b": jnp.ones((2, 3))}, tx.init(params), params)
        >>> updates["lora_b"].tolist()
        [[4.0, 4.0, 4.0], [4.0, 4.0, 4.0]]
    """
    check_interval("scale", scale, 0, above=True)
    check_interval("damping", damping, 0)

    def adjusted(factors, gradients):
        spectra = gram_spectra([gram for a, b in factors for gram in (matmul(a.mT, a), matmul(b, b.mT))])
        return [
            _adjusted(pair, grads, (spectra[2 * i], spectra[2 * i + 1]), scale, damping)
            for i, (pair, grads) in enumerate(zip(factors, gradients, strict=True))
        ]

    return precondition(adjusted, pairs)


def lora_pro(
    learning_rate: optax.ScalarOrSchedule,
    *,
    scale: jax.typing.ArrayLike = 1.0,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: jax.typing.ArrayLike = 0.0,
    damping: jax.typing.ArrayLike = 1e-8,
    pairs: Pairs | None = None,
) -> optax.GradientTransformation:
    """AdamW on the adjusted gradients of LoRA-Pro; other leaves have plain AdamW.

    `precondition_by_lora_pro(scale, damping)`, then AdamW with both moments of `h_A` and `h_B`.

    Args:
        learning_rate: a number or a schedule.
        scale: s, the number that the product is multiplied with, alpha / rank for LoRA; positive.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        damping: d, at least 0.
        pairs: names the pairs if their leaves have other names than `find_pairs` knows; see there.

    Returns:
        An `optax.GradientTransformation`.

    Raises:
        ValueError: as `precondition_by_lora_pro`, or another number is out of its range.

    Notes:
        Cost as `precondition_by_lora_pro`, and AdamW's state, twice the parameters. This is the form of little memory.
        The form of Adam that the authors released keeps both moments of the a x b matrix `s (A h_B + h_A B)`, takes
        Adam's direction of it as the full gradient, and adjusts a second time; its state is `a b / ((a + b) r)` times
        larger. Adam's entrywise step of the factors is not along the projected gradient any more.

    Source: arXiv 2407.18242.

    Examples:
        >>> params = {"lora_a": jnp.eye(3, 2), "lora_b": jnp.zeros((2, 3))}
        >>> tx = lora_pro(0.1, scale=2.0)
        >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        >>> bool(jnp.allclose(updates["lora_b"], -0.1))
        True
    """
    check_adamw(b1, b2, eps, weight_decay)
    return optax.chain(
        precondition_by_lora_pro(scale=scale, damping=damping, pairs=pairs),
        optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay),  # type: ignore[arg-type]
    )


def _adjusted(pair, gradients, spectra, scale, damping):
    """`(h_A, h_B)` of stacked pairs, given eigenvalues and eigenvectors of both Gram matrices."""
    (lora_a, lora_b), (g_a, g_b), ((values_a, u), (values_b, v)) = pair, gradients, spectra
    inverse_a, inverse_b = damped_inverse(values_a, u, damping), damped_inverse(values_b, v, damping)
    factor = 1 / jnp.asarray(scale, lora_a.dtype) ** 2
    h_a, h_b = factor * matmul(g_a, inverse_b), factor * matmul(inverse_a, g_b)
    h_a = h_a - matmul(lora_a, matmul(inverse_a, matmul(lora_a.mT, h_a)))
    right = matmul(matmul(u.mT, matmul(h_b, lora_b.mT)), v)
    x = -matmul(matmul(u, right * reciprocal(values_a[:, :, None] + values_b[:, None, :])), v.mT)
    return h_a - matmul(lora_a, x), h_b + matmul(x, lora_b)
