"""The rows of the table of methods on one layer: steps against float64 oracles, masks, bfloat16, invariances."""

import dataclasses

import jax
import jax.numpy as jnp
import method_oracles as oracle
import numpy as np
import optax
import pytest
from flax import nnx

from balora_jax import balancing_gap
from balora_jax.adapters import LORA_GA, AdaLoRALinear, DoRALinear, FullLinear, LoRALinear
from balora_jax.methods import METHODS, BalanceSettings
from balora_jax.optimizers import OptimizerSettings
from balora_jax.trees import leaves_by_path, with_leaves

ROWS, COLUMNS, RANK, STEPS = 7, 5, 2, 2
SETTINGS = OptimizerSettings(
    oracle.RATE, b1=oracle.B1, b2=oracle.B2, eps=oracle.EPS, weight_decay=oracle.DECAY, clip_norm=oracle.CLIP
)
LAYERS = {LoRALinear: oracle.lora, DoRALinear: oracle.dora, AdaLoRALinear: oracle.svd_layer, FullLinear: oracle.full}
ADAMW = oracle.clipped(oracle.adamw())
PLUS = oracle.clipped(oracle.adamw(ratio=16.0))
OPTIMIZERS = dict.fromkeys(METHODS, ADAMW) | {
    "galore": oracle.clipped(oracle.galore),
    "lora_plus": PLUS,
    "balora_plus": PLUS,
    "lora_rite": oracle.lora_rite,
    "reflora": oracle.clipped(oracle.adamw(oracle.by_geometric_mean)),
    "reflora_drawn": oracle.clipped(oracle.adamw(oracle.by_geometric_mean)),
    "reflora_s": oracle.clipped(oracle.reflora_s),
    "loro": oracle.clipped(oracle.loro),
    "scaled_gd": oracle.clipped(oracle.descent(oracle.by_partners_gram)),
    "scaled_adamw": oracle.clipped(oracle.adamw(oracle.by_partners_gram, eps=1e-6)),
    "lora_pro": oracle.clipped(oracle.adamw(oracle.by_projection)),
    "adalora": oracle.adalora,
    "balora_gd": oracle.clipped(oracle.descent()),
}
OPTIONS = {
    "galore": {"rank": 2},
    "reflora": {"warmup_steps": 0},
    "reflora_drawn": {"warmup_steps": 0},
    "reflora_s": {"warmup_steps": 0},
    "loro": {"period": 2},
    "adalora": {"initial_share": 0, "final_share": 0, "interval": 1},
}


def normal(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


X, Y = normal((20, ROWS), 0), normal((20, COLUMNS), 1)


def layer_of(method, dtype="float32"):
    """A layer as the method starts it."""
    base = nnx.Linear(ROWS, COLUMNS, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    alpha = oracle.SCALE * (RANK**0.5 if method.scaling == "rslora" else RANK)
    layer = method.layer(
        base, rank=RANK, alpha=alpha, scaling=method.scaling, initialisation=method.initialisation, rngs=nnx.Rngs(1)
    )
    if method.initialisation is LORA_GA:  # it leaves room for a start that is not zero
        for seed, name in enumerate("ab"):
            for part in (getattr(layer, f"lora_{name}"), getattr(layer, f"offset_{name}")):
                part[...] = jnp.asarray(normal(part.shape, seed))
    return layer


def transformation(name, settings=SETTINGS, **options):
    options = OPTIONS.get(name, {}) | options
    return METHODS[name].transformation(settings, BalanceSettings(), steps=STEPS, scale=oracle.SCALE, options=options)


def loss(layer):
    return 0.5 * jnp.mean(jnp.sum((layer(X.astype(layer.base.kernel.dtype)) - Y) ** 2, axis=1))


def moved(layer):
    """The layer with trained parts that are not where they started, and have full rank."""
    params = nnx.state(layer, nnx.LoRAParam)
    parts = leaves_by_path(params)
    new = {path: x + 0.5 * normal(x.shape, seed) for seed, (path, x) in enumerate(parts.items(), start=2)}
    nnx.update(layer, with_leaves(params, new))
    return layer


@pytest.mark.parametrize("name", METHODS)
def test_steps_are_those_of_the_definition(name):
    """Behind a mask that hides a leaf which is no adapter; a balanced pair is compared by its product."""
    method, layer = METHODS[name], moved(layer_of(METHODS[name]))
    graph, params, rest = nnx.split(layer, nnx.LoRAParam, ...)
    tx = optax.masked(transformation(name), {"adapter": True, "other": False})
    other = {"adapter": params, "other": jnp.ones(3)}

    @jax.jit
    def step(tree, state):
        grads = jax.grad(lambda p: loss(nnx.merge(graph, p, rest, copy=True)))(tree["adapter"])
        updates, state = tx.update({"adapter": grads, "other": jnp.full(3, 7.0)}, state, tree)
        tree = optax.apply_updates(tree, updates)
        return tree, state, nnx.merge(graph, tree["adapter"], rest, copy=True).weight_update()

    frozen = np.asarray(layer.base.kernel[...], float)
    start = 0.0
    if getattr(layer, "offset_a", None) is not None:
        start = np.asarray(layer.offset_a[...], float) @ np.asarray(layer.offset_b[...], float)
    weight, gradients = LAYERS[method.layer](frozen, start)
    parts = {path[-1]: np.asarray(x, float) for path, x in leaves_by_path(params).items()}
    state, optimizer, x, y = tx.init(other), OPTIMIZERS[name](), X.astype(float), Y.astype(float)
    np.testing.assert_allclose(frozen + layer.weight_update(), weight(parts), atol=1e-5)
    for count in range(1 if method.balanced else STEPS):
        parts = optimizer(parts, gradients(parts, x.T @ (x @ weight(parts) - y) / len(x)))
        other, state, update = step(other, state)
        np.testing.assert_allclose(frozen + update, weight(parts), atol=1e-4, err_msg=f"step {count + 1}")
        if not method.balanced and name != "loro":  # which leaves signs open
            for path, leaf in leaves_by_path(other["adapter"]).items():
                np.testing.assert_allclose(leaf, parts[path[-1]], atol=1e-4, err_msg=f"{path}, step {count + 1}")
        np.testing.assert_array_equal(other["other"], 1.0 + 7.0 * (count + 1))
    if method.balanced:
        assert balancing_gap(other["adapter"]["lora_a"][...], other["adapter"]["lora_b"][...]) < 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_over_a_bfloat16_base(name):
    """A fresh layer gives what its base gives; what is trained, and its updates, are float32 and finite."""
    layer = layer_of(METHODS[name], "bfloat16")
    x = X.astype(jnp.bfloat16)
    out = layer(x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, layer.base(x))
    grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(moved(layer))
    params, tx = nnx.state(layer, nnx.LoRAParam), transformation(name)
    assert np.isfinite(layer(x)).all()
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    updates, _ = jax.eval_shape(tx.update, grads, jax.eval_shape(tx.init, params), params)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, grads, updates))} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("name", METHODS)
def test_other_leaves_may_stand_beside_the_adapters(name):
    params = {"adapter": nnx.state(layer_of(METHODS[name]), nnx.LoRAParam), "norm": {"scale": jnp.ones(3)}}
    tx = transformation(name)
    state = jax.eval_shape(tx.init, params)
    updates, new = jax.eval_shape(tx.update, params, state, params)
    assert jax.tree.map(lambda x: x.shape, updates) == jax.tree.map(lambda x: x.shape, params)
    assert jax.tree.structure(new) == jax.tree.structure(state)


def test_lora_rite_may_clip_gradients_first():
    params = {"lora_a": jnp.asarray(normal((ROWS, RANK), 0)), "lora_b": jnp.asarray(normal((RANK, COLUMNS), 1))}
    gradients = jax.tree.map(lambda x: 0.01 * jnp.sin(x), params)
    norm = float(optax.tree.norm(gradients))
    tx, plain = transformation("lora_rite", clip_first=norm / 3), transformation("lora_rite")
    third = jax.tree.map(lambda g: g / 3, gradients)
    state, states = tx.init(params), plain.init(params)
    for given in (gradients, third):  # the first is clipped to the second
        found, state = tx.update(given, state, params)
        expected, states = plain.update(third, states, params)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), found, expected)
    without, _ = plain.update(gradients, plain.init(params), params)
    assert not np.allclose(without["lora_b"], tx.update(gradients, tx.init(params), params)[0]["lora_b"], rtol=1e-3)


CHANGES = {
    "any": np.diag([3.0, 0.4]) @ np.array([[1.0, 0.5], [-0.2, 1.0]]),
    "rotation": np.array([[0.6, -0.8], [0.8, 0.6]]),
}
INVARIANT = {"lora_rite": "any", "scaled_gd": "any", "balora_gd": "rotation", "lora": None, "balora": None}
"""For which changes of gauge of the start the products of a run stay as they are; two for comparison depend on it."""


@pytest.mark.parametrize("name", INVARIANT)
@pytest.mark.usefixtures("float64")
def test_gauge_invariance(name):
    kind = INVARIANT[name]
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, RANK)))[0] for n in (ROWS, COLUMNS))
    root = np.sqrt([2.0, 0.7])
    a, b, change = u * root, root[:, None] * v.T, CHANGES[kind or "rotation"]  # balanced
    options = {"damping": 0.0} if name == "scaled_gd" else {}
    tx = transformation(name, dataclasses.replace(SETTINGS, clip_norm=None, weight_decay=0.0), **options)
    target = jnp.asarray(rng.standard_normal((ROWS, COLUMNS)))

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: 0.5 * jnp.sum((p["lora_a"] @ p["lora_b"] - target) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    products = []
    for params in ({"lora_a": a, "lora_b": b}, {"lora_a": a @ change, "lora_b": np.linalg.solve(change, b)}):
        params = jax.tree.map(jnp.asarray, params)
        state = tx.init(params)
        for _ in range(4):
            params, state = step(params, state)
        products.append(params["lora_a"] @ params["lora_b"])
    assert np.abs(products[0] - a @ b).max() > 0.05
    difference = np.abs(products[0] - products[1]).max()
    assert difference < 1e-10 if kind else difference > 1e-3


def test_every_row_has_an_oracle_of_its_own_optimizer():
    plain = {name for name, step in OPTIMIZERS.items() if step is ADAMW}
    for name, method in METHODS.items():
        assert (name in plain) == (method.optimizer is METHODS["lora"].optimizer), name


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("galore", {"rank": 2.5}, "options: rank must be an integer, got 2.5"),
        ("lora", {"ratio": 2.0}, r"options must be among those of the method \(none\), got 'ratio'"),
        ("lora_pro", {"adapter_scale": 2.0}, r"among those of the method \(damping\), got 'adapter_scale'"),
    ],
)
def test_bad_options_raise(name, options, message):
    with pytest.raises(ValueError, match=message):
        METHODS[name].resolved(options)


def test_options_have_the_types_of_their_defaults():
    resolved = METHODS["galore"].resolved({"rank": 4.0, "scale": 1})
    assert resolved == {"rank": 4, "update_interval": 200, "scale": 1, "eps": 1e-6}
    assert isinstance(resolved["rank"], int)


@pytest.mark.parametrize("name", METHODS)
def test_first_steps_depend_on_the_number_of_all_where_phases_do(name):
    """So that a finished run may go on to more: the program of an update is the same."""
    params = nnx.state(layer_of(METHODS[name]), nnx.LoRAParam)

    def program(steps):
        tx = METHODS[name].transformation(OptimizerSettings(), BalanceSettings(), steps=steps, scale=oracle.SCALE)
        return jax.jit(tx.update).lower(params, jax.eval_shape(tx.init, params), params).as_text()

    assert (program(40) != program(80)) == METHODS[name].phased
