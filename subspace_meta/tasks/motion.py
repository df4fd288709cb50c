"""Subspace clustering: which of several bodies each tracked point belongs to.

The image coordinates of a point over F frames are a vector of R^{2F}; under an affine camera those of one rigid body
lie in a subspace of dimension 4. minimise the smooth minimum over subspaces of the squared distance,

    mean over points of -tau log mean_k exp(-|z - X_k X_k^T z|^2 / tau),

over K subspaces in Gr(2F, p): k subspaces, as k-means is to points. Sources: Tseng, "Nearest q-flat to m points", J.
Optim. Theory Appl. 105 (2000); Costeira and Kanade, "A multibody factorization method for independently moving
objects", IJCV 29 (1998); Vidal, "Subspace clustering", IEEE Signal Process. Mag. 28 (2011).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from subspace_meta.geometry import Geometry, Params
from subspace_meta.manifolds import Grassmann
from subspace_meta.tasks.base import Batch, Data, Problem, TaskFamily, draw_rows
from subspace_meta.tasks.references import reference_by_descent

TEMPERATURE = 0.03
RANK = 4


def squared_distances(x: Tensor, z: Tensor) -> Tensor:
    """Return the squared distances ``(B, K)`` of ``z`` ``(B, d)`` from subspaces ``(K, d, p)``."""
    # The residual itself, not |z|^2 - |X^T z|^2, which loses small distances to rounding.
    inside = torch.einsum("kdp,bkp->bkd", x, torch.einsum("kdp,bd->bkp", x, z))
    return (z[:, None] - inside).square().sum(dim=-1)


def soft_distance(params: Params, batch: Batch) -> Tensor:
    """Return the mean smooth minimum of the squared distances of ``z`` ``(B, d)``."""
    exponents = -squared_distances(params["x"], batch["z"]) / TEMPERATURE
    smooth = torch.logsumexp(exponents, dim=-1) - math.log(exponents.shape[-1])
    return -TEMPERATURE * smooth.mean()


def misplaced(params: Params, data: Data) -> Tensor:
    """Return the share of points that are not of the body most frequent in their cluster."""
    apart = squared_distances(params["x"], data["z"])
    nearest = torch.arange(apart.shape[-1], device=apart.device) == apart.argmin(dim=-1, keepdim=True)
    return 1.0 - (nearest.to(apart.dtype).mT @ data["one_hot"]).amax(dim=-1).sum() / apart.shape[0]


@functools.cache
def subspace_clustering_problem(bodies: int, d: int) -> Problem:
    """Return the problem of one size."""
    geometry = Geometry.from_rules({"x": torch.empty(bodies, d, RANK, device="meta")}, {"x": Grassmann()})
    return Problem(geometry, soft_distance, soft_distance, misplaced)


@dataclass(frozen=True)
class MovingBodies(TaskFamily):
    """Points on rigid bodies that turn and drift before an affine camera; mini-batches are points.

    Coordinates are relative to the first frame's body and scaled, so that a point has length 1 on average. The
    reference is what descent in float64 reaches from the true subspaces: the best known value. The metric is the share
    of points in the wrong cluster.
    """

    bodies: int
    frames: int
    samples: int = 300
    noise: float = 0.01
    batch_size: int = 32

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"subspace clustering of {self.bodies} moving bodies {2 * self.frames}x{RANK}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return subspace_clustering_problem(self.bodies, 2 * self.frames)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw bodies, motions and points."""
        k, d = self.bodies, 2 * self.frames
        spin = torch.randn(count, k, 1, 3, 3, generator=generator)
        spin = (spin - spin.mT) * torch.linspace(0.0, 1.0, self.frames)[:, None, None]
        cameras = torch.linalg.matrix_exp(spin)[..., :2, :]  # (count, K, F, 2, 3)
        drift = torch.randn(count, k, self.frames, 2, generator=generator).cumsum(dim=2) * (2.0 / self.frames) ** 0.5
        motions = torch.cat([cameras, drift[..., None]], dim=-1).flatten(2, 3)  # (count, K, d, 4)
        body = torch.arange(self.samples) % k
        shape = torch.randn(count, self.samples, 3, generator=generator)
        points = torch.cat([shape, torch.ones(count, self.samples, 1)], dim=-1)
        z = (motions[:, body] @ points[..., None])[..., 0]
        z = z / z.square().sum(dim=-1).mean(dim=-1).sqrt()[:, None, None]
        z = z + self.noise / d**0.5 * torch.randn(z.shape, generator=generator)
        basis = torch.linalg.qr(motions)[0]
        reference = reference_by_descent(self.problem, {"x": basis}, {"z": z}).float()
        one_hot = F.one_hot(body, k).float().expand(count, -1, -1)
        return {"z": z, "one_hot": one_hot, "reference": reference}

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Draw points, with replacement."""
        return draw_rows(data, ("z",), self.batch_size, generator, steps)
