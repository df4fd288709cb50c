"""The Grassmann manifold Gr(d, p) of p-dimensional subspaces of R^d, a point held as an orthonormal basis.

Tangent vectors are horizontal lifts: X^T V = 0. Only the span counts; every method commutes with X -> XQ for an
orthogonal Q, the retraction included (polar by default: the QR factor would move the representative, and a momentum
kept in ambient coordinates would then drift away from it). Source: Edelman, Arias, Smith 1998; Absil, Mahony,
Sepulchre 2008, example 3.6.4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from subspace_meta.manifolds.base import Manifold, euclidean_inner, gram_error
from subspace_meta.manifolds.retractions import OrthonormalRetraction, PolarNewtonSchulz
from subspace_meta.manifolds.stiefel import check_tall, nearest_orthonormal, random_orthonormal


@dataclass(frozen=True)
class Grassmann(Manifold):
    """Subspaces spanned by the columns of an orthonormal matrix. Projection transport."""

    retraction: OrthonormalRetraction = PolarNewtonSchulz()

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise ``ValueError`` unless d >= p."""
        check_tall(self.name, shape)

    def dimension(self, shape: tuple[int, ...]) -> int:
        """Return p(d-p) per subspace."""
        d, p = shape[-2:]
        return math.prod(shape[:-2]) * p * (d - p)

    def project(self, x: Tensor, v: Tensor) -> Tensor:
        """Return V - X X^T V, the horizontal part."""
        return v - x @ (x.mT @ v)

    def riemannian_gradient(self, x: Tensor, euclidean_gradient: Tensor) -> Tensor:
        """Return G - X X^T G, the horizontal lift of the gradient of a function of the span."""
        return self.project(x, euclidean_gradient)

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Return tr(U^T V) of horizontal lifts."""
        return euclidean_inner(u, v)

    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        """Apply the chosen retraction."""
        return self.retraction(x, v)

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Take the horizontal part at ``y``."""
        return self.project(y, v)

    def nearest(self, x: Tensor) -> Tensor:
        """Return the orthogonal polar factor: an orthonormal basis of the same span."""
        return nearest_orthonormal(x)

    def random_point(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw from the uniform distribution."""
        return random_orthonormal(shape, generator, dtype, device)

    def violation(self, x: Tensor) -> Tensor:
        """Return the largest absolute entry of X^T X - I of the basis."""
        return gram_error(x)
