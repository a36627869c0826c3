import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from oracles import assert_same_product, gap, hyper_balanced, mixed_pair, same_bits

from balora_jax import GAUGES, BaloraState, balance_pair, balora, balora_project

ROWS, RANK, COLUMNS = 12, 3, 9


def make_params(**pairs):
    """Pairs in float32 by their names, and leaves beside them."""
    rng = np.random.default_rng(1)
    params = {name: {"lora_a": a, "lora_b": b} for name, (a, b) in pairs.items()}
    params["rest"] = {"kernel": rng.standard_normal((ROWS, RANK)), "bias": rng.standard_normal(COLUMNS)}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


PARAMS = make_params(up=mixed_pair(ROWS, RANK, COLUMNS), down=mixed_pair(7, 2, 5, seed=1))
# Balanced already: the gauge raw_svd changes the places of its columns, and signs, and nothing else.
PERMUTED = make_params(up=hyper_balanced(ROWS, COLUMNS, [1, 9, 4]), down=hyper_balanced(7, 5, [2, 5], seed=1))
IS_FACTOR = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key.startswith("lora"), PARAMS)
LABELS = jax.tree_util.tree_map_with_path(
    lambda path, _: {"lora_a": "A", "lora_b": "B"}.get(path[-1].key, "rest"), PARAMS
)
FROZEN = jax.tree.map(lambda factor: "train" if factor else "frozen", IS_FACTOR)
FACTORS = ("lora_a", "lora_b")


def gradient(params, step=0):
    """Some smooth function of the parameters that differs from step to step."""
    return jax.tree.map(lambda x: jnp.sin(3 * x + step).astype(x.dtype), params)


@functools.partial(jax.jit, static_argnums=1)
@functools.partial(jax.grad, argnums=0)
def product_gradient(params, step):
    """Of the distances of the products `A B` from targets that differ from step to step, and of the rest from 1."""

    def loss(leaves):
        if "lora_a" not in leaves:
            return sum(jnp.sum((leaf - 1) ** 2) for leaf in jax.tree.leaves(leaves))
        product = leaves["lora_a"] @ leaves["lora_b"]
        return jnp.sum((product - jnp.cos(jnp.arange(product.size).reshape(product.shape) + step)) ** 2)

    return 0.5 * sum(map(loss, params.values()))


def products(params):
    return {name: np.asarray(x["lora_a"] @ x["lora_b"]) for name, x in params.items() if "lora_a" in x}


def assert_close(found, expected, tolerance=1e-4):
    """Of all leaves, relative to the largest entry of each."""

    def one(x, y):
        x, y = np.asarray(x, float), np.asarray(y, float)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(np.abs(y).max(), 1e-30))

    jax.tree.map(one, found, expected)


def assert_same_bits(found, expected):
    assert jax.tree.all(jax.tree.map(same_bits, found, expected))


def train(tx, params, grads, steps, **extra):
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(grads(params, step), state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params, state


# name: (optimizer of a learning rate, its moments)
OPTIMIZERS = {
    "adam": (optax.adam, "mu nu"),
    "adamw": (optax.adamw, "mu nu"),
    "nadam": (optax.nadam, "mu nu"),
    "amsgrad": (optax.amsgrad, "mu nu nu_max"),
    "adabelief": (optax.adabelief, "mu nu"),
    "momentum": (functools.partial(optax.sgd, momentum=0.9), "trace"),
    "nesterov": (functools.partial(optax.sgd, momentum=0.9, nesterov=True), "trace"),
    "lion": (optax.lion, "mu"),
    "rmsprop": (optax.rmsprop, "nu"),
    "rmsprop, corrected": (functools.partial(optax.rmsprop, bias_correction=True, momentum=0.9), "nu trace"),
    "rmsprop, centred": (functools.partial(optax.rmsprop, centered=True), "mu nu"),
    "rmsprop, both": (functools.partial(optax.rmsprop, eps=1.0, centered=True, bias_correction=True), "mu nu"),
    "adagrad": (optax.adagrad, "sum_of_squares"),
}
WRAPPED = {
    "chain": (lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate)), "mu nu"),
    "named_chain": (lambda rate: optax.named_chain(("clip", optax.clip(0.5)), ("adam", optax.adam(rate))), "mu nu"),
    "inject_hyperparams": (lambda rate: optax.inject_hyperparams(optax.adamw)(lambda _: rate), "mu nu"),
    "masked": (lambda rate: optax.masked(optax.adamw(rate), IS_FACTOR), "mu nu"),
    "B alone": (lambda rate: optax.masked(optax.adam(rate), jax.tree.map(lambda side: side == "B", LABELS)), "mu nu"),
    "LoRA+": (
        lambda rate: optax.partition(
            {"A": optax.adamw(rate), "B": optax.amsgrad(8 * rate), "rest": optax.sgd(rate)}, LABELS
        ),
        "mu nu nu_max",
    ),
    "MultiSteps": (lambda rate: optax.MultiSteps(optax.adamw(rate), 2), "acc_grads mu nu"),
    "apply_if_finite": (lambda rate: optax.apply_if_finite(optax.adamw(rate), 2), "mu nu"),
    "extra arguments": (
        lambda rate: optax.chain(optax.adamw(rate), optax.contrib.reduce_on_plateau(patience=1)),
        "mu nu",
    ),
    "bfloat16 moments": (lambda rate: optax.adamw(rate, mu_dtype="bfloat16"), "mu nu"),
}
EXTRA = {"extra arguments": {"value": jnp.ones(())}}
ORDERS = {"mu": 1, "trace": 1, "acc_grads": 1, "nu": 2, "nu_max": 2, "sum_of_squares": 2}


def moments(state):
    """All moments of factors in an optimizer state: `{path: (field, pair, side, leaf)}`."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        keys = [getattr(key, "name", getattr(key, "key", getattr(key, "idx", None))) for key in path]
        if keys[-1] in FACTORS:
            (field,) = (key for key in keys if key in ORDERS)
            found[path] = field, keys[-2], keys[-1], leaf
    return found


def assert_carried(found, plain, changes):
    """The state `found` is `plain` with its moments carried through `changes` (T by pair) by the definition."""
    expected = moments(plain)
    for (path, leaf), old in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(plain), strict=True):
        if path not in expected:
            assert same_bits(leaf, old), path
            continue
        field, pair, side, _ = expected[path]
        assert leaf.dtype == old.dtype
        tolerance, order = 1e-2 if old.dtype == jnp.bfloat16 else 1e-4, ORDERS[field]
        old, change = np.asarray(old, float), np.asarray(changes[pair], float)
        new = old @ np.linalg.inv(change).T ** order if side == "lora_a" else change.T**order @ old
        assert_close(leaf, new, tolerance)
        assert not old.any() or not np.allclose(new, old, rtol=0, atol=0.01 * np.abs(old).max())


CASES = [(name, gauge) for name in OPTIMIZERS for gauge in GAUGES] + [(name, "svd") for name in WRAPPED]


@pytest.mark.parametrize(("name", "gauge"), CASES)
def test_a_step_is_the_optimizers_then_balances_and_carries_the_moments(name, gauge):
    """Both steps start out of balance, so that the second has moments to carry, and far."""
    factory, fields = (OPTIMIZERS | WRAPPED)[name]
    inner, extra = factory(1e-1), EXTRA.get(name, {})
    tx = balora(inner, gauge=gauge)
    state = tx.init(PARAMS)
    for step in range(2):
        grads, changes = gradient(PARAMS, step), {}
        plain_updates, plain = inner.update(grads, state.inner, PARAMS, **extra)
        updates, state = tx.update(grads, state, PARAMS, **extra)
        for pair in ("up", "down"):
            moved = [PARAMS[pair][side] + plain_updates[pair][side] for side in FACTORS]
            balanced = balance_pair(*moved, gauge=gauge)
            assert_close([PARAMS[pair][side] + updates[pair][side] for side in FACTORS], list(balanced[:2]))
            changes[pair] = balanced.change
        assert_same_bits(updates["rest"], plain_updates["rest"])
        assert_carried(state.inner, plain, changes)
    assert {field for field, *_ in moments(plain).values()} == set(fields.split())
    assert tuple(map(int, state.projection)) == (2, 0, 0)


WIDE = make_params(up=mixed_pair(ROWS, RANK, COLUMNS), redundant=mixed_pair(9, 2, 2, seed=3))
WIDE["redundant"] = {"lora_a": WIDE["redundant"]["lora_a"] @ jnp.array([[1.0, 0, 2], [1, 1, 0]]), "lora_b": jnp.eye(3, 2)}
EXACT = [("momentum", gauge, WIDE) for gauge in GAUGES] + [(name, "raw_svd", PERMUTED) for name in OPTIMIZERS]


@pytest.mark.parametrize(("name", "gauge", "params"), EXACT)
def test_moments_are_those_of_the_same_gradients_in_the_new_gauge(name, gauge, params):
    """First moments through any change of gauge; all moments where columns change places and signs alone."""
    inner = optax.chain(OPTIMIZERS[name][0](1e-1), optax.set_to_zero())
    tx, (_, plain) = balora(inner, gauge=gauge), train(inner, params, product_gradient, 3)
    state = BaloraState(plain, tx.init(params).projection)
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    _, expected = train(inner, optax.apply_updates(params, updates), product_gradient, 3)
    expected = inner.update(jax.tree.map(jnp.zeros_like, params), expected)[1]
    for found, new, old in zip(*(moments(x).values() for x in (state.inner, expected, plain)), strict=True):
        assert_close(found[-1], new[-1])
        assert not np.allclose(found[-1], old[-1], rtol=0, atol=0.2 * np.abs(old[-1]).max())


# name: a way to wrap `balora(tx)`, and what should do the same with `balora` outside
AROUND = {
    "chain": (
        lambda tx: optax.chain(optax.clip_by_global_norm(0.5), balora(tx, gauge="raw_svd")),
        lambda tx: optax.chain(optax.clip_by_global_norm(0.5), tx),
    ),
    "inject_hyperparams": (
        lambda tx: optax.inject_hyperparams(lambda scale: balora(optax.chain(tx, optax.scale(scale)), gauge="raw_svd"))(
            lambda step: 1.0 + step
        ),
        lambda tx: optax.chain(tx, optax.scale_by_schedule(lambda step: 1.0 + step)),
    ),
    "inject_hyperparams of balora": (
        lambda tx: optax.inject_hyperparams(balora)(tx, gauge="raw_svd", every=1),
        lambda tx: tx,
    ),
    "masked": (
        lambda tx: optax.masked(balora(tx, gauge="raw_svd"), IS_FACTOR),
        lambda tx: optax.masked(tx, IS_FACTOR),
    ),
    "partition": (
        lambda tx: optax.partition({"train": balora(tx, gauge="raw_svd"), "frozen": optax.sgd(1e-2)}, FROZEN),
        lambda tx: optax.partition({"train": tx, "frozen": optax.sgd(1e-2)}, FROZEN),
    ),
    "MultiSteps": (
        lambda tx: optax.MultiSteps(balora(tx, gauge="raw_svd"), 3),
        lambda tx: optax.MultiSteps(tx, 3),
    ),
    "apply_if_finite": (
        lambda tx: optax.apply_if_finite(balora(tx, gauge="raw_svd"), 9),
        lambda tx: optax.apply_if_finite(tx, 9),
    ),
}


@pytest.mark.parametrize("name", AROUND)
def test_inside_and_around_another_transformation_are_the_same(name):
    """In the products: `balora` outside MultiSteps turns the columns in between too, and what was accumulated."""

    def grads(params, step):
        broken = jnp.nan if (name, step) == ("apply_if_finite", 2) else 0.0
        return jax.tree.map(lambda x: x + broken, product_gradient(params, step))

    outer, inner = AROUND[name]
    pair = [outer(optax.adam(1e-1)), balora(inner(optax.adam(1e-1)), gauge="raw_svd")]
    found, expected = (train(tx, PERMUTED, grads, 6)[0] for tx in pair)
    assert_close((products(found), found["rest"]), (products(expected), expected["rest"]))
    assert not any(np.allclose(products(found)[name], product, atol=0.1) for name, product in products(PERMUTED).items())
    assert max(gap(*(found[pair][side] for side in FACTORS)) for pair in ("up", "down")) < 3e-6
