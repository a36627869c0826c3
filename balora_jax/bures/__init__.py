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
from balora_jax.bures.means import frechet_mean, interpolation
from balora_jax.bures.metrics import METRICS, Metric, gauss_newton
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
from balora_jax.bures.solvers import Solution, conjugate_gradient, lbfgs, steepest_descent
from balora_jax.bures.transformations import RiemannianState, riemannian_adam, riemannian_sgd
from balora_jax.bures.trust_region import trust_regions

__all__ = [
    "METRICS",
    "Ambient",
    "Descent",
    "LowRank",
    "Metric",
    "Point",
    "RiemannianState",
    "Solution",
    "Tangent",
    "balora_gd",
    "check_point",
    "check_tangent",
    "conjugate_gradient",
    "distance",
    "exp",
    "frechet_mean",
    "from_matrix",
    "gauss_newton",
    "geodesic_distance",
    "inner_product",
    "interpolation",
    "lbfgs",
    "log",
    "norm",
    "parallel_transport",
    "projection",
    "random_point",
    "random_tangent_vector",
    "retraction",
    "riemannian_adam",
    "riemannian_gradient",
    "riemannian_gradient_descent",
    "riemannian_hessian",
    "riemannian_sgd",
    "sectional_curvature",
    "singular_values",
    "steepest_descent",
    "to_matrix",
    "transport",
    "trust_regions",
]
