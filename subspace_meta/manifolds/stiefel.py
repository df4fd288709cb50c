"""The Stiefel manifold St(d, p) = {X in R^{d x p} : X^T X = I} with the metric of the surrounding space.

Source: Edelman, Arias, Smith, "The geometry of algorithms with orthogonality constraints", SIAM J. Matrix Anal. 20
(1998); Absil, Mahony, Sepulchre 2008, examples 3.5.2, 3.6.2 and 4.1.3. Cost of a step: 4dp^2 flops for the
projection, 4dp^2 for the retraction.
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
    subtract_product,
    symmetric_part,
    without_rounding,
)
from subspace_meta.manifolds.retractions import (
    CholeskyQR,
    OrthonormalRetraction,
    embedded_geodesic,
    positive_qr,
)


def check_tall(name: str, shape: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless ``shape`` is ``(..., d, p)`` with d >= p >= 1."""
    if len(shape) < 2 or not shape[-2] >= shape[-1] >= 1:
        raise ValueError(
            f"{name} needs tall matrices of shape (..., d, p) with d >= p >= 1, got {tuple(shape)}; "
            "a wide matrix can live there transposed"
        )


def stiefel_dimension(shape: tuple[int, ...]) -> int:
    """Return dp - p(p+1)/2, summed over the batch."""
    d, p = shape[-2:]
    return math.prod(shape[:-2]) * (d * p - p * (p + 1) // 2)


def stiefel_projection(x: Tensor, v: Tensor) -> Tensor:
    """Return V - X sym(X^T V), in the type of ``x``. 4dp^2 flops."""
    v = v.to(x.dtype)
    return subtract_product(v, x, symmetric_part(x.mT @ v))


def nearest_orthonormal(x: Tensor) -> Tensor:
    """Return the orthogonal polar factor of ``x`` by SVD: the nearest matrix with orthonormal columns.

    Rows of zeros (an embedding's padding) stay exactly so where the others have rank p, as they do without rounding.
    """
    try:
        u, values, vh = torch.linalg.svd(x, full_matrices=False)
    # LAPACK gives up on some float32 matrices whose singular values are all near 1.
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        u, values, vh = (part.to(x.dtype) for part in torch.linalg.svd(x.double(), full_matrices=False))
    nearest: Tensor = u @ vh
    full = values[..., -1:] > x.shape[-2] * torch.finfo(x.dtype).eps * values[..., :1]
    zero = full & (x == 0).all(dim=-1)
    return torch.where(zero[..., None], 0.0, nearest)


def random_orthonormal(
    shape: tuple[int, ...],
    generator: torch.Generator | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Tensor:
    """Draw orthonormal columns from the uniform (Haar) distribution: QR of a normal matrix with positive diagonal."""
    # Row-major: LAPACK returns columns, and every later addition to a row-major gradient would be slow.
    return positive_qr(torch.randn(shape, generator=generator, dtype=dtype, device=device)).contiguous()


@dataclass(frozen=True)
class Stiefel(Manifold):
    """Matrices with orthonormal columns, embedded metric <u, v> = tr(u^T v). Projection transport."""

    retraction: OrthonormalRetraction = field(default=CholeskyQR())

    @property
    def vectors(self) -> str:
        """What the columns are."""
        return "orthonormal"

    @property
    def retraction_order(self) -> float:
        """The retraction's order in the embedded metric."""
        return self.retraction.order

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise ``ValueError`` unless d >= p."""
        check_tall(self.name, shape)

    def dimension(self, shape: tuple[int, ...]) -> int:
        """Return dp - p(p+1)/2 per matrix."""
        return stiefel_dimension(shape)

    def project(self, x: Tensor, v: Tensor) -> Tensor:
        """Return V - X sym(X^T V)."""
        return stiefel_projection(x, v)

    def riemannian_gradient(self, x: Tensor, euclidean_gradient: Tensor) -> Tensor:
        """Return G - X sym(X^T G)."""
        return without_rounding(stiefel_projection(x, euclidean_gradient), euclidean_gradient)

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Return tr(U^T V)."""
        return embedded_inner(x, u, v)

    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        """Apply the chosen retraction."""
        return self.retraction(x, v)

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Project on the tangent space at ``y`` (a transport of first order, not isometric)."""
        return stiefel_projection(y, v)

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        """Follow the geodesic of the embedded metric. No closed logarithm or distance is known."""
        return embedded_geodesic(x, v.to(x.dtype))

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
