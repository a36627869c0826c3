"""LoRA+: the updates of the right factors are multiplied, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from balora_jax import balancing_gap, balora
from balora_jax.optimizers.lora_plus import lora_plus

pytestmark = pytest.mark.usefixtures("float64")

SHAPES = {
    "tall.lora_a": (9, 2),
    "tall.lora_b": (2, 5),
    "wide.lora_a": (4, 3),
    "wide.lora_b": (3, 11),
    "stack.lora_a": (2, 6, 2),
    "stack.lora_b": (2, 2, 5),
    "peft.lora_A.weight": (2, 7),
    "peft.lora_B.weight": (6, 2),
    "bias": (5,),
}
RIGHT = ("tall.lora_b", "wide.lora_b", "stack.lora_b", "peft.lora_B.weight")


def make_params(dtype="float64", *, fresh=False):
    rng = np.random.default_rng(0)
    return {n: jnp.asarray(rng.standard_normal(s) * (n not in RIGHT or not fresh), dtype) for n, s in SHAPES.items()}


def gradient(x, step):
    return np.sin(3 * np.asarray(x, float) + step + 1)


def run(tx, params, steps=5):
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(steps):
        grads = {name: jnp.asarray(gradient(x, step), x.dtype) for name, x in params.items()}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert update._cache_size() == 1
    return params


def adamw(x, rate, *, b1, b2, eps, weight_decay, steps=5):
    """AdamW of one array at its own learning rate, as a parameter group of its own has it."""
    x, m, v = np.asarray(x, float), 0, 0
    for t in range(1, steps + 1):
        g, lr = gradient(x, t - 1), rate(t - 1) if callable(rate) else rate
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        x = x - lr * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + weight_decay * x)
    return x


NUMBERS = {"b1": 0.8, "b2": 0.9, "eps": 1e-3, "weight_decay": 0.2}


@pytest.mark.parametrize(
    ("ratio", "rate", "dtype", "fresh"),
    [
        (None, 0.003, "float64", False),
        (5.0, 0.01, "float64", True),
        (1, lambda count: 0.01 / (1 + count), "float64", False),
        (7.0, lambda count: 0.01 / (1 + count), "float32", False),
    ],
)
def test_agrees_with_two_parameter_groups(ratio, rate, dtype, fresh):
    params = make_params(dtype, fresh=fresh)
    tx = lora_plus(optax.adamw(rate, **NUMBERS), **({} if ratio is None else {"ratio": ratio}))
    with jax.enable_x64(dtype == "float64"):
        found = run(tx, params)
    factor = 16 if ratio is None else ratio
    for name, x in params.items():
        own = (lambda count: factor * rate(count)) if callable(rate) else factor * rate
        expected = adamw(x, own if name in RIGHT else rate, **NUMBERS)
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-12 if dtype == "float64" else 1e-5)
        assert found[name].dtype == dtype


def test_a_population_trains_as_its_members_do():
    params, ratios = make_params(), jnp.asarray([1.0, 4.0, 30.0])

    def train(params, ratio):
        tx = lora_plus(optax.adam(0.01), ratio=ratio)

        def step(carry, i):
            params, state = carry
            grads = jax.tree.map(lambda x: jnp.sin(3 * x + i), params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(5))[0][0]

    members, single = jax.tree.map(lambda x: jnp.stack([x, 2 * x, 0 * x]), params), jax.jit(train)
    together = jax.jit(jax.vmap(train))(members, ratios)
    for i, ratio in enumerate(ratios):
        alone = single(jax.tree.map(lambda x, i=i: x[i], members), ratio)
        jax.tree.map(lambda x, y, i=i: np.testing.assert_allclose(x[i], y, rtol=1e-12), together, alone)
    assert np.abs(together["tall.lora_b"][1] / 2 - together["tall.lora_b"][0]).max() > 0.01


def test_balancing_goes_around_it():
    params = {name: x for name, x in make_params().items() if name.startswith("stack")}
    plain, balanced = (run(tx(lora_plus(optax.sgd(0.01), ratio=9.0)), params, 1) for tx in (lambda tx: tx, balora))
    (a, b), (c, d) = (tree.values() for tree in (plain, balanced))
    np.testing.assert_allclose(c @ d, a @ b, atol=1e-10)
    assert balancing_gap(c, d).max() < 1e-10


def test_a_nonfinite_gradient_stays_in_its_leaf_and_bfloat16_stays():
    params, tx = make_params("bfloat16"), lora_plus(optax.sgd(0.1), ratio=jnp.float32(3))
    grads = params | {"tall.lora_b": params["tall.lora_b"].at[0, 0].set(jnp.nan)}
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert [name for name, x in updates.items() if not jnp.isfinite(x).all()] == ["tall.lora_b"]
    assert all(x.dtype == jnp.bfloat16 for x in updates.values())


def test_named_pairs_and_extra_arguments():
    def update_fn(updates, state, params=None, *, value):
        del params
        return jax.tree.map(lambda u: value * u, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update_fn)
    params = {"u": jnp.ones((3, 2)), "v": jnp.ones((2, 4)), "lora_a": jnp.ones(3)}
    for pairs in ([("u", "v")], lambda _: [("u", "v")]):
        tx = optax.chain(optax.scale(0.5), lora_plus(inner, ratio=2.0, pairs=pairs))
        updates, _ = tx.update(params, tx.init(params), params, value=10.0)
        assert {name: float(x.ravel()[0]) for name, x in updates.items()} == {"u": 5.0, "v": 10.0, "lora_a": 5.0}


def test_state_is_that_of_the_optimizer():
    params, adam = make_params(), optax.adam(0.1)
    tx = lora_plus(adam)
    assert jax.tree.structure(tx.init(params)) == jax.tree.structure(adam.init(params))
    state = optax.tree.map_params(tx, lambda leaf: "moment", tx.init(params))
    assert jax.tree.leaves(state).count("moment") == 2 * len(params)


@pytest.mark.parametrize("ratio", [0.5, 0, -2.0, float("nan"), float("inf")])
def test_a_bad_ratio_raises(ratio):
    with pytest.raises(ValueError, match=rf"ratio must be at least 1 and finite, got {ratio}"):
        lora_plus(optax.adam(0.1), ratio=ratio)


def test_what_is_missing_raises():
    tx, params = lora_plus(optax.sgd(0.1)), make_params()
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="no partner"):
        tx.init({"lora_a": params["tall.lora_a"]})
    with pytest.raises(ValueError, match="at least one LoRA pair"):
        tx.init({"kernel": jnp.ones((2, 2))})
