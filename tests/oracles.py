"""Float64 oracles of the pair mathematics, written from the definitions in NumPy, and pairs to try them on."""

import numpy as np
import scipy.linalg


def hyper_balanced(rows, columns, values, *, seed=0):
    """`(U S^1/2, S^1/2 V^T)` with random orthonormal `U (rows, r)`, `V (columns, r)` and the singular values given."""
    rng = np.random.default_rng(seed)
    root = np.sqrt(np.asarray(values, float))
    u, v = (np.linalg.qr(rng.standard_normal((n, root.size)))[0] for n in (rows, columns))
    return u * root, root[:, None] * v.T


def mixed_pair(rows, rank, columns, *, spread=10.0, leading=(), seed=0):
    """A pair out of balance, its product of condition `spread`; rounded to float32 and returned in float64."""
    rng = np.random.default_rng(seed)

    def one():
        a, b = hyper_balanced(rows, columns, np.geomspace(spread, 1, rank), seed=rng.integers(2**32))
        turn = np.linalg.qr(rng.standard_normal((rank, rank)))[0]
        mix = turn * np.geomspace(0.3, 2, rank)
        return a @ mix, np.linalg.solve(mix, b)

    pairs = [one() for _ in range(int(np.prod(leading)))]
    return tuple(
        np.stack(side).reshape(*leading, *side[0].shape).astype(np.float32).astype(float)
        for side in zip(*pairs, strict=True)
    )


def gap(a, b, *, relative=True):
    """`||A^T A - B B^T||_F`, over the sum of the two norms if relative."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    gram_a, gram_b = a.mT @ a, b @ b.mT
    size = np.linalg.norm(gram_a, axis=(-2, -1)) + np.linalg.norm(gram_b, axis=(-2, -1))
    return np.linalg.norm(gram_a - gram_b, axis=(-2, -1)) / (size if relative else 1)


def dense_svd_pair(a, b):
    """The hyper-balanced pair of the product, from the dense SVD of `A B`."""
    u, s, vt = np.linalg.svd(a @ b, full_matrices=False)
    root = np.sqrt(s[: a.shape[1]])
    return u[:, : root.size] * root, root[:, None] * vt[: root.size]


def nearest_pair(a, b):
    """The hyper-balanced pair turned by the orthogonal polar factor of its overlap with `(A, B)`."""
    new_a, new_b = dense_svd_pair(a, b)
    turn, _ = scipy.linalg.polar(new_a.T @ a + new_b @ b.T)
    return new_a @ turn, turn.T @ new_b


def symmetric_pair(a, b):
    """`(A T, T^-1 B)` with `T = (P^-1 # Q)^1/2`, `P = A^T A`, `Q = B B^T`."""
    p, q = a.T @ a, b @ b.T
    root = np.real(scipy.linalg.sqrtm(p))
    inverse = np.linalg.inv(root)
    mean = inverse @ np.real(scipy.linalg.sqrtm(root @ q @ root)) @ inverse
    np.testing.assert_allclose(mean @ p @ mean, q, rtol=1e-6, atol=1e-8 * np.abs(q).max())
    change = np.real(scipy.linalg.sqrtm(mean))
    return a @ change, np.linalg.solve(change, b)


def assert_same_product(pair, new_pair, tolerance):
    """`A' B' = A B` to the tolerance, relative to `||A||_F ||B||_F` of the pair before or after, the smaller."""
    (a, b), (new_a, new_b) = ([np.asarray(x, float) for x in each] for each in (pair, new_pair))
    size = min(
        (np.linalg.norm(left, axis=(-2, -1)) * np.linalg.norm(right, axis=(-2, -1))).min()
        for left, right in ((a, b), (new_a, new_b))
    )
    np.testing.assert_allclose(new_a @ new_b, a @ b, rtol=0, atol=tolerance * size)


def same_bits(x, y):
    """Whether two arrays agree in shape, dtype and every bit."""
    x, y = np.asarray(x), np.asarray(y)
    return x.shape == y.shape and x.dtype == y.dtype and x.tobytes() == y.tobytes()
