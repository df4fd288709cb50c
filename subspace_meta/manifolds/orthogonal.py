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
    gram,
    gram_error,
    root_at,
    skew_part,
    squared_angles,
    symmetric_part,
    without_rounding,
)
from subspace_meta.manifolds.retractions import (
    OrthonormalRetraction,
    PolarNewtonSchulz,
    canonical_geodesic,
    newton_schulz_step,
)
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


def _half_angles(x: Tensor, y: Tensor) -> Tensor:
    """Return half the angles of X^T Y, ascending, n of them (each plane twice); a constant for derivatives.

    sin(t/2) and cos(t/2) are the singular values of (Y - X)/2 and (Y + X)/2: accurate at 0 and at pi.
    """
    x, y = x.detach(), y.detach()
    return torch.atan2(torch.linalg.svdvals(y - x).flip(-1), torch.linalg.svdvals(y + x))


def squared_rotation_distance(x: Tensor, y: Tensor) -> Tensor:
    """Return |log(X^T Y)|_F^2, NaN where the determinants differ; two derivatives, below the angle pi."""
    return torch.where(_joined(x, y), 4.0 * squared_angles(0.25 * gram(y - x), _half_angles(x, y)), torch.nan)


def rotation_distance(x: Tensor, y: Tensor) -> Tensor:
    """Return |log(X^T Y)|_F, accurate to rounding at every angle; NaN where the determinants differ."""
    return root_at(2.0 * torch.linalg.vector_norm(_half_angles(x, y), dim=-1), squared_rotation_distance(x, y))


def _widest_gap(cosines: Tensor) -> Tensor:
    """Return the middle of the widest gap in [-0.9, 0.9] between ascending ``cosines``, shape ``(..., 1)``."""
    ends = torch.full_like(cosines[..., :1], 0.9)
    levels = torch.cat([-ends, cosines.clamp(min=-0.9, max=0.9), ends], dim=-1)
    widest = levels.diff(dim=-1).argmax(dim=-1, keepdim=True)
    return 0.5 * (levels.gather(-1, widest) + levels.gather(-1, widest + 1))


def _angle_by_sine(cosines: Tensor) -> Tensor:
    """Return t / sin t, given cos t well above -1."""
    # With h = sin(t/2)^2 = (1 - cos t)/2: t / sin t = asin(sqrt h) / sqrt(h (1 - h)), which is 1 at h = 0.
    half = (0.5 * (1.0 - cosines)).clamp(min=torch.finfo(cosines.dtype).tiny, max=1.0 - torch.finfo(cosines.dtype).eps)
    return half.sqrt().asin() / (half * (1.0 - half)).sqrt()


def _quarter_turns(e: Tensor, inside: Tensor) -> Tensor:
    """Return a skew J with J^2 = -I on the coordinates ``inside``, 0 elsewhere, that commutes with the skew E there.

    J turns each plane of E the other way, by a right angle. Where E is 0 but for rounding any planes serve.
    ``inside`` is 0 or 1, of shape ``(..., n)``, for an even number of coordinates. Two decompositions.
    """
    n = e.shape[-1]
    size, vectors = torch.linalg.eigh(torch.complex(torch.zeros_like(e), e))
    # What the decomposition confuses: +e and -e below some units of rounding of the largest.
    turning = size > 16.0 * torch.finfo(e.dtype).eps * size.abs().amax(dim=-1, keepdim=True)
    # E u = -ie u: the planes are those of Re u and Im u.
    projector = (vectors * turning[..., None, :]) @ vectors.mH
    # Pairs of the vectors that are left, which have the largest eigenvalues, 1.
    rest, basis = torch.linalg.eigh(torch.diag_embed(inside) - 2.0 * projector.real)
    pairs = torch.zeros(n, n, dtype=e.dtype, device=e.device)
    odd = torch.arange(n - 1, 0, -2, device=e.device)
    pairs[odd, odd - 1] = 1.0
    kept = basis * (rest > 0.5)[..., None, :]
    turns = -2.0 * projector.imag + kept @ (pairs - pairs.mT) @ kept.mT
    # A plane just above the threshold comes out askew by up to a tenth, which four squarings remove.
    for _ in range(4):
        turns = newton_schulz_step(skew_part(turns))
    return skew_part(turns)


def rotation_log(x: Tensor, y: Tensor) -> Tensor:
    """Return X log(X^T Y): a shortest tangent from X to Y, also where angles are pi; NaN in another component.

    The symmetric and the skew part C and K of a rotation commute and are cos T and sin T. In the eigenbasis of C, which
    is split at a gap between angles, log = K (t / sin t) for the smaller ones. The larger ones are pi J + E, where
    E = -K (pi - t) / sin t is the logarithm of -Q there and J turns the same planes by a right angle: accurate at pi,
    where K says nothing about the planes, and finite where they are not unique. Three decompositions of n x n matrices:
    not for differentiated paths.
    """
    rotation = x.mT @ y
    cosines, basis = torch.linalg.eigh(symmetric_part(rotation))
    large = (cosines < _widest_gap(cosines)).to(x.dtype)
    k = skew_part(basis.mT @ rotation @ basis)
    smaller = k * ((1.0 - large) * _angle_by_sine(cosines))[..., None, :] * (1.0 - large)[..., :, None]
    e = -skew_part(k * (large * _angle_by_sine(-cosines))[..., None, :] * large[..., :, None])
    logarithm = skew_part(smaller) + math.pi * _quarter_turns(e, large) + e
    return torch.where(_joined(x, y)[..., None, None], x @ (basis @ logarithm @ basis.mT), torch.nan)


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
        return rotation_log(x, y)

    def squared_distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the squared distance; NaN if the determinants differ. Two derivatives, below the angle pi."""
        return squared_rotation_distance(x, y)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the Frobenius norm of log(X^T Y); NaN if the determinants differ. Two derivatives, below pi."""
        return rotation_distance(x, y)

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
        """Draw from the uniform distribution, both components included."""
        self.check_shape(shape)
        return random_orthonormal(shape, generator, dtype, device)

    def violation(self, x: Tensor) -> Tensor:
        """Return the largest absolute entry of X^T X - I."""
        return gram_error(x)


def _joined(x: Tensor, y: Tensor) -> Tensor:
    """Return whether two orthogonal matrices lie in one component, ``(...)``."""
    joined: Tensor = torch.linalg.det(x) * torch.linalg.det(y) > 0
    return joined
