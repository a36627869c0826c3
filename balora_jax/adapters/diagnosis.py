"""What a trained pair is like: the spectrum of its update, its balance and its conditioning."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from balora_jax.adapters.peft import CONFIG_FILE, TENSOR_FILE, PeftAdapter
from balora_jax.conditioning import condition_number_by_values, least_condition_number
from balora_jax.pairs import read_pairs


class Diagnosis(NamedTuple):
    """A pair in numbers.

    Attributes:
        shape: `(in, out)` of the weight.
        rank: columns of `lora_a`.
        singular_values: `(min(in, r, out),)` of the update `s A B`, descending.
        gap: relative balancing gap, see `balora_jax.balancing_gap`.
        condition_number: of the factorization, see `factorization_condition_number`; infinite if the product lacks rank
            r.
        least_condition_number: of all pairs of this product.
    """

    shape: tuple[int, int]
    rank: int
    singular_values: np.ndarray
    gap: float
    condition_number: float
    least_condition_number: float

    @property
    def norm(self) -> float:
        """Frobenius norm of the update."""
        largest = float(self.singular_values[0])
        return largest * float(np.linalg.norm(self.singular_values / largest)) if largest > 0 else 0.0

    @property
    def stable_rank(self) -> float:
        """`||W||_F^2 / ||W||^2` of the update W; 0 if it is zero."""
        largest = self.singular_values[0]
        return float(((self.singular_values / largest) ** 2).sum()) if largest > 0 else 0.0


def diagnose(lora_a: ArrayLike, lora_b: ArrayLike, scale: float = 1.0) -> Diagnosis:
    """Returns a pair in numbers, in float64 on the host.

    Args:
        lora_a: `(in, r)`.
        lora_b: `(r, out)`.
        scale: the factor s.

    Raises:
        ValueError: the shapes do not form a pair, or an entry, of the factors or of their product, is not finite.

    Notes:
        O((in + out) r^2); nothing of the size of the weight is formed.

    Examples:
        >>> diagnosis = diagnose([[2.0], [0.0]], [[0.0, 0.5, 0.0]], scale=3.0)
        >>> diagnosis.norm, round(diagnosis.gap, 3), diagnosis.condition_number, diagnosis.least_condition_number
        (3.0, 0.882, 17.0, 2.0)
    """
    a, b = np.asarray(lora_a, float), np.asarray(lora_b, float)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"lora_a must be (in, r) and lora_b (r, out), got shapes {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("lora_a and lora_b must be finite, got a NaN or an infinity")
    rank, (size_a, left), (size_b, right) = a.shape[1], _triangle(a), _triangle(b.T)
    values = _singular_values(size_a, left, size_b, right)
    if not np.isfinite(abs(scale) * values).all():
        raise ValueError(f"the update must be within float64, got factors of up to {abs(a).max():g}, {abs(b).max():g}")
    unit = max(size_a, size_b)
    left, right = left * (size_a / unit), right * (size_b / unit)  # which keeps squares within float64
    gram_a, gram_b = left.T @ left, right.T @ right
    size = np.linalg.norm(gram_a) + np.linalg.norm(gram_b)
    values_a, values_b = (np.linalg.svd(x, compute_uv=False) for x in (left, right))
    shape = len(a), b.shape[1]
    full = rank <= len(values) and values[rank - 1] > len(values) * np.finfo(np.float32).eps * values[0]
    return Diagnosis(
        shape=shape,
        rank=rank,
        singular_values=abs(scale) * values,
        gap=float(np.linalg.norm(gram_a - gram_b) / size) if size else 0.0,
        condition_number=float(condition_number_by_values(values_a, values_b, shape)) if full else np.inf,
        least_condition_number=float(least_condition_number(values, rank)) if full else np.inf,
    )


def diagnose_adapter(adapter: PeftAdapter, *, scaled: bool = False) -> dict[str, Diagnosis]:
    """Returns every pair of a PEFT adapter in numbers, by the name of its module.

    Args:
        adapter: of any layers.
        scaled: whether updates are multiplied by their scale, which the config must then give.

    Raises:
        ValueError: a tensor or a field is not what it must be; the message names it.
    """
    pairs = adapter.pairs()
    diagnoses = {}
    for name, (a, b) in zip(pairs, read_pairs(adapter.tensors, list(pairs.values())), strict=True):
        try:
            if "r" in adapter.config and a.shape[-1] != adapter.rank(name):
                raise ValueError(f"{CONFIG_FILE} gives it the rank {adapter.rank(name)}, {TENSOR_FILE} {a.shape[-1]}")
            diagnoses[name] = diagnose(a[0], b[0], adapter.scale(name) if scaled else 1.0)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return diagnoses


def product_singular_values(lora_a: np.ndarray, lora_b: np.ndarray) -> np.ndarray:
    """The singular values `(min(a, r, b),)` of `A B`, from the triangular factors of both.

    Args:
        lora_a: `(a, r)`.
        lora_b: `(r, b)`.
    """
    return _singular_values(*_triangle(lora_a), *_triangle(np.transpose(lora_b)))


def _singular_values(size_a, left, size_b, right):
    """Those of `A B`, from what `_triangle` returns for A and for the transpose of B."""
    with np.errstate(over="ignore"):
        return np.linalg.svd(left @ right.T, compute_uv=False) * size_a * size_b


def _triangle(factor):
    """The power of 2 at the largest entry of a factor `(n, r)`, 1 if it is zero, and the triangle `(min(n, r), r)` of
    the QR decomposition of what is left without it."""
    size = float(2.0 ** np.floor(np.log2(abs(factor).max()))) if factor.any() else 1.0
    return size, np.linalg.qr(factor / size, mode="r")
