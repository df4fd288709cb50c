"""Scatter of samples that are no normal ones: heavy tails, and covariances that depend on where they are.

*Heavy tails.* minimise the mean negative log-likelihood of Student's distribution with nu degrees of freedom,

    log det S / 2 + (nu + n)/2 mean log(1 + z^T S^{-1} z / nu),

geodesically convex on SPD(n), so one minimum. Sources: Kent and Tyler, "Redescending M-estimates of multivariate
location and scatter", Ann. Stat. 19 (1991); Sra and Hosseini, "Conic geometric optimization on the manifold of positive
definite matrices", SIAM J. Optim. 25 (2015).

*Frechet regression.* m(u) minimises sum_i w_i(u) d(M, Y_i)^2 for matrices Y_i at places u_i, with kernel weights w_i
around u; here several u at once. d^2 = log det (M + Y)/2 - log det(M Y)/2 is Stein's divergence, whose root is a
distance and which is geodesically convex, so one minimum again. Sources: Petersen and Muller, "Frechet regression for
random objects with Euclidean predictors", Ann. Stat. 47 (2019); Sra, "Positive definite matrices and the S-divergence",
Proc. AMS 144 (2016); the features: Tuzel, Porikli, Meer, "Region covariance", ECCV 2006.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from subspace_meta.geometry import Geometry, Params
from subspace_meta.manifolds import SPD
from subspace_meta.tasks.base import (
    Batch,
    Data,
    Problem,
    TaskFamily,
    draw_rows,
    once_per_task,
    symmetric_matrix,
)
from subspace_meta.tasks.images import photographs

FREEDOM = 3.0
FEATURES = 5


def half_log_det(a: Tensor) -> Tensor:
    """Return log det A / 2; meaningless, but without an exception, where A has no Cholesky factor."""
    return torch.linalg.cholesky_ex(a).L.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)


def student_likelihood(params: Params, batch: Batch) -> Tensor:
    """Return the mean negative log-likelihood of ``z`` ``(B, n)``, without constants."""
    z = batch["z"]
    factor = torch.linalg.cholesky_ex(params["scatter"]).L
    squares = torch.linalg.solve_triangular(factor, z.mT, upper=False).square().sum(dim=0)
    heavy = 0.5 * (FREEDOM + z.shape[1]) * torch.log1p(squares / FREEDOM).mean()
    return factor.diagonal().log().sum() + heavy


def scatter_divergence(params: Params, data: Data) -> Tensor:
    """Return Stein's divergence from the true scatter."""
    return stein(params["scatter"], data["truth"])


def stein(a: Tensor, b: Tensor) -> Tensor:
    """Return log det (A + B)/2 - log det(A B)/2 of ``(..., n, n)`` matrices."""
    return 2.0 * half_log_det(0.5 * (a + b)) - half_log_det(a) - half_log_det(b)


@functools.cache
def student_problem(n: int) -> Problem:
    """Return the problem of one size."""
    geometry = Geometry.from_rules({"scatter": torch.empty(n, n, device="meta")}, {"scatter": SPD()})
    return Problem(geometry, student_likelihood, student_likelihood, scatter_divergence)


def student_scatter(z: Tensor, iterations: int = 300) -> Tensor:
    """Return the minimum for ``z`` ``(..., N, n)`` by the fixed-point iteration of Kent and Tyler 1991."""
    n = z.shape[-1]
    scatter = z.mT @ z / z.shape[-2]
    for _ in range(iterations):
        whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(scatter), z.mT, upper=False)
        weights = (FREEDOM + n) / (FREEDOM + whitened.square().sum(dim=-2))
        scatter = (z * weights[..., None]).mT @ z / z.shape[-2]
    return scatter


@dataclass(frozen=True)
class StudentScatter(TaskFamily):
    """Scatter of samples with heavy tails; its eigenvalues span three decades. Mini-batches are samples.

    The reference is the minimum, computed in float64; the metric is Stein's divergence from the true scatter.
    """

    n: int
    samples: int = 500
    batch_size: int = 32

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"scatter of heavy tails {self.n}x{self.n}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return student_problem(self.n)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw scatters and samples."""
        spectrum = torch.logspace(-1.5, 1.5, self.n, dtype=torch.float64).expand(count, -1)
        truth, basis = symmetric_matrix(spectrum, generator)
        noise = torch.randn(count, self.samples, self.n, generator=generator, dtype=torch.float64)
        # A normal vector over the root of an independent chi-square variable over its degrees of freedom.
        chi = torch.randn(count, self.samples, int(FREEDOM), generator=generator, dtype=torch.float64)
        z = noise @ (basis * spectrum.sqrt()[:, None, :]).mT / chi.square().mean(dim=-1, keepdim=True).sqrt()
        z = z.float()
        best = {"scatter": student_scatter(z.double())}
        reference = torch.func.vmap(student_likelihood)(best, {"z": z.double()})
        return {"z": z, "truth": truth.float(), "reference": reference.float()}

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Draw samples, with replacement."""
        return draw_rows(data, ("z",), self.batch_size, generator, steps)


@functools.cache
def cat_covariances() -> tuple[Tensor, Tensor]:
    """Return covariances ``(64, 5, 5)`` of upright strips of a colour photograph of a cat, and their places in 0..1.

    The features of a pixel are red, green, blue and the absolute differences along both axes, each with a mean square
    of 0.1 over the image: far from the identity. The photograph is ``chelsea`` of scikit-image (S. van der Walt, CC0).
    """
    (image,) = photographs("chelsea")
    rows, columns = torch.gradient(image.mean(dim=-1))
    features = torch.cat([image - image.mean(dim=(0, 1)), torch.stack([rows.abs(), columns.abs()], dim=-1)], dim=-1)
    features = features / features.square().mean(dim=(0, 1)).sqrt()
    width, strips = 24, 64
    first = torch.linspace(0.0, image.shape[1] - width, strips).long()
    pixels = torch.stack([features[:, i : i + width].flatten(0, 1) for i in first])
    pixels = pixels - pixels.mean(dim=1, keepdim=True)
    return (0.1 * pixels.mT @ pixels / pixels.shape[1]).float(), torch.linspace(0.0, 1.0, strips)


def frechet_loss(params: Params, batch: Batch) -> Tensor:
    """Return the mean of Stein's divergences of matrices ``y`` ``(B, K, n, n)`` from the K that are sought."""
    means = params["means"]
    apart = 2.0 * half_log_det(0.5 * (batch["y"] + means)) - batch["half_log_det"]
    return apart.mean() - half_log_det(means).mean()


def frechet_objective(params: Params, data: Data) -> Tensor:
    """Return the same with the weights ``(N, K)`` of the kernel instead of draws by them."""
    means = params["means"]
    apart = 2.0 * half_log_det(0.5 * (data["samples"][:, None] + means)) - data["halves"][:, None]
    return (data["weights"] * (apart - half_log_det(means))).sum() / means.shape[0]


def frechet_error(params: Params, data: Data) -> Tensor:
    """Return the root mean square of Stein's distance to the best matrices."""
    return stein(params["means"], data["solution"]).mean().clamp(min=0.0).sqrt()


@functools.cache
def frechet_problem(places: int) -> Problem:
    """Return the problem of one size."""
    geometry = Geometry.from_rules({"means": torch.empty(places, FEATURES, FEATURES, device="meta")}, {"means": SPD()})
    return Problem(geometry, frechet_loss, frechet_objective, frechet_error)


def stein_means(samples: Tensor, weights: Tensor, iterations: int = 1000) -> Tensor:
    """Return the minima ``(K, n, n)`` for ``samples`` ``(N, n, n)`` and ``weights`` ``(N, K)`` by Sra's fixed point."""
    means = torch.einsum("ik,imn->kmn", weights, samples)
    for _ in range(iterations):
        inverses = torch.linalg.inv(0.5 * (samples[:, None] + means))
        means = torch.linalg.inv(torch.einsum("ik,ikmn->kmn", weights, inverses))
    return means


@functools.cache
def _frechet_data(places: int, bandwidth: float) -> Data:
    """Return the entries of the one task."""
    samples, where = cat_covariances()
    samples, where = samples.double(), where.double()
    wanted = (torch.arange(places, dtype=torch.float64) + 0.5) / places
    weights = torch.softmax(-0.5 * ((where[:, None] - wanted) / bandwidth).square(), dim=0)
    solution = stein_means(samples, weights)
    values = {"samples": samples, "halves": half_log_det(samples), "weights": weights, "solution": solution}
    values["reference"] = frechet_objective({"means": solution}, values)
    return {name: value.float() for name, value in values.items()}


@dataclass(frozen=True)
class FrechetRegression(TaskFamily):
    """Region covariances of a photograph at several places along it, by local Frechet regression.

    A mini-batch has, for each place, strips drawn by the weights of the kernel. The reference is the minimum, computed
    in float64; the metric is the distance to the matrices that attain it.
    """

    places: int
    bandwidth: float = 0.1
    batch_size: int = 8

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"Frechet regression of region covariances {self.places}x{FEATURES}x{FEATURES}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return frechet_problem(self.places)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Return the covariances, once a task."""
        return once_per_task(_frechet_data(self.places, self.bandwidth), count)

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Draw strips, with replacement."""
        count = len(data["reference"])
        draws = steps * count * self.batch_size
        # One data set is every task: the weights of the first are those of all.
        indices = torch.multinomial(data["weights"][0].mT, draws, replacement=True, generator=generator)
        indices = indices.mT.reshape(steps, count, self.batch_size, self.places)
        return {"y": data["samples"][0][indices], "half_log_det": data["halves"][0][indices]}
