"""The Grassmann manifold Gr(d, p) of p-dimensional subspaces of R^d, a point held as an orthonormal basis.

Tangent vectors are horizontal lifts: X^T V = 0. Only the span counts; every method commutes with X -> XQ for an
orthogonal Q, the retraction included (polar by default: the QR factor would move the representative, and a momentum
kept in ambient coordinates would then drift away from it). Source: Edelman, Arias, Smith 1998; Absil, Mahony,
Sepulchre 2008, example 3.6.4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from subspace_meta.manifolds.base import (
    Manifold,
    embedded_inner,
    gram,
    gram_error,
    root_at,
    squared_angles,
    subtract_product,
    without_rounding,
)
from subspace_meta.manifolds.retractions import OrthonormalRetraction, PolarNewtonSchulz, canonical_geodesic
from subspace_meta.manifolds.stiefel import check_tall, nearest_orthonormal, random_orthonormal


@dataclass(frozen=True)
class Grassmann(Manifold):
    """Subspaces spanned by the columns of an orthonormal matrix. Projection transport.

    Steps of the retraction are no longer than to where a subspace would come nearer again.
    """

    retraction: OrthonormalRetraction = field(default=PolarNewtonSchulz())
    _bounded: OrthonormalRetraction = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_bounded", self.retraction.on_grassmann())

    @property
    def vectors(self) -> str:
        """What the columns are."""
        return "orthonormal"

    @property
    def retraction_order(self) -> float:
        """The order of the retraction's span."""
        return self.retraction.grassmann_order

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise ``ValueError`` unless d >= p."""
        check_tall(self.name, shape)

    def dimension(self, shape: tuple[int, ...]) -> int:
        """Return p(d-p) per subspace."""
        d, p = shape[-2:]
        return math.prod(shape[:-2]) * p * (d - p)

    def project(self, x: Tensor, v: Tensor) -> Tensor:
        """Return V - X X^T V, the horizontal part. 4dp^2 flops."""
        v = v.to(x.dtype)
        return subtract_product(v, x, x.mT @ v)

    def riemannian_gradient(self, x: Tensor, euclidean_gradient: Tensor) -> Tensor:
        """Return G - X X^T G, the horizontal lift of the gradient of a function of the span."""
        return without_rounding(self.project(x, euclidean_gradient), euclidean_gradient)

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Return tr(U^T V) of horizontal lifts."""
        return embedded_inner(x, u, v)

    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        """Apply the chosen retraction."""
        return self._bounded(x, v)

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Take the horizontal part at ``y``."""
        return self.project(y, v)

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        """Follow the geodesic: [X, V] exp([[0, -V^T V], [I, 0]]) [I; 0], without a singular value decomposition."""
        return canonical_geodesic(x, v.to(x.dtype))

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the lift at ``x`` of the shortest geodesic to the span of ``y``; at a right angle of one of them.

        With X^T Y = P cos(T) Q^T it is (I - XX^T) Y Q (T / sin T) P^T (Edelman, Arias, Smith 1998, theorem 2.3,
        rewritten). Not for differentiated paths: it uses an SVD.
        """
        left, cosines, right = torch.linalg.svd(x.mT @ y)
        rotated = y @ right.mT
        normal = rotated - x @ (x.mT @ rotated)
        # The arc cosine of a small angle is rounded, but T / sin T is 1 + T^2/6 there.
        angles = cosines.clamp(max=1.0).acos()
        ratio = torch.where(angles > 0, angles / angles.sin().clamp(min=torch.finfo(x.dtype).tiny), 1.0)
        return (normal * ratio[..., None, :]) @ left.mT

    def squared_distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the sum of squared principal angles. Two derivatives, below the right angle."""
        # Y - X has the same horizontal part as Y, and is exactly 0 at Y = X.
        return squared_angles(gram(self.project(x, y - x)), _angles(x, y))

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the root of the sum of squared principal angles. Two derivatives, below the right angle."""
        return root_at(torch.linalg.vector_norm(_angles(x, y), dim=-1), self.squared_distance(x, y))

    def nearest(self, x: Tensor) -> Tensor:
        """Return the orthogonal polar factor: an orthonormal basis of the same span."""
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
        """Return the largest absolute entry of X^T X - I of the basis."""
        return gram_error(x)


def _angles(x: Tensor, y: Tensor) -> Tensor:
    """Return the principal angles, ascending, each from its sine and its cosine; a constant for derivatives."""
    x, y = x.detach(), y.detach()
    cosines = torch.linalg.svdvals(x.mT @ y)
    sines = torch.linalg.svdvals(subtract_product(y - x, x, x.mT @ (y - x)))
    return torch.atan2(sines.flip(-1), cosines)
