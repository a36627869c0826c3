"""What becomes of a pair is one status, of `balance_pair`, in the state of the projection, and in the metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import hyper_balanced, mixed_pair

from balora_jax import balance_pair, balora, balora_project, pair_statuses
from balora_jax.status import COUNTED, Status, is_skipped, is_untouched

A, B = (np.float32(x) for x in mixed_pair(12, 3, 9))
DEGENERATE = {
    Status.BALANCED: (A, B),
    Status.ALREADY_BALANCED: tuple(np.float32(x) for x in hyper_balanced(12, 9, [4.0, 2.0, 1.0])),
    Status.NONFINITE: (np.where(A[2, 1] == A, np.nan, A), B),
    Status.RANK_DEFICIENT: (A, 0 * B),
    Status.OUT_OF_RANGE: (1e37 * A, 1e-37 * B),
}


@pytest.mark.parametrize("status", DEGENERATE)
def test_status_of_balancing(status):
    outcome = balance_pair(*DEGENERATE[status])
    assert Status(int(outcome.status)) is status
    assert bool(is_skipped(outcome.status)) == (status > Status.ALREADY_BALANCED)
    assert bool(outcome.untouched) == (status in (Status.RANK_DEFICIENT, Status.OUT_OF_RANGE))
    assert bool(outcome.nonfinite) == (status is Status.NONFINITE)


def test_factors_that_cancel_in_the_product():
    """The rows of A and the columns of B share little, which is the product."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((12, 12)))[0] for _ in range(2))
    with jax.enable_x64(True):
        outcome = balance_pair(rng.standard_normal((6, 6)) @ left[:6], (1e-8 * left[:6] + left[6:]).T @ right[:6])
    assert Status(int(outcome.status)) is Status.CANCELLING


def test_status_of_an_update_is_counted_by_name():
    """One pair for each status that an update can have, in one tree."""
    pairs = {  # the factors and their updates
        Status.BALANCED: (A, B, A, B),
        Status.NONFINITE: (*DEGENERATE[Status.NONFINITE], A, B),
        Status.RANK_DEFICIENT: (A[:, [0, 0, 1]], B, 0.1 * A[:, [0, 0, 1]], B),
        Status.FAR: (A, 1e-5 * B, A, 1e-5 * B),
        Status.WAITING: (A, 0.01 * B, A, 0.01 * B),
        Status.FROZEN: (A, B, A, np.zeros_like(B)),
    }
    params = {status.name: {"lora_a": jnp.asarray(a), "lora_b": jnp.asarray(b)} for status, (a, b, *_) in pairs.items()}
    steps = {s.name: {"lora_a": jnp.asarray(u), "lora_b": jnp.asarray(v)} for s, (_, _, u, v) in pairs.items()}
    params["NO_UPDATE"], steps["NO_UPDATE"] = {"lora_a": jnp.asarray(A), "lora_b": jnp.asarray(B)}, None
    tx = balora_project()
    state = tx.init(params)
    assert (state.status == Status.NO_UPDATE).all()
    updates, state = jax.jit(tx.update)(steps, state, params)
    assert [Status(status).name for status in state.status.tolist()] == sorted(params)
    counts = {name: int(number) for name, number in state.counts().items()}
    assert counts.keys() == {"untouched", "disturbed"} | {status.name.lower() for status in COUNTED}
    assert {name for name, number in counts.items() if number} == {
        "untouched",
        *(status.name.lower() for status in pairs if status is not Status.BALANCED),
    }
    assert counts["untouched"] == int(state.untouched) == is_untouched(state.status).sum() == 4
    for name in params.keys() - {"BALANCED", "NO_UPDATE"}:
        for new, old in zip(updates[name].values(), steps[name].values(), strict=True):
            np.testing.assert_array_equal(new, old)


def test_statuses_are_told_pair_by_pair():
    """Of pairs that are stacked or not, in a chain, and by names of the user's own."""
    key = jax.random.key(0)
    params = {
        "stacked": {"lora_a": jax.random.normal(key, (3, 6, 2)), "lora_b": jnp.zeros((3, 2, 5)).at[1].set(1e-3)},
        "one": {"lora_a": jnp.eye(6, 2), "lora_b": jnp.eye(2, 5)},
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), balora(optax.sgd(1e-3)))
    grads = jax.tree.map(jnp.ones_like, params)
    grads["one"]["lora_b"] = jnp.full((2, 5), jnp.nan)
    _, state = balora(optax.sgd(1e-3)).update(grads, balora(optax.sgd(1e-3)).init(params), params)
    found = pair_statuses(state, params)
    assert found["one/lora_a, one/lora_b"] == (Status.NONFINITE,)
    assert len(found["stacked/lora_a, stacked/lora_b"]) == 3
    by_name = {status: sum(s is status for one in found.values() for s in one) for status in Status}
    assert all(int(state.counts()[s.name.lower()]) == n for s, n in by_name.items() if s.name.lower() in state.counts())
    assert set(pair_statuses(tx.init(params), params)["one/lora_a, one/lora_b"]) == {Status.NO_UPDATE}
    other = {"down": jnp.eye(6, 2), "up": jnp.eye(2, 5)}
    named = [("down", "up")]
    assert list(pair_statuses(balora(optax.sgd(1.0), pairs=named).init(other), other, pairs=named)) == ["down, up"]
    trained = {"one": {"lora_a": True, "lora_b": True}, "stacked": {"lora_a": False, "lora_b": False}}
    masked = optax.masked(balora(optax.sgd(1.0)), trained).init(params)
    assert list(pair_statuses(masked, {"one": params["one"]})) == ["one/lora_a, one/lora_b"]
    with pytest.raises(ValueError, match=r"the 4 pairs of params, .* of masked parameters those that are trained"):
        pair_statuses(masked, params)
    with pytest.raises(ValueError, match=r"must be that of the 1 pairs of params, got statuses of shape \(4,\)"):
        pair_statuses(state, {"one": params["one"]})
    with pytest.raises(ValueError, match=r"the state of one balora_project or balora, found 0"):
        pair_statuses(optax.sgd(1.0).init(params), params)
