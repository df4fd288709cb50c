"""The oblique manifold {X in R^{d x p} : every column has unit norm}: p unit spheres side by side.

Everything is the sphere's, column by column, in closed form and at O(dp). Source: Absil and Gallivan, "Joint
diagonalization on the oblique manifold for independent component analysis", ICASSP 2006.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from subspace_meta.manifolds.base import Manifold, embedded_inner, without_rounding
from subspace_meta.manifolds.sphere import (
    Normalization,
    SphereRetraction,
    great_circle,
    nearest_unit,
    normalized,
    parallel_transport,
    sphere_log,
    sphere_projection,
    squared_angle,
    unit_error,
)

COLUMN = (-2,)


@dataclass(frozen=True)
class Oblique(Manifold):
    """Matrices with unit columns, metric <u, v> = tr(u^T v). Parallel transport of each column: isometric.

    A step is long or short column by column: the retraction bounds each column's step on its own.
    """

    retraction: SphereRetraction = field(default=Normalization())

    @property
    def vectors(self) -> str:
        """What the columns are."""
        return "unit"

    @property
    def retraction_order(self) -> float:
        """The retraction's order."""
        return self.retraction.order

    @property
    def isometric_transport(self) -> bool:
        """True."""
        return True

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise ``ValueError`` unless columns have at least two entries."""
        if len(shape) < 2 or shape[-2] < 2 or shape[-1] < 1:
            raise ValueError(f"Oblique needs matrices of shape (..., d, p) with d >= 2, got {tuple(shape)}")

    def dimension(self, shape: tuple[int, ...]) -> int:
        """Return (d-1)p per matrix."""
        return math.prod(shape[:-2]) * (shape[-2] - 1) * shape[-1]

    def project(self, x: Tensor, v: Tensor) -> Tensor:
        """Return V - X diag(X^T V)."""
        return sphere_projection(x, v, COLUMN)

    def riemannian_gradient(self, x: Tensor, euclidean_gradient: Tensor) -> Tensor:
        """Return G - X diag(X^T G)."""
        return without_rounding(sphere_projection(x, euclidean_gradient, COLUMN), euclidean_gradient)

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Return tr(U^T V)."""
        return embedded_inner(x, u, v)

    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        """Apply the chosen retraction to every column."""
        return self.retraction(x, v, COLUMN)

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Carry every column along its shortest great circle."""
        return parallel_transport(x, y, v, COLUMN)

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        """Follow a great circle in every column."""
        return great_circle(x, v.to(x.dtype), COLUMN)

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the shortest tangent to ``y``; where a column meets its antipode, one of the shortest."""
        return sphere_log(x, y, COLUMN)

    def squared_distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the sum of the squared angles between the columns."""
        return squared_angle(x, y, COLUMN)[..., 0, :].sum(dim=-1)

    def nearest(self, x: Tensor) -> Tensor:
        """Return the matrix with normalised columns; a zero column goes to the first basis vector."""
        self.check_shape(x.shape)
        return nearest_unit(x, COLUMN)

    def random_point(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw every column from the uniform distribution."""
        self.check_shape(shape)
        return normalized(torch.randn(shape, generator=generator, dtype=dtype, device=device), COLUMN)

    def violation(self, x: Tensor) -> Tensor:
        """Return the largest | |x_j|^2 - 1 | / 2 of the columns."""
        return unit_error(x, COLUMN)
