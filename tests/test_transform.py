import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from oracles import assert_same_product, gap, mixed_pair, same_bits

from balora_jax import (
    GAUGES,
    BaloraProjectState,
    Pair,
    balance,
    balancing_gap,
    balora,
    balora_project,
    check_projection,
    find_pairs,
)
from balora_jax.pairs import read_pairs

ROWS, RANK, COLUMNS = 12, 3, 9


def make_params(dtype=jnp.float32):
    """Two pairs of one shape out of balance, and leaves beside them."""
    (a, c), (b, d) = mixed_pair(ROWS, RANK, COLUMNS, leading=(2,))
    rng = np.random.default_rng(1)
    params = {
        "up": {"kernel": rng.standard_normal((ROWS, COLUMNS)), "lora_a": a, "lora_b": b},
        "down": {"lora_a": c, "lora_b": d, "bias": rng.standard_normal(COLUMNS)},
    }
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


PARAMS = make_params()
PAIRS = find_pairs(PARAMS)
IS_FACTOR = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key.startswith("lora"), PARAMS)
LABELS = jax.tree_util.tree_map_with_path(
    lambda path, _: {"lora_a": "A", "lora_b": "B"}.get(path[-1].key, "rest"), PARAMS
)
FROZEN = jax.tree.map(lambda factor: "train" if factor else "frozen", IS_FACTOR)


def gradient(params, step=0):
    """Some smooth function of the parameters that differs from step to step."""
    return jax.tree.map(lambda x: jnp.sin(3 * x + step).astype(x.dtype), params)


def gaps(params):
    return [float(gap(a, b).max()) for a, b in read_pairs(params, PAIRS)]


def project_state(state):
    """The one `BaloraProjectState` in an optimizer state."""
    states = [x for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, BaloraProjectState))]
    (found,) = (x for x in states if isinstance(x, BaloraProjectState))
    return found


def no_projection(*, every=1):
    """Stands in for `balora_project` in the plain optimizer."""
    del every
    return optax.identity()


def lora_plus():
    return optax.partition({"A": optax.adamw(1e-2), "B": optax.adamw(8e-2), "rest": optax.sgd(1e-1)}, LABELS)


# Each takes the last transformation's factory.
OPTIMIZERS = {
    "sgd": lambda last: optax.chain(optax.sgd(1e-1), last()),
    "adamw": lambda last: optax.chain(optax.adamw(1e-2), last()),
    "masked": lambda last: optax.chain(optax.adamw(1e-2), optax.masked(last(), IS_FACTOR)),
    "partition": lambda last: optax.partition(
        {"train": optax.chain(optax.adamw(1e-2), last()), "frozen": optax.set_to_zero()}, FROZEN
    ),
    "LoRA+": lambda last: optax.chain(lora_plus(), last()),
    "LoRA+ masked": lambda last: optax.chain(lora_plus(), optax.masked(last(), IS_FACTOR)),
    "MultiSteps": lambda last: optax.MultiSteps(optax.chain(optax.adamw(1e-2), last()), 2),
    "inject_hyperparams of the chain": lambda last: optax.inject_hyperparams(
        lambda learning_rate: optax.chain(optax.adamw(learning_rate), last())
    )(learning_rate=optax.linear_schedule(1e-2, 1e-3, 3)),
    "inject_hyperparams of the projection": lambda last: optax.chain(
        optax.adamw(1e-2), optax.inject_hyperparams(last)(every=1)
    ),
    "apply_if_finite": lambda last: optax.apply_if_finite(optax.chain(optax.adamw(1e-2), last()), 2),
    "extra arguments": lambda last: optax.with_extra_args_support(optax.chain(optax.adamw(1e-2), last())),
}


def differ(tree, other):
    """For each leaf of two trees, whether the leaves differ by more than rounding."""
    return [not np.allclose(x, y, atol=1e-3) for x, y in zip(*map(jax.tree.leaves, (tree, other)), strict=True)]


CONDITIONAL = ("MultiSteps", "inject_hyperparams of the projection", "apply_if_finite")  # a `lax.cond` each


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_balances_the_step_of_any_optimizer(optimizer):
    projected, plain = OPTIMIZERS[optimizer](balora_project), OPTIMIZERS[optimizer](no_projection)
    extra = {"value": jnp.ones(())} if optimizer == "extra arguments" else {}

    def both(grads, states, params):
        return [tx.update(grads, s, params, **extra) for tx, s in zip((projected, plain), states, strict=True)]

    both = jax.jit(both) if optimizer in CONDITIONAL else both
    params, states, moved = PARAMS, (projected.init(PARAMS), plain.init(PARAMS)), []
    for step in range(4):
        (updates, plain_updates), states = zip(*both(gradient(params, step), states, params), strict=True)
        new_params, plain_params = (optax.apply_updates(params, u) for u in (updates, plain_updates))
        for new, old in zip(read_pairs(new_params, PAIRS), read_pairs(plain_params, PAIRS), strict=True):
            assert_same_product(old, new, 3e-6)
        for update, expected, factor in zip(*map(jax.tree.leaves, (updates, plain_updates, IS_FACTOR)), strict=True):
            assert factor or same_bits(update, expected)
        moved.append(differ(updates, plain_updates))
        params = new_params
    assert np.any(moved, axis=0).tolist() == jax.tree.leaves(IS_FACTOR)
    assert max(gaps(params)) < 3e-6
    assert int(project_state(states[0]).count) == (2 if optimizer == "MultiSteps" else 4)


@pytest.mark.parametrize("options", [{}, *({"gauge": gauge} for gauge in GAUGES)], ids=["default", *GAUGES])
def test_lands_where_balance_lands(options):
    updates, _ = balora_project(**options).update(gradient(PARAMS), balora_project().init(PARAMS), PARAMS)
    trees = (optax.apply_updates(PARAMS, u) for u in (updates, gradient(PARAMS)))
    for new, old in zip(*(read_pairs(tree, PAIRS) for tree in trees), strict=True):
        for x, y in zip(new, balance(*old, **options), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


SPLITTING = {
    "masked": lambda side: optax.masked(balora_project(), jax.tree.map(lambda label: label == side, LABELS)),
    "partition": lambda side: optax.partition(
        {label: balora_project() if label == side else optax.identity() for label in ("A", "B", "rest")}, LABELS
    ),
}


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("split", SPLITTING)
def test_a_mask_between_the_factors_raises_with_advice(split, side):
    own, other = (f"down/lora_{x}" for x in (side.lower(), "b" if side == "A" else "a"))
    with pytest.raises(ValueError, match=rf"{own} is separated by a mask .*{other}; .*outside the mask or partition"):
        SPLITTING[split](side).init(PARAMS)


@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.parametrize(("every", "start_step", "due"), [(3, 2, [5, 8]), (1, 6, [7, 8])])
def test_schedule(every, start_step, due, injected):
    factory = optax.inject_hyperparams(balora_project) if injected else balora_project
    tx = optax.chain(optax.sgd(1e-1), factory(every=every, start_step=start_step))
    params, state, seen = PARAMS, tx.init(PARAMS), []
    update = jax.jit(tx.update)
    for step in range(1, 9):
        updates, state = update(gradient(params, step), state, params)
        if step not in due:
            plain, _ = optax.sgd(1e-1).update(gradient(params, step), optax.sgd(1e-1).init(params))
            jax.tree.map(np.testing.assert_array_equal, updates, plain)
        params = optax.apply_updates(params, updates)
        if max(gaps(params)) < 3e-6:
            seen.append(step)
    assert seen == due


LINEAR_X = jnp.asarray(np.random.default_rng(0).standard_normal((7, 6)), jnp.float32)


@pytest.mark.parametrize("wrt", [nnx.Param, nnx.LoRAParam])
def test_trains_an_nnx_model(wrt):
    model = nnx.LoRALinear(6, 5, lora_rank=2, rngs=nnx.Rngs(0))
    model.lora.lora_b[...] = jnp.ones((2, 5)).at[0].set(2 * jnp.arange(5.0))
    optimizer = nnx.Optimizer(model, optax.chain(optax.adam(1e-2), balora_project()), wrt=wrt)
    kernel = model.kernel[...]

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(
            lambda model: jnp.mean((model(LINEAR_X) - 1) ** 2), argnums=nnx.DiffState(0, wrt)
        )(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(10)]
    assert np.all(np.diff(losses) < 0)
    assert gap(model.lora.lora_a[...], model.lora.lora_b[...]) < 1e-5
    assert same_bits(kernel, model.kernel[...]) == (wrt is nnx.LoRAParam)


def train(params, learning_rate, *, steps=20):
    """A training loop as users write it: a scan over jitted steps."""
    tx = optax.inject_hyperparams(lambda learning_rate: optax.chain(optax.adam(learning_rate), balora_project()))(
        learning_rate=learning_rate
    )

    def step(carry, i):
        params, state = carry
        updates, state = tx.update(gradient(params, i), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))[0]


def test_a_population_trains_as_its_members_do():
    rates = jnp.array([0.0, 1e-3, 1e-2])
    members = jax.tree.map(lambda x: jnp.stack([x, 2 * x, x]), PARAMS)
    members["up"]["lora_b"] = members["up"]["lora_b"].at[2].set(jnp.nan)
    together = jax.jit(jax.vmap(train))(members, rates)
    single = jax.jit(train)
    for i in range(3):
        alone = single(jax.tree.map(lambda x, i=i: x[i], members), rates[i])
        jax.tree.map(lambda x, y, i=i: np.testing.assert_allclose(x[i], y, rtol=1e-4, atol=1e-4), together, alone)
        assert all(value < 3e-6 for value in gaps(alone[0]) if i < 2)
    assert project_state(together[1]).nonfinite.tolist() == [0, 0, 1]
    assert jax.eval_shape(train, PARAMS, 1e-2) == jax.eval_shape(lambda: alone)


def test_donated_buffers():
    tx = optax.chain(optax.sgd(1e-1), balora_project())

    def step(params, state):
        updates, state = tx.update(gradient(params), state, params)
        return optax.apply_updates(params, updates), state

    expected, _ = step(PARAMS, tx.init(PARAMS))
    params = jax.tree.map(jnp.copy, PARAMS)
    found, _ = jax.jit(step, donate_argnums=(0, 1))(params, tx.init(params))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), found, expected)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes_and_shapes_are_stable(dtype, every):
    """Updates keep their dtype, and a step can stand beside its absence in a `lax.cond`."""
    params, tx = make_params(dtype), balora_project(every=every)
    inputs = gradient(params), tx.init(params)

    @jax.jit
    def step_or_none(due):
        return jax.lax.cond(due, lambda: tx.update(*inputs, params), lambda: inputs)

    stepped = step_or_none(True)
    for outputs in (stepped, step_or_none(False)):
        assert jax.eval_shape(lambda x=outputs: x) == jax.eval_shape(lambda: inputs)
    balanced = max(gaps(optax.apply_updates(params, stepped[0]))) < (0.02 if dtype == "bfloat16" else 3e-6)
    assert balanced == (every == 1)


@pytest.mark.parametrize(("dtype", "most"), [("float32", 4e-6), ("bfloat16", 2e-2), ("float16", 4e-3)])
@pytest.mark.parametrize("condition", [1.5, 1e1, 1e2, 1e3, 1e4])
def test_a_pair_far_from_balance_keeps_its_product(condition, dtype, most):
    """An update is added to parameters in their dtype: where that would lose the product, the pair is left."""
    rng = np.random.default_rng(0)
    left, right, mix = (np.linalg.qr(rng.standard_normal((n, 6)))[0] for n in (24, 30, 6))
    stretch = np.geomspace(1, 1 / condition, 6)
    params = {
        "lora_a": jnp.asarray(left * stretch @ mix, dtype),
        "lora_b": jnp.asarray(mix.T / stretch @ right.T, dtype),
    }
    tx = balora_project(least_ratio=0.0)
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    old, new = (
        [np.asarray(x, float) for x in tree.values()] for tree in (params, optax.apply_updates(params, updates))
    )
    error = np.linalg.norm(new[0] @ new[1] - old[0] @ old[1]) / np.linalg.norm(old[0] @ old[1])
    assert error < most
    assert int(state.untouched) == (error == 0)
    assert int(state.untouched) == (condition > {"float32": 100, "bfloat16": 1.5, "float16": 10}[dtype])


@pytest.mark.parametrize(("least_ratio", "waits"), [(0, False), (jnp.float32(0), False), (1e-9, True), (0.03, True)])
def test_without_a_least_ratio_the_first_step_is_balanced_too(least_ratio, waits):
    """As in arXiv 2605.31484: from `B = 0` the gradient of A is zero, and B alone moves."""
    rng = np.random.default_rng(0)
    lora_a, step = rng.standard_normal((9, 3)), 0.1 * rng.standard_normal((3, 7))
    params = {"lora_a": jnp.asarray(lora_a, jnp.float32), "lora_b": jnp.zeros((3, 7))}
    updates = {"lora_a": jnp.zeros((9, 3)), "lora_b": jnp.asarray(step, jnp.float32)}
    tx = balora_project(least_ratio=least_ratio)
    updates, state = tx.update(updates, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    assert bool(balancing_gap(**new) > 0.1) == waits == bool(state.waiting)
    np.testing.assert_allclose(new["lora_a"] @ new["lora_b"], lora_a @ step, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_strict_promotion(dtype):
    params, tx = make_params(dtype), balora_project()
    with jax.numpy_dtype_promotion("strict"):
        updates, _ = tx.update(gradient(params), tx.init(params), params)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.masked(tx, lambda _: IS_FACTOR)])
def test_state_maps_over_parameters(wrap):
    """`optax.tree.map_params` initialises with a placeholder."""
    tx = optax.chain(optax.adam(1e-2), wrap(balora_project(every=2)))
    state = optax.tree.map_params(tx, lambda leaf: "moment", tx.init(PARAMS))
    assert jax.tree.leaves(state).count("moment") == 2 * len(jax.tree.leaves(PARAMS))
    assert [int(x) for x in project_state(state)[:-1]] == [0] * 3


def train_state(tx, params, *, steps):
    """The parameters and the state of the projection after some steps."""
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(gradient(params, step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


# name: (a transformation that holds a projection, whether its pairs stay balanced)
PLACES = {
    "last": (optax.chain(optax.adam(1e-2), balora_project()), True),
    "every third": (optax.chain(optax.adam(1e-2), balora_project(every=3)), True),
    "in MultiSteps": (optax.MultiSteps(optax.chain(optax.adam(1e-2), balora_project()), 2), True),
    "before what passes updates on": (optax.chain(optax.adam(1e-2), balora_project(), optax.zero_nans()), True),
    "first": (optax.chain(balora_project(), optax.adam(1e-2)), False),
    "first, tiny steps": (optax.chain(balora_project(), optax.adam(1e-5)), False),
    "before a scaling": (optax.chain(optax.adam(1e-2), balora_project(), optax.scale(0.5)), False),
    "before weight decay": (optax.chain(optax.adam(1e-2), balora_project(), optax.add_decayed_weights(0.1)), False),
    "before clipping": (optax.chain(optax.adam(1e-2), balora_project(), optax.clip(1e-3)), False),
    "every third, before a scaling": (
        optax.chain(optax.adam(1e-2), balora_project(every=3), optax.scale(0.5)),
        False,
    ),
    "balora, before a scaling": (optax.chain(balora(optax.adam(1e-2)), optax.scale(2.0)), False),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_projection_that_is_undone_is_noticed(place):
    tx, stays = PLACES[place]
    _, state = train_state(tx, PARAMS, steps=8)
    assert (int(project_state(state).disturbed) == 0) == stays
    if stays:
        check_projection(state)
    else:
        with pytest.raises(ValueError, match=r"came back unbalanced .* must be the last transformation"):
            check_projection(state)


def test_a_frozen_factor_is_never_moved():
    frozen = {"A": optax.set_to_zero(), "B": optax.adamw(1e-2), "rest": optax.adamw(1e-2)}
    for params in (PARAMS, fresh()):
        new, state = train_state(optax.chain(optax.partition(frozen, LABELS), balora_project()), params, steps=3)
        for pair in ("up", "down"):
            assert same_bits(new[pair]["lora_a"], params[pair]["lora_a"])
            assert not same_bits(new[pair]["lora_b"], params[pair]["lora_b"])
        assert int(project_state(state).frozen) == 2
        with pytest.raises(ValueError, match="2 pairs cannot be balanced, because one of the factors gets no update"):
            check_projection(state)


def test_a_fresh_pair_that_weight_decay_alone_moves_is_not_frozen():
    """Of an expert that has seen no token: its B is zero and has no gradient."""
    params = fresh()
    tx = optax.chain(optax.adamw(1e-2, weight_decay=0.1), balora_project())
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert jnp.any(updates["up"]["lora_a"])
    assert (int(project_state(state).frozen), int(project_state(state).untouched)) == (0, 2)
    check_projection(state)


def test_check_projection_wants_a_projection():
    with pytest.raises(ValueError, match="must hold the state of balora_project or balora"):
        check_projection(optax.adam(1e-2).init(PARAMS))


@pytest.mark.parametrize("missing", [None, optax.MaskedNode()])
def test_pairs_without_updates_stay(missing):
    """As where another transformation has taken their gradients out; also with their moments."""
    for tx in (balora_project(), balora_project(every=1, start_step=0, pairs=find_pairs), balora(optax.identity())):
        updates = gradient(PARAMS)
        expected, _ = tx.update(updates, tx.init(PARAMS), PARAMS)
        updates["down"] = {**updates["down"], "lora_a": missing, "lora_b": missing}
        found, state = tx.update(updates, tx.init(PARAMS), PARAMS)
        assert found["down"]["lora_a"] is missing
        assert found["down"]["lora_b"] is missing
        np.testing.assert_allclose(found["up"]["lora_a"], expected["up"]["lora_a"], rtol=1e-5, atol=1e-6)
        assert project_state(state).balanced.tolist() == [False, True]
        updates["down"]["lora_b"] = PARAMS["down"]["lora_b"]
        with pytest.raises(ValueError, match="updates hold none for down/lora_a, but one for its partner down/lora_b"):
            tx.update(updates, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize(("least_ratio", "waiting"), [(0.0, 0), (0.1, 1), (0.5, 2), (1.0, 2)])
def test_small_factors_wait(least_ratio, waiting):
    (a, c), (b, d) = mixed_pair(ROWS, RANK, COLUMNS, leading=(2,))
    ratios = jnp.asarray([0.02, 0.3])[:, None, None]
    stack = [x / jnp.linalg.norm(x, axis=(1, 2), keepdims=True) for x in (jnp.stack([a, c]), jnp.stack([b, d]))]
    params = {"lora_a": jnp.float32(stack[0]), "lora_b": jnp.float32(stack[1] * ratios)}
    tx = balora_project(least_ratio=least_ratio)
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert int(state.waiting) == waiting
    assert [not jnp.any(updates["lora_a"][i]) for i in range(2)] == [waiting > 0, waiting > 1]


def fresh():
    return jax.tree_util.tree_map_with_path(lambda path, x: 0 * x if path[-1].key == "lora_b" else x, PARAMS)


def test_a_fresh_adapter_waits_and_then_trains():
    """With `B = 0` and a learning rate that warms up from 0, the first step changes nothing."""
    products = [np.float32(a @ b) for a, b in (mixed_pair(ROWS, RANK, COLUMNS, seed=seed) for seed in (5, 6))]
    target = dict(zip(("up", "down"), products, strict=True))

    def loss(params):
        return sum(jnp.mean((params[k]["lora_a"] @ params[k]["lora_b"] - t) ** 2) for k, t in target.items())

    tx = optax.chain(optax.adam(optax.linear_schedule(0.0, 3e-2, 5)), balora_project())
    params = {name: {k: fresh()[name][k] for k in ("lora_a", "lora_b")} for name in ("up", "down")}
    state, untouched, losses = tx.init(params), [], []
    step = jax.jit(lambda params, state: tx.update(jax.grad(loss)(params), state, params))
    for _ in range(40):
        losses.append(float(loss(params)))
        updates, state = step(params, state)
        if not untouched:
            assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(updates))
        params = optax.apply_updates(params, updates)
        untouched.append(int(project_state(state).untouched))
    assert untouched[0] == 2
    assert not any(untouched[5:])  # Adam's first steps have entries of one size, and may lack rank too
    assert losses[0] == losses[1]
    assert losses[-1] < 0.3 * losses[0]
    assert max(gap(x["lora_a"], x["lora_b"]) for x in params.values()) < 1e-5


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-12, 1e-16, 1e-20])
def test_the_first_small_step_of_an_adapter_is_not_lost(size):
    """The product that `params + updates` gives is the optimizer's, or nearly, however small the new `B` is."""
    tx, params = balora_project(), fresh()
    steps = jax.tree.map(lambda x, label: (size if label == "B" else 0) * jnp.cos(9 * x), PARAMS, LABELS)
    updates, _ = tx.update(steps, tx.init(params), params)
    before, after = (read_pairs(optax.apply_updates(params, u), PAIRS) for u in (steps, updates))
    for old, new in zip(before, after, strict=True):
        assert_same_product(old, new, 1e-2)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_nonfinite_pair_is_counted_and_harms_no_other(value):
    tx, grads = balora_project(), gradient(PARAMS)
    expected, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    broken = jax.tree.map(jnp.copy, grads)
    broken["up"]["lora_a"] = grads["up"]["lora_a"].at[2, 1].set(value)
    updates, state = tx.update(broken, tx.init(PARAMS), PARAMS)
    assert (int(state.nonfinite), int(state.untouched), int(state.count)) == (1, 0, 1)
    assert all(same_bits(updates["down"][key], expected["down"][key]) for key in updates["down"])
    assert all(same_bits(updates["up"][key], broken["up"][key]) for key in updates["up"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"every": 2.0}, TypeError, "every must be an integer, got 2.0"),
        ({"every": True}, TypeError, "every must be an integer, got True"),
        ({"every": jnp.ones(3, int)}, TypeError, r"every must be a single integer, got shape \(3,\)"),
        ({"every": jnp.float32(2)}, TypeError, "every must be an integer, got dtype float32"),
        ({"start_step": -1}, ValueError, "start_step must be at least 0, got -1"),
        ({"start_step": None}, TypeError, "start_step must be an integer, got None"),
        ({"least_ratio": -0.1}, ValueError, "least_ratio must be from 0 to 1, got -0.1"),
        ({"least_ratio": "half"}, TypeError, "least_ratio must be a number, got 'half'"),
        ({"gauge": "polar"}, ValueError, "gauge must be one of .*'polar'"),
    ],
)
def test_bad_options_raise(options, error, message):
    with pytest.raises(error, match=message):
        balora_project(**options)


@pytest.mark.parametrize(
    ("params", "pairs", "message"),
    [
        ({"kernel": jnp.ones((2, 2))}, None, "at least one LoRA pair.*kernel"),
        ({"m": {"lora_a": jnp.ones((2, 2))}}, None, "m/lora_a has no partner.*m/lora_b"),
        ({"u": jnp.ones((2, 2))}, [("u", "v")], "'v'.*not in params"),
    ],
)
def test_params_without_pairs_raise_at_init(params, pairs, message):
    with pytest.raises(ValueError, match=message):
        balora_project(pairs=pairs).init(params)


def test_update_without_params_raises():
    tx = optax.chain(optax.adam(1e-2), balora_project())
    with pytest.raises(ValueError, match="parameters"):
        tx.update(PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize("pairs", [[("u", "v")], lambda params: [Pair("u", "v") for _ in params if _ == "u"]])
def test_named_pairs(pairs):
    params = {"u": PARAMS["up"]["lora_a"], "v": PARAMS["up"]["lora_b"], "lora_a": jnp.ones(3)}
    tx = balora_project(pairs=pairs)
    updates, _ = tx.update(gradient(params), tx.init(params), params)
    new_params = optax.apply_updates(params, updates)
    assert gap(new_params["u"], new_params["v"]) < 3e-6
    assert same_bits(updates["lora_a"], gradient(params)["lora_a"])


def test_aligned_columns_keep_the_meaning_of_adams_moments():
    """Fitting a 20 x 20 matrix of rank 4: columns that change places or signs under the moments cost a lot."""

    def final_loss(gauge, seed):
        key_a, key_u, key_v = jax.random.split(jax.random.key(seed), 3)
        target = jax.random.normal(key_u, (20, 4)) @ jax.random.normal(key_v, (4, 20))
        params = {"lora_a": jax.random.normal(key_a, (20, 4)) / 20**0.5, "lora_b": jnp.zeros((4, 20))}
        tx = optax.chain(optax.adam(5e-2), balora_project(gauge=gauge))

        def loss(params):
            return 0.5 * jnp.sum((params["lora_a"] @ params["lora_b"] - target) ** 2)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), None, length=150)
        return loss(params)

    aligned, raw = (
        np.asarray(jax.jit(jax.vmap(functools.partial(final_loss, gauge)))(jnp.arange(6)))
        for gauge in ("svd", "raw_svd")
    )
    assert np.all(aligned < 1e-3)
    assert np.all(aligned < 0.3 * raw)


def end_of_run(transformation, *, sleeping, steps=400):
    """Losses of two experts in one stacked pair, `B = 0` at the start; the second gets no token in its first steps."""
    keys = jax.random.split(jax.random.key(3), 4)
    inputs = jax.random.normal(keys[0], (2, 40, ROWS))
    target = inputs @ (jax.random.normal(keys[1], (2, ROWS, RANK)) @ jax.random.normal(keys[2], (2, RANK, COLUMNS)))
    params = {
        "lora_a": jax.random.uniform(keys[3], (2, ROWS, RANK), minval=-1, maxval=1) / ROWS**0.5,
        "lora_b": jnp.zeros((2, RANK, COLUMNS)),
    }

    def losses(params):
        return jnp.mean((inputs @ params["lora_a"] @ params["lora_b"] - target) ** 2, axis=(1, 2))

    def step(carry, i):
        params, state = carry
        awake = jnp.stack([jnp.ones(()), jnp.where(i < sleeping, 0.0, 1.0)])
        grads = jax.grad(lambda params: jnp.sum(awake * losses(params)))(params)
        updates, state = transformation.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), losses(params)

    return np.asarray(jax.lax.scan(step, (params, transformation.init(params)), jnp.arange(steps))[1])


@pytest.mark.parametrize("transport", [False, True])
@pytest.mark.parametrize("gauge", ["svd", "nearest"])
@pytest.mark.parametrize(
    ("rate", "sleeping"),
    [(optax.linear_schedule(0.0, 3e-2, 30), 0), (3e-2, 50)],
    ids=["warm-up from 0", "an expert sleeps"],
)
def test_what_starts_late_ends_as_well_as_with_lora(rate, sleeping, gauge, transport):
    lora = end_of_run(optax.adam(rate), sleeping=sleeping)
    balanced = end_of_run(balora(optax.adam(rate), gauge=gauge, transport=transport), sleeping=sleeping)
    if sleeping:  # no factor moved, and nothing was lost
        np.testing.assert_array_equal(balanced[:sleeping, 1], balanced[0, 1])
    for losses in (lora, balanced):
        assert np.all(losses[-1] < 1e-4 * losses[0])
