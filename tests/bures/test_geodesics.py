"""Geodesics, logarithm, parallel transport and curvature: their laws, and dense integration by SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conditioned_points import CONDITIONS, SHAPE, lifts, points, vectors
from scipy.integrate import solve_ivp
from scipy.linalg import solve_continuous_lyapunov

from balora_jax import balancing_gap, bures
from balora_jax.bures import Point, Tangent

pytestmark = pytest.mark.usefixtures("float64", "quick_compilation")


def integrated(lift, rows, speed, carried):
    """The geodesic and what is carried along it, in full size, from the equations of the docstrings."""
    signs = np.where(np.arange(lift.shape[0]) < rows, 1.0, -1.0)[:, None]

    def slope(_, state):
        x, v, y = state.reshape(3, *lift.shape)
        gram = x.T @ x
        bend = solve_continuous_lyapunov(gram, -2 * v.T @ (signs * v))
        mixed, turn = v.T @ (signs * y), v.T @ y
        t = solve_continuous_lyapunov(gram, -(mixed + mixed.T))
        w = solve_continuous_lyapunov(gram, turn.T - turn)
        return np.stack([v, signs * x @ bend, signs * x @ t + x @ w]).ravel()

    start = np.stack([lift, speed, carried]).ravel()
    end = solve_ivp(slope, (0, 1), start, method="Radau" if lift.size < 20 else "DOP853", rtol=1e-11, atol=1e-14)
    return end.y[:, -1].reshape(3, *lift.shape)[[0, 2]]


exp, transport, log, curvature = (
    jax.jit(f) for f in (bures.exp, bures.parallel_transport, bures.log, bures.sectional_curvature)
)


GRID = [(1, np.float64), (2, np.float32), (4, np.float64), (8, np.float64), (8, np.float32)]


@pytest.mark.parametrize(("rank", "dtype"), GRID)
def test_geodesics_are_those_of_dense_integration(rank, dtype):
    point = points(rank, dtype=dtype)
    speed, carried = vectors(point, 0.6, 2)
    end, moved = exp(point, speed), transport(point, speed, carried)
    rounding = np.finfo(dtype).eps
    for i, condition in enumerate(CONDITIONS):
        start, size = lifts(point)[i], np.linalg.norm(lifts(speed)[i])
        expected = integrated(start, SHAPE[0], lifts(speed)[i], lifts(carried)[i])
        tolerance = size * max(1e-9, 1e-15 * condition)
        np.testing.assert_allclose(lifts(end)[i], expected[0], rtol=0, atol=tolerance + rounding * np.abs(start).max())
        np.testing.assert_allclose(lifts(moved)[i], expected[1], rtol=0, atol=tolerance + 4 * rounding * size)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_laws_of_geodesics(dtype):
    """Length and angles are kept, the end is a point, what is carried is tangent; there and back again is nothing."""
    point = points(3, dtype=dtype)
    speed, first, second = vectors(point, 0.5, 3)
    rounding = np.finfo(dtype).eps
    end = exp(point, speed)
    velocity, one, two = (transport(point, speed, x) for x in (speed, first, second))
    assert np.all(balancing_gap(*end) < 20 * rounding)
    for x, y, before, after in (
        (speed, first, velocity, one),
        (first, second, one, two),
        (speed, speed, *2 * [velocity]),
    ):
        size = bures.norm(point, x) * bures.norm(point, y)
        np.testing.assert_allclose(
            bures.inner_product(end, before, after) / size, bures.inner_product(point, x, y) / size, atol=300 * rounding
        )
    bures.check_tangent(end, one, tolerance=300 * rounding)
    back = exp(end, Tangent(*(-x for x in velocity)))
    lost = np.linalg.norm(lifts(back) - lifts(point), axis=(1, 2)) / bures.norm(point, speed)
    assert np.all(lost < 100 * rounding * np.sqrt(CONDITIONS) / 10 + 1e-9)


@pytest.mark.parametrize(("rank", "dtype"), [(2, np.float32), (8, np.float64)])
def test_logarithm_inverts_the_exponential_map(rank, dtype):
    """Of near points it is the vector that led there; of far ones its geodesic, integrated in full size, does."""
    point, rounding = points(rank, dtype=dtype), np.finfo(dtype).eps
    (tangent,) = vectors(point, 0.7)
    other = exp(point, tangent)
    turn = np.linalg.qr(np.random.default_rng(3).standard_normal((rank, rank)))[0].astype(dtype)
    found = log(point, Point(other[0] @ turn, turn.T @ other[1]))
    error = np.linalg.norm(lifts(found) - lifts(tangent), axis=(1, 2)) / np.linalg.norm(lifts(tangent), axis=(1, 2))
    assert np.all(error < 300 * rounding * np.sqrt(CONDITIONS) + 1e-15 * np.array(CONDITIONS))
    far = points(rank, seed=5, dtype=dtype)
    there = log(point, far)
    for i, condition in enumerate(CONDITIONS):
        end, _ = integrated(lifts(point)[i], SHAPE[0], lifts(there)[i], lifts(there)[i])
        u, _, vt = np.linalg.svd(lifts(far)[i].T @ end)
        atol = 1e-9 + 10 * rounding * np.sqrt(condition)
        np.testing.assert_allclose(lifts(far)[i] @ u @ vt, end, rtol=0, atol=atol)
    assert np.all(bures.norm(point, there) >= bures.distance(point, far))


def test_logarithm_of_a_pair_that_is_balanced_to_rounding_of_its_root():
    """What passes the check of balance is answered."""
    point, other = (jax.tree.map(lambda x: x[1], points(2, seed=k)) for k in (0, 1))
    near = Point(other[0] * (1 + 1e-9), other[1] / (1 + 1e-9))
    np.testing.assert_allclose(lifts(log(point, near)), lifts(log(point, other)), atol=1e-8)


def test_rank_one_is_a_cone_over_two_spheres():
    """`d^2 = R1^2 + R2^2 - 2 R1 R2 cos(sqrt((alpha^2 + beta^2) / 2))`, `R^2 = 2 sigma`."""
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal(shape) for shape in ((4, 6, 1), (4, 1, 5)))
    x2, y2 = x + 0.7 * rng.standard_normal(x.shape), y + 0.7 * rng.standard_normal(y.shape)
    pairs = []
    for u, v in ((x, y), (x2, y2)):
        sizes = [np.linalg.norm(z, axis=(1, 2), keepdims=True) for z in (u, v)]
        root = np.sqrt(sizes[0] * sizes[1])
        pairs.append(Point(jnp.asarray(u / sizes[0] * root), jnp.asarray(v / sizes[1] * root)))

    def cosine(first, second):
        norms = np.linalg.norm(first, axis=(1, 2)) * np.linalg.norm(second, axis=(1, 2))
        return (first * second).sum((1, 2)) / norms

    angle = np.sqrt((np.arccos(cosine(x, x2)) ** 2 + np.arccos(cosine(y, y2)) ** 2) / 2)
    first, second = (np.sqrt(2 * bures.singular_values(pair)[:, 0]) for pair in pairs)
    expected = np.sqrt(first**2 + second**2 - 2 * first * second * np.cos(angle))
    np.testing.assert_allclose(bures.norm(pairs[0], log(*pairs)), expected, rtol=1e-12)
    # a plane through the cone's apex is flat; one of a sphere of radius R / sqrt(2) in the cone has 2 / R^2 - 1 / R^2
    p = pairs[0]
    radial = Tangent(*p)
    left = Tangent(p[0] * 0 + np.linalg.qr(np.concatenate([p[0], x2], 2))[0][:, :, 1:], 0 * p[1])
    other = np.linalg.qr(np.concatenate([p[0], x2, rng.standard_normal(x.shape)], 2))[0][:, :, 2:]
    np.testing.assert_allclose(bures.sectional_curvature(p, radial, left), 0, atol=1e-12)
    np.testing.assert_allclose(bures.sectional_curvature(p, left, Tangent(jnp.asarray(other), 0 * p[1])), 1 / first**2)


def dense_curvature(lift, rows, u, v):
    """The equations of Gauss and O'Neill, with normal and vertical parts by least squares in full size."""
    rank = lift.shape[1]
    signs = np.where(np.arange(len(lift)) < rows, 1.0, -1.0)[:, None]

    def form(x, y):  # the derivative of L^T J L, and its second derivative
        return (x.T @ (signs * y) + (signs * y).T @ x)[np.triu_indices(rank)]

    units = np.eye(lift.size).reshape(-1, *lift.shape)
    constraint = np.stack([form(lift, unit) for unit in units], 1)
    uu, vv, uv = (np.linalg.lstsq(constraint, -form(x, y), rcond=None)[0] for x, y in ((u, u), (v, v), (u, v)))
    turns = [i - i.T for i in np.eye(rank**2).reshape(-1, rank, rank)]
    inner = [np.sum(u * (v @ turn)) - np.sum(v * (u @ turn)) for turn in turns]
    bracket = np.linalg.lstsq(np.stack([(lift @ turn).ravel() for turn in turns]), inner, rcond=1e-12)[0]
    area = np.sum(u * u) * np.sum(v * v) - np.sum(u * v) ** 2
    return (uu @ vv - uv @ uv + 0.75 * bracket @ bracket) / area


@pytest.mark.parametrize(("dtype", "ranks"), [(np.float64, (1, 2, 5, 8)), (np.float32, (1, 3, 8))])
def test_curvature_is_that_of_dense_least_squares(dtype, ranks):
    """To what rounding of the point leaves of its least singular value."""
    for rank in ranks:
        point = points(rank, dtype=dtype)
        u, v = vectors(point, 1.0, 2)
        found = curvature(point, u, v)
        for i, condition in enumerate(CONDITIONS):
            expected = dense_curvature(*(lifts(point)[i], SHAPE[0], lifts(u)[i], lifts(v)[i]))
            tolerance = 20 * np.finfo(dtype).eps * condition**0.5 + 1e-16 * condition
            np.testing.assert_allclose(found[i], expected, rtol=tolerance, atol=tolerance)


def test_curvature_is_that_of_jacobi_fields():
    """`|d exp_{t u} (t v)|^2 = t^2 (1 - K t^2 / 3) + O(t^5)` for orthonormal u, v."""
    point = jax.tree.map(lambda x: x[1], points(2, seed=3))
    u, v = (bures.random_tangent_vector(jax.random.key(k), point) for k in (0, 1))
    inner = bures.inner_product(point, u, v)
    v = Tangent(*(y - inner * x for x, y in zip(u, v, strict=True)))
    v = Tangent(*(x / bures.norm(point, v) for x in v))

    @jax.jit
    def squared(t):
        tangent, step = (Tangent(*(t * x for x in y)) for y in (u, v))
        end, moved = jax.jvp(lambda x: bures.exp(point, x), (tangent,), (step,))
        horizontal = bures.projection(end, Tangent(*moved))
        return bures.inner_product(end, horizontal, horizontal) / t**2

    found = []
    for t in (0.02, 0.01):
        found.append(3 * (1 - (squared(t) + squared(-t)) / 2) / t**2)
    expected = bures.sectional_curvature(point, u, v)
    np.testing.assert_allclose((4 * found[1] - found[0]) / 3, expected, rtol=2e-3, atol=1e-4)
    mixed = [Tangent(*(c * x + s * y for x, y in zip(u, v, strict=True))) for c, s in ((2.0, 1.0), (0.5, 3.0))]
    np.testing.assert_allclose(bures.sectional_curvature(point, *mixed), expected)


def test_curvature_has_both_signs():
    root = np.sqrt([1.0, 0.1])
    point = Point(jnp.asarray(np.eye(4, 2) * root), jnp.asarray(root[:, None] * np.eye(2, 4)))
    one, two = (jax.vmap(lambda k: bures.random_tangent_vector(k, point))(jax.random.split(jax.random.key(s), 2000))
                for s in (0, 1))  # fmt: skip
    found = jax.vmap(lambda u, v: bures.sectional_curvature(point, u, v))(one, two)
    assert found.min() < -0.3
    assert found.max() > 0.3


def test_the_retraction_is_second_order():
    """Its error against the geodesic is divided by 8 when t halves; that of truncation by 4."""
    point = jax.tree.map(lambda x: x[1], points(2, seed=3))
    (tangent,) = vectors(point, 1.0)
    for kind, ratio in (("balanced", 8), ("truncated", 4)):
        errors = []
        for t in (0.02, 0.01):
            step = Tangent(*(t * x for x in tangent))
            errors.append(bures.distance(exp(point, step), bures.retraction(point, step, kind=kind)))
        np.testing.assert_allclose(errors[0] / errors[1], ratio, rtol=0.05)


def test_geodesics_end_where_the_rank_falls():
    point = points(2)
    inward = Tangent(*(-x for x in point))
    assert np.all(np.isfinite(exp(point, Tangent(*(0.9 * x for x in inward)))[0]))
    assert np.all(np.isnan(exp(point, Tangent(*(1.1 * x for x in inward)))[0]))


def test_derivatives():
    """Of the end of a geodesic, and of the distance: `-log / d`."""
    point = jax.tree.map(lambda x: x[0], points(2))
    (tangent,) = vectors(point, 0.5)
    weight = np.random.default_rng(0).standard_normal((SHAPE[0], 2))

    @jax.jit
    def value(t):
        return (weight * bures.exp(point, Tangent(*(t * x for x in tangent)))[0]).sum()

    slope = (value(1 + 1e-5) - value(1 - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.jit(jax.grad(value))(1.0), slope, rtol=1e-7)
    other = exp(point, tangent)
    (step,) = vectors(other, 1.0, seed=7)

    @jax.jit
    def distance(t):
        return bures.geodesic_distance(point, Point(*(x + t * y for x, y in zip(other, step, strict=True))))

    velocity = transport(point, tangent, tangent)
    expected = bures.inner_product(other, velocity, step) / bures.norm(other, velocity)
    np.testing.assert_allclose(jax.grad(distance)(0.0), expected, rtol=1e-8)
