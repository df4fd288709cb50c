"""The rotations SO(n): orthogonal matrices of determinant 1.

Formulas and sources: :mod:`subspace_meta.manifolds.orthogonal`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from subspace_meta.manifolds.base import Manifold, embedded_inner, gram_error, without_rounding
from subspace_meta.manifolds.orthogonal import (
    check_square,
    left_translation,
    rotation_dimension,
    rotation_distance,
    rotation_exp,
    rotation_log,
    rotation_projection,
    squared_rotation_distance,
)
from subspace_meta.manifolds.retractions import OrthonormalRetraction, PolarNewtonSchulz
from subspace_meta.manifolds.stiefel import random_orthonormal


@dataclass(frozen=True)
class Rotations(Manifold):
    """n x n rotations, metric <u, v> = tr(u^T v), so that a turn by t in one plane has length sqrt(2) t.

    Left translation: isometric. A point is feasible only with determinant 1: :meth:`violation` is 2 at a reflection.
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
        """Return X log(X^T Y); one of the shortest where an angle is pi. Not for differentiated paths."""
        return rotation_log(x, y)

    def squared_distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the squared Frobenius norm of log(X^T Y). Two derivatives, below pi. NaN where Y is a reflection."""
        return squared_rotation_distance(x, y)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the Frobenius norm of log(X^T Y). Two derivatives, below the angle pi. NaN where Y is a reflection."""
        return rotation_distance(x, y)

    def nearest(self, x: Tensor) -> Tensor:
        """Return the nearest rotation: the polar factor, its weakest direction turned over if the determinant asks."""
        self.check_shape(x.shape)
        try:
            u, _, vh = torch.linalg.svd(x)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # as of nearest_orthonormal
            u, _, vh = (part.to(x.dtype) for part in torch.linalg.svd(x.double()))
        nearest: Tensor = _flip_last_column(u, torch.linalg.det(u) * torch.linalg.det(vh)) @ vh
        return nearest

    def random_point(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw from the uniform distribution."""
        self.check_shape(shape)
        x = random_orthonormal(shape, generator, dtype, device)
        return _flip_last_column(x, torch.linalg.det(x))

    def violation(self, x: Tensor) -> Tensor:
        """Return the largest absolute entry of X^T X - I, and at least 2 if the determinant is negative."""
        error = gram_error(x)
        return torch.where(torch.linalg.det(x) < 0, error.clamp(min=2.0), error)


def _flip_last_column(x: Tensor, determinant: Tensor) -> Tensor:
    """Turn the last column over where ``determinant`` is negative."""
    signs = torch.ones_like(x[..., :1, :])
    signs[..., -1] = torch.where(determinant < 0, -1.0, 1.0).to(x.dtype)[..., None]
    return x * signs
