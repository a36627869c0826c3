"""Stochastic Riemannian optimizers as optax transformations: momentum that follows the manifold.

Pairs step along the retraction, and their momentum is carried to the new pair by projection. All other leaves are
Euclidean: there the transformations are optax's `sgd` and `adam`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from balora_jax.bures.manifold import projection
from balora_jax.bures.matrix_functions import balanced
from balora_jax.bures.points import Point, Tangent, balanced_point
from balora_jax.pairs import Pairs, find_pairs, read_pairs, write_pairs
from balora_jax.trees import is_masked, leaves_by_path, path_text, with_leaves


class RiemannianState(NamedTuple):
    """The state of `riemannian_sgd` and `riemannian_adam`.

    Attributes:
        step: `()`, the number of updates.
        momentum: of the form of the parameters; of pairs tangent vectors.
        squares: of the form of the parameters: at both factors of a pair `(n,)`, for each of its n stacked pairs the
            mean of the squared norms of the gradients; at other leaves the mean of their squared entries. `()` for SGD.
    """

    step: jax.Array
    momentum: Any
    squares: Any


def riemannian_sgd(
    learning_rate: optax.ScalarOrSchedule, *, momentum: float = 0.9, pairs: Pairs | None = None
) -> optax.GradientTransformation:
    """Gradient descent with momentum on the manifold: `m <- momentum m + g`, a step along `-lr m`, and m carried along.

    Args:
        learning_rate: of the descent, or a schedule of it.
        momentum: how much of the last step is kept; with 0 it is `balora_gd`.
        pairs: which parameters are pairs, as for `find_pairs`.

    Returns:
        A transformation with a `RiemannianState`; `update` needs the parameters, and must be the last of a chain.

    Raises:
        ValueError: from `init`, a pair is not balanced (a fresh one with B = 0 is not): `balora_jax.balance_tree`
            balances a tree. Inside `jit` it is taken on trust.

    Source: Bonnabel 2013 (stochastic gradient descent on Riemannian manifolds); the momentum is that of geoopt.
    """

    return _transformation(
        learning_rate, pairs, lambda kept, gradient: momentum * kept + gradient, lambda kept, square, count: kept, None
    )


def riemannian_adam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    pairs: Pairs | None = None,
) -> optax.GradientTransformation:
    """Adam on the manifold: the second moment of a pair is one number, the mean of `<g, g>_X`.

    Args:
        learning_rate: of the steps, or a schedule of it. A step of a pair has about this length, of all its entries
            together; Adam's has it for each.
        b1: decay of the momentum.
        b2: decay of the second moment.
        eps: added to its root.
        pairs: which parameters are pairs, as for `find_pairs`.

    Returns:
        A transformation with a `RiemannianState`; `update` needs the parameters, and must be the last of a chain.

    Raises:
        ValueError: as `riemannian_sgd`.

    Source: Becigneul and Ganea 2019 (Riemannian adaptive optimization methods), as geoopt's RiemannianAdam.

    Examples:
        >>> from balora_jax import balance_tree, bures
        >>> params = balance_tree({"lora_a": jnp.eye(6, 2), "lora_b": 3.0 * jnp.eye(2, 5)})
        >>> tx = bures.riemannian_adam(1e-2)
        >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        >>> bures.check_point(bures.Point(*optax.apply_updates(params, updates).values()))
    """

    def direction(kept, square, count):
        size = jnp.sqrt(square / (1 - b2**count)) + eps
        return kept / (1 - b1**count) / size

    return _transformation(
        learning_rate,
        pairs,
        lambda kept, gradient: b1 * kept + (1 - b1) * gradient,
        direction,
        lambda square, new: b2 * square + (1 - b2) * new,
    )


def _transformation(learning_rate, pairs, momentum_of, direction_of, square_of):
    """The transformation of a rule for the momentum, the direction of the step and the second moment."""

    def init_fn(params):
        found = find_pairs(params, pairs) if jax.tree.leaves(params) else []
        for pair, factors in zip(found, read_pairs(params, found), strict=True):
            balanced_point(Point(*factors), f"the pair {path_text(pair.path_a)}, {path_text(pair.path_b)}")
        zeros = jax.tree.map(jnp.zeros_like, params)
        counted = {
            path: jnp.zeros(factors[0].shape[0], factors[0].dtype)
            for pair, factors in zip(found, read_pairs(params, found), strict=True)
            for path in (pair.path_a, pair.path_b)
        }
        squares = () if square_of is None else with_leaves(zeros, counted)
        return RiemannianState(jnp.zeros((), jnp.int32), zeros, squares)

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError("the manifold needs the parameters: call `update(updates, state, params)`")
        count = optax.safe_increment(state.step)
        rate = learning_rate(state.step) if callable(learning_rate) else learning_rate
        found = find_pairs(params, pairs)
        squares = {} if square_of is None else leaves_by_path(state.squares)
        momenta, gradients = leaves_by_path(state.momentum), leaves_by_path(updates)
        steps: dict[Any, Any] = {}
        paths = {path for pair in found for path in (pair.path_a, pair.path_b)}
        for path, gradient in gradients.items():
            if path in paths or is_masked(gradient):
                continue
            momenta[path] = momentum_of(momenta[path], gradient)
            if squares:
                squares[path] = square_of(squares[path], gradient**2)
            steps[path] = -rate * direction_of(momenta[path], squares.get(path), count)
        kept, moved = [], []
        of_pairs = (read_pairs(tree, found) for tree in (params, updates, state.momentum))
        for pair, point, gradient, momentum in zip(found, *of_pairs, strict=True):
            gradient = projection(Point(*point), Tangent(*gradient))
            momentum = [momentum_of(m, g) for m, g in zip(momentum, gradient, strict=True)]
            square = None
            if squares:
                length = sum((x**2).sum((-2, -1)) for x in gradient)
                squares[pair.path_a] = squares[pair.path_b] = square_of(squares[pair.path_a], length)
                square = squares[pair.path_a][:, None, None]
            new = balanced(*(x - rate * direction_of(m, square, count) for x, m in zip(point, momentum, strict=True)))
            moved.append(tuple(x - y for x, y in zip(new, point, strict=True)))
            kept.append(projection(Point(*new), Tangent(*momentum)))
        momentum = write_pairs(with_leaves(state.momentum, momenta), found, kept)
        new_squares = with_leaves(state.squares, squares) if squares else ()
        return write_pairs(with_leaves(updates, steps), found, moved), RiemannianState(count, momentum, new_squares)

    return optax.GradientTransformation(init_fn, update_fn)
