"""Pairs in numbers, against dense decompositions."""

import numpy as np
import pytest

from balora_jax.adapters.diagnosis import diagnose, product_singular_values
from balora_jax.balance import balance, balancing_gap
from balora_jax.conditioning import factorization_condition_number


@pytest.mark.parametrize("shape", [(9, 3, 7), (5, 3, 3), (4, 6, 8)])
def test_numbers_of_a_pair(shape):
    rows, rank, columns = shape
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((rows, rank)), 3 * rng.standard_normal((rank, columns))
    found = diagnose(a, b, scale=-0.5)
    dense = np.linalg.svd(0.5 * a @ b, compute_uv=False)[: min(shape)]
    np.testing.assert_allclose(found.singular_values, dense, rtol=1e-10)
    assert found.norm == pytest.approx(np.linalg.norm(0.5 * a @ b))
    assert found.stable_rank == pytest.approx((np.linalg.norm(0.5 * a @ b) / np.linalg.norm(0.5 * a @ b, 2)) ** 2)
    assert found.gap == pytest.approx(float(balancing_gap(a, b)), rel=1e-5)
    assert (found.shape, found.rank) == ((rows, columns), rank)
    if rank < min(rows, columns):
        assert found.condition_number == pytest.approx(float(factorization_condition_number(a, b)))
        balanced = diagnose(*balance(a, b))
        assert balanced.condition_number == pytest.approx(found.least_condition_number, rel=1e-4)
        assert found.least_condition_number < 0.9 * found.condition_number
    if rank > min(rows, columns):
        assert np.isinf(found.condition_number)


def test_small_singular_values_of_a_product_are_exact():
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((50, 4)))[0] for _ in range(2))
    values = np.array([1.0, 1e-4, 1e-8, 1e-12])
    found = product_singular_values(left * values, right.T)
    np.testing.assert_allclose(found, values, rtol=1e-3)


@pytest.mark.parametrize("size", [1e-150, 1e150])
def test_sizes_whose_squares_float64_does_not_hold(size):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((9, 3)), rng.standard_normal((3, 7))
    usual, found = diagnose(a, b), diagnose(size * a, size * b)
    np.testing.assert_allclose(found.singular_values / size**2, usual.singular_values, rtol=1e-12)
    assert found.norm / size**2 == pytest.approx(usual.norm)
    for name in ("gap", "condition_number", "least_condition_number", "stable_rank"):
        assert getattr(found, name) == pytest.approx(getattr(usual, name), rel=1e-9)
    with pytest.raises(ValueError, match=r"update must be within float64, got factors of up to 2.*e\+200"):
        diagnose(1e200 * a, 1e200 * b)


def test_pairs_without_rank():
    fresh = diagnose(np.ones((5, 2)), np.zeros((2, 4)))
    assert (fresh.norm, fresh.stable_rank, fresh.gap) == (0, 0, 1)
    assert np.isinf([fresh.condition_number, fresh.least_condition_number]).all()
    zero = diagnose(np.zeros((5, 2)), np.zeros((2, 4)))
    assert zero.gap == 0


def test_what_is_no_pair_is_refused():
    with pytest.raises(ValueError, match=r"got shapes \(5, 2\) and \(3, 4\)"):
        diagnose(np.ones((5, 2)), np.ones((3, 4)))
    with pytest.raises(ValueError, match="must be finite"):
        diagnose(np.full((5, 2), np.inf), np.ones((2, 4)))
