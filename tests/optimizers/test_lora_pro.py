"""LoRA-Pro: against its definition in NumPy, the projection it stands for, and the edges of its domain."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

from balora_jax.optimizers.lora_pro import lora_pro, precondition_by_lora_pro

pytestmark = pytest.mark.usefixtures("float64")


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


def adjusted(params, grads, scale=1.0, damping=1e-8):
    """The definition, with dense inverses and SciPy's solver."""
    grads = jax.tree.map(np.copy, grads)
    for (a, b), (g_a, g_b) in zip(pairs_of(params), pairs_of(grads), strict=True):
        gram_a, gram_b, unit = a.T @ a, b @ b.T, np.eye(a.shape[1])
        inverse_a, inverse_b = np.linalg.inv(gram_a + damping * unit), np.linalg.inv(gram_b + damping * unit)
        x = scipy.linalg.solve_sylvester(gram_a, gram_b, -inverse_a @ g_b @ b.T / scale**2)
        h_a = (np.eye(len(a)) - a @ inverse_a @ a.T) @ g_a @ inverse_b / scale**2 - a @ x
        g_a[...], g_b[...] = h_a, inverse_a @ g_b / scale**2 + x @ b
    return grads


def run(tx, params, steps):
    """The parameters after some steps under jit."""
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(gradient(params, step), state, params)
        params = optax.apply_updates(params, updates)
    return params


def expected_run(params, steps, rate, *, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, **options):
    """The parameters after some steps of AdamW on adjusted gradients, in NumPy."""
    m, v = (jax.tree.map(np.zeros_like, params) for _ in range(2))
    for t in range(1, steps + 1):
        grads = adjusted(params, gradient(params, t - 1), **options)
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, grads)
        v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, v, grads)

        def moved(x, m, v, t=t):
            direction = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
            return x - rate(t - 1) * (direction + weight_decay * x)

        params = jax.tree.map(moved, params, m, v)
    return params


def assert_close(tree, expected, tolerance=1e-9):
    for x, y in zip(*map(jax.tree.leaves, (tree, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


OPTIONS = [{}, {"scale": 0.4, "damping": 0.2, "b1": 0.5, "b2": 0.8, "eps": 1e-2, "weight_decay": 0.3}]


@pytest.mark.parametrize("options", OPTIONS)
def test_is_its_definition(options):
    expected = expected_run(make_params(), 6, lambda _: 0.05, **options)
    assert_close(run(lora_pro(0.05, **options), make_params(), 6), expected, 1e-8)


def test_schedule():
    expected = expected_run(make_params(), 5, lambda step: 0.1 / (1 + step))
    assert_close(run(lora_pro(lambda count: 0.1 / (1 + count)), make_params(), 5), expected, 1e-8)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-3), (jnp.bfloat16, 2e-2)])
def test_lower_precision_is_computed_in_float32(dtype, tolerance):
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), make_params())
    grads = jax.tree.map(lambda x: jnp.sin(3 * x), params)
    tx = precondition_by_lora_pro(scale=2.0, damping=0.1)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    wide = [jax.tree.map(lambda x: np.array(x, float), tree) for tree in (params, grads, updates)]
    assert_close(wide[2], adjusted(*wide[:2], 2.0, 0.1), tolerance)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("shape", [(9, 3, 7), (4, 3, 12), (6, 6, 6)])
def test_step_of_the_weight_is_the_projected_gradient(shape, scale):
    rng = np.random.default_rng(1)
    rows, rank, columns = shape
    a, b, full = (rng.standard_normal(size) for size in ((rows, rank), (rank, columns), (rows, columns)))
    g_a, g_b = scale * full @ b.T, scale * a.T @ full
    params, grads = {"lora_a": a, "lora_b": b}, {"lora_a": g_a, "lora_b": g_b}
    tx = precondition_by_lora_pro(scale=scale, damping=0.0)
    new, _ = tx.update(grads, tx.init(params), params)
    h_a, h_b = np.asarray(new["lora_a"]), np.asarray(new["lora_b"])
    onto_a, onto_b = a @ np.linalg.pinv(a), np.linalg.pinv(b) @ b
    projection = onto_a @ full + full @ onto_b - onto_a @ full @ onto_b
    np.testing.assert_allclose(scale * (a @ h_b + h_a @ b), projection, rtol=1e-9, atol=1e-9)
    # the equation for X, which B's side shows, and that the pair is nearest to the gradients among all of this step
    x = (h_b - np.linalg.solve(a.T @ a, g_b) / scale**2) @ np.linalg.pinv(b)
    right = -np.linalg.solve(a.T @ a, g_b) @ b.T / scale**2
    np.testing.assert_allclose(a.T @ a @ x + x @ b @ b.T, right, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose((h_b - g_b) @ b.T, a.T @ (h_a - g_a), rtol=1e-8, atol=1e-8)


def test_step_of_the_weight_does_not_depend_on_the_gauge():
    rng = np.random.default_rng(2)
    a, b, full, change = (rng.standard_normal(shape) for shape in ((9, 3), (3, 7), (9, 7), (3, 3)))
    tx, steps = precondition_by_lora_pro(damping=0.0), []
    for left, right in ((a, b), (a @ change, np.linalg.solve(change, b))):
        params = {"lora_a": left, "lora_b": right}
        new, _ = tx.update({"lora_a": full @ right.T, "lora_b": left.T @ full}, tx.init(params), params)
        steps.append(left @ new["lora_b"] + new["lora_a"] @ right)
    np.testing.assert_allclose(steps[1], steps[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("damping", [0.0, 1e-8])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_from_zero_first_b_moves_and_then_a(dtype, damping):
    rng = np.random.default_rng(3)
    target = jnp.asarray(rng.standard_normal((9, 7)), dtype)
    params = {"lora_a": jnp.asarray(rng.standard_normal((9, 3)), dtype), "lora_b": jnp.zeros((3, 7), dtype)}
    tx = lora_pro(0.03, damping=damping)
    state, update, losses = tx.init(params), jax.jit(tx.update), []
    for step in range(30):
        residual = params["lora_a"] @ params["lora_b"] - target
        losses.append(float(jnp.sum(residual**2)))
        grads = {"lora_a": residual @ params["lora_b"].T, "lora_b": params["lora_a"].T @ residual}
        updates, state = update(grads, state, params)
        if step < 2:
            moved = [float(jnp.abs(updates[name]).max()) > 1e-3 for name in ("lora_a", "lora_b")]
            assert moved == [step == 1, True]
        params = optax.apply_updates(params, updates)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((params, state)))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("side", ["both", "a", "b", "zero"])
def test_deficient_pairs_give_no_noise(side):
    rng = np.random.default_rng(4)
    a, b, full = (rng.standard_normal(shape).astype(np.float32) for shape in ((9, 3), (3, 7), (9, 7)))
    if side in ("both", "a"):
        a[:, 1] = a[:, 0]
    if side in ("both", "b"):
        b[1] = b[0]
    if side == "zero":
        a[...], b[...] = 0, 0
    params = {"lora_a": a, "lora_b": b}
    tx = precondition_by_lora_pro(damping=1e-12)
    new, _ = tx.update({"lora_a": full @ b.T, "lora_b": a.T @ full}, tx.init(params), params)
    onto_a, onto_b = (np.asarray(x, float) for x in (a @ np.linalg.pinv(a, 1e-5), np.linalg.pinv(b, 1e-5) @ b))
    projection = onto_a @ full + full @ onto_b - onto_a @ full @ onto_b
    np.testing.assert_allclose(a @ new["lora_b"] + new["lora_a"] @ b, projection, atol=1e-3)


@pytest.mark.parametrize("poisoned", ["gradient", "parameter"])
def test_what_is_not_finite_stays_in_its_pair(poisoned):
    params = make_params()
    grads = gradient(params, 0)
    tx = precondition_by_lora_pro()
    update = jax.jit(tx.update)
    clean, _ = update(grads, tx.init(params), params)
    (grads if poisoned == "gradient" else params)["stack"]["lora_b"][1, 0, 0] = np.nan
    updates, _ = update(grads, tx.init(params), params)
    assert np.isnan(updates["stack"]["lora_b"][1]).any()
    for tree in (clean, updates):
        tree["stack"] = {name: x[0] for name, x in tree["stack"].items()}
    assert_close(updates, clean, 1e-12)


def test_vmap_equals_members_alone():
    members = [make_params(seed) for seed in range(3)]
    numbers = np.array([0.1, 0.05, 0.02]), np.array([1.0, 0.5, 4.0]), np.array([1e-8, 0.1, 1.0])

    def trained(params, rate, scale, damping):
        tx = lora_pro(rate, scale=scale, damping=damping)

        def one(carry, step):
            params, state = carry
            grads = jax.tree.map(lambda x: jnp.sin(3 * x + step), params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(one, (params, tx.init(params)), jnp.arange(3))[0][0]

    together = jax.jit(jax.vmap(trained))(jax.tree.map(lambda *x: np.stack(x), *members), *numbers)
    for i, each in enumerate(zip(members, *numbers, strict=True)):
        assert_close(jax.tree.map(lambda x, i=i: x[i], together), jax.jit(trained)(*each), 1e-9)


def test_names_of_pairs_can_be_given():
    params = {"left": np.eye(4, 2), "right": np.eye(2, 3)}
    with pytest.raises(ValueError, match="must hold at least one LoRA pair"):
        lora_pro(0.1).init(params)
    tx = optax.chain(optax.clip_by_global_norm(1.0), lora_pro(0.1, pairs=[("left", "right")]))
    updates, _ = tx.update(jax.tree.map(np.ones_like, params), tx.init(params), params)
    assert np.abs(updates["right"]).max() == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, r"scale must be in \(0, inf\), got 0.0"),
        ({"damping": -1.0}, r"damping must be in \[0, inf\), got -1.0"),
        ({"b1": 1.0}, r"b1 must be in \[0, 1\), got 1.0"),
        ({"b2": -0.5}, "b2 must be in .*, got -0.5"),
        ({"eps": -1.0}, "eps must be in .*, got -1.0"),
        ({"weight_decay": -1.0}, "weight_decay must be in .*, got -1.0"),
    ],
)
def test_bad_numbers_raise(options, message):
    with pytest.raises(ValueError, match=message):
        lora_pro(0.1, **options)


def test_update_without_parameters_raises():
    params = make_params()
    tx = lora_pro(0.1)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, tx.init(params))
