"""AdaLoRA's budget against its definition in NumPy, for one pair, stacked ones and leaves beside them."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from balora_jax.optimizers import adalora

pytestmark = pytest.mark.usefixtures("float64")

SHAPES = {
    "x.lora_a": (7, 3),
    "x.lora_e": (3,),
    "x.lora_b": (3, 5),
    "lora_a": (2, 4, 2),
    "lora_e": (2, 2),
    "lora_b": (2, 2, 6),
    "bias": (5,),
}
TRIPLETS = 3 + 2 * 2
RATE = 0.05


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(shape)) for name, shape in SHAPES.items()}


def gradient(params, step):
    return {name: np.sin(3 * np.asarray(x) + step) for name, x in params.items()}


@jax.jit
@jax.grad
def regulariser_gradient(params):
    """Of what the paper adds to the loss, over gamma."""
    residuals = []
    for name, x in params.items():
        if name.endswith(("lora_a", "lora_b")):
            for m in x.reshape(-1, *x.shape[-2:]):
                m = m if name.endswith("a") else m.T
                residuals.append(jnp.linalg.norm(m.T @ m - jnp.eye(m.shape[1])))
    return sum(residuals) / len(residuals)


def oracle(params, steps, *, total_steps, initial_steps=0, final_steps=0, interval=1, share=0.5, b1=0.85, b2=0.85,
           gamma=0.5):  # fmt: skip
    """Gradient descent with AdaLoRA; yields parameters and the number of values that are not zero after every step."""
    smooth, spread = ({name: np.zeros(shape) for name, shape in SHAPES.items()} for _ in range(2))
    target, last = round(share * TRIPLETS), total_steps - final_steps
    for t in range(1, steps + 1):
        grads = gradient(params, t)
        extra = regulariser_gradient(params)
        grads = {name: g + gamma * np.asarray(extra[name]) for name, g in grads.items()}
        if t < last:
            for name, p in params.items():
                now = np.abs(p * grads[name])
                smooth[name] = b1 * smooth[name] + (1 - b1) * now
                spread[name] = b2 * spread[name] + (1 - b2) * np.abs(now - smooth[name])
        params = {name: np.asarray(p) - RATE * grads[name] for name, p in params.items()}
        if t > initial_steps and (t % interval == 0 or t >= last):
            budget = target
            if t < last:
                left = 1 - Fraction(t - initial_steps, last - initial_steps)
                budget = math.floor(target + (TRIPLETS - target) * left**3)
            ranked = []
            for prefix in ("x.", ""):
                s = {side: smooth[f"{prefix}lora_{side}"] * spread[f"{prefix}lora_{side}"] for side in "aeb"}
                score = s["e"] + s["a"].mean(-2) + s["b"].mean(-1)
                ranked += [(value, f"{prefix}lora_e", index) for index, value in np.ndenumerate(score)]
            for _, name, index in sorted(ranked, reverse=True)[budget:]:
                params[name][index] = 0
        yield params


SETTINGS = {
    "defaults": {"total_steps": 8},
    "phases": {"total_steps": 12, "initial_steps": 2, "final_steps": 4},
    "interval": {"total_steps": 10, "interval": 3, "final_steps": 2},
    "numbers": {"total_steps": 8, "b1": 0.5, "b2": 0.7, "target_share": 0.3, "regularisation": 2.0},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_is_its_definition(settings):
    tx, params = adalora(optax.sgd(RATE), **settings), jax.tree.map(jnp.asarray, make_params())
    names = {"target_share": "share", "regularisation": "gamma"}
    expected = oracle(params, settings["total_steps"], **{names.get(k, k): v for k, v in settings.items()})
    state, update, counts = tx.init(params), jax.jit(tx.update), []
    for step, after in enumerate(expected, start=1):
        updates, state = update(gradient(params, step), state, params)
        params = optax.apply_updates(params, updates)
        for name, x in params.items():
            np.testing.assert_allclose(x, after[name], rtol=1e-9, atol=1e-10, err_msg=f"{name}, {step}")
        counts.append(sum(int(np.count_nonzero(params[name])) for name in ("x.lora_e", "lora_e")))
    assert update._cache_size() == 1
    assert counts[-1] == round(settings.get("target_share", 0.5) * TRIPLETS)
    assert counts[: settings.get("initial_steps", 0)] == [TRIPLETS] * settings.get("initial_steps", 0)
    assert sum(int(kept.sum()) for kept in jax.tree.leaves(state.kept)) == counts[-1]


def test_vmap_equals_members_alone():
    members = [make_params(seed) for seed in range(3)]

    def trained(params, gamma):
        tx = adalora(optax.adam(RATE), total_steps=5, regularisation=gamma)

        def one(carry, step):
            params, state = carry
            grads = jax.tree.map(lambda x: jnp.sin(3 * x + step), params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(one, (params, tx.init(params)), jnp.arange(5))[0][0]

    gammas = np.array([0.0, 0.5, 2.0])
    together = jax.jit(jax.vmap(trained))(jax.tree.map(lambda *x: np.stack(x), *members), gammas)
    alone = jax.jit(trained)
    for i, (params, gamma) in enumerate(zip(members, gammas, strict=True)):
        for name, x in alone(params, gamma).items():
            np.testing.assert_allclose(together[name][i], x, rtol=1e-9, atol=1e-12, err_msg=name)


def test_orthogonal_factors_are_not_regularised():
    params = {"lora_a": jnp.eye(4, 2), "lora_e": jnp.ones(2), "lora_b": jnp.eye(2, 3)}
    tx = adalora(optax.sgd(1.0), total_steps=9)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for name in ("lora_a", "lora_b"):
        np.testing.assert_array_equal(updates[name], 0)


def test_half_precision_leaves_have_float32_state():
    params = {name: jnp.asarray(x, jnp.bfloat16) for name, x in make_params().items()}
    tx = adalora(optax.sgd(RATE), total_steps=2)
    updates, state = jax.eval_shape(tx.update, params, tx.init(params), params)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves((state.sensitivity, state.uncertainty))} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0}, "total_steps must be an integer of at least 1, got 0"),
        ({"interval": 0}, "interval must be an integer of at least 1, got 0"),
        ({"initial_steps": -1}, r"initial_steps must be in \[0, 10\), got -1"),
        ({"initial_steps": 4, "final_steps": 6}, r"must be below total_steps \(10\) together, got 4 and 6"),
        ({"target_share": 0}, r"target_share must be in \(0, inf\), got 0"),
        ({"target_share": 1.5}, r"target_share must be in \(0, 1\], got 1.5"),
        ({"b1": 1.0}, r"b1 must be in \[0, 1\), got 1.0"),
        ({"b2": -0.1}, r"b2 must be in \[0, 1\), got -0.1"),
        ({"regularisation": -1}, r"regularisation must be in \[0, inf\), got -1"),
    ],
)
def test_bad_numbers_raise(options, message):
    with pytest.raises(ValueError, match=message):
        adalora(optax.sgd(0.1), **{"total_steps": 10} | options)


def test_what_is_missing_raises():
    tx, params = adalora(optax.sgd(0.1), total_steps=3), make_params()
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match=r"x\.lora_e must hold the 3 values between .* got no such leaf"):
        tx.init({name: x for name, x in params.items() if name != "x.lora_e"})
    with pytest.raises(ValueError, match=r"lora_e must hold the 4 values between .* got 3 values"):
        tx.init(params | {"lora_e": np.ones(3)})
