"""Symmetric positive definite matrices with the affine-invariant metric <u, v>_M = tr(M^{-1} u M^{-1} v).

Source: Pennec, Fillard, Ayache, "A Riemannian framework for tensor computing", IJCV 66 (2006); Bhatia, "Positive
Definite Matrices", 2007, chapter 6; the second-order retraction: Jeuris, Vandebril, Vandereycken, "A survey and
comparison of contemporary algorithms for computing the matrix geometric mean", ETNA 39 (2012), section 4.2.

Steps are measured in *whitened* coordinates, E = L^{-1} V L^{-T} with M = L L^T: an eigenvalue e of E multiplies M by
about exp(e) in its direction. The Cholesky factor serves where only eigenvalues of E count; coordinates for statistics
use the symmetric square root, because a Cholesky factor depends on the order of rows.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from subspace_meta.manifolds.base import (
    Manifold,
    euclidean_inner,
    identity_like,
    normal_like,
    spectral_bound,
    symmetric_part,
)
from subspace_meta.manifolds.matrix_functions import (
    LOGARITHM_NORM,
    matrix_exponential,
    symmetric_logarithm,
    symmetric_square_root,
)
from subspace_meta.manifolds.orthogonal import check_square


class SPDRetraction(abc.ABC):
    """The contract of a retraction on SPD matrices: a frozen value object with one method."""

    order: float = 1

    @abc.abstractmethod
    def __call__(self, x: Tensor, v: Tensor) -> Tensor:
        """Retract the symmetric ``v`` at ``x``, both ``(..., n, n)``."""


def cholesky(x: Tensor) -> Tensor:
    """Return the lower Cholesky factor; where there is none the result is meaningless, but nothing raises."""
    factor: Tensor = torch.linalg.cholesky_ex(x).L
    return factor


def whiten(factor: Tensor, v: Tensor) -> Tensor:
    """Return L^{-1} V L^{-T} for a symmetric ``v``."""
    half = torch.linalg.solve_triangular(factor, v, upper=False)
    return symmetric_part(torch.linalg.solve_triangular(factor, half.mT, upper=False))


def _shorten(e: Tensor, max_norm: float) -> Tensor:
    """Return s <= 1, ``(..., 1, 1)``, such that s|E|_2 <= ``max_norm``; exactly 1 well within. 2n^3 flops."""
    limit = max_norm * max_norm
    # E^2 has the squared eigenvalues; bounding it is sharper than bounding E.
    return (limit / spectral_bound(e @ e).clamp(min=limit)).sqrt()


def keep_positive(x: Tensor) -> Tensor:
    """Polish: make ``x`` exactly symmetric, and add a ridge if it is too close to singular for its type.

    If a Cholesky pivot falls below 4 n eps times the largest diagonal entry (or there is no factor), that much is
    added to the diagonal. So however often and however far one steps, the next step starts from a positive definite
    matrix; the price is that eigenvalue ratios beyond 1/(4 n eps) (4e5 for n = 5 in float32) do not survive.
    """
    x = symmetric_part(x)
    constant = x.detach()
    factor, failure = torch.linalg.cholesky_ex(constant)
    largest = torch.diagonal(constant, dim1=-2, dim2=-1).amax(dim=-1)
    floor = 4 * x.shape[-1] * torch.finfo(x.dtype).eps * largest
    pivot = torch.diagonal(factor, dim1=-2, dim2=-1).square().amin(dim=-1)
    ridge = torch.where((failure > 0) | (pivot < floor), floor, 0.0)
    return x + ridge[..., None, None] * identity_like(x)


@dataclass(frozen=True)
class SPDSecondOrder(SPDRetraction):
    """M + V + V M^{-1} V / 2, computed as (M + F F^T)/2 with F = L (I + E): a sum of two positive matrices. Order 2.

    Eigenvalues e of E go to 1 + e + e^2/2 >= 1/2. Steps are shortened to |E|_2 <= ``max_norm``; the default 2 is where
    a contraction would turn into an expansion. One Cholesky factor, two triangular solves, two products: 7n^3 flops.
    """

    max_norm: float = 2.0
    order = 2

    def __call__(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the retracted point, polished by :func:`keep_positive`."""
        factor = cholesky(x)
        # L E = V L^{-T}
        step = torch.linalg.solve_triangular(factor, symmetric_part(v.to(x.dtype)), upper=False).mT
        whitened = torch.linalg.solve_triangular(factor, step, upper=False)
        moved = factor + _shorten(symmetric_part(whitened), self.max_norm) * step
        return keep_positive(0.5 * (x + moved @ moved.mT))


@dataclass(frozen=True)
class SPDExponential(SPDRetraction):
    """The exponential map L exp(E) L^T, computed as F F^T with F = L exp(E/2).

    Steps are shortened to |E|_2 <= ``max_norm``: the default 5 multiplies an eigenvalue by at most 148. About twice the
    cost of the second-order retraction.
    """

    max_norm: float = 5.0
    order = math.inf

    def __call__(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the geodesic's point at time 1, polished by :func:`keep_positive`."""
        factor = cholesky(x)
        whitened = whiten(factor, symmetric_part(v.to(x.dtype)))
        return keep_positive(_along(factor, _shorten(whitened, self.max_norm) * whitened, self.max_norm))


def _along(factor: Tensor, whitened: Tensor, max_norm: float) -> Tensor:
    """Return L exp(E) L^T as a product F F^T, for |E|_2 <= ``max_norm``."""
    half = factor @ matrix_exponential(0.5 * whitened, 0.5 * max_norm)
    return half @ half.mT


@dataclass(frozen=True)
class SPD(Manifold):
    """Symmetric positive definite matrices, affine-invariant metric. Parallel transport: isometric.

    Statistics are taken in the whitened tangent S^{-1} v S^{-1} with the symmetric square root S = M^{1/2}. All matrix
    functions have finite derivatives at equal eigenvalues, to third order
    (:mod:`~subspace_meta.manifolds.matrix_functions`).
    """

    retraction: SPDRetraction = SPDSecondOrder()

    @property
    def retraction_order(self) -> float:
        """The retraction's order."""
        return self.retraction.order

    @property
    def isometric_transport(self) -> bool:
        """True."""
        return True

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise ``ValueError`` unless matrices are square."""
        check_square(self.name, shape)

    def dimension(self, shape: tuple[int, ...]) -> int:
        """Return n(n+1)/2 per matrix."""
        n = shape[-1]
        return math.prod(shape[:-2]) * (n * (n + 1) // 2)

    def project(self, x: Tensor, v: Tensor) -> Tensor:
        """Return sym(V)."""
        return symmetric_part(v.to(x.dtype))

    def riemannian_gradient(self, x: Tensor, euclidean_gradient: Tensor) -> Tensor:
        """Return M sym(G) M. 4n^3 flops."""
        return symmetric_part(x @ symmetric_part(euclidean_gradient.to(x.dtype)) @ x)

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Return tr(M^{-1} U M^{-1} V)."""
        factor = cholesky(x)
        left = torch.cholesky_solve(u.to(x.dtype), factor)
        right = torch.cholesky_solve(v.to(x.dtype), factor)
        return euclidean_inner(left.mT, right)

    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        """Apply the chosen retraction."""
        return self.retraction(x, v)

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Carry ``v`` along the geodesic to ``y``: B V B^T, B = (Y M^{-1})^{1/2} = L (L^{-1} Y L^{-T})^{1/2} L^{-1}."""
        factor = cholesky(x)
        root = symmetric_square_root(whiten(factor, y))
        left = factor @ root
        return symmetric_part(left @ whiten(factor, symmetric_part(v.to(x.dtype))) @ left.mT)

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        """Return L exp(E) L^T; accurate for |E|_2 up to 64 (factors of 1e27)."""
        factor = cholesky(x)
        return symmetric_part(_along(factor, whiten(factor, symmetric_part(v.to(x.dtype))), LOGARITHM_NORM))

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        """Return L log(L^{-1} Y L^{-T}) L^T."""
        factor = cholesky(x)
        return symmetric_part(factor @ symmetric_logarithm(whiten(factor, y)) @ factor.mT)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the Frobenius norm of log(L^{-1} Y L^{-T})."""
        distance: Tensor = torch.linalg.matrix_norm(symmetric_logarithm(whiten(cholesky(x), y)))
        return distance

    def nearest(self, x: Tensor) -> Tensor:
        """Return sym(X) with eigenvalues raised to 1e-6 times the largest in float64 (1e-4 in float32).

        The set is open, so there is no nearest point; this is the nearest one that is safely inside. A matrix without a
        positive eigenvalue goes to that multiple of the identity.
        """
        values, vectors = torch.linalg.eigh(symmetric_part(x))
        share = 1e-6 if x.dtype == torch.float64 else 1e-4
        largest = values[..., -1:]
        raised = torch.maximum(values, share * torch.where(largest > 0, largest, 1.0))
        return symmetric_part((vectors * raised[..., None, :]) @ vectors.mT)

    def random_point(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw a Wishart matrix of 2n degrees of freedom, divided by them: mean I, condition number about 34."""
        n = shape[-1]
        root = torch.randn((*shape[:-1], 2 * n), generator=generator, dtype=dtype, device=device)
        return symmetric_part(root @ root.mT) / (2 * n)

    def violation(self, x: Tensor) -> Tensor:
        """Return the larger of max|M - M^T| and minus the smallest eigenvalue (if negative), over the largest entry."""
        finite = torch.isfinite(x).all(dim=-1).all(dim=-1)
        safe = torch.where(finite[..., None, None], x, identity_like(x))
        scale = safe.abs().amax(dim=(-2, -1))
        asymmetry = (safe - safe.mT).abs().amax(dim=(-2, -1))
        negative = (-torch.linalg.eigvalsh(symmetric_part(safe))[..., 0]).clamp(min=0.0)
        return torch.where(finite, torch.maximum(asymmetry, negative) / scale, torch.nan)

    def random_tangent(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw L sym(Z) L^T with a standard normal Z: its length in the metric does not depend on ``x``."""
        factor = cholesky(x)
        return symmetric_part(factor @ symmetric_part(normal_like(x, generator)) @ factor.mT)

    def coordinates(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the whitened tangent S^{-1} V S^{-1}, S = M^{1/2} symmetric."""
        inverse: Tensor = torch.linalg.inv(symmetric_square_root(x))
        return inverse @ v.to(x.dtype) @ inverse

    def from_coordinates(self, x: Tensor, v: Tensor) -> Tensor:
        """Return S V S."""
        root = symmetric_square_root(x)
        return root @ v.to(x.dtype) @ root
