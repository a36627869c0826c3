"""LoRA-GA against the singular value decomposition of the full gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from balora_jax import balancing_gap
from balora_jax.adapters import LORA, LORA_GA, add_adapters, gradient_triplets, iter_adapters, lora_ga_start, start_at

RANK, GAMMA = 2, 9.0


class Net(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(10, 12, rngs=rngs)
        self.heads = nnx.LinearGeneral(12, (2, 4), rngs=rngs)

    def __call__(self, x):
        return self.heads(jnp.tanh(self.inner(x)))


def loss(model, batch):
    x, y = batch
    return ((model(x) - y) ** 2).mean()


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    batches = tuple(rng.standard_normal((3, 4, *shape)).astype(np.float32) for shape in ((10,), (2, 4)))
    return Net(nnx.Rngs(0)), batches


def full_gradients(model, batches):
    """The mean gradients as matrices (in, out)."""
    grads = [nnx.grad(loss)(model, jax.tree.map(lambda x: x[i], batches)) for i in range(3)]  # noqa: B023
    inner = np.mean([g["inner"]["kernel"][...] for g in grads], axis=0)
    heads = np.mean([g["heads"]["kernel"][...] for g in grads], axis=0).reshape(12, 8)
    return {"inner": inner, "heads": heads}


def test_start_is_that_of_the_authors(problem):
    """In torch's letters, `G_t = U S V^T`: `lora_A = c V^T[:r]`, `lora_B = c U[:, r:2r]`, `c = out^1/4 / gamma^1/2`."""
    model, batches = problem
    starts = lora_ga_start(
        model, loss, batches, targets=["inner", "heads"], rank=RANK, gamma=GAMMA, key=jax.random.key(0)
    )
    for path, gradient in full_gradients(model, batches).items():
        u, _, vt = np.linalg.svd(gradient.T)
        c = gradient.shape[1] ** 0.25 / np.sqrt(GAMMA)
        lora_a, lora_b = (np.asarray(x[0]) for x in starts[path])
        for ours, theirs in ((lora_a.T, vt[:RANK]), (lora_b.T.T, u[:, RANK : 2 * RANK].T)):
            signs = np.sign((ours * theirs).sum(1, keepdims=True))
            np.testing.assert_allclose(ours, c * signs * theirs, atol=1e-3, err_msg=path)
        assert balancing_gap(lora_a, lora_b) < 1e-5


def test_triplets_of_a_low_rank_probe(problem):
    model, batches = problem
    found = gradient_triplets(model, loss, batches, targets="inner", rank=4, key=jax.random.key(1), iterations=20)
    assert set(found) == {"inner"}
    values = np.linalg.svd(full_gradients(model, batches)["inner"], compute_uv=False)
    np.testing.assert_allclose(found["inner"].values[0], values[:4], rtol=1e-4)


def test_started_model_gives_what_it_gave(problem):
    model, batches = problem
    before = model(batches[0])
    targets = ["inner", "heads"]
    starts = lora_ga_start(model, loss, batches, targets=targets, rank=RANK, key=jax.random.key(0))
    add_adapters(model, targets=targets, rank=RANK, initialisation=LORA_GA, rngs=nnx.Rngs(0))
    start_at(model, starts)
    np.testing.assert_array_equal(model(batches[0]), before)
    for path, adapter in iter_adapters(model):
        np.testing.assert_array_equal(adapter.lora_a[...].reshape(starts[path][0][0].shape), starts[path][0][0])
        np.testing.assert_allclose(adapter.weight_update(), 0, atol=1e-7)
        adapter.lora_b[...] *= 2
    assert not np.allclose(model(batches[0]), before)


def test_errors(problem):
    model, batches = problem
    with pytest.raises(ValueError, match="heads: LoRA-GA needs 2 rank singular directions, so a rank of at most 4"):
        lora_ga_start(model, loss, batches, targets=["inner", "heads"], rank=5, key=jax.random.key(0))
    add_adapters(model, targets=["inner"], rank=2, initialisation=LORA, rngs=nnx.Rngs(0))
    start = jnp.zeros((1, 10, 2)), jnp.zeros((1, 2, 12))
    with pytest.raises(ValueError, match="inner must have been made with an initialisation that leaves room"):
        start_at(model, {"inner": start})
    with pytest.raises(ValueError, match="starts must be for inner, got inner, other: other is in one alone"):
        start_at(model, {"inner": start, "other": start})
