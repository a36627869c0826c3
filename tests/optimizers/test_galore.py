"""GaLore: against its definition in NumPy, on tall, wide, square, stacked and other leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from balora_jax.optimizers.galore import galore

pytestmark = pytest.mark.usefixtures("float64")

SHAPES = {"tall": (9, 5), "wide": (4, 7), "square": (5, 5), "stack": (2, 3, 6, 4), "bias": (5,), "scale": ()}


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(shape)) for name, shape in SHAPES.items()}


def gradient(params, step):
    """Some smooth function of the parameters that differs from step to step."""
    return jax.tree.map(lambda x: jnp.sin(3 * x + step), params)


def over_stack(function, *arrays):
    """A function of matrices over leading axes."""
    lead = arrays[0].shape[:-2]
    flat = [x.reshape(-1, *x.shape[-2:]) for x in arrays]
    out = np.stack([function(*each) for each in zip(*flat, strict=True)])
    return out.reshape(*lead, *out.shape[1:])


class Oracle:
    """The definition; the signs of singular vectors, which it leaves open, are those of the bases given."""

    def __init__(self, *, rank=128, interval=200, scale=0.25, b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.0):
        self.rank, self.interval, self.scale, self.weight_decay = rank, interval, scale, weight_decay
        self.numbers, self.t, self.m, self.v, self.bases = (b1, b2, eps), 0, {}, {}, {}

    def step(self, params, grads, rate, given):
        self.t += 1
        return {name: self._moved(name, x, np.asarray(grads[name], float), rate, given) for name, x in params.items()}

    def _moved(self, name, x, gradient, rate, given):
        if x.ndim < 2:
            return x - rate * (self._adam(name, gradient) + self.weight_decay * x)
        tall = x.shape[-2] >= x.shape[-1]
        if not tall:
            gradient = np.swapaxes(gradient, -1, -2)
        if (self.t - 1) % self.interval == 0:
            basis = over_stack(lambda g: np.linalg.svd(g)[2][: self.rank].T, gradient)
            self.bases[name] = basis * np.sign((basis * np.asarray(given[name])).sum(-2, keepdims=True))
        basis = self.bases[name]
        step = self._adam(name, gradient @ basis) @ np.swapaxes(basis, -1, -2)
        step = step if tall else np.swapaxes(step, -1, -2)
        return x - rate * (self.scale * step + self.weight_decay * x)

    def _adam(self, name, gradient):
        b1, b2, eps = self.numbers
        self.m[name] = b1 * self.m.get(name, 0) + (1 - b1) * gradient
        self.v[name] = b2 * self.v.get(name, 0) + (1 - b2) * gradient**2
        return self.m[name] / (1 - b1**self.t) / (np.sqrt(self.v[name] / (1 - b2**self.t)) + eps)


def check_run(tx, oracle, steps, rate, *, params=None, tolerance=1e-9):
    params = make_params() if params is None else params
    expected = {name: np.asarray(x, float) for name, x in params.items()}
    state, traced = tx.init(params), []

    def update(*arguments):
        traced.append(1)
        return tx.update(*arguments)

    update = jax.jit(update)
    for step in range(steps):
        grads = gradient(params, step)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        expected = oracle.step(expected, grads, rate(step), state[0].bases)
        for name, x in params.items():
            np.testing.assert_allclose(x, expected[name], rtol=tolerance, atol=tolerance, err_msg=f"{name}, {step}")
    assert len(traced) == 1
    return params, state


def test_is_its_definition():
    check_run(galore(0.05), Oracle(), 5, lambda _: 0.05)


def test_the_default_rank_and_interval():
    rng = np.random.default_rng(0)
    params = {"kernel": rng.standard_normal((132, 130))}
    state = galore(0.1).init(params)
    assert state[0].bases["kernel"].shape == (130, 128)
    assert state[0].inner.mu["kernel"].shape == (132, 128)
    params = make_params()
    tx = galore(0.1, rank=2)
    update = jax.jit(tx.update)
    _, state = update(gradient(params, 0), tx.init(params), params)
    for count, followed in ((100, False), (199, False), (200, True), (201, False)):
        start = (state[0]._replace(count=jnp.int32(count)), *state[1:])
        _, new = update(gradient(params, 1), start, params)
        for basis, old in zip(*map(jax.tree.leaves, (new[0].bases, state[0].bases)), strict=True):
            assert (np.abs(basis - old).max() > 1e-3) == followed, count


def test_other_numbers_and_a_schedule():
    options = {"b1": 0.5, "b2": 0.8, "eps": 1e-2, "weight_decay": 0.3, "scale": 0.7}
    tx = galore(lambda count: 0.1 / (1 + count), rank=2, update_interval=3, **options)
    _, state = check_run(tx, Oracle(rank=2, interval=3, **options), 7, lambda step: 0.1 / (1 + step))
    shapes = {name: x.shape for name, x in state[0].inner.mu.items()}
    assert shapes == {**SHAPES, "tall": (9, 2), "wide": (2, 7), "square": (5, 2), "stack": (2, 3, 6, 2)}
    assert {name: x.shape for name, x in state[0].bases.items() if hasattr(x, "shape")} == {
        "tall": (5, 2),
        "wide": (4, 2),
        "square": (5, 2),
        "stack": (2, 3, 4, 2),
    }


def test_float32():
    params = {name: jnp.asarray(x, jnp.float32) for name, x in make_params().items()}
    new, _ = check_run(galore(0.05, rank=2), Oracle(rank=2), 5, lambda _: 0.05, params=params, tolerance=1e-3)
    assert {x.dtype for x in new.values()} == {jnp.dtype(jnp.float32)}


def test_half_precision_matrices_have_float32_moments():
    params = {name: jnp.asarray(make_params()[name], jnp.bfloat16) for name in ("tall", "stack")}
    tx = galore(0.05, rank=2)
    updates, state = jax.jit(tx.update)(gradient(params, 0), tx.init(params), params)
    assert {x.dtype for x in updates.values()} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves((state[0].bases, state[0].inner.mu))} == {jnp.dtype(jnp.float32)}
    zeros = {name: np.zeros(x.shape) for name, x in params.items()}
    expected = Oracle(rank=2).step(zeros, gradient(params, 0), 0.05, state[0].bases)
    for name, x in updates.items():
        np.testing.assert_allclose(np.asarray(x, float), expected[name], atol=3e-4)


def test_vmap_equals_members_alone():
    members = [make_params(seed) for seed in range(3)]
    numbers = np.array([0.1, 0.05, 0.02]), np.array([0.25, 1.0, 2.0]), np.array([2, 2, 3])

    def trained(params, rate, scale, interval):
        tx = galore(rate, rank=2, scale=scale, update_interval=interval)

        def one(carry, step):
            params, state = carry
            updates, state = tx.update(gradient(params, step), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(one, (params, tx.init(params)), jnp.arange(4))[0][0]

    together = jax.jit(jax.vmap(trained))(jax.tree.map(lambda *x: np.stack(x), *members), *numbers)
    for i, each in enumerate(zip(members, *numbers, strict=True)):
        for name, x in jax.jit(trained)(*each).items():
            np.testing.assert_allclose(together[name][i], x, rtol=1e-9, atol=1e-10)


def outside_conditions(program):
    """The names of all primitives of a program that run whatever its conditions say."""
    names = set()
    for equation in program.eqns:
        names.add(equation.primitive.name)
        if equation.primitive.name != "cond":
            inner = (getattr(value, "jaxpr", None) for value in equation.params.values())
            names.update(*(outside_conditions(jaxpr) for jaxpr in inner if jaxpr is not None))
    return names


def test_a_population_decomposes_only_when_a_basis_is_due():
    params = jax.tree.map(lambda x: np.stack([x, x]), make_params())
    tx = galore(0.1)
    program = jax.make_jaxpr(jax.vmap(tx.update))(params, jax.vmap(tx.init)(params), params)
    names = outside_conditions(program)
    assert "cond" in names
    assert names.isdisjoint({"svd", "scan", "while"})


def test_what_is_not_finite_stays_in_its_matrix_and_leaves_its_basis():
    params = make_params()
    tx = galore(0.1, rank=2, update_interval=1)
    update = jax.jit(tx.update)
    clean, state = update(gradient(params, 0), tx.init(params), params)
    grads = jax.tree.map(np.array, gradient(params, 1))
    clean, clean_state = update(grads, state, params)
    grads["stack"][1, 2, 0, 0] = np.nan
    updates, new = update(grads, state, params)
    assert np.isnan(updates["stack"][1, 2]).any()
    np.testing.assert_array_equal(new[0].bases["stack"][1, 2], state[0].bases["stack"][1, 2])
    updates["stack"], clean["stack"] = (
        np.delete(np.asarray(x).reshape(6, 6, 4), 5, 0) for x in (updates["stack"], clean["stack"])
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9), updates, clean)
    assert np.isfinite(clean_state[0].bases["stack"]).all()


def test_zero_gradients_and_partitions():
    params = make_params()
    labels = {name: "adamw" if name in ("square", "bias") else "galore" for name in params}
    tx = optax.partition({"galore": galore(0.1, rank=2), "adamw": optax.adamw(0.1)}, labels)
    update = jax.jit(tx.update)
    state, grads = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    updates, state = update(grads, state, params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
    updates, _ = update(gradient(params, 0), state, params)
    assert np.linalg.matrix_rank(updates["tall"]) == 2
    assert np.linalg.matrix_rank(updates["square"]) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
        ({"rank": 2.0}, "rank must be an integer of at least 1, got 2.0"),
        ({"update_interval": 0}, "update_interval must be an integer of at least 1, got 0"),
        ({"scale": -1.0}, r"scale must be in \[0, inf\), got -1.0"),
        ({"b1": 1.0}, r"b1 must be in \[0, 1\), got 1.0"),
        ({"b2": 1.0}, "b2 must be in .*, got 1.0"),
        ({"eps": -1.0}, "eps must be in .*, got -1.0"),
        ({"weight_decay": -1.0}, "weight_decay must be in .*, got -1.0"),
    ],
)
def test_bad_numbers_raise(options, message):
    with pytest.raises(ValueError, match=message):
        galore(0.1, **options)


def test_update_without_parameters_raises():
    params = make_params()
    tx = galore(0.1)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, tx.init(params))
