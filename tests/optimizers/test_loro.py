"""LORO: every step against its definition with dense matrices, and the edges where the exact step does not exist."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from balora_jax.optimizers.loro import LoroState, loro

pytestmark = pytest.mark.usefixtures("float64")


def make_params(seed=0):
    """A tall, a wide, a stacked and a transposed pair, one with a side below 2 r, and a leaf beside them."""
    rng = np.random.default_rng(seed)
    shapes = {
        "tall": {"lora_a": (12, 3), "lora_b": (3, 5)},
        "wide": {"lora_a": (4, 2), "lora_b": (2, 11)},
        "stack": {"lora_a": (2, 6, 3), "lora_b": (2, 3, 7)},
        "peft": {"lora_A": {"weight": (2, 8)}, "lora_B": {"weight": (6, 2)}},
        "bias": (5,),
    }
    return jax.tree.map(rng.standard_normal, shapes, is_leaf=lambda x: isinstance(x, tuple))


def make_stack(seed=0):
    """A stacked pair and one of its shape, which go through together."""
    rng = np.random.default_rng(seed)
    shapes = {"one": {"lora_a": (6, 3), "lora_b": (3, 7)}, "stack": {"lora_a": (2, 6, 3), "lora_b": (2, 3, 7)}}
    return jax.tree.map(rng.standard_normal, shapes, is_leaf=lambda x: isinstance(x, tuple))


def pairs_of(tree):
    """The pairs of a tree as arrays `(a, r)`, `(r, b)`."""
    pairs = [(tree[name]["lora_a"], tree[name]["lora_b"]) for name in ("tall", "wide", "one") if name in tree]
    pairs += zip(tree["stack"]["lora_a"], tree["stack"]["lora_b"], strict=True)
    return [
        *pairs,
        *((tree[name]["lora_A"]["weight"].T, tree[name]["lora_B"]["weight"].T) for name in tree if name == "peft"),
    ]


def gradient(params, step):
    """Some smooth function of the parameters that differs from step to step."""
    return jax.tree.map(lambda x: jnp.sin(3 * x + step), params)


def riemannian_product(a, b, d_a, d_b, rate):
    """The truncated SVD of `A B - rate D`, from pseudo-inverses."""
    along = d_a @ np.linalg.inv(b @ b.T) @ b
    across = a @ np.linalg.inv(a.T @ a) @ d_b @ (np.eye(b.shape[1]) - np.linalg.pinv(b) @ b)
    u, s, vt = np.linalg.svd(a @ b - rate * (along + across))
    rank = a.shape[1]
    return u[:, :rank] * s[:rank] @ vt[:rank], s[:rank]


class Oracle:
    """The moments in NumPy, and what one step makes of some parameters."""

    def __init__(self, params, *, b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.0):
        self.numbers, self.t = (b1, b2, eps, weight_decay), 0
        self.m, self.v = (jax.tree.map(np.zeros_like, params) for _ in range(2))

    def check_step(self, params, grads, new, rate, *, exact, tolerance=1e-9):
        """Raises unless a step from `params` leads to `new`."""
        b1, b2, eps, decay = self.numbers
        params, grads, new = (jax.tree.map(lambda x: np.asarray(x, float), tree) for tree in (params, grads, new))
        self.t += 1
        self.m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, self.m, grads)
        self.v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, self.v, grads)
        c1, c2 = 1 - b1**self.t, 1 - b2**self.t
        close = {"rtol": tolerance, "atol": tolerance}
        for name in {"bias"} & params.keys():
            adamw = self.m[name] / c1 / (np.sqrt(self.v[name] / c2) + eps) + decay * params[name]
            np.testing.assert_allclose(new[name], params[name] - rate * adamw, **close)
        directions = jax.tree.map(lambda m, v: m / (np.sqrt(v) + eps), self.m, self.v)
        rate = rate * np.sqrt(c2) / c1
        for (a, b), (d_a, d_b), (new_a, new_b) in zip(*map(pairs_of, (params, directions, new)), strict=True):
            if exact:
                product, values = riemannian_product(a, b, d_a, d_b, rate)
                np.testing.assert_allclose(new_a @ new_b, product, **close)
                np.testing.assert_allclose(new_a.T @ new_a, np.diag(values), **close)
                np.testing.assert_allclose(new_b @ new_b.T, np.diag(values), **close)
            else:
                np.testing.assert_allclose(new_a, (1 - rate * decay) * (a - rate * d_a), **close)
                np.testing.assert_allclose(new_b, (1 - rate * decay) * (b - rate * d_b), **close)


def check_run(tx, params, steps, oracle, rate, exact, tolerance=1e-9):
    """Checks every step of a run under jit, traced once."""
    traced = []

    def update(grads, state, params):
        traced.append(1)
        return tx.update(grads, state, params)

    state, update = tx.init(params), jax.jit(update)
    for step in range(steps):
        grads = gradient(params, step)
        updates, state = update(grads, state, params)
        new = optax.apply_updates(params, updates)
        oracle.check_step(params, grads, new, rate(step), exact=step + 1 in exact, tolerance=tolerance)
        params = new
    assert len(traced) == 1
    assert int(state.count) == steps
    return params


def test_is_its_definition():
    params = make_params()
    check_run(loro(0.05, period=3), params, 7, Oracle(params), lambda _: 0.05, {3, 6})


def test_other_numbers_and_a_schedule():
    params, options = make_params(), {"b1": 0.5, "b2": 0.8, "eps": 1e-2, "weight_decay": 0.3}
    tx = loro(lambda count: 0.1 / (1 + count), period=2, **options)
    check_run(tx, params, 5, Oracle(params, **options), lambda step: 0.1 / (1 + step), {2, 4})


def test_the_hundredth_step_is_the_first_exact_one():
    params, oracle = make_stack(), Oracle(make_stack())
    oracle.t = 98
    zeros = jax.tree.map(jnp.zeros_like, params)
    state, update = LoroState(jnp.int32(98), zeros, zeros), jax.jit(loro(0.05).update)
    for exact in (False, True, False):
        grads = gradient(params, 0)
        updates, state = update(grads, state, params)
        new = optax.apply_updates(params, updates)
        oracle.check_step(params, grads, new, 0.05, exact=exact)
        params = new


def test_float32():
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), make_params())
    new = check_run(loro(0.05, period=3), params, 6, Oracle(params), lambda _: 0.05, {3, 6}, 1e-4)
    assert {x.dtype for x in jax.tree.leaves(new)} == {jnp.dtype(jnp.float32)}


def test_half_precision_has_float32_moments():
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), make_stack())
    tx = loro(0.05, period=1)
    updates, state = jax.jit(tx.update)(gradient(params, 0), tx.init(params), params)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves((state.mu, state.nu))} == {jnp.dtype(jnp.float32)}
    Oracle(params).check_step(
        params, gradient(params, 0), optax.apply_updates(params, updates), 0.05, exact=True, tolerance=0.1
    )


def test_exact_steps_of_plain_gradients_are_riemannian_in_every_gauge():
    rng = np.random.default_rng(1)
    a, b, full, change = (rng.standard_normal(shape) for shape in ((9, 3), (3, 7), (9, 7), (3, 3)))
    flat = 1e9  # an eps against which gradients vanish: directions are the gradients over it
    tx = loro(0.1 * flat, b1=0.0, b2=0.0, eps=flat, period=1)
    project_a, project_b = a @ np.linalg.pinv(a), np.linalg.pinv(b) @ b
    tangent = project_a @ full + full @ project_b - project_a @ full @ project_b
    u, s, vt = np.linalg.svd(a @ b - 0.1 * tangent)
    for left, right in ((a, b), (a @ change, np.linalg.solve(change, b))):
        params = {"lora_a": left, "lora_b": right}
        updates, _ = tx.update({"lora_a": full @ right.T, "lora_b": left.T @ full}, tx.init(params), params)
        new = optax.apply_updates(params, updates)
        np.testing.assert_allclose(new["lora_a"] @ new["lora_b"], u[:, :3] * s[:3] @ vt[:3], atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_from_zero_first_b_moves_and_then_a(dtype):
    rng = np.random.default_rng(2)
    target = jnp.asarray(rng.standard_normal((9, 7)), dtype)
    params = {"lora_a": jnp.asarray(rng.standard_normal((9, 3)), dtype), "lora_b": jnp.zeros((3, 7), dtype)}
    tx = loro(0.05, period=1)
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


def deficient(params):
    """One stacked pair in which two columns of A agree."""
    a = np.array(params["stack"]["lora_a"])
    a[1, :, 1] = a[1, :, 0]
    return {**params, "stack": {**params["stack"], "lora_a": a}}


def test_deficient_pairs_take_the_ordinary_step():
    params = deficient(make_stack())
    grads, oracle = gradient(params, 0), Oracle(params)
    exact, ordinary = (
        jax.jit(tx.update)(grads, tx.init(params), params)[0] for tx in (loro(0.05, period=p) for p in (1, 2))
    )
    oracle.check_step(params, grads, optax.apply_updates(params, ordinary), 0.05, exact=False)
    for side in ("lora_a", "lora_b"):
        np.testing.assert_allclose(exact["stack"][side][1], ordinary["stack"][side][1], rtol=1e-12)
        assert np.abs(exact["stack"][side][0] - ordinary["stack"][side][0]).max() > 1e-2


def test_ranks_above_a_side_never_take_the_exact_step():
    rng = np.random.default_rng(3)
    params = {"lora_a": rng.standard_normal((2, 3)), "lora_b": rng.standard_normal((3, 5))}
    exact, ordinary = (
        tx.update(gradient(params, 0), tx.init(params), params)[0] for tx in (loro(0.1, period=1), loro(0.1, period=2))
    )
    jax.tree.map(np.testing.assert_array_equal, exact, ordinary)


@pytest.mark.parametrize("period", [1, 2])
@pytest.mark.parametrize("poisoned", ["gradient", "parameter"])
def test_what_is_not_finite_stays_in_its_pair(poisoned, period):
    params = make_stack()
    grads = jax.tree.map(np.array, gradient(params, 0))
    tx = loro(0.05, period=period)
    update = jax.jit(tx.update)
    clean, _ = update(grads, tx.init(params), params)
    (grads if poisoned == "gradient" else params)["stack"]["lora_b"][1, 0, 0] = np.nan
    updates, _ = update(grads, tx.init(params), params)
    assert np.isnan(optax.apply_updates(params, updates)["stack"]["lora_b"][1]).any()
    for tree in (clean, updates):
        tree["stack"] = {name: x[0] for name, x in tree["stack"].items()}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12), updates, clean)


def trained(params, rate, weight_decay, period):
    tx = loro(rate, weight_decay=weight_decay, period=period)

    def one(carry, step):
        params, state = carry
        updates, state = tx.update(gradient(params, step), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(one, (params, tx.init(params)), jnp.arange(4))[0][0]


def test_vmap_equals_members_alone():
    members = [make_stack(0), deficient(make_stack(1)), make_stack(2)]
    numbers = np.array([0.1, 0.05, 0.02]), np.array([0.0, 0.1, 0.2]), np.array([2, 2, 3])
    together = jax.jit(jax.vmap(trained))(jax.tree.map(lambda *x: np.stack(x), *members), *numbers)
    alone = [jax.jit(trained)(*each) for each in zip(members, *numbers, strict=True)]
    for i, member in enumerate(alone):
        jax.tree.map(lambda x, y, i=i: np.testing.assert_allclose(x[i], y, rtol=1e-9, atol=1e-10), together, member)


def outside_conditions(program):
    """The names of all primitives of a program that run whatever its conditions say."""
    names = set()
    for equation in program.eqns:
        names.add(equation.primitive.name)
        if equation.primitive.name != "cond":
            inner = (getattr(value, "jaxpr", None) for value in equation.params.values())
            names.update(*(outside_conditions(jaxpr) for jaxpr in inner if jaxpr is not None))
    return names


def test_a_population_decomposes_in_exact_steps_only():
    params = jax.tree.map(lambda x: np.stack([x, x]), make_stack())
    tx = loro(0.1)
    program = jax.make_jaxpr(jax.vmap(tx.update))(params, jax.vmap(tx.init)(params), params)
    names = outside_conditions(program)
    assert "cond" in names
    assert names.isdisjoint({"qr", "svd", "householder_product", "geqrf", "scan", "while"})


def test_names_of_pairs_can_be_given():
    params = {"left": np.eye(4, 2), "right": np.eye(2, 3)}
    with pytest.raises(ValueError, match="must hold at least one LoRA pair"):
        loro(0.1).init(params)
    tx = optax.chain(optax.clip_by_global_norm(1.0), loro(0.1, period=1, pairs=[("left", "right")]))
    updates, _ = tx.update(jax.tree.map(np.ones_like, params), tx.init(params), params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_allclose(new["left"].T @ new["left"], new["right"] @ new["right"].T, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"b1": 1.0}, r"b1 must be in \[0, 1\), got 1.0"),
        ({"b2": 1.5}, "b2 must be in .*, got 1.5"),
        ({"eps": -1.0}, "eps must be in .*, got -1.0"),
        ({"weight_decay": -1.0}, "weight_decay must be in .*, got -1.0"),
        ({"period": 0}, "period must be an integer of at least 1, got 0"),
        ({"period": 2.5}, "period must be an integer of at least 1, got 2.5"),
    ],
)
def test_bad_numbers_raise(options, message):
    with pytest.raises(ValueError, match=message):
        loro(0.1, **options)


def test_update_without_parameters_raises():
    params = make_stack()
    tx = loro(0.1)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, tx.init(params))
