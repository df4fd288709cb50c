"""Manifolds and retractions: frozen value objects with pure methods."""

from subspace_meta.manifolds.base import Manifold
from subspace_meta.manifolds.euclidean import Euclidean
from subspace_meta.manifolds.grassmann import Grassmann
from subspace_meta.manifolds.retractions import CholeskyQR, OrthonormalRetraction, PolarNewtonSchulz
from subspace_meta.manifolds.stiefel import Stiefel

__all__ = ["CholeskyQR", "Euclidean", "Grassmann", "Manifold", "OrthonormalRetraction", "PolarNewtonSchulz", "Stiefel"]
