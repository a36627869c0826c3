"""BaLoRA in a training loop of your own, in plain JAX and optax: `python examples/own_loop.py`.

Two frozen layers get LoRA pairs, which learn another function than the layers were made for. The same loop runs with
AdamW alone and with AdamW inside `balora`, from the same start.
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
import optax

from balora_jax import balancing_gap, balora, check_projection, find_pairs, read_pairs

WIDTHS, RANK, STEPS = (16, 64, 8), 4, 300


def adapters(key):
    """One pair per layer: A random, B zero, so that the fresh adapters change nothing."""
    keys = jax.random.split(key, len(WIDTHS) - 1)
    return {
        f"layer{i}": {"lora_a": jax.random.normal(k, (a, RANK)) / a**0.5, "lora_b": jnp.zeros((RANK, b))}
        for i, (k, (a, b)) in enumerate(zip(keys, pairwise(WIDTHS), strict=True))
    }


def forward(base, lora, x):
    """A two-layer network whose weights are `W + A B`."""
    for i, weight in enumerate(base):
        pair = lora[f"layer{i}"]
        x = x @ weight + x @ pair["lora_a"] @ pair["lora_b"]  # A B itself is never formed
        x = jax.nn.tanh(x) if i < len(base) - 1 else x
    return x


def train(tx, base, lora, x, y):
    """The loop. Nothing in it knows of balancing but the optimizer."""

    def loss(lora):
        return jnp.mean((forward(base, lora, x) - y) ** 2)

    @jax.jit
    def step(lora, opt_state):
        value, gradient = jax.value_and_grad(loss)(lora)
        updates, opt_state = tx.update(gradient, opt_state, lora)
        return optax.apply_updates(lora, updates), opt_state, value

    opt_state = tx.init(lora)
    for i in range(STEPS):
        lora, opt_state, value = step(lora, opt_state)
        if i % 100 == 0 or i == STEPS - 1:
            print(f"  step {i:3d}  loss {value:.4f}  worst gap {worst_gap(lora):.0e}")
    return lora, opt_state


def worst_gap(lora):
    """How far the worst pair is from `A^T A = B B^T`, between 0 and 1."""
    return max(float(balancing_gap(*factors).max()) for factors in read_pairs(lora, find_pairs(lora)))


keys = iter(jax.random.split(jax.random.key(0), 6))
base = [jax.random.normal(next(keys), shape) / shape[0] ** 0.5 for shape in pairwise(WIDTHS)]
x = jax.random.normal(next(keys), (256, WIDTHS[0]))
teacher = [weight + 0.3 * jax.random.normal(next(keys), weight.shape) / weight.shape[0] ** 0.5 for weight in base]
y = forward(teacher, jax.tree.map(jnp.zeros_like, adapters(jax.random.key(1))), x)

gaps = {}
for name, tx in (("LoRA", optax.adamw(1e-2)), ("BaLoRA", balora(optax.adamw(1e-2)))):
    print(name)
    lora, opt_state = train(tx, base, adapters(jax.random.key(1)), x, y)
    gaps[name] = worst_gap(lora)
check_projection(opt_state)  # raises if something had undone the balance
