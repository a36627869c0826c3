"""Riemannian geometry of the matrices of rank r under the Bures metric, in balanced pairs; see `manifold`."""

from balora_jax.bures.descent import Descent, balora_gd, riemannian_gradient_descent
from balora_jax.bures.geodesics import exp, parallel_transport, sectional_curvature
from balora_jax.bures.logarithm import geodesic_distance, log
from balora_jax.bures.manifold import (
    distance,
    inner_product,
    norm,
    projection,
    random_tangent_vector,
    retraction,
    riemannian_gradient,
    riemannian_hessian,
    transport,
)
from balora_jax.bures.points import (
    Ambient,
    LowRank,
    Point,
    Tangent,
    check_point,
    check_tangent,
    from_matrix,
    random_point,
    singular_values,
    to_matrix,
)

__all__ = [
    "Ambient",
    "Descent",
    "LowRank",
    "Point",
    "Tangent",
    "balora_gd",
    "check_point",
    "check_tangent",
    "distance",
    "from_matrix",
    "inner_product",
    "norm",
    "projection",
    "random_point",
    "random_tangent_vector",
    "retraction",
    "riemannian_gradient",
    "riemannian_gradient_descent",
    "riemannian_hessian",
    "singular_values",
    "to_matrix",
    "transport",
]
