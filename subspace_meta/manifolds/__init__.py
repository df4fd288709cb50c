"""Manifolds and retractions: frozen value objects with pure methods."""

from subspace_meta.manifolds.base import Manifold
from subspace_meta.manifolds.checks import ManifoldCheckError, ManifoldReport, check_manifold
from subspace_meta.manifolds.euclidean import Euclidean
from subspace_meta.manifolds.grassmann import Grassmann
from subspace_meta.manifolds.oblique import Oblique
from subspace_meta.manifolds.orthogonal import Orthogonal
from subspace_meta.manifolds.product import Product
from subspace_meta.manifolds.retractions import (
    Cayley,
    CholeskyQR,
    Geodesic,
    HouseholderQR,
    OrthonormalRetraction,
    PolarNewtonSchulz,
)
from subspace_meta.manifolds.rotations import Rotations
from subspace_meta.manifolds.spd import SPD, SPDExponential, SPDRetraction, SPDSecondOrder
from subspace_meta.manifolds.sphere import Normalization, Sphere, SphereExponential, SphereRetraction
from subspace_meta.manifolds.stiefel import Stiefel
from subspace_meta.manifolds.stiefel_canonical import StiefelCanonical

__all__ = [
    "SPD",
    "Cayley",
    "CholeskyQR",
    "Euclidean",
    "Geodesic",
    "Grassmann",
    "HouseholderQR",
    "Manifold",
    "ManifoldCheckError",
    "ManifoldReport",
    "Normalization",
    "Oblique",
    "Orthogonal",
    "OrthonormalRetraction",
    "PolarNewtonSchulz",
    "Product",
    "Rotations",
    "SPDExponential",
    "SPDRetraction",
    "SPDSecondOrder",
    "Sphere",
    "SphereExponential",
    "SphereRetraction",
    "Stiefel",
    "StiefelCanonical",
    "check_manifold",
]
