import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from oracles import gap, hyper_balanced, mixed_pair, same_bits

from balora_jax import GAUGES, BaloraState, balance_pair, balance_pairs, balora, balora_project

ROWS, RANK, COLUMNS = 12, 3, 9
PAIRS, FACTORS = ("up", "down"), ("lora_a", "lora_b")


def make_params(pairs):
    """Two pairs and leaves beside them, in float32 and of few shapes."""
    rng = np.random.default_rng(1)
    params = {name: dict(zip(FACTORS, pair, strict=True)) for name, pair in zip(PAIRS, pairs, strict=True)}
    params["rest"] = {"kernel": rng.standard_normal((RANK, COLUMNS)), "weight": rng.standard_normal((ROWS, RANK))}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


PARAMS = make_params(mixed_pair(ROWS, RANK, COLUMNS, seed=seed) for seed in range(2))
LABELS = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key[-1] if path[0].key != "rest" else "r", PARAMS)
IS_FACTOR = jax.tree.map(lambda label: label != "r", LABELS)
# Balanced already: the gauge raw_svd changes places and signs of the columns, and of the others their sizes too.
PERMUTED = make_params(hyper_balanced(ROWS, COLUMNS, values, seed=i) for i, values in enumerate(([1, 9, 4], [2, 3, 5])))
SCALED = jax.tree.map(lambda x, label: x * {"a": 4.0, "b": 0.25, "r": 1.0}[label], PERMUTED, LABELS)
REDUNDANT = {"up": {"lora_a": PARAMS["up"]["lora_a"][:, :2] @ jnp.eye(2, 3), "lora_b": jnp.eye(3, 2) + 1.0}}


def gradient(params, step=0):
    """Some smooth function of the parameters that differs from step to step."""
    return jax.tree.map(lambda x: jnp.sin(3 * x + step).astype(x.dtype), params)


@functools.partial(jax.jit, static_argnums=1)
@jax.grad
def product_gradient(params, step):
    """Of the distances of the products `A B` from targets that differ from step to step, and of the rest from 1."""

    def loss(leaves):
        if "lora_a" not in leaves:
            return sum(jnp.sum((leaf - 1) ** 2) for leaf in leaves.values())
        product = leaves["lora_a"] @ leaves["lora_b"]
        return jnp.sum((product - jnp.cos(jnp.arange(product.size).reshape(product.shape) + step)) ** 2)

    return 0.5 * sum(map(loss, params.values()))


def factors(leaves):
    return leaves["lora_a"], leaves["lora_b"]


def counted(projection):
    return tuple(map(int, (projection.count, projection.untouched, projection.nonfinite)))


def products(params):
    return [np.asarray(params[pair]["lora_a"] @ params[pair]["lora_b"]) for pair in PAIRS]


def train(tx, params, grads, steps, *, compiled=False):
    state, update = tx.init(params), jax.jit(tx.update) if compiled else tx.update
    for step in range(steps):
        updates, state = update(grads(params, step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_close(found, expected, tolerance=1e-4):
    """Of all leaves, relative to the largest entry of each."""

    def one(x, y):
        x, y = np.asarray(x, float), np.asarray(y, float)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())

    jax.tree.map(one, found, expected)


def assert_same_bits(found, expected):
    assert jax.tree.all(jax.tree.map(same_bits, found, expected))


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
    "adagrad": (lambda rate: optax.chain(optax.scale_by_rss(), optax.scale(-rate)), "sum_of_squares"),
}
LORA_PLUS = {"a": optax.adamw(1e-1), "b": optax.amsgrad(8e-1), "r": optax.sgd(1e-1)}
WRAPPED = {
    "chain": (lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)), "mu nu"),
    "named_chain": (lambda rate: optax.named_chain(("clip", optax.clip(0.5)), ("adam", optax.adam(rate))), "mu nu"),
    "inject_hyperparams": (lambda rate: optax.inject_hyperparams(optax.adamw)(lambda _: rate), "mu nu"),
    "masked": (lambda rate: optax.masked(optax.adam(rate), IS_FACTOR), "mu nu"),
    "one factor": (lambda rate: optax.masked(optax.adam(rate), jax.tree.map(lambda x: x == "b", LABELS)), "mu nu"),
    "LoRA+": (lambda _: optax.partition(LORA_PLUS, LABELS), "mu nu nu_max"),
    "MultiSteps": (lambda rate: optax.MultiSteps(optax.adam(rate), 2), "acc_grads mu nu"),
    "apply_if_finite": (lambda rate: optax.apply_if_finite(optax.adam(rate), 2), "mu nu"),
    "needs a value": (lambda rate: optax.chain(optax.adam(rate), optax.contrib.reduce_on_plateau()), "mu nu"),
    "bfloat16 moments": (lambda rate: optax.adam(rate, mu_dtype="bfloat16"), "mu nu"),
}
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
    """The state is the plain one with its moments carried through `changes` (T by pair) by the definition, in NumPy."""
    expected = moments(plain)
    for (path, leaf), old in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(plain), strict=True):
        field, pair, side, _ = expected.get(path, 4 * (None,))
        if pair not in changes:
            assert same_bits(leaf, old), path
            continue
        assert leaf.dtype == old.dtype
        tolerance, order = 1e-2 if old.dtype == jnp.bfloat16 else 1e-4, ORDERS[field]
        old, change = np.asarray(old, float), np.asarray(changes[pair], float)
        new = old @ np.linalg.inv(change).T ** order if side == "lora_a" else change.T**order @ old
        assert_close(leaf, new, tolerance)
        assert not old.any() or not np.allclose(new, old, rtol=0, atol=0.01 * np.abs(old).max())


STEPS = [(name, gauge) for name in OPTIMIZERS for gauge in GAUGES] + [(name, "svd") for name in WRAPPED]


@pytest.mark.parametrize(("name", "gauge"), STEPS)
def test_a_step_is_the_optimizers_then_balances_and_carries_the_moments(name, gauge):
    """Both steps start out of balance, so that the second has moments to carry, and far."""
    factory, fields = (OPTIMIZERS | WRAPPED)[name]
    inner, extra = factory(1e-1), {"value": jnp.ones(())} if name == "needs a value" else {}
    tx = balora(inner, gauge=gauge)
    state = tx.init(PARAMS)
    for step in range(2):
        grads = gradient(PARAMS, step)
        plain_updates, plain = inner.update(grads, state.inner, PARAMS, **extra)
        updates, state = tx.update(grads, state, PARAMS, **extra)
        new, moved = (optax.apply_updates(PARAMS, u) for u in (updates, plain_updates))
        balanced = balance_pairs([factors(moved[pair]) for pair in PAIRS], gauge=gauge)
        assert_close([factors(new[pair]) for pair in PAIRS], [x[:2] for x in balanced])
        assert_same_bits(updates["rest"], plain_updates["rest"])
        assert_carried(state.inner, plain, {pair: x.T for pair, x in zip(PAIRS, balanced, strict=True)})
    assert {field for field, *_ in moments(plain).values()} == set(fields.split())
    assert counted(state.projection) == (2, 0, 0)


SCALES = {"adagrad": PERMUTED, "rmsprop, corrected": PERMUTED}  # they keep what does not scale as a gradient
EXACT = [
    *(("momentum", gauge, PARAMS) for gauge in GAUGES),
    ("momentum", "nearest", REDUNDANT),
    *((name, "raw_svd", SCALES.get(name, SCALED)) for name in OPTIMIZERS),
]


def assert_moments_of_the_new_gauge(optimizer, gauge, params):
    """As if all gradients had been taken where the projection leads."""

    def grads(params, step):
        return jax.tree.map(lambda x: x * (step < 3), product_gradient(params, step))

    inner = optax.chain(optimizer, optax.set_to_zero())
    tx, (_, plain) = balora(inner, gauge=gauge), train(inner, params, grads, 3)
    updates, state = tx.update(grads(params, 3), BaloraState(plain, tx.init(params).projection), params)
    _, expected = train(inner, optax.apply_updates(params, updates), grads, 4)
    for found, new, old in zip(*(moments(x).values() for x in (state.inner, expected, plain)), strict=True):
        assert_close(found[-1], new[-1])
        assert not np.allclose(found[-1], old[-1], rtol=0, atol=0.05 * np.abs(old[-1]).max())


@pytest.mark.parametrize(("name", "gauge", "params"), EXACT, ids=[f"{name}-{gauge}" for name, gauge, _ in EXACT])
def test_first_moments_and_those_of_permuted_columns_are_exact(name, gauge, params):
    assert_moments_of_the_new_gauge(OPTIMIZERS[name][0](1e-1), gauge, params)


ADAM = optax.adam(1e-1)
# Each takes what to do with the optimizer of the pairs: `balora`, or nothing.
AROUND = {
    "chain": lambda wrap: optax.chain(optax.clip_by_global_norm(0.5), wrap(ADAM)),
    "inject_hyperparams": lambda wrap: optax.inject_hyperparams(lambda rate: wrap(optax.adam(rate)))(lambda _: 0.1),
    "inject_hyperparams of balora": lambda wrap: optax.inject_hyperparams(wrap)(ADAM),
    "masked": lambda wrap: optax.masked(wrap(ADAM), IS_FACTOR),
    "partition": lambda wrap: optax.partition({True: wrap(ADAM), False: optax.sgd(1e-2)}, IS_FACTOR),
    "MultiSteps": lambda wrap: optax.MultiSteps(wrap(ADAM), 3),
    "apply_if_finite": lambda wrap: optax.apply_if_finite(wrap(ADAM), 2),
}


@pytest.mark.parametrize("name", AROUND)
def test_inside_and_around_another_transformation_are_the_same(name):
    """In their products: outside MultiSteps, `balora` turns the columns and the sums of gradients in between too."""

    def grads(params, step):
        broken = jnp.nan if (name, step) == ("apply_if_finite", 2) else 0.0
        return jax.tree.map(lambda x: x + broken, product_gradient(params, step))

    wrap = functools.partial(balora, gauge="raw_svd")
    conditional = name in ("MultiSteps", "apply_if_finite", "inject_hyperparams of balora")
    found, _ = train(AROUND[name](wrap), PERMUTED, grads, 6, compiled=conditional)
    expected, _ = train(wrap(AROUND[name](lambda tx: tx)), PERMUTED, grads, 6)
    assert_close((products(found), found["rest"]), (products(expected), expected["rest"]))
    assert not any(np.allclose(x, y, atol=0.1) for x, y in zip(products(found), products(PERMUTED), strict=True))
    assert max(gap(*factors(found[pair])) for pair in PAIRS) < 3e-6


LAYOUTS = {  # of two pairs `(a, b)`, `(c, d)`, and the names of the pairs
    "PEFT": (lambda a, b, c, d: {"lora_A.weight": a.T, "lora_B.weight": b.T, "k.lora_A": c.T, "k.lora_B": d.T}, None),
    "stacked": (lambda a, b, c, d: {"lora_a": jnp.stack([a, c]), "lora_b": jnp.stack([b, d])}, None),
    "split axes": (
        lambda a, b, c, d: {
            "w_lora_a": a.reshape(3, 4, 3),
            "w_lora_b": b,
            "v_lora_a": c,
            "v_lora_b": d.reshape(3, 3, 3),
        },
        None,
    ),
    "named": (lambda a, b, c, d: {"u": [a, c], "v": [b, d]}, [("u/0", "v/0"), ("u/1", "v/1")]),
}
FRESH = {**PARAMS, "up": {**PARAMS["up"], "lora_b": 0 * PARAMS["up"]["lora_b"]}}
MOVING, WAITING = (PARAMS, optax.identity()), (FRESH, optax.set_to_zero())


@pytest.mark.parametrize(
    ("layout", "params", "last"), [("stacked", *WAITING), *((layout, *MOVING) for layout in LAYOUTS)]
)
def test_layouts_agree(layout, params, last):
    """Also when one pair of a stack is untouched for its `B = 0`."""
    arranged, pairs = LAYOUTS[layout]
    plain = {pair: params[pair] for pair in PAIRS}
    inner = optax.chain(optax.scale_by_adam(), optax.scale(-1e-2), last)
    expected, state = train(balora(inner), plain, gradient, 2)
    trees = [plain, expected, state.inner[0].mu, state.inner[0].nu]
    start, *trees = (arranged(*factors(tree["up"]), *factors(tree["down"])) for tree in trees)
    found, state = train(balora(inner, pairs=pairs), start, gradient, 2)
    assert_close([found, state.inner[0].mu, state.inner[0].nu], trees)
    assert int(state.projection.untouched) == (params is FRESH)


def with_entry(params, value):
    return {**params, "up": {**params["up"], "lora_a": params["up"]["lora_a"].at[2, 1].set(value)}}


TINY = {**PARAMS, "up": {**PARAMS["up"], "lora_b": 1e-20 * PARAMS["up"]["lora_b"]}}
LEFT = {"B = 0": (FRESH, 1, 0), "tiny B": (TINY, 1, 0), "NaN": (with_entry(PARAMS, jnp.nan), 0, 1)}


@pytest.mark.parametrize("case", LEFT)
def test_moments_of_a_pair_that_is_left_stay_and_those_of_others_follow(case):
    params, untouched, nonfinite = LEFT[case]
    inner = optax.chain(optax.amsgrad(1.0), optax.set_to_zero())
    tx = balora(inner)
    _, plain = inner.update(gradient(PARAMS), inner.init(params), params)
    updates, state = tx.update(gradient(PARAMS), tx.init(params), params)
    assert_carried(state.inner, plain, {"down": balance_pair(*factors(PARAMS["down"])).change})
    assert counted(state.projection) == (1, untouched, nonfinite)
    assert not any(jnp.any(leaf) for leaf in factors(updates["up"]))


def test_between_projections_the_optimizer_is_plain():
    inner = optax.adam(1e-1)
    tx, params, projected = balora(inner, every=2, start_step=1), PARAMS, []
    state = tx.init(params)
    for step in range(1, 6):
        plain_updates, plain = inner.update(gradient(params, step), state.inner, params)
        updates, state = tx.update(gradient(params, step), state, params)
        if not same_bits(updates["up"]["lora_a"], plain_updates["up"]["lora_a"]):
            projected.append(step)
            assert not same_bits(state.inner[0].mu["up"]["lora_a"], plain[0].mu["up"]["lora_a"])
        else:
            assert_same_bits((updates, state.inner), (plain_updates, plain))
        params = optax.apply_updates(params, updates)
    assert projected == [3, 5]


@pytest.mark.parametrize("name", ["adamw", "LoRA+"])
def test_without_transport_it_is_a_chain(name):
    inner = (OPTIMIZERS | WRAPPED)[name][0](1e-1)
    params, state = train(balora(inner, transport=False, gauge="nearest"), PARAMS, gradient, 2)
    expected, chained = train(optax.chain(inner, balora_project(gauge="nearest")), PARAMS, gradient, 2)
    assert_same_bits((params, tuple(state)), (expected, chained))


# name: (an optimizer whose state no rule tells how to carry, the place that the message names)
UNMOVABLE = {
    "adadelta": (optax.adadelta(1e-1), "1/e_g/down/lora_a"),
    "adan": (optax.adan(1e-1), "0/m/down/lora_a"),
    "novograd": (optax.novograd(1e-1), "0/mu/down/lora_a"),
    "centred rmsprop": (optax.rmsprop(1e-1, centered=True), "0/mu/down/lora_a"),
    "adafactor": (optax.adafactor(1e-1), r"0/\S*v_row/down/lora_a"),
    "ema": (optax.chain(optax.sgd(1e-1), optax.ema(0.9)), "1/ema/down/lora_a"),
    "rprop": (optax.rprop(1e-1), "0/step_sizes/down/lora_a"),
    "sm3": (optax.sm3(1e-1), r"0/\S*/down/lora_a"),
    "lbfgs": (optax.scale_by_lbfgs(), "params/down/lora_a"),
    "schedule_free": (optax.contrib.schedule_free_sgd(1e-1), "z/down/lora_a"),
    "one of a partition": (optax.partition({True: optax.adadelta(1.0), False: ADAM}, IS_FACTOR), "e_g/down/lora_a"),
    "in MultiSteps": (optax.MultiSteps(optax.adadelta(1.0), 2), "e_g/down/lora_a"),
}


@pytest.mark.parametrize("name", UNMOVABLE)
def test_states_without_a_rule_raise_with_advice(name):
    inner, place = UNMOVABLE[name]
    with pytest.raises(ValueError, match=rf"keeps \S*{place} in its state.*transport=False"):
        balora(inner).init(PARAMS)
    tx = balora(inner, transport=False)
    updates, _ = tx.update(gradient(PARAMS), tx.init(PARAMS), PARAMS)
    new_params = optax.apply_updates(PARAMS, updates)
    assert max(gap(*factors(new_params[pair])) for pair in PAIRS) < 3e-6


def test_a_raveled_state_raises_too():
    with pytest.raises(ValueError, match="transport=False"):
        balora(optax.flatten(ADAM)).init(PARAMS)


@pytest.mark.parametrize("inner", [optax.adam, None, "adam", balora])
def test_what_is_no_transformation_raises(inner):
    with pytest.raises(TypeError, match="inner must be an optax gradient transformation, got"):
        balora(inner)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes_and_shapes_are_stable(dtype, every):
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    tx = balora(optax.MultiSteps(optax.adam(1e-1, mu_dtype="bfloat16"), 2), every=every)
    inputs = params, tx.init(params)
    assert jax.eval_shape(lambda p, state: tx.update(p, state, p), *inputs) == jax.eval_shape(lambda: inputs)


def scanned(params, rate):
    tx = optax.inject_hyperparams(lambda rate: balora(optax.adam(rate)))(rate)

    def step(carry, i):
        params, state = carry
        updates, state = tx.update(product_gradient(params, 0), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), length=5)[0]


def test_a_population_trains_as_its_members_do():
    """In one scan, in place or stacked, or step by step."""
    rates = jnp.array([1e-2, 1e-1, 1e-2])
    starts = [PARAMS, jax.tree.map(lambda x: 2 * x, PARAMS), with_entry(PARAMS, jnp.nan)]
    together = jax.jit(jax.vmap(scanned))(jax.tree.map(lambda *x: jnp.stack(x), *starts), rates)
    single = jax.jit(scanned, donate_argnums=0)
    for i, start in enumerate(starts):
        copy = jax.tree.map(jnp.copy, start)
        alone = single(copy, rates[i])
        assert_close(jax.tree.map(lambda x, i=i: x[i], together), alone, 1e-3)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(copy))
    stepped = train(balora(optax.adam(rates[0])), PARAMS, lambda params, _: product_gradient(params, 0), 5)
    assert_close(jax.tree.map(lambda x: x[0], (together[0], together[1].inner_state)), stepped, 1e-3)


def test_trains_an_nnx_model():
    model = nnx.LoRA(ROWS, RANK, COLUMNS, rngs=nnx.Rngs(0))
    model.lora_a[...], model.lora_b[...] = factors(PARAMS["up"])
    optimizer = nnx.Optimizer(model, balora(ADAM), wrt=nnx.LoRAParam)
    optimizer.update(model, gradient(nnx.state(model, nnx.LoRAParam)))
    plain = {"up": PARAMS["up"]}
    expected, state = train(balora(ADAM), plain, gradient, 1)
    found = (*factors(nnx.state(model)), *factors(optimizer.opt_state.inner[0].nu))
    assert_close([leaf[...] for leaf in found], [*factors(expected["up"]), *factors(state.inner[0].nu["up"])])


def test_state_maps_over_parameters():
    tx = balora(ADAM)
    state = optax.tree.map_params(tx, lambda leaf: "moment", tx.init(PARAMS))
    assert jax.tree.leaves(state).count("moment") == 2 * len(jax.tree.leaves(PARAMS))


def test_carried_moments_make_up_for_columns_that_flip():
    """Fitting 20 x 20 matrices of rank 4, and what is left of the loss."""

    @jax.jit
    def fit(params, target):
        return jax.value_and_grad(lambda p: 0.5 * jnp.sum((p["lora_a"] @ p["lora_b"] - target) ** 2))(params)

    def final_loss(tx, seed):
        key_a, key_u, key_v = jax.random.split(jax.random.key(seed), 3)
        target = jax.random.normal(key_u, (20, 4)) @ jax.random.normal(key_v, (4, 20))
        params = {"lora_a": jax.random.normal(key_a, (20, 4)) / 20**0.5, "lora_b": jnp.zeros((4, 20))}
        params, _ = train(tx, params, lambda params, _: fit(params, target)[1], 150, compiled=True)
        return float(fit(params, target)[0])

    options = {}, {"gauge": "raw_svd"}, {"gauge": "raw_svd", "transport": False}
    optimizers = (balora(optax.adam(5e-2), **each) for each in options)
    aligned, raw, behind = (np.array([final_loss(tx, seed) for seed in range(3)]) for tx in optimizers)
    assert np.all(raw < 1e-3)
    assert np.all(raw < 1e-3 * behind)
    np.testing.assert_allclose(raw, aligned, rtol=0.1, atol=1e-6)
