"""Spherical k-means with a smooth maximum: directions that the samples cluster around.

minimise the mean of 1 - (1/s) log(mean_c exp(s m_c^T z)) over k unit vectors m_c, for unit samples z: the
log-likelihood of a mixture of von Mises-Fisher distributions with equal weights and concentration s, and for large s
one minus the cosine with the nearest centre. Sources: Dhillon and Modha, "Concept decompositions for large sparse text
data using clustering", Machine Learning 42 (2001); Banerjee, Dhillon, Ghosh, Sra, "Clustering on the unit hypersphere
using von Mises-Fisher distributions", JMLR 6 (2005).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from subspace_meta.geometry import Geometry, Params
from subspace_meta.manifolds import Sphere
from subspace_meta.tasks.base import Batch, Data, Problem, TaskFamily, draw_rows, once_per_task

CONCENTRATION = 10.0
STARTS = 50


def soft_distance(params: Params, batch: Batch) -> Tensor:
    """Return the mean of 1 - the smooth maximum of the cosines of ``z`` ``(B, d)`` with the centres ``(k, d, 1)``."""
    cosines = batch["z"] @ params["centres"][:, :, 0].mT
    smooth = torch.logsumexp(CONCENTRATION * cosines, dim=-1) - math.log(cosines.shape[-1])
    return 1.0 - smooth.mean() / CONCENTRATION


def purity(params: Params, data: Data) -> Tensor:
    """Return the share of samples whose label is the most frequent one among those with the same nearest centre."""
    cosines = data["z"] @ params["centres"][:, :, 0].mT
    nearest = torch.arange(cosines.shape[-1], device=cosines.device) == cosines.argmax(dim=-1, keepdim=True)
    return (nearest.to(cosines.dtype).mT @ data["one_hot"]).amax(dim=-1).sum() / cosines.shape[0]


@functools.cache
def clustering_problem(d: int, k: int) -> Problem:
    """Return the problem of one size."""
    geometry = Geometry.from_rules({"centres": torch.empty(k, d, 1, device="meta")}, {"centres": Sphere()})
    return Problem(geometry, soft_distance, soft_distance, purity)


def best_centres(z: Tensor, starts: Tensor, iterations: int = 100) -> tuple[Tensor, Tensor]:
    """Run expectation maximisation, which never increases the objective.

    Takes unit samples ``(n, d)`` and centres ``(starts, k, d)``; returns the centres and objectives it ends with.
    """
    centres = starts
    for _ in range(iterations):
        weights = torch.softmax(CONCENTRATION * (z @ centres.mT), dim=-1)
        centres = F.normalize(weights.mT @ z, dim=-1)
    values = torch.func.vmap(lambda c: soft_distance({"centres": c[:, :, None]}, {"z": z}))(centres)
    return centres, values


@functools.cache
def _clustering_data(load: Callable[[], tuple[Tensor, Tensor]], k: int) -> Data:
    """Return the entries of the one task of a data set."""
    inputs, labels = load()
    z = F.normalize(inputs.double(), dim=-1)
    generator = torch.Generator().manual_seed(0)
    starts = torch.stack(
        [z[torch.randperm(len(z), generator=generator, device=generator.device)[:k]] for _ in range(STARTS)]
    )
    _, values = best_centres(z, starts)
    return {"z": z.float(), "one_hot": F.one_hot(labels).float(), "reference": values.amin().float()}


@dataclass(frozen=True)
class SphericalKMeans(TaskFamily):
    """Smoothed spherical k-means of a data set, every sample scaled to length 1.

    The reference is the best of 50 runs of expectation maximisation from samples, in float64: the best known value. The
    metric is the purity of the clusters.

    Attributes:
        source: name of the data set, for tables.
        load: cached function that returns inputs ``(n, d)`` and labels, which only the metric uses.
        k: number of centres.
    """

    source: str
    load: Callable[[], tuple[Tensor, Tensor]]
    k: int
    batch_size: int = 64

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"spherical k-means of {self.source} {self.k} x S({self.load()[0].shape[1]})"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return clustering_problem(self.load()[0].shape[1], self.k)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Return the samples, once a task."""
        return once_per_task(_clustering_data(self.load, self.k), count)

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Draw samples, with replacement."""
        return draw_rows(data, ("z",), self.batch_size, generator, steps)
