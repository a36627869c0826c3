"""The figures and promises of the projection that rest on how stacks of pairs go through it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compilation import OPTIMIZED
from oracles import gap, hyper_balanced
from processes import run_alone

from balora_jax import ROUTES, balance, balance_pair, balance_pairs, balora, balora_project, linalg, stacks
from balora_jax.status import Status

TREE = {"a": (96, 160), "b": (64, 40)}


def product_error(pair, new_pair):
    (a, b), (x, y) = ([np.asarray(f, float) for f in each] for each in (pair, new_pair))
    return np.linalg.norm(x @ y - a @ b) / np.linalg.norm(a @ b)


def off_diagonal(gram):
    gram = np.asarray(gram, float)
    return np.linalg.norm(gram - np.diag(np.diag(gram))) / np.linalg.norm(gram)


def gaussian(rows, rank, columns, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(np.float32(rng.standard_normal(shape)) for shape in ((rows, rank), (rank, columns)))


def of_condition(condition, rows, rank, columns, seed=0):
    """Factors with singular values from 1 to 1 / condition, each in a basis of its own."""
    rng = np.random.default_rng(seed)
    values = np.geomspace(1, 1 / condition, rank)

    def one(n):
        left, right = (np.linalg.qr(rng.standard_normal((k, rank)))[0] for k in (n, rank))
        return np.float32(left * values @ right.T)

    return one(rows), one(columns).T


def after_a_step(rows, rank, columns, values, size, seed=0):
    """A hyper-balanced pair after an update whose entries are all of one size, some of it shared by the columns."""
    a, b = hyper_balanced(rows, columns, values, seed=seed)
    rng = np.random.default_rng(seed + 1)

    def moved(x):
        common = np.outer(*(rng.standard_normal(n) for n in x.shape))
        step = np.sign(common + rng.standard_normal(x.shape))
        return np.float32(x + size * np.sqrt(np.mean(x**2)) * step)

    return moved(a), moved(b)


SPECTRA = {
    "two decades": lambda rank: np.geomspace(1, 1e-2, rank),
    "four decades": lambda rank: np.geomspace(1, 1e-4, rank),
    "even": lambda rank: np.linspace(1, 0.01, rank),
    "fours": lambda rank: np.repeat(np.geomspace(1, 1e-2, rank // 4), 4),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", [(300, 1, 200), (500, 8, 40), (64, 32, 900), (300, 128, 400), (200, 128, 129)])
def test_well_conditioned_pairs_keep_product_and_balance(shape, route):
    pair = gaussian(*shape)
    new = balance(*pair, route=route)
    assert product_error(pair, new) < 1.2e-6
    assert gap(*new) < 1e-6
    assert off_diagonal(new[0].T @ new[0]) < 1e-5


@pytest.mark.parametrize("size", [1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("rank", [8, 64])
def test_the_iteration_lands_on_the_exact_route_without_it(rank, spectrum, size, monkeypatch):
    """After a training step the iteration converges by itself, columns in their places."""
    pair = after_a_step(128, rank, 200, SPECTRA[spectrum](rank), size)
    grams = [jnp.asarray(gram)[None] for gram in (pair[0].T @ pair[0], pair[1] @ pair[1].T)]
    from balora_jax.gauge import iterative_change

    change = jax.jit(iterative_change)(*grams)
    assert change.found.all()
    new = balance(*pair, route="iterative")
    assert product_error(pair, new) < 1.2e-6
    assert gap(*new) < 1e-6
    assert off_diagonal(new[0].T @ new[0]) < 1e-5
    assert off_diagonal(new[1] @ new[1].T) < 1e-5
    exact = balance(*pair, route="exact")
    values = [np.sort(np.linalg.norm(np.asarray(x[0], float), axis=0)) for x in (new, exact)]
    np.testing.assert_allclose(*values, rtol=1e-3)
    if size == 1e-3 and spectrum != "fours":  # equal singular values may turn
        cosines = (
            np.sum(np.asarray(new[0]) * pair[0], 0) / np.linalg.norm(new[0], axis=0) / np.linalg.norm(pair[0], axis=0)
        )
        assert np.all(cosines > 0.5)


@pytest.mark.parametrize("route", ["exact", "iterative"])
@pytest.mark.parametrize("rank", [8, 64])
@pytest.mark.parametrize("condition", [1e1, 1e2, 1e3, 1e4, 1e5, 1e6])
def test_ill_conditioned_factors(condition, rank, route):
    pair = of_condition(condition, 160, rank, 200)
    outcome = balance_pair(*pair, route=route)
    assert not outcome.untouched
    assert product_error(pair, outcome[:2]) < 1.2e-6
    assert gap(*outcome[:2]) < 1e-6
    expected = np.sqrt(np.linalg.svd(pair[0].astype(float) @ pair[1].astype(float))[1][:rank])
    found = np.sort(np.linalg.norm(np.asarray(outcome.lora_a, float), axis=0))[::-1]
    # float32 factors hold a direction only down to their own rounding
    np.testing.assert_allclose(found, expected, rtol=1e-3 + 1e-6 * condition**0.5, atol=3e-8 * expected[0])


@pytest.mark.parametrize("rank", [8, 32])
@pytest.mark.parametrize("conditions", [(1e4, 1), (1, 3e4), (1e5, 1), (1e2, 1e5)])
def test_one_factor_far_worse_conditioned_than_the_other(conditions, rank):
    a, b = (
        of_condition(c, 160, rank, 200, seed)[i] for i, (c, seed) in enumerate(zip(conditions, (1, 2), strict=True))
    )
    outcome = balance_pair(a, b)
    assert not outcome.untouched
    assert product_error((a, b), outcome[:2]) < 1.2e-6
    assert gap(*outcome[:2]) < 1e-6


@pytest.mark.parametrize("turn", [False, True], ids=["graded columns", "mixed columns"])
def test_a_product_that_spans_twelve_decades(turn):
    a, b = hyper_balanced(160, 200, np.geomspace(1, 1e-12, 12))
    mix = np.linalg.qr(np.random.default_rng(0).standard_normal((12, 12)))[0] if turn else np.eye(12)
    pair = np.float32(a @ mix), np.float32(mix.T @ b)
    outcome = balance_pair(*pair)
    assert not outcome.untouched
    assert product_error(pair, outcome[:2]) < 1.2e-6
    assert gap(*outcome[:2]) < 1e-6
    expected = np.linalg.svd(pair[0].astype(float) @ pair[1].astype(float))[1][:12]
    found = np.sort(np.linalg.norm(np.asarray(outcome.lora_a, float), axis=0))[::-1] ** 2
    np.testing.assert_allclose(found, expected, rtol=0.1 if turn else 1e-4)


def refactored(condition, rank, seed=0):
    """A well-conditioned product in the factors `(A M, M^-1 B)` with an M of this condition number."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((rank, rank)))[0] for _ in range(2))
    mix = left * np.geomspace(1, 1 / condition, rank) @ right
    a, b = hyper_balanced(160, 200, np.geomspace(1, 0.1, rank), seed=seed)
    return a @ mix, np.linalg.solve(mix, b)


@pytest.mark.parametrize("gauge", ["svd", "nearest", "symmetric"])
@pytest.mark.parametrize("rank", [8, 48])
@pytest.mark.parametrize("condition", [1e1, 1e2, 1e3, 1e4, 1e5, 1e6])
def test_ill_conditioned_refactorisations(condition, rank, gauge):
    """`||A B||` far below `||A|| ||B||`: applied in float32, the change of gauge would lose the product."""
    pair = tuple(np.float32(x) for x in refactored(condition, rank))
    outcome = balance_pair(*pair, gauge=gauge)
    assert not outcome.untouched
    assert product_error(pair, outcome[:2]) < 5e-7
    assert gap(*outcome[:2]) < 3e-7
    with jax.enable_x64(True):
        pair = refactored(condition, rank)
        wide = balance_pair(*pair, gauge=gauge)
        assert wide.lora_a.dtype == np.float64
        assert not wide.untouched
        assert product_error(pair, wide[:2]) < 1e-15 * (10 + condition)
        assert gap(*wide[:2]) < 1e-14
        np.testing.assert_allclose(pair[0] @ wide.change, wide.lora_a, atol=1e-15 * condition + 1e-13)


def test_factors_that_cancel_beyond_float64_are_left():
    rng = np.random.default_rng(0)
    u, v, w = (np.linalg.qr(rng.standard_normal((n, 8)))[0] for n in (60, 70, 8))
    values = np.geomspace(1, 1e-6, 8)
    pair = u * values @ w, w.T @ (v * values[::-1]).T
    outcome = balance_pair(*map(np.float32, pair))
    assert not outcome.untouched
    assert product_error([np.float32(x) for x in pair], outcome[:2]) < 5e-7
    with jax.enable_x64(True):
        pair = u * values**1.4 @ w, w.T @ (v * values[::-1] ** 1.4).T
        outcome = balance_pair(*pair)
        assert outcome.untouched
        assert product_error(pair, outcome[:2]) == 0


@pytest.mark.parametrize("shape", [(8, 12, 16), (16, 12, 8), (9, 12, 9), (1, 3, 5)])
@pytest.mark.parametrize("gauge", ["svd", "raw_svd", "nearest", "symmetric"])
def test_more_columns_than_the_matrix_has_rank(shape, gauge):
    """With r > min(a, b) the product has all the rank that there is, and the pair is balanced within it."""
    pair = gaussian(*shape)
    outcome = balance_pair(*pair, gauge=gauge)
    a, b = outcome[:2]
    assert not outcome.untouched
    assert product_error(pair, (a, b)) < 1.2e-6
    assert gap(a, b) < 1e-6
    least = min(shape[0], shape[2])
    if "svd" in gauge:
        assert off_diagonal(a.T @ a) < 1e-5
        assert np.sum(np.any(np.asarray(a) != 0, axis=0)) == least
    if gauge == "symmetric":
        np.testing.assert_allclose(outcome.change, outcome.change.T, atol=1e-5)
    np.testing.assert_allclose(pair[0] @ outcome.change, a, atol=1e-5)
    np.testing.assert_allclose(outcome.inverse_change @ pair[1], b, atol=1e-5)
    again = balance_pair(a, b, gauge=gauge)
    assert product_error((a, b), again[:2]) < 2e-6
    nothing = balance_pair(pair[0], 0 * pair[1], gauge=gauge)
    assert nothing.untouched
    assert np.array_equal(nothing.lora_a, pair[0])


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("gauge", ["svd", "raw_svd", "nearest", "symmetric"])
def test_more_columns_than_rank_that_share_little(gauge, condition):
    """What the rows of A and the columns of B do not share must not cancel in float32."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((12, 12)))[0] for _ in range(2))
    a = rng.standard_normal((6, 6)) @ left[:6]
    b = (left[:6].T / condition + left[6:].T) @ right[:6]
    pair = np.float32(a), np.float32(b)
    outcome = balance_pair(*pair, gauge=gauge)
    assert not outcome.untouched
    assert product_error(pair, outcome[:2]) < 3e-6
    assert gap(*outcome[:2]) < 1e-5


BALANCED_SIZES = [(1e18, 1e18), (1e-19, 1e-19), (1e-29, 1e29)]
EDGES = [*BALANCED_SIZES, (1e34, 1e-34), (1e37, 1e-37), (1e-36, 1e36), (1e19, 1e19), (1e-36, 1e-36)]


@pytest.mark.parametrize("sizes", EDGES)
@pytest.mark.parametrize("gauge", ["svd", "nearest"])
def test_the_edges_of_the_range_keep_the_product(sizes, gauge):
    """To rounding or, where float32 cannot hold the balanced pair to all its digits, bit for bit."""
    pair = tuple(np.float32(x * size) for x, size in zip(gaussian(20, 4, 30), sizes, strict=True))
    outcome = balance_pair(*pair, gauge=gauge)
    assert not outcome.nonfinite
    if outcome.untouched:
        assert all(np.array_equal(new, old) for new, old in zip(outcome[:2], pair, strict=True))
    else:
        old, new = ([np.asarray(x, np.longdouble) for x in each] for each in (pair, outcome[:2]))
        assert np.abs(new[0] @ new[1] - old[0] @ old[1]).max() < 1e-6 * np.abs(old[0] @ old[1]).max()
    assert not (outcome.untouched and sizes in BALANCED_SIZES)


def test_subnormal_factors_are_returned_as_they_came():
    pair = tuple(np.float32(x * 1e-41) for x in gaussian(20, 4, 30))
    assert all(np.any(x != 0) for x in pair)
    outcome = balance_pair(*pair)
    assert outcome.untouched
    assert all(np.array_equal(np.asarray(new), old) for new, old in zip(outcome[:2], pair, strict=True))


def test_half_precision_that_would_underflow_is_returned_as_it_came():
    """A balanced float16 factor below the normal numbers would have lost its digits."""
    a, b = gaussian(20, 4, 30)
    pair = jnp.float16(a), jnp.float32(1e-16 * b)
    outcome = balance_pair(*pair)
    assert outcome.untouched
    assert all(np.array_equal(new, old) for new, old in zip(outcome[:2], pair, strict=True))
    np.testing.assert_array_equal(outcome.change, jnp.eye(4))


def test_no_pairs_give_no_outcomes():
    assert balance_pairs([]) == []


def test_differentiation_is_refused_with_advice():
    a, b = gaussian(20, 4, 30)
    with pytest.raises(TypeError, match=r"balance has no derivative.*stop_gradient"):
        jax.jit(jax.grad(lambda a: balance(a, b)[0].sum()))(a)
    jax.grad(lambda a: (a @ balance(jax.lax.stop_gradient(a), b)[1]).sum())(a)


@pytest.mark.parametrize("condition", [1e2, 1e5])
@pytest.mark.parametrize("route", ["exact", "iterative"])
def test_a_thousand_projections_do_not_drift(route, condition):
    pair = of_condition(condition, 40, 6, 30)
    start = balance(*pair)
    end = jax.lax.fori_loop(0, 1000, lambda _, pair: balance(*pair, route=route), start)
    assert product_error(pair, end) < 1e-5
    for old, new in zip(start, end, strict=True):
        assert np.linalg.norm(new - old) < 1e-5 * np.linalg.norm(old)


def test_change_of_gauge_is_reported():
    pairs = [gaussian(30, 4, 20), of_condition(1e4, 30, 4, 25), (gaussian(30, 4, 20)[0], jnp.zeros((4, 20)))]
    for gauge in ("svd", "nearest"):
        for (a, b), outcome in zip(pairs, balance_pairs(pairs, gauge=gauge), strict=True):
            np.testing.assert_allclose(a @ outcome.change, outcome.lora_a, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(outcome.inverse_change @ b, outcome.lora_b, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(outcome.change, jnp.eye(4))


def test_pairs_of_all_shapes_at_once_are_as_each_alone():
    pairs = [
        gaussian(30, 4, 20),
        gaussian(12, 4, 50),
        gaussian(30, 7, 20),
        gaussian(3, 4, 20),
        gaussian(30, 4, 20, seed=1),
    ]
    pairs.append(of_condition(1e5, 30, 4, 20))
    for pair, together in zip(pairs, balance_pairs(pairs), strict=True):
        alone = balance_pair(*pair)
        for x, y in zip(together, alone, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_stacks_one_by_one_and_together(monkeypatch):
    """Of experts, in half precision, at scales of their own, with a pair that lacks rank and one that stands still."""
    rng = np.random.default_rng(0)
    shapes = {
        "experts": ((3, 4, 17, 5), (3, 4, 5, 29)),
        "half": ((6, 33, 4), (6, 4, 21)),
        "scaled": ((7, 40, 3), (7, 3, 50)),
    }
    sizes = {"experts": (1, 1e-3), "half": (1, 1), "scaled": (1e9, 1e8)}
    drawn = {
        name: [np.float32(size * rng.standard_normal(shape)) for size, shape in zip(sizes[name], sides, strict=True)]
        for name, sides in shapes.items()
    }
    drawn["experts"][1][1, 2] = 0
    params = {
        name: dict(zip(("lora_a", "lora_b"), map(jnp.asarray, pair), strict=True)) for name, pair in drawn.items()
    }
    params["half"] = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params["half"])
    updates = jax.tree.map(lambda x: 1e-2 * x.astype(jnp.float32) * rng.choice([-1, 1], x.shape), params)
    updates["scaled"]["lora_a"] = updates["scaled"]["lora_a"].at[3].set(0)
    tx = balora_project(least_ratio=0.0)
    found = []
    for alone in (True, False):
        monkeypatch.setattr(linalg, "has_one_cpu", lambda alone=alone: alone)
        stacks._compiled.cache_clear()
        found.append(jax.jit(lambda *x: tx.update(*x))(updates, tx.init(params), params))
    stacks._compiled.cache_clear()
    (one, state), (other, other_state) = found
    np.testing.assert_array_equal(state.status, other_state.status)
    assert set(np.asarray(state.status)) == {Status.BALANCED, Status.RANK_DEFICIENT, Status.FROZEN}
    for x, y, p in zip(*map(jax.tree.leaves, (one, other, params)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6 * np.abs(np.asarray(p, float)).max())


def compiled_update(params):
    tx = balora_project()
    return jax.jit(tx.update).lower(params, jax.eval_shape(tx.init, params), params).compile(OPTIMIZED)


@pytest.mark.parametrize("leading", [(), (6,)], ids=["single", "stacked"])
def test_memory_is_one_more_copy_of_the_factors(leading):
    shapes = [(512, 16, 2048), (2048, 16, 512), (512, 16, 2048)] * (1 if leading else 6)
    params = {
        str(i): {
            "lora_a": jax.ShapeDtypeStruct((*leading, a, r), jnp.float32),
            "lora_b": jax.ShapeDtypeStruct((*leading, r, b), jnp.float32),
        }
        for i, (a, r, b) in enumerate(shapes)
    }
    size = sum(4 * x.size for x in jax.tree.leaves(params))
    assert compiled_update(params).memory_analysis().temp_size_in_bytes < 1.1 * size


def params_for(rank, dtype=jnp.float32):
    return {
        name: {"lora_a": jax.ShapeDtypeStruct((a, rank), dtype), "lora_b": jax.ShapeDtypeStruct((rank, b), dtype)}
        for name, (a, b) in TREE.items()
    }


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_accelerators_at_full_precision(platform):
    """No product of the program may fall to TF32 or bfloat16 passes, and none has the size of the full weight."""
    tx, params = balora(optax.adam(1e-3)), params_for(8)
    traced = jax.jit(tx.update).trace(params, jax.eval_shape(tx.init, params), params)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) > 10
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)
    assert ("f64" in text) == (platform == "cuda")  # which TPUs lack, wherever the program is compiled
    for a, b in TREE.values():
        assert f"tensor<{a}x{b}x" not in text


def test_a_program_for_several_platforms_runs_on_each():
    """TPUs among them need `jax.enable_x64`: else jax cannot lower float64 decompositions, unused ones."""
    pair = gaussian(30, 4, 20)
    function = jax.jit(lambda a, b: tuple(balance_pair(a, b)))
    exported = [jax.export.export(function, platforms=("cpu", "cuda"))(*pair)]
    with jax.enable_x64(True):
        exported.append(jax.export.export(function, platforms=("cpu", "cuda", "tpu"))(*pair))
    for program in exported:
        for found, expected in zip(program.call(*pair), function(*pair), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_the_iteration_is_what_accelerators_run():
    """Only the fallback, inside a loop that runs for pairs that need it, factorises."""
    lowered = jax.jit(lambda a, b: balance(a, b)).trace(*gaussian(30, 4, 20))
    cuda, cpu = (lowered.lower(lowering_platforms=(p,)).as_text() for p in ("cuda", "cpu"))
    iterative = jax.jit(lambda a, b: balance(a, b, route="iterative")).trace(*gaussian(30, 4, 20))
    loops = [text.count("stablehlo.while") for text in (cuda, iterative.lower(lowering_platforms=("cuda",)).as_text())]
    assert loops[0] == loops[1] > cpu.count("stablehlo.while")


def test_three_groups_in_a_users_program_do_not_deadlock():
    run_alone(
        """
        import jax, jax.numpy as jnp
        from balora_jax import balance
        shapes = [(512, 640), (640, 300), (300, 512)]
        keys = jax.random.split(jax.random.key(0), 6)
        factors = [(jax.random.normal(keys[2 * i], (36, a, 32)), jax.random.normal(keys[2 * i + 1], (36, 32, b)))
                   for i, (a, b) in enumerate(shapes)]
        step = jax.jit(lambda factors: [balance(*pair) for pair in factors])
        mapped = jax.jit(lambda factors: [jax.vmap(balance)(*pair) for pair in factors])
        for _ in range(20):
            factors = jax.block_until_ready(mapped(step(factors)))
        """,
        optimized=True,
    )


@pytest.mark.parametrize(("rank", "steps", "optimized"), [(96, 200, True), (128, 60, False)])
def test_many_steps_of_eight_shapes_do_not_deadlock(rank, steps, optimized):
    run_alone(
        f"""
        import jax, jax.numpy as jnp, optax
        from balora_jax import balora
        key = jax.random.key(0)
        params = {{}}
        for i in range(8):
            a, b = 136 + 8 * i, 216 - 8 * i
            params[str(i)] = {{"lora_a": jax.random.normal(key, (2, a, {rank})), "lora_b": jnp.zeros((2, {rank}, b))}}
        tx = balora(optax.adam(1e-2), least_ratio=0.0)
        def loss(params, x):
            outputs = [x[:, : p["lora_a"].shape[1]] @ p["lora_a"] @ p["lora_b"] for p in params.values()]
            return sum(jnp.mean((y - x[:, : y.shape[-1]]) ** 2) for y in outputs)
        @jax.jit
        def step(params, state, key):
            updates, state = tx.update(jax.grad(loss)(params, jax.random.normal(key, (256, 256))), state, params)
            return optax.apply_updates(params, updates), state
        state = tx.init(params)
        for i in range({steps}):
            params, state = step(params, state, jax.random.fold_in(key, i))
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(params))
        assert int(state.projection.nonfinite) == int(state.projection.untouched) == 0
        """,
        optimized=optimized,
    )


SHARDED = """
    import re, sys
    import jax, jax.numpy as jnp, numpy as np, optax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from balora_jax import balora

    layers, rank, a, b = 8, 6, 64, 128
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((layers, n, rank)))[0] for n in (a, b))
    root = np.sqrt(np.geomspace(8, 1, rank))
    params = {"lora_a": jnp.float32(u * root), "lora_b": jnp.float32((v * root).mT), "bias": jnp.ones(3)}
    updates = jax.tree.map(lambda x: 0.01 * jnp.cos(40 * x), params)
    tx = balora(optax.sgd(1.0, momentum=0.9))
    expected, _ = tx.update(updates, tx.init(params), params)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
        for spec_a, spec_b in ((P(None, "x"), P(None, None, "x")), (P("x"), P("x")), (P(None, "x"), P())):
            shardings = {"lora_a": spec_a, "lora_b": spec_b, "bias": P()}
            shardings = {name: NamedSharding(mesh, spec) for name, spec in shardings.items()}
            there = [jax.device_put(x, shardings) for x in (updates, params)]
            state = tx.init(there[1])
            compiled = jax.jit(tx.update).lower(there[0], state, there[1]).compile()
            moved = re.findall(
                r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)", compiled.as_text()
            )
            assert moved, "the check saw no communication at all"
            sizes = [int(np.prod([int(n) for n in dims.split(",") if n])) for kind, _ in moved
                     for dims in re.findall(r"\\w+\\[([\\d,]*)\\]", kind)]
            assert max(sizes) <= layers * rank * rank, (spec_a, spec_b, moved)
            found, _ = compiled(there[0], state, there[1])
            for name in params:
                np.testing.assert_allclose(found[name], expected[name], atol=2e-5)
                assert found[name].sharding.is_equivalent_to(shardings[name], found[name].ndim), name
"""


def test_sharded_factors_stay_where_they_are():
    """Along their long axes or along the layers, in both modes of sharding: only r x r matrices travel."""
    run_alone(SHARDED, flags="--xla_force_host_platform_device_count=8")
