"""Eigenvalue problems with a given matrix, so without noise: leading subspace, ordered eigenvectors, one eigenvector.

Sources: Absil, Mahony, Sepulchre, "Optimization Algorithms on Matrix Manifolds", 2008, chapters 2 and 4 (Rayleigh
quotient, generalised Rayleigh quotient); Brockett, "Dynamical systems that sort lists, diagonalize matrices, and solve
linear programming problems", 1991. All reference values are sums of eigenvalues that were put in.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from subspace_meta.geometry import Geometry, Params
from subspace_meta.manifolds import Manifold, Sphere, Stiefel
from subspace_meta.tasks.base import Batch, Data, Problem, TaskFamily, repeat, symmetric_matrix
from subspace_meta.tasks.pca import pca_metric, pca_objective


@functools.cache
def leading_subspace_problem(d: int, p: int, manifold: Manifold) -> Problem:
    """Return the problem of one size."""
    geometry = Geometry.from_rules({"x": torch.empty(d, p, device="meta")}, {"x": manifold})
    return Problem(geometry, pca_objective, pca_objective, pca_metric)


@dataclass(frozen=True)
class LeadingSubspace(TaskFamily):
    """Leading p-dimensional subspace of a matrix with eigenvalues k^-exponent in a random basis.

    minimise tr C - tr X^T C X over St(d, p) or Gr(d, p), as in PCA but without sampling. The eigenvalue gap at p is
    about exponent/p of the eigenvalue there. The metric is the relative excess.
    """

    d: int
    p: int
    exponent: float = 0.7
    manifold: Manifold = field(default=Stiefel())

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"leading subspace {self.d}x{self.p}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return leading_subspace_problem(self.d, self.p, self.manifold)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw bases."""
        spectrum = torch.arange(1, self.d + 1, dtype=torch.float64, device=generator.device) ** -self.exponent
        covariance, _ = symmetric_matrix(spectrum.expand(count, -1), generator)
        return {"covariance": covariance.float(), "reference": spectrum[self.p :].sum().float().expand(count)}

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Return the matrix at every step."""
        return repeat(data, ("covariance",), steps)


def brockett_cost(params: Params, batch: Batch) -> Tensor:
    """Return -tr X^T A X N / tr N, N = diag(p, ..., 1)."""
    x = params["x"]
    weights = torch.arange(x.shape[-1], 0, -1, dtype=x.dtype, device=x.device)
    return -((x * (batch["matrix"] @ x)).sum(dim=-2) * weights).sum() / weights.sum()


def eigenvector_error(params: Params, data: Data) -> Tensor:
    """Return the mean of 1 - (x_i^T v_i)^2 over the columns, for the eigenvectors v_i."""
    cosines = (params["x"] * data["vectors"].reshape(params["x"].shape)).sum(dim=0)
    return (1.0 - cosines.square()).mean()


@functools.cache
def brockett_problem(d: int, p: int, manifold: Manifold) -> Problem:
    """Return the problem of one size."""
    geometry = Geometry.from_rules({"x": torch.empty(d, p, device="meta")}, {"x": manifold})
    return Problem(geometry, brockett_cost, brockett_cost, eigenvector_error)


@dataclass(frozen=True)
class OrderedEigenvectors(TaskFamily):
    """The p leading eigenvectors themselves, in order: Brockett's cost -tr X^T A X N / tr N, N = diag(p, ..., 1).

    Unlike a trace it changes under rotations of the columns. Eigenvalues are (1 - k/d)^2; the reference is
    -sum_i (p+1-i) lambda_i / tr N; the metric is the mean squared sine of the angles to the eigenvectors.
    """

    d: int
    p: int
    manifold: Manifold = field(default=Stiefel())

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"ordered eigenvectors {self.d}x{self.p}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return brockett_problem(self.d, self.p, self.manifold)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw bases."""
        spectrum = (1.0 - torch.arange(self.d, dtype=torch.float64, device=generator.device) / self.d).square()
        matrix, basis = symmetric_matrix(spectrum.expand(count, -1), generator)
        weights = torch.arange(self.p, 0, -1, dtype=torch.float64, device=generator.device)
        reference = -(weights * spectrum[: self.p]).sum() / weights.sum()
        return {
            "matrix": matrix.float(),
            "vectors": basis[:, :, : self.p].float(),
            "reference": reference.float().expand(count),
        }

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Return the matrix at every step."""
        return repeat(data, ("matrix",), steps)


def rayleigh_quotient(params: Params, batch: Batch) -> Tensor:
    """Return x^T A x."""
    return params["x"] @ (batch["matrix"] @ params["x"])


@functools.cache
def rayleigh_problem(d: int) -> Problem:
    """Return the problem of one size, a unit vector."""
    geometry = Geometry.from_rules({"x": torch.empty(d, device="meta")}, {"x": Sphere()})
    return Problem(geometry, rayleigh_quotient, rayleigh_quotient, eigenvector_error)


@dataclass(frozen=True)
class RayleighQuotient(TaskFamily):
    """Eigenvector of the smallest eigenvalue: minimise x^T A x over the unit sphere.

    Eigenvalues are k/d, k = 1..d. The metric is the squared sine of the angle to the eigenvector.
    """

    d: int

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"Rayleigh quotient {self.d}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return rayleigh_problem(self.d)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw bases."""
        spectrum = torch.arange(1, self.d + 1, dtype=torch.float64, device=generator.device) / self.d
        matrix, basis = symmetric_matrix(spectrum.expand(count, -1), generator)
        return {
            "matrix": matrix.float(),
            "vectors": basis[:, :, 0].float(),
            "reference": spectrum[0].float().expand(count),
        }

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Return the matrix at every step."""
        return repeat(data, ("matrix",), steps)
