"""The orthogonal group O(n) with the metric of the surrounding space, which is invariant on both sides.

A tangent vector at X is X A with a skew A. The formulas here serve the rotations as well: SO(n) is the component of the
identity, and every retraction stays in the component it starts from, because X + V = X (I + A) and det(I + A) > 0.
Source: Absil, Mahony, Sepulchre 2008, section 3.6; Edelman, Arias, Smith 1998, section 2.2. Cost: 4n^3 flops for the
projection, and the table in :mod:`~subspace_meta.manifolds.retractions`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from subspace_meta.manifolds.base import (
    Manifold,
    embedded_inner,
    gram_error,
    skew_part,
    symmetric_part,
    without_rounding,
)
from subspace_meta.manifolds.retractions import OrthonormalRetraction, PolarNewtonSchulz, canonical_geodesic
from subspace_meta.manifolds.stiefel import nearest_orthonormal, random_orthonormal


def check_square(name: str, shape: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless ``shape`` is ``(..., n, n)`` with n >= 1."""
    if len(shape) < 2 or not shape[-2] == shape[-1] >= 1:
        raise ValueError(f"{name} needs square matrices of shape (..., n, n), got {tuple(shape)}")


def rotation_dimension(shape: tuple[int, ...]) -> int:
    """Return n(n-1)/2, summed over the batch."""
    n = shape[-1]
    return math.prod(shape[:-2]) * (n * (n - 1) // 2)


def rotation_projection(x: Tensor, v: Tensor) -> Tensor:
    """Return X skew(X^T V), in the type of ``x``. 4n^3 flops."""
    return x @ skew_part(x.mT @ v.to(x.dtype))


def left_translation(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    """Carry V = XA to YA. Isometric, and the same along every path; 4n^3 flops."""
    return y @ skew_part(x.mT @ v.to(x.dtype))


def rotation_exp(x: Tensor, v: Tensor) -> Tensor:
    """Return X exp(X^T V), polished by one Newton-Schulz step."""
    return canonical_geodesic(x, v.to(x.dtype))


# Angles whose cosine is below this are far: their sine is small, or on its way there.
_FAR = -0.5


def rotation_log(x: Tensor, y: Tensor) -> Tensor:
    """Return X log(X^T Y) for X and Y in one component; where an angle is pi, one of the shortest tangents.

    The symmetric and the skew part S and K of a rotation Q commute and are cos T and sin T. With S = V diag(cos t) V^T,
    log Q = K f(S), f(cos t) = t / sin t, serves up to t = 2 pi/3. Beyond, K loses digits relative to itself, and only
    its direction J = K (-K^2)^{-1/2}, the polar factor, is taken: log Q = J T. At t = pi itself K is 0, and J
    turns pairs of eigenvectors into each other. By decompositions: not for differentiated paths. 40n^3 flops.
    """
    # Q - I from the difference, which is exact where X and Y are near.
    skew = skew_part(x.mT @ (y - x))
    cosines, vectors = torch.linalg.eigh(symmetric_part(x.mT @ y))
    skew = vectors.mT @ skew @ vectors
    sines = torch.linalg.vector_norm(skew, dim=-2)
    angles = torch.atan2(sines, cosines)
    far = (cosines < _FAR).to(x.dtype)
    ratio = torch.where(sines > 0, angles / torch.where(sines > 0, sines, 1.0), 1.0)
    # Ascending cosines: eigenvectors of one plane are neighbours, those of -1 come first.
    pairs = torch.zeros_like(skew)
    even = torch.arange(0, x.shape[-1] - 1, 2, device=x.device)
    pairs[..., even, even + 1], pairs[..., even + 1, even] = -1.0, 1.0
    both_far = far[..., :, None] * far[..., None, :]
    left, _, right = torch.linalg.svd(both_far * (skew + 4.0 * torch.finfo(x.dtype).eps * pairs))
    log = skew * (ratio * (1.0 - far))[..., None, :] + (left @ right) * (angles * far)[..., None, :]
    return x @ skew_part(vectors @ log @ vectors.mT)


def squared_rotation_distance(x: Tensor, y: Tensor) -> Tensor:
    """Return the sum of the squared angles of X^T Y, each plane counted twice, for X and Y in one component.

    Q - I and Q + I have the singular values 2 sin(t/2) and 2 cos(t/2), so each angle is accurate to rounding. By two
    decompositions: not for differentiated paths.
    """
    sines = torch.linalg.svdvals(x.mT @ (y - x))
    cosines = torch.linalg.svdvals(x.mT @ (y + x)).flip(-1)
    return (2.0 * torch.atan2(sines, cosines)).square().sum(dim=-1)


@dataclass(frozen=True)
class Orthogonal(Manifold):
    """Orthogonal n x n matrices of either determinant, metric <u, v> = tr(u^T v). Left translation: isometric.

    Updates keep the determinant's sign. Distance and logarithm exist within a component; between components the
    distance is NaN.
    """

    retraction: OrthonormalRetraction = field(default=PolarNewtonSchulz())

    @property
    def vectors(self) -> str:
        """What the columns are."""
        return "orthonormal"

    @property
    def retraction_order(self) -> float:
        """The retraction's order on square matrices."""
        return self.retraction.rotation_order

    @property
    def isometric_transport(self) -> bool:
        """True."""
        return True

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise ``ValueError`` unless matrices are square."""
        check_square(self.name, shape)

    def dimension(self, shape: tuple[int, ...]) -> int:
        """Return n(n-1)/2 per matrix."""
        return rotation_dimension(shape)

    def project(self, x: Tensor, v: Tensor) -> Tensor:
        """Return X skew(X^T V)."""
        return rotation_projection(x, v)

    def riemannian_gradient(self, x: Tensor, euclidean_gradient: Tensor) -> Tensor:
        """Return X skew(X^T G)."""
        return without_rounding(rotation_projection(x, euclidean_gradient), euclidean_gradient)

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Return tr(U^T V)."""
        return embedded_inner(x, u, v)

    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        """Apply the chosen retraction."""
        return self.retraction(x, v)

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Translate ``v`` = XA to YA."""
        return left_translation(x, y, v)

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        """Return X exp(X^T V)."""
        return rotation_exp(x, v)

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        """Return X log(X^T Y), one of the shortest where an angle is pi; NaN if the determinants differ.

        Not for differentiated paths.
        """
        return torch.where(_joined(x, y)[..., None, None], rotation_log(x, y), torch.nan)

    def squared_distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the squared Frobenius norm of log(X^T Y); NaN if the determinants differ."""
        return torch.where(_joined(x, y), squared_rotation_distance(x, y), torch.nan)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the Frobenius norm of log(X^T Y); NaN if the determinants differ."""
        return self.squared_distance(x, y).sqrt()

    def nearest(self, x: Tensor) -> Tensor:
        """Return the orthogonal polar factor."""
        return nearest_orthonormal(x)

    def random_point(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw from the uniform distribution, both components included."""
        return random_orthonormal(shape, generator, dtype, device)

    def violation(self, x: Tensor) -> Tensor:
        """Return the largest absolute entry of X^T X - I."""
        return gram_error(x)


def _joined(x: Tensor, y: Tensor) -> Tensor:
    """Return whether two orthogonal matrices lie in one component, ``(...)``."""
    return torch.linalg.det(x) * torch.linalg.det(y) > 0
