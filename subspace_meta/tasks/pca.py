"""Principal component analysis: the leading p-dimensional subspace of a covariance, from mini-batches.

minimise E |z - X X^T z|^2 over X in St(d, p) or Gr(d, p). For orthonormal X the loss is E|z|^2 - E|X^T z|^2, which is
what is computed: its Riemannian gradient is the same and it costs 4Bdp flops. Source of the stochastic problem: Oja,
"Simplified neuron model as a principal component analyzer", 1982; on Grassmann in the subspace adaptation paper
(arXiv 2501.15235). The reference value is the sum of the d-p smallest eigenvalues.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from subspace_meta.geometry import Geometry, Params
from subspace_meta.manifolds import Manifold, Stiefel
from subspace_meta.tasks.base import Batch, Data, Problem, TaskFamily, draw_indices


def pca_loss(params: Params, batch: Batch) -> Tensor:
    """Return the mean reconstruction error of the batch ``z`` ``(B, d)``."""
    z = batch["z"]
    return (z.square().sum() - (z @ params["x"]).square().sum()) / z.shape[0]


def pca_objective(params: Params, data: Data) -> Tensor:
    """Return tr C - tr X^T C X for the covariance ``C`` ``(d, d)``."""
    x, covariance = params["x"], data["covariance"]
    return covariance.diagonal().sum() - (x * (covariance @ x)).sum()


def pca_metric(params: Params, data: Data) -> Tensor:
    """Return the excess reconstruction error relative to the total variance."""
    return (pca_objective(params, data) - data["reference"]) / data["covariance"].diagonal().sum()


@functools.cache
def pca_problem(d: int, p: int, manifold: Manifold | None = None) -> Problem:
    """Return the problem of one size, on Stiefel unless another manifold is given."""
    geometry = Geometry.from_rules({"x": torch.empty(d, p, device="meta")}, {"x": manifold or Stiefel()})
    return Problem(geometry, pca_loss, pca_objective, pca_metric)


def residual_variance(covariance: Tensor, p: int) -> Tensor:
    """Return the sum of the d-p smallest eigenvalues of ``(..., d, d)``, computed in float64."""
    eigenvalues = torch.linalg.eigvalsh(covariance.double())
    return eigenvalues[..., : covariance.shape[-1] - p].sum(dim=-1).to(covariance.dtype)


@dataclass(frozen=True)
class SyntheticPCA(TaskFamily):
    """PCA of normal samples with random spectrum, random basis, random scale.

    The spectrum is a power law (exponent 0.3 to 2), an exponential (e-folding over p/4 to 2p components), or p strong
    directions above noise (2 to 30 times stronger), each a third of the draws. A third of the tasks keeps the
    coordinate basis. The loss scale is log-uniform over ``10^log10_scale``.
    """

    d: int
    p: int
    batch_size: int = 64
    log10_scale: tuple[float, float] = (-2.0, 2.0)
    manifold: Manifold | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"synthetic PCA {self.d}x{self.p}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return pca_problem(self.d, self.p, self.manifold)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw covariances and their square roots."""
        index = torch.arange(1, self.d + 1, dtype=torch.float32, device=generator.device).expand(count, self.d)

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(count, 1, generator=generator, device=generator.device)

        power = index ** -uniform(0.3, 2.0)
        exponential = torch.exp(-index / (self.p * torch.exp(uniform(math.log(0.25), math.log(2.0))))) + 1e-4
        strength = torch.exp(uniform(math.log(2.0), math.log(30.0)))
        spiked = torch.where(
            index <= self.p,
            strength * (1.0 + torch.rand(count, self.d, generator=generator, device=generator.device)),
            1.0,
        )
        kind = torch.randint(3, (count, 1), generator=generator, device=generator.device)
        spectrum = torch.where(kind == 0, power, torch.where(kind == 1, exponential, spiked))
        spectrum = spectrum / spectrum.sum(dim=-1, keepdim=True) * 10 ** uniform(*self.log10_scale)
        basis = Stiefel().random_point((count, self.d, self.d), generator, device=generator.device)
        keep = (torch.rand(count, generator=generator, device=generator.device) < 1 / 3)[:, None, None]
        basis = torch.where(keep, torch.eye(self.d, device=generator.device), basis)
        root = basis * spectrum.sqrt()[:, None, :]
        covariance = root @ root.mT
        return {
            "covariance": covariance,
            "root": root,
            "reference": spectrum.sort(dim=-1).values[:, : self.d - self.p].sum(dim=-1),
        }

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Draw normal samples."""
        count = len(data["reference"])
        noise = torch.randn(steps, count, self.batch_size, self.d, generator=generator, device=generator.device)
        return {"z": noise @ data["root"].mT}

    def measured(self, data: Data) -> Data:
        """Return covariance and reference."""
        return {name: data[name] for name in ("covariance", "reference")}


@dataclass(frozen=True)
class SampledPCA(TaskFamily):
    """PCA of a fixed data set, mini-batches drawn with replacement.

    Attributes:
        source: name of the data set, for tables.
        load: a cached function that returns the centred samples ``(n, d)``; a function and not a tensor, so that the
            family stays hashable.
        p: dimension of the subspace.
        rotate: give every task its own random rotation and scale, so that a few data sets are many tasks.
    """

    source: str
    load: Callable[[], Tensor]
    p: int
    batch_size: int = 64
    rotate: bool = False
    log10_scale: tuple[float, float] = (-2.0, 2.0)
    manifold: Manifold | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"PCA of {self.source} {self.load().shape[1]}x{self.p}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return pca_problem(self.load().shape[1], self.p, self.manifold)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Return the covariance of the data, once a task, rotated or not."""
        samples = self.load()
        n, d = samples.shape
        covariance = samples.T @ samples / n
        reference = residual_variance(covariance, self.p)
        if not self.rotate:
            frame = torch.eye(d, device=samples.device).expand(count, d, d)
            return {
                "covariance": covariance.expand(count, d, d),
                "frame": frame,
                "reference": reference.expand(count),
            }
        low, high = self.log10_scale
        scale = (
            10 ** (low + (high - low) * torch.rand(count, generator=generator, device=generator.device))
            / covariance.trace()
        )
        frame = Stiefel().random_point((count, d, d), generator, device=generator.device) * scale.sqrt()[:, None, None]
        return {"covariance": frame.mT @ covariance @ frame, "frame": frame, "reference": reference * scale}

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Draw rows of the data set."""
        samples = self.load()
        indices = draw_indices(len(samples), (steps, len(data["reference"]), self.batch_size), generator)
        z = samples[indices]
        return {"z": z @ data["frame"] if self.rotate else z}

    def measured(self, data: Data) -> Data:
        """Return covariance and reference."""
        return {name: data[name] for name in ("covariance", "reference")}
