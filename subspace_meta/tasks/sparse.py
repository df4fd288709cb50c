"""Sparse models: sparse principal components, and a dictionary with sparse codes.

*Sparse PCA.* minimise -tr X^T C X + weight * sum sqrt(X_ij^2 + eps^2) over St(d, p), the smoothed l1 norm. Sources:
Chen, Ma, So, Zhang, "Proximal gradient method for nonsmooth optimization over the Stiefel manifold", SIAM J. Optim. 30
(2020); Journee, Nesterov, Richtarik, Sepulchre, "Generalized power method for sparse PCA", JMLR 11 (2010).

*Dictionary learning.* minimise (|Z - D C|^2 / 2 + weight * sum sqrt(C_ij^2 + eps^2)) / (|Z|^2 / 2) over dictionaries D
with unit columns (oblique) and codes C (Euclidean). Sources: Olshausen and Field, "Emergence of simple-cell receptive
field properties by learning a sparse code for natural images", Nature 381 (1996); Mairal, Bach, Ponce, Sapiro, "Online
learning for matrix factorization and sparse coding", JMLR 11 (2010).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from subspace_meta.geometry import Geometry, Params
from subspace_meta.manifolds import Euclidean, Oblique, Stiefel
from subspace_meta.tasks.base import Batch, Data, Problem, TaskFamily, once_per_task, repeat
from subspace_meta.tasks.references import reference_by_descent

SMOOTHING = 0.01
SPARSE_PCA_WEIGHT = 0.1
DICTIONARY_WEIGHT = 0.5


def smoothed_l1(x: Tensor) -> Tensor:
    """Return sum sqrt(x^2 + eps^2)."""
    return (x.square() + SMOOTHING**2).sqrt().sum()


def sparse_pca_loss(params: Params, batch: Batch) -> Tensor:
    """Return -tr X^T C X + weight |X|_1, smoothed."""
    x = params["x"]
    return SPARSE_PCA_WEIGHT * smoothed_l1(x) - (x * (batch["covariance"] @ x)).sum()


def sparsity(params: Params, data: Data) -> Tensor:
    """Return the share of entries below the smoothing length times 2 in absolute value."""
    return (params["x"].abs() < 2 * SMOOTHING).to(params["x"].dtype).mean()


@functools.cache
def sparse_pca_problem(d: int, p: int) -> Problem:
    """Return the problem of one size."""
    geometry = Geometry.from_rules({"x": torch.empty(d, p, device="meta")}, {"x": Stiefel()})
    return Problem(geometry, sparse_pca_loss, sparse_pca_loss, sparsity)


@dataclass(frozen=True)
class SparsePCA(TaskFamily):
    """Sparse components of a sample covariance: p components on disjoint supports of d/(2p) entries, above noise.

    The variances of the components are 2 to 1, that of the noise is 0.1 in every direction. The reference is what
    descent in float64 reaches from the true components: the best known value. The metric is the share of entries that
    vanish.
    """

    d: int
    p: int
    samples: int = 500

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"sparse PCA {self.d}x{self.p}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return sparse_pca_problem(self.d, self.p)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw supports, signs and samples."""
        width = self.d // (2 * self.p)
        loadings = torch.zeros(count, self.d, self.p, device=generator.device)
        for i in range(count):
            support = torch.randperm(self.d, generator=generator, device=generator.device)[: width * self.p].reshape(
                self.p, width
            )
            signs = 2.0 * torch.randint(2, (self.p, width), generator=generator, device=generator.device) - 1.0
            loadings[i, support, torch.arange(self.p, device=generator.device)[:, None]] = signs / width**0.5
        strength = torch.linspace(2.0, 1.0, self.p, device=generator.device).sqrt()
        scores = torch.randn(count, self.samples, self.p, generator=generator, device=generator.device) * strength
        noise = 0.1**0.5 * torch.randn(count, self.samples, self.d, generator=generator, device=generator.device)
        z = scores @ loadings.mT + noise
        data = {"covariance": z.mT @ z / self.samples}
        return {**data, "reference": reference_by_descent(self.problem, {"x": loadings}, data, 1000).float()}

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Return the covariance at every step."""
        return repeat(data, ("covariance",), steps)


def dictionary_loss(params: Params, batch: Batch) -> Tensor:
    """Return the reconstruction error and the smoothed l1 norm of the codes, relative to the data ``z`` ``(d, n)``."""
    z, codes = batch["z"], params["codes"]
    error = z - params["atoms"] @ codes
    penalty = smoothed_l1(codes) - SMOOTHING * codes.shape[-2] * codes.shape[-1]
    return (error.square().sum() + 2.0 * DICTIONARY_WEIGHT * penalty) / z.square().sum()


def dictionary_error(params: Params, data: Data) -> Tensor:
    """Return |Z - D C| / |Z|."""
    error = data["z"] - params["atoms"] @ params["codes"]
    return (error.square().sum() / data["z"].square().sum()).sqrt()


@functools.cache
def dictionary_problem(d: int, atoms: int, n: int) -> Problem:
    """Return the problem of one size."""
    geometry = Geometry.from_rules(
        {"atoms": torch.empty(d, atoms, device="meta"), "codes": torch.empty(atoms, n, device="meta")},
        {"atoms": Oblique(), "codes": Euclidean()},
    )
    return Problem(geometry, dictionary_loss, dictionary_loss, dictionary_error)


@dataclass(frozen=True)
class DictionaryLearning(TaskFamily):
    """A dictionary and the codes of the first ``n`` samples of a data set, learned together.

    The minimum is not known; the reference is 0, which the loss cannot reach. The metric is the relative reconstruction
    error.

    Attributes:
        source: name of the data set, for tables.
        load: cached function that returns inputs ``(at least n, d)`` and labels, which are not used.
        atoms: columns of the dictionary.
        n: number of samples.
    """

    source: str
    load: Callable[[], tuple[Tensor, Tensor]]
    atoms: int
    n: int

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"dictionary learning of {self.source} {self.load()[0].shape[1]}x{self.atoms}, {self.atoms}x{self.n}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return dictionary_problem(self.load()[0].shape[1], self.atoms, self.n)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Return the samples as columns, once a task."""
        z = self.load()[0][: self.n].T.contiguous()
        return once_per_task({"z": z, "reference": torch.zeros((), device=z.device)}, count)

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Return all samples at every step."""
        return repeat(data, ("z",), steps)
