"""A user's own optimizer as a method, plain and balanced: `python examples/own_method.py`.

A method of the experiments is a value: a layer, a start, a scaling, an optimizer, and whether its pairs are balanced.
As a row of `METHODS` in `balora_jax/methods.py` it is also known to `balora-jax run`, to sweeps and to the tests.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from balora_jax import balancing_gap, check_projection, find_pairs, read_pairs
from balora_jax.adapters import add_adapters, iter_adapters
from balora_jax.methods import BalanceSettings, Method
from balora_jax.optimizers import OptimizerSettings, clipped, learning_rate_schedule
from balora_jax.settings import Option


def signed_momentum(settings, steps, *, momentum):
    """Steps of one size along the sign of the momentum; the method's own options come by their names."""
    rate = learning_rate_schedule(settings, steps)
    return clipped(
        settings, optax.chain(optax.trace(momentum), optax.scale_by_sign(), optax.scale_by_learning_rate(rate))
    )


OPTIONS = {"momentum": Option(0.9, "decay of the momentum")}
SIGNED = Method("steps along the sign of the momentum", optimizer=signed_momentum, options=OPTIONS)
METHODS = {"signed": SIGNED, "balora_signed": replace(SIGNED, summary="signed, balanced", balanced=True)}


class Network(nnx.Module):
    """One hidden layer."""

    def __init__(self, rngs):
        self.up = nnx.Linear(8, 32, rngs=rngs)
        self.down = nnx.Linear(32, 4, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.tanh(self.up(x)))


def train(method, x, y, steps=200):
    """Trains the adapters; returns the last loss, the worst gap and the state of the optimizer."""
    model = Network(nnx.Rngs(0))
    add_adapters(
        model,
        targets=["up", "down"],
        rank=3,
        alpha=6,
        scaling=method.scaling,
        layer=method.layer,
        initialisation=method.initialisation,
        rngs=nnx.Rngs(1),
    )
    scale = next(adapter for _, adapter in iter_adapters(model)).scale[...]
    settings = OptimizerSettings(learning_rate=3e-3, schedule="cosine")
    tx = method.transformation(settings, BalanceSettings(), steps=steps, scale=scale, options={"momentum": 0.8})
    graph, factors, rest = nnx.split(model, nnx.LoRAParam, ...)

    @jax.jit
    def step(factors, state):
        value, gradient = jax.value_and_grad(lambda f: jnp.mean((nnx.merge(graph, f, rest)(x) - y) ** 2))(factors)
        updates, state = tx.update(gradient, state, factors)
        return optax.apply_updates(factors, updates), state, value

    state = tx.init(factors)
    for _ in range(steps):
        factors, state, value = step(factors, state)
    gap = max(float(balancing_gap(*pair).max()) for pair in read_pairs(factors, find_pairs(factors)))
    return float(value), gap, state


x = jax.random.normal(jax.random.key(0), (128, 8))
outcomes = {name: train(method, x, Network(nnx.Rngs(5))(x)) for name, method in METHODS.items()}
for name, (loss, gap, _) in outcomes.items():
    print(f"{name:14} loss {loss:.4f}, worst gap {gap:.0e}; own options {METHODS[name].defaults}")
check_projection(outcomes["balora_signed"][2])
