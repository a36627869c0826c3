"""RefLoRA and RefLoRA-S: agreement with their definitions, and what does not depend on the split into factors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

from balora_jax.optimizers.reflora import (
    RefloraState,
    precondition_by_reflora,
    reflora,
    reflora_s,
)

pytestmark = pytest.mark.usefixtures("float64")

DEFAULTS = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "warmup_steps": 100}
BIAS = np.array([0.5, -1.0, 2.0])


def make_pairs(seed=0):
    """A tall, a wide, two stacked and a transposed pair, and one of more columns than its left factor has rows."""
    rng = np.random.default_rng(seed)
    shapes = [(9, 2, 5), (5, 2, 9), (9, 2, 5), (9, 2, 5), (5, 2, 9), (2, 3, 5)]
    return [(rng.standard_normal((a, r)), 0.3 * rng.standard_normal((r, b))) for a, r, b in shapes]


def as_tree(pairs, bias=BIAS):
    (a, b), (c, d), (e, f), (g, h), (i, j), (k, l) = pairs
    tree = {"tall.lora_a": a, "tall.lora_b": b, "wide.lora_a": c, "wide.lora_b": d, "bias": bias}
    tree |= {"stack.lora_a": np.stack([e, g]), "stack.lora_b": np.stack([f, h])}
    return tree | {"peft.lora_A.weight": i.T, "peft.lora_B.weight": j.T, "short.lora_a": k, "short.lora_b": l}


def as_pairs(tree):
    tree = {name: np.asarray(x) for name, x in tree.items()}
    tall, wide, short = ((tree[f"{name}.lora_a"], tree[f"{name}.lora_b"]) for name in ("tall", "wide", "short"))
    stack = zip(tree["stack.lora_a"], tree["stack.lora_b"], strict=True)
    return [tall, wide, *stack, (tree["peft.lora_A.weight"].T, tree["peft.lora_B.weight"].T), short]


def gradients(pairs, bias, step):
    """Of a function of the products and the bias that differs from step to step."""
    out = []
    for i, (a, b) in enumerate(pairs):
        full = np.sin(2 * a @ b + step + i + 5 * np.sqrt(np.arange(1, len(a) + 1))[:, None] * np.arange(b.shape[1]))
        out.append((full @ b.T, a.T @ full))
    return out, np.cos(bias + step)


def geometric_mean(a, b):
    """S with `S B B^T S = A^T A`, by square roots of matrices."""
    gram_a, gram_b = a.T @ a, b @ b.T
    root = np.real(scipy.linalg.sqrtm(gram_b))
    inverse = np.linalg.inv(root)
    mean = inverse @ np.real(scipy.linalg.sqrtm(root @ gram_a @ root)) @ inverse
    np.testing.assert_allclose(mean @ gram_b @ mean, gram_a, rtol=1e-9, atol=1e-9)
    return mean


def preconditioned(pairs, grads):
    """The gradients of each pair of full rank, preconditioned, and the number of the others."""
    full = [np.linalg.matrix_rank(a) == np.linalg.matrix_rank(b) == a.shape[1] for a, b in pairs]
    means = [
        geometric_mean(*pair) if rank else np.eye(pair[0].shape[1]) for pair, rank in zip(pairs, full, strict=True)
    ]
    new = [(g_a @ mean, np.linalg.solve(mean, g_b)) for (g_a, g_b), mean in zip(grads, means, strict=True)]
    return new, full.count(False)


def trained(pairs, steps, rate, *, b1, b2, eps, weight_decay, warmup_steps, scalar=False):
    """Pairs, bias and the number of pairs left as they are after every step: AdamW and what RefLoRA adds."""
    arrays = [x for pair in pairs for x in pair] + [BIAS]
    m, v, history = [0 * x for x in arrays], [0 * x for x in arrays], []
    for t in range(1, steps + 1):
        pairs, lr, left = (
            list(zip(arrays[:-1:2], arrays[1::2], strict=True)),
            rate(t - 1) if callable(rate) else rate,
            0,
        )
        grads, g_bias = gradients(pairs, arrays[-1], t - 1)
        if t > warmup_steps and not scalar:
            grads, left = preconditioned(pairs, grads)
        for i, g in enumerate([g for grad in grads for g in grad] + [g_bias]):
            m[i], v[i] = b1 * m[i] + (1 - b1) * g, b2 * v[i] + (1 - b2) * g**2
            step = m[i] / (1 - b1**t) / (np.sqrt(v[i] / (1 - b2**t)) + eps) + weight_decay * arrays[i]
            arrays[i] = arrays[i] - lr * step
        for i in range(0, len(arrays) - 1, 2):
            norm_a, norm_b = np.linalg.norm(arrays[i]), np.linalg.norm(arrays[i + 1])
            if scalar and t >= warmup_steps and norm_a > 0 and norm_b > 0:
                p = np.sqrt(norm_b / norm_a)
                arrays[i], m[i], v[i] = arrays[i] * p, m[i] / p, v[i] / p**2
                arrays[i + 1], m[i + 1], v[i + 1] = arrays[i + 1] / p, m[i + 1] * p, v[i + 1] * p**2
        history.append((list(zip(arrays[:-1:2], arrays[1::2], strict=True)), arrays[-1], left))
    return history


@functools.partial(jax.jit, static_argnames="transform")
def update(numbers, grads, state, params, transform):
    """A step with traced numbers, so that one program serves many settings; the rate falls from its start."""
    start, fall = numbers["rate"]
    others = {name: x for name, x in numbers.items() if name != "rate"}
    return transform(lambda count: start / (1 + fall * count), **others).update(grads, state, params)


def run(transform, pairs, steps, *, rate=(0.05, 0.0), dtype="float64", **options):
    """As `trained`, by the library; the state never changes its shapes and dtypes."""
    params = {name: jnp.asarray(x, dtype) for name, x in as_tree(pairs).items()}
    numbers = {name: jax.tree.map(lambda x: jnp.asarray(x, dtype), x) for name, x in (options | {"rate": rate}).items()}
    state, history, shapes = transform(lambda count: 0.1).init(params), [], None
    for step in range(steps):
        grads, g = gradients(as_pairs(params), np.asarray(params["bias"]), step)
        grads = {name: jnp.asarray(x, dtype) for name, x in as_tree(grads, g).items()}
        updates, state = update(numbers, grads, state, params, transform)
        params = optax.apply_updates(params, updates)
        left = [int(x.untouched) for x in jax.tree.leaves(state, is_leaf=is_state) if is_state(x)] or [0]
        history.append((as_pairs(params), np.asarray(params["bias"]), *left))
        assert shapes in (None, jax.eval_shape(lambda x: x, state))
        shapes = jax.eval_shape(lambda x: x, state)
    return history


def is_state(node):
    return isinstance(node, RefloraState)


def assert_same_runs(found, expected, tolerance):
    for (pairs, bias, left), (other_pairs, other_bias, other_left) in zip(found, expected, strict=True):
        for pair, other in zip(pairs, other_pairs, strict=True):
            for x, y in zip(pair, other, strict=True):
                np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(bias, other_bias, rtol=tolerance, atol=tolerance)
        assert left == other_left


def with_defaults(scalar, learning_rate):
    return reflora_s(learning_rate) if scalar else reflora(learning_rate)


METHODS = {False: reflora, True: reflora_s}
DEFAULT_METHODS = {scalar: functools.partial(with_defaults, scalar) for scalar in METHODS}
OPTIONS = {
    "base": {},
    "b1": {"b1": 0.5},
    "b2": {"b2": 0.8},
    "eps": {"eps": 0.03},
    "weight_decay": {"weight_decay": 0.3},
    "warmup_steps": {"warmup_steps": 3},
}


@pytest.mark.parametrize("scalar", METHODS, ids=METHODS.values())
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_agrees_with_the_definition(options, scalar):
    base = DEFAULTS | {"warmup_steps": 0}
    expected, plain = (trained(make_pairs(), 6, 0.05, **base | x, scalar=scalar) for x in (options, {}))
    assert_same_runs(run(METHODS[scalar], make_pairs(), 6, **base | options), expected, 1e-9)
    assert (np.abs(plain[-1][0][0][0] - expected[-1][0][0][0]).max() > 1e-4) == bool(options)
    assert expected[-1][2] == (0 if scalar else 1)  # the pair of too many columns


@pytest.mark.parametrize("scalar", METHODS, ids=METHODS.values())
def test_the_warm_up_is_of_100_steps_and_the_rate_a_schedule(scalar):
    pairs = make_pairs()
    expected = trained(pairs, 104, lambda count: 0.02 / (1 + 0.1 * count), **DEFAULTS, scalar=scalar)
    assert_same_runs(run(DEFAULT_METHODS[scalar], pairs, 104, rate=(0.02, 0.1)), expected, 1e-7)
    gaps = [abs(np.linalg.norm(a) - np.linalg.norm(b)) for pairs, *_ in expected for a, b in pairs[:1]]
    assert [t for t, gap in enumerate(gaps, start=1) if gap < 1e-9] == (list(range(100, 105)) if scalar else [])
    assert [t for t, (*_, left) in enumerate(expected, start=1) if left] == ([] if scalar else list(range(101, 105)))


@pytest.mark.parametrize("scalar", METHODS, ids=METHODS.values())
def test_float32(scalar):
    base = DEFAULTS | {"warmup_steps": 2, "eps": 0.01}
    expected = trained(make_pairs(), 6, 0.05, **base, scalar=scalar)
    with jax.enable_x64(False):
        assert_same_runs(run(METHODS[scalar], make_pairs(), 6, dtype="float32", **base), expected, 1e-4)


@pytest.mark.parametrize("scalar", METHODS, ids=METHODS.values())
def test_a_fresh_adapter_moves_b_and_then_a(scalar):
    pairs, base = [(a, 0 * b) for a, b in make_pairs()], DEFAULTS | {"warmup_steps": 0}
    found = run(METHODS[scalar], pairs, 5, **base)
    assert_same_runs(found, trained(pairs, 5, 0.05, **base, scalar=scalar), 1e-9)
    assert found[0][2] == (0 if scalar else 6)
    for (a, _), (first_a, first_b), (second_a, second_b) in zip(pairs, found[0][0], found[1][0], strict=True):
        np.testing.assert_allclose(a / np.linalg.norm(a), first_a / np.linalg.norm(first_a), rtol=1e-12)
        np.testing.assert_allclose(first_b / np.abs(first_b).max(), np.sign(first_b), rtol=1e-4)
        assert np.linalg.matrix_rank(second_a @ second_b - first_a @ first_b) > 1
        assert np.abs(second_a / np.linalg.norm(second_a) - a / np.linalg.norm(a)).max() > 1e-3


def test_factors_that_stay_zero_are_not_rescaled():
    params, tx = two_pairs(), reflora_s(0.05, warmup_steps=0)
    params["lora_b"] = 0 * params["lora_b"]
    grads = {name: jnp.cos(x) * (not name.startswith("lora")) for name, x in params.items()}
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert [name for name, step in updates.items() if not step.any()] == ["lora_a", "lora_b"]


def test_the_gradient_step_does_not_depend_on_the_split():
    """And is that of the balanced factors, taken back; the definition is tried on factors of condition 1e3."""
    rng, a, b = np.random.default_rng(1), *make_pairs()[0]
    tx, runs = optax.chain(precondition_by_reflora(warmup_steps=0), optax.sgd(0.02)), []
    step = jax.jit(tx.update)
    for mix in (np.eye(2), rng.standard_normal((2, 2)) * [1.0, 1e3]):
        params = {"lora_a": jnp.asarray(a @ mix), "lora_b": jnp.asarray(np.linalg.solve(mix, b))}
        state = tx.init(params)
        for i in range(8):
            pair = tuple(np.asarray(x) for x in params.values())
            ((g_a, g_b),), _ = gradients([pair], BIAS, i)
            ((h_a, h_b),), _ = preconditioned([pair], [(g_a, g_b)])
            updates, state = step({"lora_a": jnp.asarray(g_a), "lora_b": jnp.asarray(g_b)}, state, params)
            for found, expected in zip(updates.values(), (h_a, h_b), strict=True):
                np.testing.assert_allclose(found, -0.02 * expected, rtol=0, atol=1e-8 * np.abs(expected).max())
            params = optax.apply_updates(params, updates)
        runs.append(params["lora_a"] @ params["lora_b"])
    np.testing.assert_allclose(runs[1], runs[0], rtol=0, atol=1e-9)
    assert np.abs(runs[0] - a @ b).max() > 0.05


def train(transformation, params, steps=5):
    """Some steps whose gradients are functions of the parameters."""

    def step(carry, i):
        params, state = carry
        updates, state = transformation.update(jax.tree.map(lambda x: jnp.sin(3 * x + i), params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, transformation.init(params)), jnp.arange(steps))[0]


def two_pairs(seed=0, dtype="float64"):
    """A pair, a stack of two and a bias."""
    (a, b), _, (c, d), (e, f), *_ = make_pairs(seed)
    tree = {"x.lora_a": a, "x.lora_b": b, "lora_a": np.stack([c, e]), "lora_b": np.stack([d, f]), "bias": BIAS}
    return {name: jnp.asarray(x, dtype) for name, x in tree.items()}


@pytest.mark.parametrize("scalar", METHODS, ids=METHODS.values())
def test_a_population_trains_as_its_members_do(scalar):
    names = ("learning_rate", "b1", "b2", "eps", "weight_decay", "warmup_steps")
    numbers = np.array([[0.0, 0.5, 0.9, 1e-3, 0.1, 0], [0.01, 0.9, 0.8, 1e-2, 0.0, 2], [0.05, 0.8, 0.9, 1e-6, 0.2, 1]])
    numbers = dict(zip(names, jnp.asarray(numbers.T), strict=True))
    members = [two_pairs(seed) for seed in range(3)]
    members[2]["x.lora_b"] = 0 * members[2]["x.lora_b"]
    single = jax.jit(lambda params, numbers: train(METHODS[scalar](**numbers), params))
    together = jax.jit(jax.vmap(single))(jax.tree.map(lambda *x: jnp.stack(x), *members), numbers)
    for i, member in enumerate(members):
        alone = single(member, {name: x[i] for name, x in numbers.items()})
        jax.tree.map(lambda x, y, i=i: np.testing.assert_allclose(x[i], y, rtol=1e-8, atol=1e-8), together, alone)


@pytest.mark.parametrize("scalar", METHODS, ids=METHODS.values())
@pytest.mark.parametrize("broken", ["gradient", "parameter"])
def test_nonfinite_numbers_stay_in_their_pair(scalar, broken):
    tx = METHODS[scalar](0.05, warmup_steps=0)
    params, update = two_pairs(), jax.jit(tx.update)
    grads = {name: jnp.cos(x) for name, x in params.items()}
    expected, _ = update(grads, tx.init(params), params)
    tree = {"gradient": grads, "parameter": params}[broken]
    tree["lora_a"] = tree["lora_a"].at[1, 2, 0].set(jnp.nan)
    found, state = update(grads, tx.init(params), params)
    if not scalar:
        assert state[0].untouched == (broken == "parameter")
    for name, step in found.items():
        here, there = (x[0] if name.startswith("lora") else x for x in (step, expected[name]))
        np.testing.assert_allclose(here, there, rtol=1e-12)


@pytest.mark.parametrize("scalar", METHODS, ids=METHODS.values())
def test_updates_keep_their_dtype_and_the_state_maps_over_parameters(scalar):
    params, tx = two_pairs(dtype="bfloat16"), METHODS[scalar](0.05, weight_decay=0.1)
    updates, state = jax.eval_shape(tx.update, params, tx.init(params), params)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(updates))
    state = optax.tree.map_params(tx, lambda leaf: "moment", state)
    assert jax.tree.leaves(state).count("moment") == 2 * len(params)


@pytest.mark.parametrize("scalar", METHODS, ids=METHODS.values())
def test_in_a_chain_with_named_pairs(scalar):
    _, (a, b), *_ = make_pairs()
    params = {"u": jnp.asarray(a), "v": jnp.asarray(b), "lora_a": jnp.ones(3)}
    plain = {"lora_a": params["u"], "lora_b": params["v"], "w": jnp.ones(3)}
    runs = []
    for tree, pairs in ((params, lambda _: [("u", "v")]), (plain, None)):
        tx = optax.chain(optax.scale(0.1), METHODS[scalar](0.05, warmup_steps=0, pairs=pairs))
        runs.append(jax.jit(tx.update)(tree, tx.init(tree), tree)[0])
    found, expected = runs
    for name, other in (("u", "lora_a"), ("v", "lora_b"), ("lora_a", "w")):
        np.testing.assert_array_equal(found[name], expected[other])


@pytest.mark.parametrize("scalar", METHODS, ids=METHODS.values())
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"b1": 1.0}, r"b1 must be in \[0, 1\), got 1.0"),
        ({"b2": -0.1}, r"b2 must be in \[0, 1\), got -0.1"),
        ({"eps": -1e-3}, r"eps must be in \[0, inf\), got -0.001"),
        ({"weight_decay": -1}, r"weight_decay must be in \[0, inf\), got -1"),
        ({"warmup_steps": -1}, r"warmup_steps must be in \[0, inf\), got -1"),
    ],
)
def test_bad_numbers_raise(options, message, scalar):
    with pytest.raises(ValueError, match=message):
        METHODS[scalar](0.1, **options)


@pytest.mark.parametrize("scalar", METHODS, ids=METHODS.values())
def test_what_is_missing_raises(scalar):
    tx, params = METHODS[scalar](0.1), {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="no partner"):
        tx.init({"lora_a": params["lora_a"]})
    with pytest.raises(ValueError, match="at least one LoRA pair"):
        tx.init({"kernel": jnp.ones((2, 2))})
