"""Robust subspace recovery: a subspace from samples of which many lie nowhere near it.

minimise the mean of sqrt(|z - X X^T z|^2 + eps^2), the smoothed l1 norm of the distances, over X in Gr(d, p). Source:
Lerman and Maunu, "An overview of robust subspace recovery", Proc. IEEE 106 (2018), and "Fast, robust and non-convex
subspace recovery", Information and Inference 7 (2018).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from subspace_meta.geometry import Geometry, Params
from subspace_meta.manifolds import Grassmann, Stiefel
from subspace_meta.tasks.base import Batch, Data, Problem, TaskFamily, draw_rows

SMOOTHING = 0.02


def smoothed_distance(params: Params, batch: Batch) -> Tensor:
    """Return the mean smoothed distance of the samples ``z`` ``(B, d)`` to the span."""
    z, x = batch["z"], params["x"]
    # The residual itself, not |z|^2 - |X^T z|^2, which loses the small distances of the inliers to rounding.
    residual = z - (z @ x) @ x.mT
    return (residual.square().sum(dim=-1) + SMOOTHING**2).sqrt().mean()


def subspace_error(params: Params, data: Data) -> Tensor:
    """Return |(I - X X^T) U|_F / sqrt p for the true basis ``U``: the root mean square sine of the angles."""
    x, u = params["x"], data["basis"]
    return (u - x @ (x.mT @ u)).square().sum().sqrt() / u.shape[-1] ** 0.5


@functools.cache
def robust_subspace_problem(d: int, p: int) -> Problem:
    """Return the problem of one size."""
    geometry = Geometry.from_rules({"x": torch.empty(d, p, device="meta")}, {"x": Grassmann()})
    return Problem(geometry, smoothed_distance, smoothed_distance, subspace_error)


def reweighted_subspace(z: Tensor, start: Tensor, iterations: int = 200) -> Tensor:
    """Minimise the smoothed distance by iteratively reweighted PCA, ``z`` ``(..., n, d)``; never increases it."""
    x = start
    for _ in range(iterations):
        residual = z - (z @ x) @ x.mT
        weights = (residual.square().sum(dim=-1, keepdim=True) + SMOOTHING**2).rsqrt()
        x = torch.linalg.eigh((z * weights).mT @ z)[1][..., -start.shape[-1] :]
    return x


@dataclass(frozen=True)
class RobustSubspace(TaskFamily):
    """Inliers near a random subspace, outliers everywhere, all of length about 1.

    The reference is what iteratively reweighted PCA reaches in float64 from the true subspace: the best known value.
    The metric is the root mean square sine of the angles to the true subspace.
    """

    d: int
    p: int
    samples: int = 500
    outliers: float = 0.4
    noise: float = 0.01
    batch_size: int = 64

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"robust subspace recovery {self.d}x{self.p}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return robust_subspace_problem(self.d, self.p)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw subspaces and samples, outliers first."""
        basis = Stiefel().random_point((count, self.d, self.p), generator, device=generator.device)
        outliers = round(self.outliers * self.samples)
        far = torch.randn(count, outliers, self.d, generator=generator, device=generator.device) / self.d**0.5
        inside = (
            torch.randn(count, self.samples - outliers, self.p, generator=generator, device=generator.device)
            / self.p**0.5
        )
        noise = (
            torch.randn(count, self.samples - outliers, self.d, generator=generator, device=generator.device)
            / self.d**0.5
        )
        z = torch.cat([far, inside @ basis.mT + self.noise * noise], dim=1)
        best = reweighted_subspace(z.double(), basis.double())
        values = [smoothed_distance({"x": x}, {"z": one}) for x, one in zip(best, z.double(), strict=True)]
        return {"z": z, "basis": basis, "reference": torch.stack(values).float()}

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Draw samples, with replacement."""
        return draw_rows(data, ("z",), self.batch_size, generator, steps)
