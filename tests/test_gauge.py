"""Changes of gauge from Gram matrices alone, against their definition in NumPy."""

from functools import partial

import jax
import numpy as np
import pytest
import scipy.linalg
from oracles import hyper_balanced, mixed_pair

from balora_jax.gauge import check_route, exact_change, iterative_change, matching, refined_inverse, rotation

pytestmark = pytest.mark.usefixtures("float64")

RANK, VALUES = 4, np.array([[8.0, 4.0, 2.0, 1.0], [1.0, 3.0, 9.0, 27.0]])
ROUTES = {"exact": jax.jit(exact_change), "iterative": jax.jit(iterative_change)}


def nearly_balanced():
    """Two pairs, `(2, 12, 4)` and `(2, 4, 9)`, a small step away from hyper-balanced ones."""
    rng = np.random.default_rng(0)
    pairs = [hyper_balanced(12, 9, values, seed=seed) for seed, values in enumerate(VALUES)]
    return [np.stack([x + 1e-2 * rng.standard_normal(x.shape) for x in side]) for side in zip(*pairs, strict=True)]


def grams(a, b):
    return a.mT @ a, b @ b.mT


def pair_for(route):
    return nearly_balanced() if route == "iterative" else mixed_pair(12, RANK, 9, spread=1e3, leading=(2,))


@pytest.mark.parametrize("route", ROUTES)
def test_a_change_makes_both_gram_matrices_one_diagonal_matrix(route):
    a, b = pair_for(route)
    forward, inverse, values, found = map(np.asarray, ROUTES[route](*grams(a, b)))
    assert found.all()
    np.testing.assert_allclose(inverse @ forward, np.broadcast_to(np.eye(RANK), forward.shape), atol=1e-13)
    singular = np.linalg.svd(a @ b)[1][:, :RANK]
    np.testing.assert_allclose(-np.sort(-values, axis=1), singular, rtol=1e-9)
    for gram in grams(a @ forward, inverse @ b):
        np.testing.assert_allclose(gram, values[:, None, :] * np.eye(RANK), atol=1e-11 * singular.max())
    if route == "iterative":
        np.testing.assert_allclose(values, VALUES, rtol=0.2, err_msg="columns keep their places")
        assert (np.diagonal(forward, axis1=1, axis2=2) > 0.9).all(), "and their signs"


@pytest.mark.parametrize("broken", ["lacks rank", "is zero", "is not finite"])
@pytest.mark.parametrize("route", ROUTES)
def test_a_pair_without_a_change_is_told_and_disturbs_no_other(route, broken):
    a, b = pair_for(route)
    alone = ROUTES[route](*grams(a, b))
    a[1] = {"lacks rank": a[1] * (np.arange(RANK) > 0), "is zero": 0 * a[1], "is not finite": a[1] * np.nan}[broken]
    together = ROUTES[route](*grams(a, b))
    assert together.found.tolist() == [True, False]
    for x, y in zip(together, alone, strict=True):
        np.testing.assert_allclose(x[0], y[0], rtol=1e-12, atol=1e-12)


def gauge_of(a, b, gauge):
    """The pairs in a gauge, and the change of gauge that led there, as NumPy arrays."""
    gram_a, gram_b = grams(a, b)
    change = ROUTES["exact"](gram_a, gram_b)
    turn = np.asarray(jax.jit(partial(rotation, gauge=gauge))(change, gram_a, gram_b))
    forward, inverse = np.asarray(change[0]) @ turn, turn.mT @ np.asarray(change[1])
    return a @ forward, inverse @ b, forward


def test_the_nearest_gauge_is_that_of_the_polar_factor():
    """`tr(A'^T A + B' B^T)` is largest, which is what a symmetric positive overlap says."""
    a, b = mixed_pair(12, RANK, 9, leading=(2,))
    for new_a, new_b, old_a, old_b in zip(*gauge_of(a, b, "nearest")[:2], a, b, strict=True):
        overlap = new_a.T @ old_a + new_b @ old_b.T
        np.testing.assert_allclose(overlap, scipy.linalg.polar(overlap)[1], atol=1e-12)


def test_the_symmetric_gauge_is_that_of_a_positive_change():
    for change in gauge_of(*mixed_pair(12, RANK, 9, leading=(2,)), "symmetric")[2]:
        np.testing.assert_allclose(change, change.T, atol=1e-12)
        assert np.linalg.eigvalsh(change).min() > 0


@pytest.mark.parametrize("seed", range(4))
def test_columns_are_matched_by_the_greedy_rule(seed):
    """Largest |cosine| first; a loop over all entries in NumPy, on numbers without meaning."""
    rng = np.random.default_rng(seed)
    overlap_a, overlap_b = rng.standard_normal((2, 3, RANK, 6))
    values, norm_a, norm_b = (rng.uniform(0.5, 2, (3, n)) for n in (RANK, 6, 6))
    found = np.asarray(jax.jit(matching)(overlap_a, overlap_b, values, norm_a, norm_b))
    cosines = (overlap_a / norm_a[:, None] + overlap_b / norm_b[:, None]) / np.sqrt(values)[:, :, None]
    for cosine, chosen in zip(cosines, found, strict=True):
        expected, score = np.zeros_like(cosine), np.abs(cosine)
        for _ in range(RANK):
            place = np.unravel_index(np.argmax(score), score.shape)
            expected[place] = np.sign(cosine[place])
            score[place[0]], score[:, place[1]] = -1, -1
        np.testing.assert_array_equal(chosen, expected)


def test_equal_columns_are_matched_once_each():
    ones, norms = np.ones((1, RANK, RANK)), np.ones((1, RANK))
    np.testing.assert_array_equal(jax.jit(matching)(ones, ones, norms, norms, norms)[0], np.eye(RANK))


def test_an_inverse_gains_twice_its_digits():
    rng = np.random.default_rng(0)
    forward = rng.standard_normal((2, RANK, RANK)) + 4 * np.eye(RANK)
    error = 1e-4 * rng.standard_normal((2, RANK, RANK))
    exact = np.linalg.inv(forward)
    refined = refined_inverse(forward, exact + error)
    np.testing.assert_allclose(refined, exact - error @ forward @ error, atol=1e-14)


@pytest.mark.parametrize(
    ("route", "gauge", "error", "message"),
    [
        ("fast", "svd", ValueError, "route must be one of auto, exact, iterative, got 'fast'"),
        (None, "svd", TypeError, "route must be one of auto, exact, iterative, got None"),
        ("iterative", "nearest", ValueError, "route 'iterative' gives the gauge 'svd' alone, got gauge 'nearest'"),
    ],
)
def test_routes_that_are_none(route, gauge, error, message):
    with pytest.raises(error, match=message):
        check_route(route, gauge)
