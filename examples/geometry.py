# %% [markdown]
# # Gradient descent under three metrics
#
# Balanced LoRA is Riemannian gradient descent on the matrices of rank r under the Bures metric. Other metrics give
# other methods. Here three of them approximate a matrix, one well and one badly conditioned, from the same start.

# %%
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

from balora_jax import bures, conditioning

ROWS, COLUMNS, RANK, STEPS = 30, 20, 3, 60


def target(condition):
    """A matrix of rank 3 whose singular values go from `condition` to 1."""
    u, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (ROWS, RANK)))
    v, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (COLUMNS, RANK)))
    return u * jnp.geomspace(condition, 1, RANK) @ v.T


@partial(jax.jit, static_argnames="metric")
def descend(z, metric):
    """Armijo's rule chooses the steps, for every metric alike."""
    noise = jax.random.normal(jax.random.key(2), z.shape) / (ROWS**0.5 + COLUMNS**0.5)
    start = bures.from_matrix(z + noise, RANK)

    def loss(a, b):
        return 0.5 * jnp.sum((a @ b - z) ** 2)

    return bures.riemannian_gradient_descent(loss, start, steps=STEPS, search=True, metric=metric)


# %% [markdown]
# `"bures"` is gradient descent of balanced factors, `"embedded"` uses the inner product of matrices, and `"scaled"`
# divides the gradients by the Gram matrices of the factors (ScaledGD).

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
last = {}
for axis, condition in zip(axes, (2, 50), strict=True):
    z = target(condition)
    for metric in ("bures", "embedded", "scaled"):
        descent = descend(z, metric)
        last[condition, metric] = float(descent.losses[-1])
        axis.semilogy(jnp.maximum(descent.losses, 1e-14), label=metric)
    axis.set(title=f"condition number of the target: {condition}", xlabel="step")
axes[0].set_ylabel("loss")
axes[0].legend(frameon=False)
figure.savefig("geometry.png", dpi=120)

# %% [markdown]
# Under the Bures metric the speed depends on the target: near a minimum the loss has the condition number
# `2 sigma_1 / sigma_r`, and no pair of the same product has a smaller one. The other two do not depend on it; their
# steps divide by singular values, which those of Bures never do.

# %%
for condition in (2, 50):
    values = jnp.linalg.svd(target(condition), compute_uv=False)
    number = float(conditioning.least_condition_number(values, RANK))
    rate = float(conditioning.predicted_rate(number))
    print(f"target {condition}: condition number {number:.0f}, best error per step {rate:.3f}")
