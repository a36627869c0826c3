"""LoRA-RITE: agreement with its definition, and the same products for every split into factors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from balora_jax import balora
from balora_jax.optimizers.lora_rite import LoraRiteState, lora_rite

pytestmark = pytest.mark.usefixtures("float64")

DEFAULTS = {"b1": 0.9, "b2": 0.999, "eps": 1e-6, "weight_decay": 0.0, "skip": 1.0, "clip_norm": 1.0}


def make_pairs(*, redundant=False, seed=0):
    """A tall, a wide, two stacked and a transposed pair, and one of more columns than its left factor has rows."""
    rng = np.random.default_rng(seed)
    shapes = [(9, 2, 5), (5, 2, 9), (9, 2, 5), (9, 2, 5), (5, 2, 9)] + [(2, 3, 5)] * redundant
    return [(rng.standard_normal((a, r)), 0.5 * rng.standard_normal((r, b))) for a, r, b in shapes]


BIAS = np.array([0.5, -1.0, 2.0])


def as_tree(pairs, bias=BIAS):
    (a, b), (c, d), (e, f), (g, h), (i, j), *redundant = pairs
    tree = {"tall.lora_a": a, "tall.lora_b": b, "wide.lora_a": c, "wide.lora_b": d, "bias": bias}
    tree |= {"stack.lora_a": np.stack([e, g]), "stack.lora_b": np.stack([f, h])}
    tree |= {"peft.lora_A.weight": i.T, "peft.lora_B.weight": j.T}
    for a, b in redundant:
        tree |= {"redundant.lora_a": a, "redundant.lora_b": b}
    return tree


def as_pairs(tree):
    tree = {name: np.asarray(x) for name, x in tree.items()}
    pairs = [(tree[f"{name}.lora_a"], tree[f"{name}.lora_b"]) for name in ("tall", "wide")]
    pairs += list(zip(tree["stack.lora_a"], tree["stack.lora_b"], strict=True))
    pairs += [(tree["peft.lora_A.weight"].T, tree["peft.lora_B.weight"].T)]
    return [*pairs, (tree["redundant.lora_a"], tree["redundant.lora_b"])] if "redundant.lora_a" in tree else pairs


def gradients(pairs, bias, step, size=0.1):
    """Of a function of the products and the bias that differs from step to step."""
    out = []
    for i, (a, b) in enumerate(pairs):
        phase = step + i + 5 * np.sqrt(np.arange(1, len(a) + 1))[:, None] * np.arange(b.shape[1])  # of full rank
        full = size * (1 + 5 * (i == step % 4)) * np.sin(2 * a @ b + phase)
        out.append((full @ b.T, a.T @ full))
    return out, size * np.cos(bias + step)


def basis(factor):
    """An orthonormal basis from the SVD, and the factor in it."""
    u = np.linalg.svd(factor, full_matrices=False)[0]
    return u, u.T @ factor


def rite(pairs, bias, steps, rate, *, b1, b2, eps, weight_decay, skip, clip_norm, size=0.1):
    """Parameters and the number of skipped gradients after every step, one matrix after the other."""
    sides = [[x, y.T] for x, y in pairs]
    kept = [[None, None] for _ in pairs]
    m, v, history = np.zeros_like(bias), np.zeros_like(bias), []
    for t in range(1, steps + 1):
        grads, g = gradients([(x, y.T) for x, y in sides], bias, t - 1, size)
        parts, dropped, lr = [], 0, rate(t - 1) if callable(rate) else rate
        for side, (g_a, g_b) in zip(sides, grads, strict=True):
            (u_a, r_a), (u_b, r_b) = map(basis, side)
            hs = [g_a @ np.linalg.pinv(r_b), g_b.T @ np.linalg.pinv(r_a)]
            over = [skip is not None and np.sqrt(np.mean(h**2)) > skip for h in hs]
            dropped += sum(over)
            parts.append(([u_a, u_b], [r_a, r_b], [0 * h if o else h for h, o in zip(hs, over, strict=True)]))
        norm = np.sqrt(sum(np.sum(h**2) for *_, hs in parts for h in hs))
        shrink = clip_norm / norm if clip_norm is not None and norm > clip_norm else 1
        b1_t, b2_t = (beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in (b1, b2))
        for i, (us, rs, hs) in enumerate(parts):
            steps_ab, new = [], []
            for j in (0, 1):
                h, r = hs[j] * shrink, rs[1 - j]
                second, first = (1 - b2_t) * h.T @ h / len(h), 0
                if t > 1:
                    old_us, firsts, seconds = kept[i]
                    turn = us[1 - j].T @ old_us[1 - j]
                    second, first = second + b2_t * turn @ seconds[j] @ turn.T, b1_t * firsts[j] @ turn.T
                w, x = np.linalg.eigh(second)
                first = first + (1 - b1_t) * h @ x @ np.diag(1 / (np.sqrt(np.maximum(w, 0)) + eps)) @ x.T
                new.append((first, second))
                steps_ab.append(lr * (first @ np.linalg.pinv(r).T + weight_decay * sides[i][j]))
            kept[i] = us, [first for first, _ in new], [second for _, second in new]
            sides[i] = [x - step for x, step in zip(sides[i], steps_ab, strict=True)]
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        bias = bias - lr * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + weight_decay * bias)
        history.append(([(x, y.T) for x, y in sides], bias, dropped))
    return history


def state_of(state) -> LoraRiteState:
    (found,) = (
        x
        for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, LoraRiteState))
        if isinstance(x, LoraRiteState)
    )
    return found


@functools.partial(jax.jit, static_argnames="transform")
def update(numbers, grads, state, params, transform):
    """A step with traced numbers, so that one program serves many settings; the rate falls from its start."""
    start, fall = numbers["rate"]
    others = {name: x for name, x in numbers.items() if name != "rate"}
    return transform(lambda count: start / (1 + fall * count), **others).update(grads, state, params)


def run(pairs, steps, *, rate=(0.05, 0.0), dtype="float64", size=0.1, transform=lora_rite, **options):
    """As `rite`, by the library; the state never changes its shapes and dtypes."""
    params = {name: jnp.asarray(x, dtype) for name, x in as_tree(pairs).items()}
    numbers = DEFAULTS | {"rate": rate} | options
    numbers = {name: jax.tree.map(lambda x: jnp.asarray(x, dtype), x) for name, x in numbers.items()}
    state, history, shapes = transform(lambda count: 0.1).init(params), [], None
    for step in range(steps):
        grads, g = gradients(as_pairs(params), np.asarray(params["bias"]), step, size)
        grads = {name: jnp.asarray(x, dtype) for name, x in as_tree(grads, g).items()}
        updates, state = update(numbers, grads, state, params, transform)
        params = optax.apply_updates(params, updates)
        history.append((as_pairs(params), np.asarray(params["bias"]), int(state_of(state).skipped)))
        assert shapes in (None, jax.eval_shape(lambda x: x, state))
        shapes = jax.eval_shape(lambda x: x, state)
    assert state_of(state).count == steps
    return history


def assert_same_runs(found, expected, tolerance):
    for (pairs, bias, skipped), (other_pairs, other_bias, other_skipped) in zip(found, expected, strict=True):
        for pair, other in zip(pairs, other_pairs, strict=True):
            for x, y in zip(pair, other, strict=True):
                np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(bias, other_bias, rtol=tolerance, atol=tolerance)
        assert skipped == other_skipped


BASE = DEFAULTS | {"eps": 0.01}  # with a small eps a clip changes little
OPTIONS = {
    "base": {},
    "b1": {"b1": 0.5},
    "b2": {"b2": 0.8},
    "eps": {"eps": 0.05},
    "weight_decay": {"weight_decay": 0.3},
    "skip": {"skip": 0.1},
    "clip_norm": {"clip_norm": 0.2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_agrees_with_the_definition(options):
    pairs = make_pairs(redundant=True)
    expected, plain = (rite(pairs, BIAS, 6, 0.05, **BASE | numbers) for numbers in (options, {}))
    assert_same_runs(run(pairs, 6, **BASE | options), expected, 1e-9)
    assert (np.abs(plain[-1][0][0][0] - expected[-1][0][0][0]).max() > 1e-4) == bool(options)


def test_switches_off():
    pairs, off = make_pairs(), {"skip": None, "clip_norm": None}
    tx = lora_rite(0.05, eps=0.01, **off)
    params = {name: jnp.asarray(x) for name, x in as_tree(pairs).items()}
    grads = {name: jnp.asarray(x) for name, x in as_tree(*gradients(pairs, BIAS, 0, 0.3)).items()}
    found = as_pairs(optax.apply_updates(params, jax.jit(tx.update)(grads, tx.init(params), params)[0]))
    for options in (off, {"skip": 0.3}, {"clip_norm": 0.5}):
        ((expected, _, _),) = rite(pairs, BIAS, 1, 0.05, **BASE | off | options, size=0.3)
        agree = [np.allclose(x, y, atol=1e-10) for x, y in zip(sum(found, ()), sum(expected, ()), strict=True)]
        assert all(agree) == (options == off)


def test_defaults_and_a_schedule():
    """Numbers that are plain Python ones, and gradients of which some are skipped."""
    pairs = make_pairs(redundant=True)
    expected = rite(pairs, BIAS, 5, lambda count: 0.05 / (1 + count), **DEFAULTS, size=0.5)
    assert 0 < sum(skipped for *_, skipped in expected) < 5 * 2 * len(pairs)
    assert_same_runs(run(pairs, 5, rate=(0.05, 1.0), size=0.5, transform=with_defaults), expected, 1e-9)


def with_defaults(learning_rate, **_):
    return lora_rite(learning_rate)


def test_float32():
    pairs = make_pairs()
    expected = rite(pairs, BIAS, 6, 0.05, **DEFAULTS)
    with jax.enable_x64(False):
        assert_same_runs(run(pairs, 6, dtype="float32"), expected, 1e-4)


def test_a_fresh_adapter_moves_b_and_then_a():
    """The bases of a factor of zeros are arbitrary, and differ from the definition's here."""
    pairs = [(a, 0 * b) for a, b in make_pairs()]
    found = run(pairs, 6)
    assert_same_runs(found, rite(pairs, BIAS, 6, 0.05, **DEFAULTS), 1e-9)
    for (a, _), (first_a, first_b), (second_a, _) in zip(pairs, found[0][0], found[1][0], strict=True):
        assert np.array_equal(a, first_a)
        assert np.linalg.matrix_rank(first_b) == 2
        assert np.abs(second_a - a).max() > 1e-3


@pytest.mark.parametrize(("dtype", "most"), [("float64", 1e-13), ("float32", 1e-5)])
@pytest.mark.parametrize("condition", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("fresh", [False, True])
def test_products_do_not_depend_on_the_split(condition, dtype, most, fresh):
    """The tolerance is the one that the docstring names."""
    rng = np.random.default_rng(3)
    pairs, split = [(a, 0 * b if fresh else b) for a, b in make_pairs()], []
    for a, b in pairs:
        left, right = (np.linalg.qr(rng.standard_normal((a.shape[1], a.shape[1])))[0] for _ in range(2))
        mix = 3 * left * np.geomspace(1, 1 / condition, a.shape[1]) @ right
        split.append((a @ mix, np.linalg.solve(mix, b)))
    options = {"rate": (0.02, 0.0), "weight_decay": 0.1, "eps": 1e-3, "clip_norm": 0.5}
    with jax.enable_x64(dtype == "float64"):
        runs = [run(start, 10, dtype=dtype, **options)[-1][0] for start in (pairs, split)]
    for (a, b), (c, d), (start_a, start_b) in zip(*runs, pairs, strict=True):
        np.testing.assert_allclose(c @ d, a @ b, rtol=0, atol=most * condition * np.abs(a @ b).max())
        assert np.abs(a @ b - start_a @ start_b).max() > 0.02


def train(transformation, params, steps=6):
    """Some steps that descend a function of the products, and of the bias, that differs from step to step."""

    def loss(params, i):
        tilt = i + 5 * jnp.sqrt(jnp.arange(9.0))[:, None] * jnp.arange(5.0)
        products = [params[name] @ params[name[:-1] + "b"] for name in params if name.endswith("lora_a")]
        return 0.3 * sum(jnp.sum(jnp.cos(x)) for x in (params["bias"] + i, *(2 * x + tilt for x in products)))

    def step(carry, i):
        params, state = carry
        updates, state = transformation.update(jax.grad(loss)(params, i), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, transformation.init(params)), jnp.arange(steps))[0]


def two_pairs(seed=0, dtype="float64"):
    """A pair, a stack of two and a bias."""
    (a, b), _, (c, d), (e, f), _ = make_pairs(seed=seed)
    tree = {"x.lora_a": a, "x.lora_b": b, "lora_a": np.stack([c, e]), "lora_b": np.stack([d, f]), "bias": BIAS}
    return {name: jnp.asarray(x, dtype) for name, x in tree.items()}


RITE = lora_rite(0.05)


def test_balancing_changes_no_product():
    params = {name: x for name, x in two_pairs().items() if not name.startswith("x.")}
    plain, balanced = (jax.jit(functools.partial(train, tx))(params)[0] for tx in (RITE, balora(RITE, transport=False)))
    (a, b), (c, d) = ((x["lora_a"], x["lora_b"]) for x in (plain, balanced))
    np.testing.assert_allclose(c @ d, a @ b, rtol=0, atol=1e-9)
    np.testing.assert_allclose(c.mT @ c, d @ d.mT, rtol=0, atol=1e-9)
    assert np.abs(a.mT @ a - b @ b.mT).max() > 0.1


def test_a_population_trains_as_its_members_do():
    names = ("learning_rate", "b1", "b2", "eps", "weight_decay", "skip", "clip_norm")
    numbers = np.array(
        [
            [0.0, 0.5, 0.9, 1e-3, 0.1, 2.0, 1.0],
            [0.01, 0.9, 0.8, 1e-2, 0.0, 0.3, 0.5],
            [0.05, 0.8, 0.9, 1e-6, 0.2, 0.2, 9],
        ]
    )
    numbers = dict(zip(names, jnp.asarray(numbers.T), strict=True))
    members = [two_pairs(seed) for seed in range(3)]
    members[2]["x.lora_b"] = 0 * members[2]["x.lora_b"]
    single = jax.jit(lambda params, numbers: train(lora_rite(**numbers), params))
    together = jax.jit(jax.vmap(single))(jax.tree.map(lambda *x: jnp.stack(x), *members), numbers)
    for i, member in enumerate(members):
        alone = single(member, {name: x[i] for name, x in numbers.items()})
        jax.tree.map(lambda x, y, i=i: np.testing.assert_allclose(x[i], y, rtol=1e-9, atol=1e-9), together, alone)
    skipped = np.asarray(state_of(together[1]).skipped)
    assert skipped.min() < skipped.max()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_nonfinite_gradient_stays_in_its_pair(value):
    """And counts as 0 in the norm of all gradients."""
    params, tx = two_pairs(), lora_rite(0.05, clip_norm=0.01)
    grads, update = {name: 0.01 * jnp.cos(x) for name, x in params.items()}, jax.jit(tx.update)
    without = grads | {"lora_a": grads["lora_a"].at[1].set(0)}
    broken = grads | {"lora_a": grads["lora_a"].at[1, 2, 0].set(value)}
    (expected, _), (found, state) = (update(g, tx.init(params), params) for g in (without, broken))
    assert state_of(state).skipped == 0
    assert np.isnan(found["lora_a"][1]).any()
    for name, step in found.items():
        here, there = (x[0] if name.startswith("lora") else x for x in (step, expected[name]))
        np.testing.assert_allclose(here, there, rtol=1e-12)


def test_updates_keep_their_dtype():
    params, tx = two_pairs(dtype="bfloat16"), lora_rite(0.05, weight_decay=0.1)
    updates, state = jax.eval_shape(tx.update, params, tx.init(params), params)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(updates))
    moments = [tree["lora_a"] for tree in state_of(state)[2:]]
    assert [x.dtype for x in moments] == 3 * [jnp.float32]
    assert [x.shape for x in moments] == [(2, 9, 2), (2, 9, 2), (2, 2, 2)]


def test_in_a_chain_with_named_pairs():
    a, b = make_pairs()[0]
    params = {"u": jnp.asarray(a), "v": jnp.asarray(b), "lora_a": jnp.ones(3)}
    plain = {"lora_a": params["u"], "lora_b": params["v"], "w": jnp.ones(3)}
    named = optax.chain(optax.scale(0.1), lora_rite(0.05, pairs=lambda _: [("u", "v")]))
    tx = optax.chain(optax.scale(0.1), lora_rite(0.05))
    found, expected = (jax.jit(t.update)(p, t.init(p), p)[0] for t, p in ((named, params), (tx, plain)))
    for name, other in (("u", "lora_a"), ("v", "lora_b"), ("lora_a", "w")):
        np.testing.assert_array_equal(found[name], expected[other])


def test_state_maps_over_parameters():
    params = {name: jnp.asarray(x) for name, x in as_tree(make_pairs()).items()}
    tx = lora_rite(0.05)
    state = optax.tree.map_params(tx, lambda leaf: "moment", tx.init(params))
    assert jax.tree.leaves(state).count("moment") == 3 * 8 + 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"b1": 1.0}, r"b1 must be in \[0, 1\), got 1.0"),
        ({"b2": -0.1}, r"b2 must be in \[0, 1\), got -0.1"),
        ({"eps": 0.0}, r"eps must be in \(0, inf\), got 0.0"),
        ({"weight_decay": -1}, r"weight_decay must be in \[0, inf\), got -1"),
        ({"skip": 0}, r"skip must be in \(0, inf\), got 0"),
        ({"clip_norm": -2.0}, r"clip_norm must be in \(0, inf\), got -2.0"),
    ],
)
def test_bad_numbers_raise(options, message):
    with pytest.raises(ValueError, match=message):
        lora_rite(0.1, **options)


def test_what_is_missing_raises():
    tx, params = lora_rite(0.1), {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="no partner"):
        tx.init({"lora_a": params["lora_a"]})
    with pytest.raises(ValueError, match="at least one LoRA pair"):
        tx.init({"kernel": jnp.ones((2, 2))})
