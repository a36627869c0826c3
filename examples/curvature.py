# %% [markdown]
# # Geodesics and curvature
#
# The matrices of rank r are curved. A geodesic under the Bures metric stays among them, where a straight line of
# products leaves them; and the space bends both ways.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

from balora_jax import bures

# %% [markdown]
# ## A geodesic against a straight line
#
# Two adapters of rank 2 whose products have the same singular values, 1 and 0.5, in other directions. On the straight
# line between the products there are four singular values; the geodesic keeps two. Its length is at least the distance
# that is found without it, by turning one pair to the other.


# %%
def point(key, values):
    """A balanced pair of a product with given singular values."""
    u, v = (jnp.linalg.qr(jax.random.normal(k, (8, len(values))))[0] for k in jax.random.split(jax.random.key(key)))
    root = jnp.sqrt(jnp.asarray(values))
    return bures.Point(u * root, root[:, None] * v.T)


start, end = point(0, [1.0, 0.5]), point(1, [1.0, 0.5])
weights = jnp.linspace(0, 1, 21)
tangent = bures.log(start, end)
paths = {
    "geodesic": jax.vmap(lambda t: bures.to_matrix(bures.exp(start, bures.Tangent(*(t * x for x in tangent)))))(
        weights
    ),
    "straight line": jax.vmap(lambda t: (1 - t) * bures.to_matrix(start) + t * bures.to_matrix(end))(weights),
}
values = {name: jnp.linalg.svd(path, compute_uv=False)[:, :4] for name, path in paths.items()}
length, chord = float(bures.norm(start, tangent)), float(bures.distance(start, end))
print(f"geodesic distance {length:.3f}, distance modulo rotations {chord:.3f}")

figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
for axis, (name, along) in zip(axes, values.items(), strict=True):
    axis.plot(weights, along, color="tab:blue")
    axis.set(title=name, xlabel="weight")
axes[0].set_ylabel("singular values")
figure.savefig("geodesic.png", dpi=120)

# %% [markdown]
# ## Both signs of curvature
#
# At a product with singular values 1 and 0.1 random planes have sectional curvatures of both signs. The quotient by
# rotations adds none below zero, as in the Bures-Wasserstein metric on positive semidefinite matrices, which has
# nothing else. Balance makes the pairs a curved surface in the space of all pairs, and adds curvature of either sign.

# %%
corner = point(2, [1.0, 0.1])


def curvature(key):
    """The sectional curvature of a random plane."""
    first, second = (bures.random_tangent_vector(k, corner) for k in jax.random.split(key))
    return bures.sectional_curvature(corner, first, second)


curvatures = jax.jit(jax.vmap(curvature))(jax.random.split(jax.random.key(3), 5000))
figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
axis.hist(curvatures, bins=80)
axis.axvline(0, color="black", linewidth=0.8)
axis.set(xlabel="sectional curvature", ylabel="planes", yscale="log", title="singular values 1 and 0.1")
figure.savefig("curvature.png", dpi=120)
print(f"from {float(curvatures.min()):.2f} to {float(curvatures.max()):.2f}")
