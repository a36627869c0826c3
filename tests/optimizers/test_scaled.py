"""Preconditioning by Gram matrices: against its definition in NumPy, gauges, and the edges of its domain."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from balora_jax.optimizers.scaled import precondition_by_grams, scaled_adamw, scaled_gd

pytestmark = pytest.mark.usefixtures("float64")

RATE = 0.05


def make_params(seed=0):
    """A tall, a wide, a stacked and a transposed pair, and a leaf beside them."""
    rng = np.random.default_rng(seed)
    shapes = {
        "tall": {"lora_a": (12, 3), "lora_b": (3, 5)},
        "wide": {"lora_a": (4, 2), "lora_b": (2, 11)},
        "stack": {"lora_a": (2, 6, 3), "lora_b": (2, 3, 7)},
        "peft": {"lora_A": {"weight": (2, 8)}, "lora_B": {"weight": (6, 2)}},
        "bias": (5,),
    }
    return jax.tree.map(rng.standard_normal, shapes, is_leaf=lambda x: isinstance(x, tuple))


def pairs_of(tree):
    """The pairs of a tree of NumPy arrays as writable views `(a, r)`, `(r, b)`."""
    yield from ((tree[name]["lora_a"], tree[name]["lora_b"]) for name in ("tall", "wide"))
    yield from zip(tree["stack"]["lora_a"], tree["stack"]["lora_b"], strict=True)
    yield tree["peft"]["lora_A"]["weight"].T, tree["peft"]["lora_B"]["weight"].T


def gradient(params, step):
    """Some smooth function of the parameters that differs from step to step."""
    return jax.tree.map(lambda x: np.sin(3 * x + step), params)


def preconditioned(params, grads, damping):
    """The definition, with dense inverses."""
    grads = jax.tree.map(np.copy, grads)
    for (a, b), (g_a, g_b) in zip(pairs_of(params), pairs_of(grads), strict=True):
        unit = damping * np.eye(a.shape[1])
        g_a[...], g_b[...] = g_a @ np.linalg.inv(b @ b.T + unit), np.linalg.inv(a.T @ a + unit) @ g_b
    return grads


class AdamW:
    """The definition, on trees of NumPy arrays."""

    def __init__(self, params, *, b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.0):
        self.m, self.v = (jax.tree.map(np.zeros_like, params) for _ in range(2))
        self.numbers, self.t = (b1, b2, eps, weight_decay), 0

    def step(self, params, grads, rate):
        b1, b2, eps, weight_decay = self.numbers
        self.t += 1
        self.m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, self.m, grads)
        self.v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, self.v, grads)

        def moved(x, m, v):
            direction = m / (1 - b1**self.t) / (np.sqrt(v / (1 - b2**self.t)) + eps)
            return x - rate * (direction + weight_decay * x)

        return jax.tree.map(moved, params, self.m, self.v)


def run(tx, params, steps, grads=gradient):
    """The parameters after some steps under jit, and the updates of each step."""
    state, update, seen = tx.init(params), jax.jit(tx.update), []
    for step in range(steps):
        updates, state = update(grads(params, step), state, params)
        params = optax.apply_updates(params, updates)
        seen.append(updates)
    return params, seen


def assert_close(tree, expected, tolerance=1e-9):
    for x, y in zip(*map(jax.tree.leaves, (tree, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


ADAMW = [{}, {"b1": 0.5, "b2": 0.8, "eps": 1e-2, "weight_decay": 0.3}]


@pytest.mark.parametrize("damping", [None, 0.3])
@pytest.mark.parametrize("options", ADAMW)
def test_scaled_adamw_is_its_definition(options, damping):
    given = {} if damping is None else {"damping": damping}
    params, expected = make_params(), make_params()
    adamw = AdamW(expected, **options)
    for step in range(6):
        grads = preconditioned(expected, gradient(expected, step), 1e-6 if damping is None else damping)
        expected = adamw.step(expected, grads, RATE)
    assert_close(run(scaled_adamw(RATE, **options, **given), params, 6)[0], expected)


@pytest.mark.parametrize(("damping", "momentum"), [(None, None), (0.3, 0.7)])
def test_scaled_gd_is_its_definition(damping, momentum):
    given = {} if damping is None else {"damping": damping, "momentum": momentum}
    params, expected = make_params(), make_params()
    trace = jax.tree.map(np.zeros_like, expected)
    for step in range(6):
        grads = preconditioned(expected, gradient(expected, step), 1e-6 if damping is None else damping)
        trace = jax.tree.map(lambda t, g: (momentum or 0) * t + g, trace, grads)
        expected = jax.tree.map(lambda x, t: x - RATE * t, expected, trace)
    assert_close(run(scaled_gd(RATE, **given), params, 6)[0], expected)


def test_float32():
    params = jax.tree.map(lambda x: x.astype(np.float32), make_params())
    expected = jax.tree.map(lambda x: x.astype(float), params)
    for step in range(5):
        grads = preconditioned(expected, gradient(expected, step), 0.1)
        expected = jax.tree.map(lambda x, g: x - RATE * g, expected, grads)
    new, _ = run(scaled_gd(RATE, damping=0.1), params, 5)
    assert {x.dtype for x in jax.tree.leaves(new)} == {jnp.dtype(jnp.float32)}
    assert_close(new, expected, 1e-4)


def test_half_precision_is_computed_in_float32():
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), make_params())
    grads = gradient(jax.tree.map(lambda x: np.asarray(x, float), params), 0)
    grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), grads)
    tx = precondition_by_grams(damping=0.1)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    expected = preconditioned(*(jax.tree.map(lambda x: np.asarray(x, float), tree) for tree in (params, grads)), 0.1)
    assert_close(jax.tree.map(lambda x: np.asarray(x, float), updates), expected, 6e-3)


def factor_gradients(target):
    """Gradients of `|A B - target|^2 / 2`."""

    def grads(params, _):
        a, b = params["lora_a"], params["lora_b"]
        full = a @ b - target
        return {"lora_a": full @ b.T, "lora_b": a.T @ full}

    return grads


@pytest.mark.parametrize("momentum", [None, 0.8])
def test_products_of_scaled_gd_do_not_depend_on_the_gauge(momentum):
    rng = np.random.default_rng(1)
    a, b, change = (rng.standard_normal(shape) for shape in ((9, 3), (3, 7), (3, 3)))
    grads = factor_gradients(rng.standard_normal((9, 7)))
    tx = scaled_gd(0.1, damping=0.0, momentum=momentum)
    products = []
    for start in ((a, b), (a @ change, np.linalg.solve(change, b))):
        new, _ = run(tx, dict(zip(("lora_a", "lora_b"), start, strict=True)), 8, grads)
        products.append(new["lora_a"] @ new["lora_b"])
    np.testing.assert_allclose(products[1], products[0], rtol=1e-9, atol=1e-9)
    assert np.abs(products[0] - a @ b).max() > 0.1


@pytest.mark.parametrize("damping", [0.0, 1e-6])
@pytest.mark.parametrize("method", [scaled_gd, scaled_adamw])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_from_zero_first_b_moves_and_then_a(method, damping, dtype):
    rng = np.random.default_rng(2)
    params = {"lora_a": jnp.asarray(rng.standard_normal((9, 3)), dtype), "lora_b": jnp.zeros((3, 7), dtype)}
    target = jnp.asarray(rng.standard_normal((9, 7)), dtype)
    new, seen = run(method(0.05, damping=damping), params, 5, factor_gradients(target))
    assert float(jnp.abs(seen[0]["lora_a"]).max()) == 0
    assert float(jnp.abs(seen[0]["lora_b"]).max()) > 1e-3
    assert float(jnp.abs(seen[1]["lora_a"]).max()) > 1e-3
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(new))


def test_directions_below_rounding_count_as_absent():
    a = np.diag([1.0, 1e-9])  # squared below rounding
    params = {"lora_a": jnp.asarray(a), "lora_b": jnp.ones((2, 3))}
    tx = precondition_by_grams(damping=0.0)
    updates, _ = tx.update({"lora_a": jnp.zeros((2, 2)), "lora_b": jnp.ones((2, 3))}, tx.init(params), params)
    np.testing.assert_allclose(updates["lora_b"], [[1] * 3, [0] * 3], atol=1e-12)


@pytest.mark.parametrize("poisoned", ["gradient", "parameter"])
def test_what_is_not_finite_stays_in_its_pair(poisoned):
    params = make_params()
    grads = gradient(params, 0)
    tx = precondition_by_grams()
    update = jax.jit(tx.update)
    clean, _ = update(grads, tx.init(params), params)
    (grads if poisoned == "gradient" else params)["stack"]["lora_b"][1, 0, 0] = np.nan
    updates, _ = update(grads, tx.init(params), params)
    assert np.isnan(updates["stack"]["lora_a" if poisoned == "parameter" else "lora_b"][1]).any()
    for tree in (clean, updates):
        tree["stack"] = {name: x[0] for name, x in tree["stack"].items()}
    assert_close(updates, clean, 1e-12)


def test_vmap_equals_members_alone():
    members = [make_params(seed) for seed in range(3)]
    rates, dampings, weights = np.array([0.1, 0.05, 0.02]), np.array([1e-6, 0.1, 1.0]), np.array([0.0, 0.1, 0.2])

    def trained(params, rate, damping, weight_decay):
        tx = scaled_adamw(rate, damping=damping, weight_decay=weight_decay)

        def one(carry, step):
            params, state = carry
            grads = jax.tree.map(lambda x: jnp.sin(3 * x + step), params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(one, (params, tx.init(params)), jnp.arange(3))[0][0]

    stacked = jax.tree.map(lambda *x: np.stack(x), *members)
    together = jax.jit(jax.vmap(trained))(stacked, rates, dampings, weights)
    alone = [jax.jit(trained)(*numbers) for numbers in zip(members, rates, dampings, weights, strict=True)]
    assert_close(together, jax.tree.map(lambda *x: np.stack(x), *alone), 1e-11)


@pytest.mark.parametrize("method", [scaled_gd, scaled_adamw])
def test_schedule(method):
    expected = make_params()
    adamw = AdamW(expected)
    for step in range(5):
        grads = preconditioned(expected, gradient(expected, step), 1e-6)
        rate = 0.1 / (1 + step)
        if method is scaled_gd:
            expected = jax.tree.map(lambda x, g, rate=rate: x - rate * g, expected, grads)
        else:
            expected = adamw.step(expected, grads, rate)
    assert_close(run(method(lambda count: 0.1 / (1 + count)), make_params(), 5)[0], expected)


def test_is_compiled_once_and_names_of_pairs_can_be_given():
    params = {"left": np.ones((4, 2)) + np.eye(4, 2), "right": np.ones((2, 3)) + np.eye(2, 3)}
    traced = []

    def update(grads, state, params):
        traced.append(1)
        return tx.update(grads, state, params)

    tx = optax.chain(optax.clip_by_global_norm(1.0), scaled_adamw(0.1, pairs=[("left", "right")]))
    step, state, new = jax.jit(update), tx.init(params), params
    for _ in range(3):
        updates, state = step(jax.tree.map(np.ones_like, params), state, new)
        new = optax.apply_updates(new, updates)
    assert len(traced) == 1
    with pytest.raises(ValueError, match="must hold at least one LoRA pair"):
        scaled_adamw(0.1).init(params)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (precondition_by_grams, {"damping": -1e-3}, r"damping must be in \[0, inf\), got -0.001"),
        (scaled_gd, {"learning_rate": 0.1, "momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        (scaled_gd, {"learning_rate": 0.1, "damping": float("nan")}, "damping must be in .*, got nan"),
        (scaled_adamw, {"learning_rate": 0.1, "b1": 1}, "b1 must be in .*, got 1"),
        (scaled_adamw, {"learning_rate": 0.1, "b2": -0.1}, "b2 must be in .*, got -0.1"),
        (scaled_adamw, {"learning_rate": 0.1, "eps": -1.0}, "eps must be in .*, got -1.0"),
        (scaled_adamw, {"learning_rate": 0.1, "weight_decay": -1.0}, "weight_decay must be in .*, got -1.0"),
    ],
)
def test_bad_numbers_raise(method, options, message):
    with pytest.raises(ValueError, match=message):
        method(**options)


def test_update_without_parameters_raises():
    params = make_params()
    tx = scaled_gd(0.1)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, tx.init(params))
