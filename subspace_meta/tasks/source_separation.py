"""Source separation: joint diagonalisation, and independent component analysis with the log-cosh contrast.

*Joint diagonalisation.* minimise -sum_k sum_i (x_i^T C_k x_i)^2 over St(d, p). Source: Theis, Cason, Absil, "Soft
dimension reduction for ICA by joint diagonalization on the Stiefel manifold", ICA 2009. Here all C_k have the same
eigenvectors q_j, with eigenvalues l_jk >= 0, so the minimum is known: by convexity (x^T C_k x)^2 is at most
sum_j (q_j^T x)^2 l_jk^2, and so the sum of the p largest sum_k l_jk^2 is the best (Ky Fan).

*Independent component analysis.* minimise E sum_i log cosh(x_i^T z) over St(d, p) for white z: sources with a sharper
peak than the normal one have a smaller contrast. Source: Hyvarinen, "Fast and robust fixed-point algorithms for
independent component analysis", IEEE Trans. Neural Networks 10 (1999).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from subspace_meta.geometry import Geometry, Params
from subspace_meta.manifolds import Stiefel
from subspace_meta.tasks.base import Batch, Data, Problem, TaskFamily, draw_rows, repeat
from subspace_meta.tasks.references import reference_by_descent


def joint_diagonality(params: Params, batch: Batch) -> Tensor:
    """Return -sum_k |diag(X^T C_k X)|^2 for ``matrices`` ``(K, d, d)``."""
    x = params["x"]
    return -(x * (batch["matrices"] @ x)).sum(dim=-2).square().sum()


def column_error(params: Params, data: Data) -> Tensor:
    """Return the mean over the true directions of 1 - |cosine| with the nearest column of X."""
    cosines = (data["directions"].mT @ params["x"]).abs()
    return (1.0 - cosines.amax(dim=-1)).mean()


@functools.cache
def joint_diagonalisation_problem(d: int, p: int) -> Problem:
    """Return the problem of one size."""
    geometry = Geometry.from_rules({"x": torch.empty(d, p, device="meta")}, {"x": Stiefel()})
    return Problem(geometry, joint_diagonality, joint_diagonality, column_error)


@dataclass(frozen=True)
class JointDiagonalisation(TaskFamily):
    """The p strongest common eigenvectors of several matrices.

    Eigenvalues are uniform in 0..1, times 2 for the p directions that are sought, divided by a norm that makes the
    reference -1. The metric is the mean of 1 - |cosine| between each of these and the nearest column.
    """

    d: int
    p: int
    matrices: int = 10

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"joint diagonalisation {self.d}x{self.p}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return joint_diagonalisation_problem(self.d, self.p)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw common bases and eigenvalues."""
        basis = Stiefel().random_point((count, self.d, self.d), generator, torch.float64, device=generator.device)
        values = torch.rand(
            count, self.matrices, self.d, generator=generator, dtype=torch.float64, device=generator.device
        )
        values[..., : self.p] *= 2.0
        strength = values.square().sum(dim=1)
        best = strength.topk(self.p, dim=-1)
        values = values / best.values.sum(dim=-1).sqrt()[:, None, None]
        matrices = (basis[:, None] * values[:, :, None, :]) @ basis[:, None].mT
        directions = basis.gather(2, best.indices[:, None, :].expand(count, self.d, self.p))
        return {
            "matrices": matrices.float(),
            "directions": directions.float(),
            "reference": -torch.ones(count, device=generator.device),
        }

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Return the matrices at every step."""
        return repeat(data, ("matrices",), steps)


def log_cosh_contrast(params: Params, batch: Batch) -> Tensor:
    """Return the mean over samples of sum_i log cosh(x_i^T z)."""
    u = batch["z"] @ params["x"]
    # log cosh u = u + log(1 + exp(-2u)) - log 2: smooth at 0, no overflow.
    return (u + F.softplus(-2.0 * u) - math.log(2.0)).sum() / u.shape[0]


@functools.cache
def ica_problem(d: int, p: int) -> Problem:
    """Return the problem of one size."""
    geometry = Geometry.from_rules({"x": torch.empty(d, p, device="meta")}, {"x": Stiefel()})
    return Problem(geometry, log_cosh_contrast, log_cosh_contrast, column_error)


@dataclass(frozen=True)
class IndependentComponents(TaskFamily):
    """p Laplacian sources among d - p normal ones, orthogonally mixed and whitened.

    The reference is what descent in float64 reaches from the true mixing: the best known value. The metric is the mean
    of 1 - |cosine| between each true direction and the nearest column.
    """

    d: int
    p: int
    samples: int = 2000
    batch_size: int = 256

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"independent components {self.d}x{self.p}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return ica_problem(self.d, self.p)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw mixing matrices and samples."""
        mixing = Stiefel().random_point((count, self.d, self.d), generator, device=generator.device)
        sources = torch.randn(count, self.samples, self.d, generator=generator, device=generator.device)
        # A Laplace variable of variance 1 is a normal one times the root of an exponential one.
        spread = (
            -torch.rand(count, self.samples, self.p, generator=generator, device=generator.device).clamp(min=1e-7).log()
        )
        sources[..., : self.p] *= spread.sqrt()
        z = sources @ mixing.mT
        z = z - z.mean(dim=1, keepdim=True)
        covariance = z.mT @ z / self.samples
        # White by the Cholesky factor of the inverse would turn the directions; the symmetric root turns them least.
        values, vectors = torch.linalg.eigh(covariance)
        z = z @ (vectors * values.rsqrt()[:, None, :]) @ vectors.mT
        directions = mixing[..., : self.p]
        reference = reference_by_descent(self.problem, {"x": directions}, {"z": z}).float()
        return {"z": z, "directions": directions.contiguous(), "reference": reference}

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Draw samples, with replacement."""
        return draw_rows(data, ("z",), self.batch_size, generator, steps)
