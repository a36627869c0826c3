"""AdamW from settings: its schedule, and agreement with the definition."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from balora_jax.optimizers import OptimizerSettings, adamw, learning_rate_schedule

SCHEDULES = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1 + np.cos(np.pi * done)),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 4])
def test_schedule(schedule, warmup):
    settings = OptimizerSettings(learning_rate=0.5, schedule=schedule, warmup_steps=warmup)
    rate = learning_rate_schedule(settings, 20)
    for count in range(20):
        rising = min((count + 1) / warmup, 1) if warmup else 1
        done = max(count - warmup, 0) / (20 - warmup)
        assert float(rate(count)) == pytest.approx(0.5 * rising * SCHEDULES[schedule](done), rel=1e-5)


def test_update_is_clipped_adamw():
    settings = OptimizerSettings(learning_rate=0.1, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.2, clip_norm=1.5)
    tx = adamw(settings, 10)
    params = {"x": jnp.asarray([1.0, -2.0, 3.0])}
    state = tx.init(params)
    x, m, v = np.array([1.0, -2.0, 3.0]), np.zeros(3), np.zeros(3)
    for t, gradient in enumerate(np.array([[3.0, 4.0, 0.0], [0.1, 0.2, -0.3]]), start=1):
        updates, state = tx.update({"x": jnp.asarray(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        g = gradient * min(1, 1.5 / np.linalg.norm(gradient))
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        x = x - 0.1 * (m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3) + 0.2 * x)
        np.testing.assert_allclose(params["x"], x, rtol=1e-5)


def test_no_clipping():
    tx = adamw(OptimizerSettings(clip_norm=None), 10)
    params = {"x": jnp.zeros(2)}
    state = tx.update({"x": jnp.asarray([30.0, 40.0])}, tx.init(params), params)[1]
    np.testing.assert_allclose(optax.tree.get(state, "mu")["x"], [3.0, 4.0], rtol=1e-6)
