# %% [markdown]
# # Fine-tuning an image classifier in Flax NNX
#
# A small network learns scikit-learn's handwritten digits. Then the images are turned by a quarter, and adapters of
# rank 4 learn to read them again, while the network itself stays frozen. LoRA and BaLoRA start alike.

# %%
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

from balora_jax import balancing_gap, balora, check_projection, find_pairs, read_pairs
from balora_jax.adapters import add_adapters, merge_adapters

images, labels = map(jnp.asarray, load_digits(return_X_y=True))
images = images.reshape(-1, 8, 8) / 16
turned = jnp.rot90(images, axes=(1, 2))
train, test = slice(0, 1300), slice(1300, None)


class Classifier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(64, 128, rngs=rngs)
        self.second = nnx.Linear(128, 128, rngs=rngs)
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.first(x.reshape(len(x), -1)))
        return self.head(nnx.relu(self.second(x)))


def accuracy(model, images):
    return float((model(images[test]).argmax(-1) == labels[test]).mean())


# %% [markdown]
# One loop serves both: `wrt` says what is trained, `nnx.Param` for all weights, `nnx.LoRAParam` for adapters alone.


# %%
def fit(model, tx, images, *, wrt, steps):
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)

    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(images[train]), labels[train]).mean()

    @nnx.jit
    def step(model, optimizer):
        value, gradient = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, wrt))(model)
        optimizer.update(model, gradient)
        return value

    for _ in range(steps):
        value = step(model, optimizer)
    return float(value), optimizer


pretrained = Classifier(nnx.Rngs(0))
fit(pretrained, optax.adamw(3e-3), images, wrt=nnx.Param, steps=100)
print(f"upright {accuracy(pretrained, images):.3f}, turned {accuracy(pretrained, turned):.3f}")

# %% [markdown]
# Now the adapters. `balora` around the optimizer is all that changes.

# %%
accuracies, gaps = {}, {}
for name, tx in (("LoRA", optax.adamw(1e-2)), ("BaLoRA", balora(optax.adamw(1e-2)))):
    model = nnx.clone(pretrained)
    add_adapters(model, targets=["first", "second"], rank=4, alpha=8, rngs=nnx.Rngs(1))
    value, optimizer = fit(model, tx, turned, wrt=nnx.LoRAParam, steps=100)
    factors = nnx.state(model, nnx.LoRAParam)
    gaps[name] = max(float(balancing_gap(*pair).max()) for pair in read_pairs(factors, find_pairs(factors)))
    merge_adapters(model)  # for use: the adapters become part of the weights
    accuracies[name] = accuracy(model, turned)
    print(f"{name:7} loss {value:.4f}, turned {accuracies[name]:.3f}, worst gap {gaps[name]:.0e}")
check_projection(optimizer.opt_state)
