"""The Stiefel manifold with the canonical metric <u, v> = tr(u^T (I - X X^T / 2) v), from the quotient O(d)/O(d-p).

It counts the p(p-1)/2 rotations inside the span once, where the embedded metric counts them twice. Everything here
costs O(dp^2) and no d x d matrix is ever formed. Source: Edelman, Arias, Smith 1998, section 2.4; the retraction: Wen
and Yin, "A feasible method for optimization with orthogonality constraints", Math. Program. 142 (2013).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from subspace_meta.manifolds.base import Manifold, euclidean_inner, gram_error, without_rounding
from subspace_meta.manifolds.retractions import Cayley, OrthonormalRetraction, canonical_geodesic
from subspace_meta.manifolds.stiefel import (
    check_tall,
    nearest_orthonormal,
    random_orthonormal,
    stiefel_dimension,
    stiefel_projection,
)


@dataclass(frozen=True)
class StiefelCanonical(Manifold):
    """Matrices with orthonormal columns, canonical metric. Projection transport, not isometric.

    Statistics are taken in the coordinates (I - (1 - 1/sqrt 2) X X^T) v, in which the metric is Euclidean.
    """

    retraction: OrthonormalRetraction = field(default=Cayley())

    @property
    def vectors(self) -> str:
        """What the columns are."""
        return "orthonormal"

    @property
    def retraction_order(self) -> float:
        """The retraction's order in the canonical metric."""
        return self.retraction.canonical_order

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise ``ValueError`` unless d >= p."""
        check_tall(self.name, shape)

    def dimension(self, shape: tuple[int, ...]) -> int:
        """Return dp - p(p+1)/2 per matrix."""
        return stiefel_dimension(shape)

    def project(self, x: Tensor, v: Tensor) -> Tensor:
        """Return V - X sym(X^T V): orthogonal in this metric too, since X S with symmetric S is normal in both."""
        return stiefel_projection(x, v)

    def riemannian_gradient(self, x: Tensor, euclidean_gradient: Tensor) -> Tensor:
        """Return G - X G^T X. 4dp^2 flops."""
        gradient = euclidean_gradient.to(x.dtype)
        return without_rounding(gradient - x @ (gradient.mT @ x), gradient)

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Return tr(U^T V) - tr((X^T U)^T (X^T V)) / 2."""
        u, v = u.to(x.dtype), v.to(x.dtype)
        return euclidean_inner(u, v) - 0.5 * euclidean_inner(x.mT @ u, x.mT @ v)

    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        """Apply the chosen retraction."""
        return self.retraction(x, v)

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Project on the tangent space at ``y`` (a transport of first order, not isometric)."""
        return stiefel_projection(y, v)

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        """Follow the geodesic of the canonical metric. No closed logarithm or distance is known."""
        return canonical_geodesic(x, v.to(x.dtype))

    def nearest(self, x: Tensor) -> Tensor:
        """Return the orthogonal polar factor."""
        self.check_shape(x.shape)
        return nearest_orthonormal(x)

    def random_point(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw from the uniform distribution."""
        self.check_shape(shape)
        return random_orthonormal(shape, generator, dtype, device)

    def violation(self, x: Tensor) -> Tensor:
        """Return the largest absolute entry of X^T X - I."""
        return gram_error(x)

    def coordinates(self, x: Tensor, v: Tensor) -> Tensor:
        """Return V - (1 - 1/sqrt 2) X X^T V: the part inside the span is divided by sqrt 2. 4dp^2 flops."""
        return _scale_span(x, v, math.sqrt(0.5))

    def from_coordinates(self, x: Tensor, v: Tensor) -> Tensor:
        """Return V + (sqrt 2 - 1) X X^T V."""
        return _scale_span(x, v, math.sqrt(2.0))


def _scale_span(x: Tensor, v: Tensor, factor: float) -> Tensor:
    """Multiply the part of ``v`` in the span of ``x`` by ``factor``."""
    v = v.to(x.dtype)
    return v + (factor - 1.0) * (x @ (x.mT @ v))
