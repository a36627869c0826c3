import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import (
    assert_same_product,
    dense_svd_pair,
    gap,
    hyper_balanced,
    mixed_pair,
    nearest_pair,
    same_bits,
    symmetric_pair,
)
from processes import run_alone

from balora_jax import GAUGES, balance, balance_pair, balancing_gap
from balora_jax.factors import Stacks
from balora_jax.stacks import _balanced
from balora_jax.status import is_skipped

SHAPES = {"rank 1": (5, 1, 7), "tall": (24, 4, 10), "wide": (8, 8, 40), "square": (48, 32, 48)}
TALL = SHAPES["tall"]
SCALES = {
    "unit": (1, 1),
    "far apart": (1e6, 1e-20),
    "tiny": (1e-20, 1e-20),
    "huge": (1e18, 1e18),
    "opposite": (1e25, 1e-25),
}


def tolerance(dtype):
    """Rounding of the arithmetic, in float32 or wider, and of the result."""
    eps = float(jnp.finfo(dtype).eps)
    return 20 * min(eps, 1.2e-7) + (eps if eps > 1e-6 else 0)


KINDS = {  # condition numbers of the two factors and their scales, drawn for each pair
    "any scale": lambda draw: (2.0, 2.0, *2 * (10 ** draw(-20, 18),)),
    "scales apart": lambda draw: (2.0, 2.0, 10 ** draw(-9, 9), 10 ** draw(-9, 9)),
    "huge": lambda draw: (2.0, 2.0, *2 * (10 ** draw(9, 12),)),
    "A ill-conditioned": lambda draw: (10 ** draw(0, 6), 1.0, 1.0, 1.0),
    "B ill-conditioned": lambda draw: (1.0, 10 ** draw(0, 6), 1.0, 1.0),
    "both": lambda draw: (10 ** draw(0, 3), 10 ** draw(0, 3), 10 ** draw(-9, 9), 10 ** draw(-9, 9)),
}
WAYS = [("svd", "exact"), ("svd", "iterative"), *((gauge, "auto") for gauge in GAUGES if gauge != "svd")]


def drawn_pairs(rows, rank, columns, count=40):
    """Pairs of every kind in float32, one after the other."""
    rng = np.random.default_rng(0)

    def factor(size, condition, scale):
        left, right = (np.linalg.qr(rng.standard_normal((n, rank)))[0] for n in (size, rank))
        return scale * (left * np.geomspace(1, 1 / condition, rank)) @ right

    pairs = []
    for kind in KINDS.values():
        for _ in range(count):
            condition_a, condition_b, scale_a, scale_b = kind(rng.uniform)
            pairs.append((factor(rows, condition_a, scale_a), factor(columns, condition_b, scale_b).T))
    return tuple(np.stack(side).astype(np.float32) for side in zip(*pairs, strict=True))


def assert_law(pair, new, left, product, most_gap):
    """Pairs that were balanced have their products, and are balanced; in float64, at the scale 1."""
    size_a, size_b = (np.abs(np.asarray(x, float)).max((1, 2), keepdims=True) for x in pair)
    old_a, old_b = np.asarray(pair[0], float) / size_a, np.asarray(pair[1], float) / size_b
    new_a, new_b = (np.asarray(x, float) / np.sqrt(size_a * size_b) for x in new)
    old_product = old_a @ old_b
    error = np.linalg.norm(new_a @ new_b - old_product, axis=(1, 2)) / np.linalg.norm(old_product, axis=(1, 2))
    assert error[~left].max() < product
    assert gap(new_a, new_b)[~left].max() < most_gap


@pytest.mark.parametrize(("gauge", "route"), WAYS)
def test_pairs_of_any_scale_and_condition(gauge, route):
    pair = drawn_pairs(16, 3, 24)
    outcome = jax.jit(functools.partial(balance_pair, gauge=gauge, route=route))(*pair)
    assert not outcome.untouched.any()
    assert not outcome.nonfinite.any()
    assert_law(pair, outcome[:2], np.zeros(len(pair[0]), bool), 3e-7, 1e-6)


def without_float64(gauge, route="exact"):
    """`balance_pair` of stacked pairs as on TPUs: the new factors, and which pairs were left."""

    @jax.jit
    def run(a, b):
        return _balanced(Stacks([a], [b]), gauge, route, jnp.float32)

    def called(pair):
        ((new_a,), (new_b,)), _, _, status, *_ = run(*pair)
        return (new_a, new_b), np.asarray(is_skipped(status))

    return called


@pytest.mark.parametrize(("gauge", "route"), WAYS)
def test_pairs_of_any_scale_without_float64(gauge, route):
    """Ill-conditioned pairs may be left; those that are not keep the law."""
    pair = drawn_pairs(16, 3, 24)
    new, left = without_float64(gauge, route)(pair)
    well_conditioned = np.arange(len(left)) < len(left) // 2
    assert not left[well_conditioned].any()
    assert left.mean() < 0.4
    assert_law(pair, new, left, 5e-7, 1e-6)


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("shape", [(12, 6, 5), (3, 4, 6)])
def test_more_columns_than_rank_without_float64(shape, gauge):
    """Their product would be lost where columns of all sizes cancel in it."""
    rng = np.random.default_rng(0)
    rows, rank, columns = shape
    spread = 10.0 ** rng.uniform(-4, 4, (60, 1, rank))
    spread[:20] = 1
    a = np.float32(rng.standard_normal((60, rows, rank)) * spread)
    b = np.float32(rng.standard_normal((60, rank, columns)) / spread.mT)
    new, left = without_float64(gauge)((a, b))
    assert not left[:20].all()
    assert left[20:].any()
    assert_law((a, b), new, left, 1e-6, 1e-6)


def cosines(pair, new_pair):
    """Cosines of the columns of the stacked factors `[A; B^T]`, both sides scaled to size 1 before."""

    def stacked(pair):
        a, b = (np.asarray(x, float) for x in pair)
        columns = np.concatenate([a / np.linalg.norm(a), b.T / np.linalg.norm(b)])
        return columns / np.linalg.norm(columns, axis=0)

    return stacked(new_pair).T @ stacked(pair)


def assert_balanced(pair, new_pair, gauge, limit):
    assert_same_product(pair, new_pair, limit)
    assert np.max(gap(*new_pair)) < limit
    if gauge in ("svd", "raw_svd"):
        a, b = (np.asarray(x, float) for x in new_pair)
        for gram in (a.mT @ a, b @ b.mT):
            diagonal = np.diagonal(gram, axis1=-2, axis2=-1)
            assert np.all(np.linalg.norm(gram - diagonal[..., None] * np.eye(a.shape[-1])) < limit * gram.max())
            if gauge == "raw_svd":
                assert np.all(np.diff(diagonal, axis=-1) <= limit * gram.max())


def oracle(pair, new_pair, gauge):
    """The float64 result; in the gauges of the SVD with columns in the order and signs of `new_pair`."""
    if gauge in ("nearest", "symmetric"):
        return {"nearest": nearest_pair, "symmetric": symmetric_pair}[gauge](*pair)
    a, b = dense_svd_pair(*pair)
    order = np.argmax(np.abs(cosines((a, b), new_pair)), axis=1)
    assert sorted(order) == list(range(a.shape[1]))
    signs = np.sign(np.sum(new_pair[0] * a[:, order], axis=0))
    return a[:, order] * signs, signs[:, None] * b[order]


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize(
    ("shape", "scale"),
    [(shape, SCALES["unit"]) for shape in SHAPES.values()] + [(TALL, scale) for scale in SCALES.values()],
    ids=[*SHAPES, *SCALES],
)
def test_agrees_with_the_oracle(shape, scale, gauge):
    pair = [np.float32(x * s) for x, s in zip(mixed_pair(*shape), scale, strict=True)]
    outcome = balance_pair(*pair, gauge=gauge)
    assert not outcome.untouched
    assert float(balancing_gap(*outcome[:2])) < 3e-6
    # Back to numbers around 1; one factor may still be far above the other, as in the pair that came.
    root = np.sqrt(scale[0] * scale[1])
    pair, new_pair = ([np.asarray(x, float) / root for x in each] for each in (pair, outcome[:2]))
    assert_balanced(pair, new_pair, gauge, 3e-6)
    for new, expected in zip(new_pair, oracle(pair, new_pair, gauge), strict=True):
        np.testing.assert_allclose(new, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("leading", [(3,), (3, 1), (1, 3)])
def test_leading_axes_are_independent_pairs(leading, gauge):
    a, b = (jnp.float32(x) for x in mixed_pair(*TALL, leading=leading))
    outcome = balance_pair(a, b, gauge=gauge)
    assert outcome.untouched.shape == outcome.nonfinite.shape == leading
    for at in np.ndindex(leading):
        single = balance(a[at], b[at], gauge=gauge)
        np.testing.assert_allclose(outcome.lora_a[at], single[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(outcome.lora_b[at], single[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("values", [[1, 1, 1, 1], [4, 4, 1, 1]], ids=["all", "two by two"])
def test_equal_singular_values(values, gauge):
    a, b = hyper_balanced(TALL[0], TALL[2], values)
    mix = np.array([[2, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0.5, 0], [1, 0, 0, 1]])
    for pair in ((a, b), (a @ mix, np.linalg.solve(mix, b))):
        assert_balanced(pair, balance(*map(jnp.float32, pair), gauge=gauge), gauge, 3e-6)


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("spread", [1e2, 1e4, 1e5])
def test_ill_conditioned_products(spread, gauge):
    pair = mixed_pair(*TALL, spread=spread)
    outcome = balance_pair(*map(jnp.float32, pair), gauge=gauge)
    assert not outcome.untouched
    assert_balanced(pair, outcome[:2], gauge, 1e-5)


@pytest.mark.parametrize("gauge", ["svd", "symmetric"])
@pytest.mark.parametrize(
    "dtypes", [(x, x) for x in ("bfloat16", "float16", "float32", "float64")] + [("float32", "bfloat16")]
)
def test_dtypes_are_kept(dtypes, gauge):
    with jax.enable_x64("float64" in dtypes):
        pair = [jnp.asarray(x, dtype) for x, dtype in zip(mixed_pair(*TALL), dtypes, strict=True)]
        new_pair = balance(*pair, gauge=gauge)
        assert tuple(str(x.dtype) for x in new_pair) == dtypes
        limit = max(tolerance(dtype) for dtype in dtypes)
        assert_same_product(pair, new_pair, limit)
        assert gap(*new_pair) < limit
        assert balancing_gap(*new_pair).dtype == (jnp.float64 if "float64" in dtypes else jnp.float32)


def test_a_finite_pair_stays_finite():
    a, b = jnp.full((4, 1), 6e4, jnp.float16), jnp.full((1, 4096), 6e4, jnp.float16)
    assert all(jnp.isfinite(x).all() for x in balance(a, b))


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_svd_gauge_keeps_the_columns_of_a_hyper_balanced_pair(shape, scale):
    rows, rank, columns = shape
    rng = np.random.default_rng(rank)
    a, b = hyper_balanced(rows, columns, np.geomspace(1, 30, rank))
    for _ in range(3):
        order, signs = rng.permutation(rank), rng.choice([-1, 1], rank)
        pair = a[:, order] * signs, signs[:, None] * b[order]
        new_pair = balance(*(np.float32(x * s) for x, s in zip(pair, scale, strict=True)))
        for new, old in zip(new_pair, pair, strict=True):
            np.testing.assert_allclose(np.asarray(new, float) / np.sqrt(scale[0] * scale[1]), old, atol=3e-5)


def test_svd_gauge_takes_the_closest_order_and_signs():
    """Among all signed permutations, for a pair that an optimizer's step has moved a little."""
    rng = np.random.default_rng(3)
    raw_differs = 0
    for seed in range(5):
        a, b = hyper_balanced(TALL[0], TALL[2], rng.permutation([8.0, 4.0, 2.0, 1.0]), seed=seed)
        pair = [x + 0.03 * rng.standard_normal(x.shape) for x in (a, b)]
        new_a, new_b = (np.asarray(x, float) for x in balance(*map(jnp.float32, pair)))

        def distance(order, signs, pair=pair, new_a=new_a, new_b=new_b):
            return np.linalg.norm(new_a[:, order] * signs - pair[0]) + np.linalg.norm(
                (new_b[order].T * signs).T - pair[1]
            )

        others = [
            distance(list(order), np.array(signs))
            for order in itertools.permutations(range(4))
            for signs in itertools.product([1, -1], repeat=4)
        ]
        assert distance([0, 1, 2, 3], np.ones(4)) == min(others)
        raw_a, _ = balance(*map(jnp.float32, pair), gauge="raw_svd")
        raw_differs += not np.allclose(raw_a, new_a, atol=1e-3)
    assert raw_differs == 5  # the pairs above do need to be put in order


def test_no_balanced_pair_is_nearer_than_the_nearest():
    rng = np.random.default_rng(0)
    a, b = mixed_pair(*TALL)
    near_a, near_b = (np.asarray(x, float) for x in balance(jnp.float32(a), jnp.float32(b), gauge="nearest"))

    def distance(new_a, new_b):
        return np.linalg.norm(new_a - a) ** 2 + np.linalg.norm(new_b - b) ** 2

    for size in (1e-2, 1e-1, 1, 10):
        for _ in range(25):
            skew = rng.standard_normal((4, 4)) * size
            turn, _ = np.linalg.qr(np.eye(4) + (skew - skew.T))
            turn *= np.sign(np.diag(turn)) if size < 1 else rng.choice([-1, 1], 4)
            assert distance(near_a, near_b) < distance(near_a @ turn, turn.T @ near_b)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_symmetric_gauge_is_a_positive_definite_change(shape):
    a, b = mixed_pair(*shape)
    new_a, _ = balance(jnp.float32(a), jnp.float32(b), gauge="symmetric")
    change = np.linalg.lstsq(a, np.asarray(new_a, float))[0]
    np.testing.assert_allclose(change, change.T, atol=1e-4 * np.abs(change).max())
    assert np.linalg.eigvalsh((change + change.T) / 2).min() > 0


def deficient_pairs():
    rng = np.random.default_rng(0)
    rank = TALL[1]
    a, b = (x.astype(np.float32) for x in mixed_pair(*TALL))
    half = np.float32(rng.standard_normal((rank, rank // 2)) @ rng.standard_normal((rank // 2, rank)))
    hole = np.ones(rank, np.float32)
    hole[1] = 0
    left, right = np.array([1, 1, 0, 0], np.float32), np.array([1, 1, 0, 0], np.float32)[::-1]
    return {
        "B = 0": (a, 0 * b),
        "A = 0": (0 * a, b),
        "both 0": (0 * a, -0.0 * b),
        "zero column of A": (a * hole, b),
        "zero row of B": (a, hole[:, None] * b),
        "A of rank r/2": (a @ half, b),
        "B of rank r/2": (a, half @ b),
        "A B = 0": (a * left, right[:, None] * b),
    }


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("scale", [1, 1e-20, 1e15])
@pytest.mark.parametrize("case", deficient_pairs())
def test_a_product_that_lacks_rank_is_returned_as_it_came(case, scale, gauge):
    pair = [np.float32(x * scale) for x in deficient_pairs()[case]]
    outcome = balance_pair(*pair, gauge=gauge)
    assert all(np.array_equal(new, old) for new, old in zip(outcome[:2], pair, strict=True))
    assert outcome.untouched
    assert not outcome.nonfinite


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_nonfinite_pair_is_returned_as_it_came_and_alone(value, side, gauge):
    clean = [np.float32(x) for x in mixed_pair(*TALL, leading=(3,))]
    broken = [x.copy() for x in clean]
    broken[side][1, 2, 3] = value
    expected, outcome = balance_pair(*clean, gauge=gauge), balance_pair(*broken, gauge=gauge)
    assert outcome.nonfinite.tolist() == [False, True, False]
    assert not outcome.untouched.any()
    for new, old, other in zip(outcome[:2], broken, expected[:2], strict=True):
        assert same_bits(new[1], old[1])
        assert same_bits(new[::2], other[::2])


def over_vmap(a, b):
    return jax.vmap(balance_pair)(a, b)


def over_nested_vmap(a, b):
    outcome = jax.jit(jax.vmap(jax.vmap(balance_pair)))(a[:, None], b[:, None])
    return jax.tree.map(lambda x: x[:, 0], outcome)


def over_scan(a, b):
    return jax.lax.scan(lambda _, pair: (None, balance_pair(*pair)), None, (a, b))[1]


TRANSFORMATIONS = [jax.jit(balance_pair), over_vmap, over_nested_vmap, over_scan]


@pytest.mark.parametrize("transformed", TRANSFORMATIONS, ids=["jit", "vmap", "nested vmap", "scan"])
def test_transformations_agree_with_the_plain_call(transformed):
    a, b = (jnp.float32(x) for x in mixed_pair(*TALL, leading=(3,)))
    b = b.at[1].set(0)
    expected, outcome = balance_pair(a, b), transformed(a, b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), outcome, expected)
    assert outcome.untouched.tolist() == [False, True, False]
    assert jax.eval_shape(transformed, a, b) == jax.eval_shape(lambda: expected)


@pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (2, None)])
def test_vmap_over_one_factor(in_axes):
    a, b = (jnp.float32(x) for x in mixed_pair(*TALL, leading=(3,)))
    factors = [x[0] if axis is None else jnp.moveaxis(x, 0, axis) for x, axis in zip((a, b), in_axes, strict=True)]
    outcome = jax.vmap(balance, in_axes=in_axes)(*factors)
    for i in range(3):
        single = balance(*(x[0] if axis is None else x[i] for x, axis in zip((a, b), in_axes, strict=True)))
        for new, old in zip(outcome, single, strict=True):
            np.testing.assert_allclose(new[i], old, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_traces_under_strict_promotion(dtype, gauge):
    factors = [jax.ShapeDtypeStruct((2, *shape), dtype) for shape in ((12, 5), (5, 9))]
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        outcome = jax.eval_shape(lambda a, b: balance(a, b, gauge=gauge), *factors)
        jax.eval_shape(balancing_gap, *factors)
    assert outcome == tuple(factors)


A, B = jnp.ones((6, 2)), jnp.ones((2, 5))
ERRORS = {
    "one axis": ((jnp.ones(6), B), {}, ValueError, "`lora_a`.*two axes.*(6,)"),
    "ranks differ": ((A, jnp.ones((3, 5))), {}, ValueError, r"`lora_a`.*`lora_b`.*rank.*\(6, 2\).*\(3, 5\)"),
    "leading axes differ": ((jnp.ones((4, 6, 2)), B), {}, ValueError, r"leading axes.*\(4, 6, 2\).*\(2, 5\)"),
    "empty": ((jnp.ones((0, 2)), B), {}, ValueError, r"empty.*\(0, 2\)"),
    "integers": ((A, jnp.ones((2, 5), int)), {}, TypeError, "`lora_b`.*floating.*int32"),
    "complex": ((A.astype(complex), B), {}, TypeError, "`lora_a`.*floating.*complex64"),
    "unknown gauge": ((A, B), {"gauge": "svdd"}, ValueError, "gauge must be one of svd, raw_svd.*'svdd'"),
    "gauge of another type": ((A, B), {"gauge": None}, TypeError, "gauge must be one of svd, raw_svd.*None"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case):
    factors, options, error, message = ERRORS[case]
    functions = [balance, balance_pair] + ([] if options else [balancing_gap])
    for function in functions:
        with pytest.raises(error, match=message):
            function(*factors, **options)


@pytest.mark.parametrize("relative", [True, False])
def test_gap_agrees_with_numpy(relative):
    a, b = mixed_pair(*TALL, leading=(2, 3))
    found = balancing_gap(jnp.float32(a), jnp.float32(b), relative=relative)
    np.testing.assert_allclose(found, gap(a, b, relative=relative), rtol=1e-5)
    assert float(balancing_gap(jnp.float32(a[0, 0]), jnp.float32(b[0, 0]), relative=relative)) == pytest.approx(
        found[0, 0]
    )


@pytest.mark.parametrize(("factors", "expected"), [((0, 0), 0), ((1, 0), 1), ((0, 1), 1), ((1, 1), 0.25)])
@pytest.mark.parametrize("scale", [1, 1e-25, 1e25])
def test_gap_of_simple_pairs(factors, expected, scale):
    a, b = factors[0] * scale * jnp.ones((5, 1)), factors[1] * scale * jnp.ones((1, 3))
    assert float(balancing_gap(a, b)) == pytest.approx(expected)


def test_many_pairs_of_several_shapes_do_not_deadlock():
    """One program with several batches of factorisations, plain and under `vmap`."""
    code = """
import jax, numpy as np
from functools import partial
from balora_jax import balance, balancing_gap
rng = np.random.default_rng(0)
pairs = [(np.float32(rng.standard_normal((36, a, 32))), np.float32(rng.standard_normal((36, 32, b))))
         for a, b in ((64, 48), (48, 64), (56, 56))]
project = partial(balance, gauge="nearest")
for step in (jax.jit(lambda pairs: [f(*pair) for pair in pairs]) for f in (project, jax.vmap(project))):
    for _ in range(5):
        balanced = jax.block_until_ready(step(pairs))
    print(max(float(balancing_gap(*pair).max()) for pair in balanced))
"""
    printed = run_alone(code, timeout=120)
    assert max(map(float, printed.split())) < 1e-5
