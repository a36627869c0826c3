"""The laws of the manifold, against dense definitions in NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pymanopt.manifolds import FixedRankEmbedded, PSDFixedRank

from balora_jax import bures
from balora_jax.bures import LowRank, Point, Tangent

pytestmark = pytest.mark.usefixtures("float64")

SHAPES = {"tall": (9, 5, 3), "wide": (4, 11, 2), "square": (6, 6, 6), "rank one": (7, 8, 1)}
TOLERANCE = 1e-12


@pytest.fixture(params=SHAPES.values(), ids=SHAPES, name="point")
def _point(request):
    rows, columns, rank = request.param
    return bures.random_point(jax.random.key(0), (rows, columns), rank)


def tangents(point, count=3):
    return [bures.random_tangent_vector(key, point) for key in jax.random.split(jax.random.key(1), count)]


def ambient(point, seed=2):
    return np.random.default_rng(seed).standard_normal((point.lora_a.shape[0], point.lora_b.shape[1]))


def rotated(pair, seed=3):
    rank = pair[0].shape[-1]
    turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((rank, rank)))[0]
    return type(pair)(pair[0] @ turn, turn.T @ pair[1])


def scaled(tangent, factor):
    return Tangent(*(factor * x for x in tangent))


def thin_svd(point):
    u, s, vt = np.linalg.svd(np.asarray(bures.to_matrix(point)))
    rank = point.lora_a.shape[1]
    return u[:, :rank], s[:rank], vt[:rank].T


def h_operator(point, w):
    """`(X X^T)^1/2 W + W (X^T X)^1/2`."""
    u, s, v = thin_svd(point)
    return u * s @ u.T @ w + w @ v * s @ v.T


def close(x, y, tolerance=TOLERANCE):
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1, np.abs(np.asarray(y)).max()))


def test_points_and_tangent_vectors_pass_their_checks(point):
    bures.check_point(point)
    bures.check_point(bures.from_matrix(bures.to_matrix(point), point.lora_a.shape[1]))
    for tangent in tangents(point):
        bures.check_tangent(point, tangent)
        close(bures.norm(point, tangent), 1)


def test_inner_product_is_the_metric(point):
    """`<xi, eta>_X = <W, eta>` where `H_X[W] = xi`, with the pseudo-inverse of the dense operator."""
    first, second, _ = tangents(point)
    size = point.lora_a.shape[0] * point.lora_b.shape[1]
    shape = (point.lora_a.shape[0], point.lora_b.shape[1])
    dense = np.stack([h_operator(point, unit.reshape(shape)).ravel() for unit in np.eye(size)])
    xi, eta = (np.asarray(bures.to_matrix(point, tangent)).ravel() for tangent in (first, second))
    close(bures.inner_product(point, first, second), xi @ np.linalg.pinv(dense) @ eta, 1e-10)
    close(bures.inner_product(point, first, second), bures.inner_product(point, second, first))


def test_projection_of_factor_directions(point):
    """Idempotent, self-adjoint, and what it takes out is what does not change the product."""
    rng = np.random.default_rng(4)
    first, second = (Tangent(*(rng.standard_normal(x.shape) for x in point)) for _ in range(2))
    p, q = bures.projection(point, first), bures.projection(point, second)
    bures.check_tangent(point, p)
    for x, y in zip(bures.projection(point, p), p, strict=True):
        close(x, y)
    close(bures.inner_product(point, p, second), bures.inner_product(point, first, q))
    close(bures.to_matrix(point, p), bures.to_matrix(point, first))
    m = rng.standard_normal(2 * (point.lora_a.shape[1],))
    vertical = Tangent(point.lora_a @ m, -m @ point.lora_b)
    close(bures.norm(point, bures.projection(point, vertical)), 0)


def test_projection_of_matrices(point):
    z = ambient(point)
    u, _, v = thin_svd(point)
    expected = u @ u.T @ z + z @ v @ v.T - u @ u.T @ z @ v @ v.T
    for direction in (jnp.asarray(z), LowRank(jnp.asarray(z), jnp.eye(z.shape[1])), lambda x: z @ x):
        tangent = bures.projection(point, direction)
        bures.check_tangent(point, tangent)
        close(bures.to_matrix(point, tangent), expected)


def test_gradient_is_dual_to_the_differential(point):
    g = ambient(point)
    for gradient in (jnp.asarray(g), LowRank(jnp.eye(g.shape[0]), jnp.asarray(g)), lambda x: g @ x):
        found = bures.riemannian_gradient(point, gradient)
        bures.check_tangent(point, found)
        close(bures.to_matrix(point, found), h_operator(point, g))
        for tangent in tangents(point):
            close(bures.inner_product(point, found, tangent), np.sum(g * bures.to_matrix(point, tangent)))


def quartic(matrix, target):
    return 0.25 * jnp.sum((matrix - target) ** 4) + 0.5 * jnp.sum((matrix - target) ** 2)


def hessian_of_quartic(point, tangent):
    gradient = jax.grad(quartic)
    target = ambient(point)
    x, xi = bures.to_matrix(point), bures.to_matrix(point, tangent)
    value, product = jax.jvp(lambda x: gradient(x, target), (x,), (xi,))
    return bures.riemannian_hessian(point, value, product, tangent)


def test_hessian_is_symmetric_and_second_order(point):
    """`g(R(t xi)) = g + t <grad, xi> + t^2/2 <Hess xi, xi> + O(t^3)` at a critical point of g on the manifold."""
    first, second, tangent = tangents(point)
    one = bures.inner_product(point, hessian_of_quartic(point, first), second)
    close(one, bures.inner_product(point, first, hessian_of_quartic(point, second)), 1e-10)
    bures.check_tangent(point, hessian_of_quartic(point, first))
    # a function that is critical at the point: what is normal to the manifold, plus a square
    z = ambient(point)
    normal = z - bures.to_matrix(point, bures.projection(point, jnp.asarray(z)))
    base = bures.to_matrix(point)

    def value(x):
        return jnp.sum(normal * x) + 0.5 * jnp.sum((x - base) ** 2)

    form = bures.inner_product(
        point, bures.riemannian_hessian(point, normal, bures.to_matrix(point, tangent), tangent), tangent
    )
    for kind in ("balanced", "truncated"):
        errors = [
            abs(
                value(bures.to_matrix(bures.retraction(point, scaled(tangent, t), kind=kind)))
                - value(base)
                - t**2 * form / 2
            )
            for t in (1e-2, 1e-3)
        ]
        assert errors[1] < 2e-3 * errors[0] + 1e-14


def tangent_basis(point):
    """An orthonormal basis of the tangent space, stacked."""
    size = point.lora_a.size + point.lora_b.size - point.lora_a.shape[1] ** 2
    found = jax.vmap(lambda key: bures.random_tangent_vector(key, point))(jax.random.split(jax.random.key(1), size))
    rows = np.concatenate([np.reshape(x, (size, -1)) for x in found], axis=1)
    rows = np.linalg.qr(rows.T)[0].T  # the metric is that of the entries of horizontal factors
    parts = np.split(rows, [point.lora_a.size], axis=1)
    return Tangent(*(jnp.asarray(part).reshape(size, *x.shape) for part, x in zip(parts, point, strict=True)))


def in_basis(point, operator, basis):
    """The matrix of an operator on the tangent space."""
    images = jax.vmap(operator)(basis)
    inner = partial(bures.inner_product, point)
    return jax.vmap(lambda image: jax.vmap(lambda other: inner(image, other))(basis))(images)


@pytest.mark.parametrize("shape", [(3, 2, 1), (4, 3, 2), (3, 3, 3)])
def test_hessian_is_that_of_the_levi_civita_connection(shape):
    """Away from critical points, against `d_ij f - Gamma^k_ij d_k f` with numerical derivatives of the metric."""
    point = bures.random_point(jax.random.key(0), shape[:2], shape[2])
    target, basis = ambient(point), tangent_basis(point)
    size = len(basis.lora_a)

    def matrix(x):
        bent = x + 0.5 * x.sum() * x[::-1]
        return jnp.matmul(*(p + jnp.einsum("k,kij->ij", bent, t) for p, t in zip(point, basis, strict=True)))

    @jax.jit
    def metric(x):
        at = bures.from_matrix(matrix(x), shape[2])
        fields = jax.vmap(partial(bures.projection, at))(jnp.moveaxis(jax.jacobian(matrix)(x), -1, 0))
        return in_basis(at, lambda field: field, fields)

    zero, h = jnp.zeros(size), 1e-5
    close(metric(zero), np.eye(size))
    slopes = np.stack([(metric(zero.at[k].set(h)) - metric(zero.at[k].set(-h))) / (2 * h) for k in range(size)])
    christoffel = 0.5 * (np.einsum("ijk->kij", slopes) + np.einsum("jik->kij", slopes) - slopes)
    slope, curvature = (d(lambda x: quartic(matrix(x), target))(zero) for d in (jax.grad, jax.hessian))
    correction = np.einsum("kij,k->ij", christoffel, slope)
    assert np.abs(correction).max() > 1
    close(in_basis(point, partial(hessian_of_quartic, point), basis), curvature - correction, 1e-7)


@pytest.mark.parametrize("shape", [(6, 4, 2), (5, 5, 3), (3, 5, 3)])
def test_hessian_at_the_minimiser(shape):
    """Of `1/2 ||X - Z||^2`: `sigma_i + sigma_j` for i, j <= r, and `sigma_i -+ sigma_j` where j > r has a sigma."""
    rows, columns, rank = shape
    z = np.random.default_rng(0).standard_normal((rows, columns))
    sigma = np.linalg.svd(z, compute_uv=False)
    point = bures.from_matrix(jnp.asarray(z), rank)
    gradient = bures.to_matrix(point) - z

    @jax.jit
    def hessian(tangent):
        return bures.riemannian_hessian(point, gradient, bures.to_matrix(point, tangent), tangent)

    found = np.linalg.eigvalsh(in_basis(point, hessian, tangent_basis(point)))
    tail = np.concatenate([sigma[rank:], -sigma[rank:], np.zeros(abs(rows - columns))])
    close(found, np.sort([s + t for s in sigma[:rank] for t in np.concatenate([sigma[:rank], tail])]))
    close(found[0], sigma[rank - 1] - sigma[rank] if rank < min(rows, columns) else sigma[-1])


@pytest.mark.parametrize("kind", ["balanced", "truncated"])
def test_retraction(point, kind):
    (tangent,) = tangents(point, 1)
    for x, y in zip(bures.retraction(point, scaled(tangent, 0.0), kind=kind), point, strict=True):
        close(x, y)
    errors = []
    for t in (1e-2, 1e-3):
        new = bures.retraction(point, scaled(tangent, t), kind=kind)
        bures.check_point(new)
        straight = bures.to_matrix(point) + t * bures.to_matrix(point, tangent)
        errors.append(np.linalg.norm(bures.to_matrix(new) - straight))
        if kind == "truncated":
            u, s, vt = np.linalg.svd(straight, full_matrices=False)
            rank = point.lora_a.shape[1]
            close(bures.to_matrix(new), u[:, :rank] * s[:rank] @ vt[:rank])
        else:
            w = h_inverse(point, t * np.asarray(bures.to_matrix(point, tangent)))
            close(bures.to_matrix(new), straight + w @ np.asarray(bures.to_matrix(point)).T @ w)
    assert errors[1] < 1.2e-2 * errors[0] + 1e-13


def h_inverse(point, xi):
    """`H_X^+[xi]`, by the pseudo-inverse of the dense operator."""
    shape = xi.shape
    dense = np.stack([h_operator(point, unit.reshape(shape)).ravel() for unit in np.eye(xi.size)])
    return (np.linalg.pinv(dense) @ xi.ravel()).reshape(shape)


def test_geometry_does_not_see_the_gauge(point):
    first, second, _ = tangents(point)
    other = bures.random_point(jax.random.key(9), bures.to_matrix(point).shape, point.lora_a.shape[1])
    turned = rotated(point)
    for kind in ("balanced", "truncated"):
        expected = bures.to_matrix(bures.retraction(point, first, kind=kind))
        close(bures.to_matrix(bures.retraction(turned, rotated(first), kind=kind)), expected)
    close(bures.distance(turned, other), bures.distance(point, other))
    close(bures.distance(turned, point), 0, 1e-7)
    expected = bures.to_matrix(other, bures.transport(point, other, first))
    close(bures.to_matrix(other, bures.transport(turned, other, rotated(first))), expected)
    moved = rotated(other, seed=8)
    close(bures.to_matrix(moved, bures.transport(point, moved, first)), expected)
    close(bures.inner_product(turned, rotated(first), rotated(second)), bures.inner_product(point, first, second))


def test_transport(point):
    first, second, step = tangents(point)
    for x, y in zip(bures.transport(point, point, first), first, strict=True):
        close(x, y)
    other = bures.retraction(point, scaled(step, 0.1))
    moved = bures.transport(point, other, first)
    bures.check_tangent(other, moved)
    both = bures.transport(point, other, Tangent(*(2 * x + y for x, y in zip(first, second, strict=True))))
    expected = 2 * bures.to_matrix(other, moved) + bures.to_matrix(other, bures.transport(point, other, second))
    close(bures.to_matrix(other, both), expected)


def test_distance_is_that_of_pymanopts_fixed_rank_psd_lifts(point):
    other = bures.random_point(jax.random.key(9), bures.to_matrix(point).shape, point.lora_a.shape[1])
    lifts = [np.vstack([pair.lora_a, pair.lora_b.T]) for pair in (point, other)]
    manifold = PSDFixedRank(lifts[0].shape[0], lifts[0].shape[1])
    close(bures.distance(point, other), manifold.dist(*lifts), 1e-10)
    values = [np.trace(lift.T @ lift) for lift in lifts]
    overlap = np.linalg.svd(lifts[0].T @ lifts[1])[1].sum()
    close(bures.distance(point, other), np.sqrt(sum(values) - 2 * overlap), 1e-10)


def test_distance_of_near_points_has_all_its_digits(point):
    (tangent,) = tangents(point, 1)
    for size in (1e-4, 1e-8, 1e-12):
        found = bures.distance(point, bures.retraction(point, scaled(tangent, size)))
        rounding = np.finfo(float).eps * np.linalg.norm(np.concatenate([x.ravel() for x in point]))
        np.testing.assert_allclose(found, size, rtol=max(size, 1e-6), atol=8 * rounding)
    assert bures.distance(point, point) < 1e-14


def test_embedded_projection_is_pymanopts(point):
    rank = point.lora_a.shape[1]
    u, s, v = thin_svd(point)
    z = ambient(point)
    manifold = FixedRankEmbedded(u.shape[0], v.shape[0], rank)
    left, middle, right = manifold.embedding((u, s, v.T), manifold.projection((u, s, v.T), z))
    close(bures.to_matrix(point, bures.projection(point, jnp.asarray(z))), left @ middle @ right.T)


def test_batches_and_jit():
    keys = jax.random.split(jax.random.key(5), 4)
    stacked = bures.random_point(keys[0], (2, 3, 7, 6), 2)
    others = bures.random_point(keys[1], (2, 3, 7, 6), 2)
    tangent = bures.random_tangent_vector(keys[2], stacked)
    z = jax.random.normal(keys[3], (2, 3, 7, 6))

    def everything(point, other, tangent, z):
        new = bures.retraction(point, tangent), bures.retraction(point, tangent, kind="truncated")
        return (
            [bures.to_matrix(p) for p in new],
            bures.distance(point, other),
            bures.to_matrix(other, bures.transport(point, other, tangent)),
            bures.to_matrix(point, bures.projection(point, z)),
            bures.norm(point, tangent),
            bures.singular_values(point),
            bures.to_matrix(bures.from_matrix(z, 2)),
        )

    together = jax.jit(everything)(stacked, others, tangent, z)
    mapped = jax.jit(jax.vmap(jax.vmap(everything)))(stacked, others, tangent, z)
    jax.tree.map(close, together, mapped)
    at = jax.tree.map(lambda x: x[1, 2], (stacked, others, tangent, z))
    jax.tree.map(lambda x, y: close(x[1, 2], y), together, everything(*at))


def test_singular_values(point):
    close(bures.singular_values(rotated(point)), thin_svd(point)[1])
    if point.lora_a.shape[1] > 1:
        lacking = rotated(Point(point.lora_a.at[:, 0].set(0), point.lora_b.at[0].set(0)))
        close(bures.singular_values(lacking), np.linalg.svd(bures.to_matrix(lacking))[1][: point.lora_a.shape[1]])
    assert bures.singular_values(point).shape == (point.lora_a.shape[1],)


BAD_POINTS = {
    "unbalanced": (lambda a, b: (2 * a, b / 2), "balanced.*relative gap"),
    "nonfinite": (lambda a, b: (a.at[0, 0].set(jnp.nan), b), "lora_a must be finite, got 1"),
    "lacking rank": (lambda a, b: (a.at[:, 1].set(0), b.at[1].set(0)), "full rank 3"),
    "transposed": (lambda a, b: (b, a), "must be lora_a .* got shapes"),
    "too many columns": (lambda a, b: (a[:2], b), r"r must be at most min\(a, b\)"),
}


@pytest.mark.parametrize("case", BAD_POINTS)
def test_check_point_says_why_not(case):
    point = bures.from_matrix(jnp.asarray(np.random.default_rng(0).standard_normal((9, 5))), 3)
    broken, message = BAD_POINTS[case]
    with pytest.raises(ValueError, match=message):
        bures.check_point(Point(*broken(*point)))


def test_check_tangent_says_why_not():
    point = bures.random_point(jax.random.key(0), (9, 5), 3)
    (tangent,) = tangents(point, 1)
    with pytest.raises(ValueError, match=r"horizontal, A\^T dA = dB B\^T, to .*, got"):
        bures.check_tangent(point, Tangent(tangent.lora_a, 2 * tangent.lora_b))
    with pytest.raises(ValueError, match="shapes of the point"):
        bures.check_tangent(point, Tangent(tangent.lora_b, tangent.lora_a))
    with pytest.raises(ValueError, match="lora_b of the tangent vector must be finite"):
        bures.check_tangent(point, Tangent(tangent.lora_a, tangent.lora_b * jnp.inf))


BAD_CALLS = {
    "shape of a matrix": (
        lambda p, t: bures.projection(p, jnp.ones((5, 9))),
        ValueError,
        r"shape \(9, 5\), got \(5, 9\)",
    ),
    "shape of factors": (
        lambda p, t: bures.projection(p, LowRank(jnp.ones((9, 2)), jnp.ones((2, 4)))),
        ValueError,
        "shape",
    ),
    "shape of a product": (lambda p, t: bures.riemannian_gradient(p, lambda x: x), ValueError, "function's result"),
    "no matrix": (
        lambda p, t: bures.riemannian_gradient(p, 3),
        TypeError,
        "must be a Tangent, or a matrix as an array",
    ),
    "kind": (lambda p, t: bures.retraction(p, t, kind="qr"), ValueError, "kind must be .*'qr'"),
    "rank": (lambda p, t: bures.from_matrix(jnp.ones((4, 3)), 4), ValueError, "rank must be from 1 to .* 3, got 4"),
    "matrix shape": (lambda p, t: bures.random_point(jax.random.key(0), (4,), 1), ValueError, "shape must be"),
    "half precision": (
        lambda p, t: bures.norm(Point(*(x.astype("bfloat16") for x in p)), t),
        TypeError,
        "got bfloat16",
    ),
    "other point": (lambda p, t: bures.distance(p, Point(p[0][:4], p[1])), ValueError, "other must have the shapes"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_arguments_raise(case):
    point = bures.random_point(jax.random.key(0), (9, 5), 3)
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call(point, tangents(point, 1)[0])


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_projections_of_ill_conditioned_points_are_horizontal(condition):
    u, v = (np.linalg.qr(np.random.default_rng(n).standard_normal((n, 4)))[0] for n in (9, 6))
    point = rotated(Point(*(jnp.asarray(x) for x in (u * np.geomspace(1, condition, 4) ** 0.5,
                                                     (v * np.geomspace(1, condition, 4) ** 0.5).T))))  # fmt: skip
    rng = np.random.default_rng(1)
    bures.check_tangent(point, bures.projection(point, Tangent(*(rng.standard_normal(x.shape) for x in point))))
    bures.check_tangent(point, bures.projection(point, jnp.asarray(ambient(point))))
    bures.check_tangent(point, bures.random_tangent_vector(jax.random.key(0), point))


def test_nan_is_not_passed_over():
    point = bures.random_point(jax.random.key(0), (6, 5), 2)
    broken = Point(point.lora_a * jnp.nan, point.lora_b)
    (tangent,) = tangents(point, 1)
    assert np.isnan(bures.distance(point, broken))
    assert np.isnan(bures.norm(point, Tangent(tangent.lora_a * jnp.nan, tangent.lora_b)))
    with pytest.raises(ValueError, match="horizontal"):
        bures.check_tangent(broken, tangent)


def test_any_pair_of_arrays_is_a_point():
    point, other = (bures.random_point(jax.random.key(k), (6, 5), 2) for k in (0, 1))
    (tangent,) = tangents(point, 1)
    np.testing.assert_array_equal(bures.distance(tuple(point), tuple(other)), bures.distance(point, other))
    for x, y in zip(
        bures.transport(tuple(point), tuple(other), tuple(tangent)), bures.transport(point, other, tangent), strict=True
    ):
        np.testing.assert_array_equal(x, y)
