"""Stacked products and decompositions are those of NumPy, alone and under transformations."""

import jax
import numpy as np
import pytest

from balora_jax.linalg import eigh, gram, orthonormal, over_stack, product, qr, split, svd

pytestmark = pytest.mark.usefixtures("float64")


def stack(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("count", [1, 3])
def test_products_of_one_matrix_and_of_several(count):
    left, right = stack(count, 5, 4), stack(count, 4, 6, seed=1)
    np.testing.assert_allclose(product(left, right), left @ right, atol=1e-13)
    for side, factor, expected in ((0, left, left.mT @ left), (1, right, right @ right.mT)):
        found = over_stack(lambda matrix, side=side: gram(matrix, side), factor)
        np.testing.assert_allclose(found, expected, atol=1e-13)


def test_what_is_over_all_pairs_is_cut_into_the_parts_of_the_stacks():
    stacks = [stack(n, 2, 2) for n in (3, 1, 2)]
    for part, expected in zip(split(np.concatenate(stacks), stacks), stacks, strict=True):
        np.testing.assert_array_equal(part, expected)


def test_nearly_orthonormal_columns_become_orthonormal():
    near = np.linalg.qr(stack(2, 6, 3))[0] + 1e-8 * stack(2, 6, 3, seed=1)
    columns = np.asarray(orthonormal(near))
    np.testing.assert_allclose(columns.mT @ columns, np.broadcast_to(np.eye(3), (2, 3, 3)), atol=1e-14)
    np.testing.assert_allclose(columns, near, atol=1e-7)


def unsigned(parts):
    return [np.abs(part) for part in parts]  # columns of eigenvectors and singular vectors have any sign


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0, 2), (2, 0)])
@pytest.mark.parametrize("decomposition", [(svd, np.linalg.svd), (qr, np.linalg.qr), (eigh, np.linalg.eigh)])
def test_decompositions_over_leading_axes(decomposition, leading):
    ours, numpys = decomposition
    matrices = stack(*leading, 5, 3)
    if ours is eigh:
        matrices = matrices.mT @ matrices
    expected = numpys(matrices, full_matrices=False) if ours is svd else numpys(matrices)
    for found in (ours(matrices), jax.vmap(ours)(matrices) if leading else ours(matrices)):
        for x, y in zip(unsigned(found), unsigned(expected), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-12)
