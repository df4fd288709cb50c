"""Principal components under constraints: non-negative ones, and those of few groups of variables.

*Non-negative.* minimise -E |X^T z|^2 + weight |min(X, 0)|^2 over St(d, p): the constraint X >= 0 as a quadratic
penalty; orthonormal columns that are not negative have disjoint supports. Sources: Zass and Shashua, "Nonnegative
sparse PCA", NeurIPS 2006; Montanari and Richard, "Non-negative principal component analysis: message passing algorithms
and sharp asymptotics", IEEE Trans. Inf. Theory 62 (2016).

*Group-sparse.* minimise -tr X^T C X + weight sum_g sqrt(|X_g|^2 + eps^2) over Gr(d, p), X_g the rows of a group of
variables: a function of the span. Sources: Yuan and Lin, "Model selection and estimation in regression with grouped
variables", J. R. Stat. Soc. B 68 (2006); Ulfarsson and Solo, "Sparse variable PCA using geodesic steepest descent",
IEEE Trans. Signal Process. 56 (2008).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from subspace_meta.geometry import Geometry, Params
from subspace_meta.manifolds import Grassmann, Stiefel
from subspace_meta.tasks.base import Batch, Data, Problem, TaskFamily, draw_rows, repeat
from subspace_meta.tasks.references import reference_by_descent

PENALTY = 1.0
GROUP_WEIGHT = 0.1
SMOOTHING = 0.01
ROWS = 6  # variables of a group


def _penalty(x: Tensor) -> Tensor:
    return PENALTY * x.clamp(max=0.0).square().sum()


def nonnegative_loss(params: Params, batch: Batch) -> Tensor:
    """Return -mean |X^T z|^2 + weight |min(X, 0)|^2 for samples ``z`` ``(B, d)``."""
    x = params["x"]
    return _penalty(x) - (batch["z"] @ x).square().sum() / batch["z"].shape[0]


def nonnegative_objective(params: Params, data: Data) -> Tensor:
    """Return -tr X^T C X + weight |min(X, 0)|^2."""
    x = params["x"]
    return _penalty(x) - (x * (data["covariance"] @ x)).sum()


def component_error(params: Params, data: Data) -> Tensor:
    """Return the mean over the true components of 1 - cosine with the nearest column, signs counting."""
    return (1.0 - (data["components"].mT @ params["x"]).amax(dim=-1)).mean()


@functools.cache
def nonnegative_problem(d: int, p: int) -> Problem:
    """Return the problem of one size."""
    geometry = Geometry.from_rules({"x": torch.empty(d, p, device="meta")}, {"x": Stiefel()})
    return Problem(geometry, nonnegative_loss, nonnegative_objective, component_error)


@dataclass(frozen=True)
class NonNegativePCA(TaskFamily):
    """p non-negative components on disjoint supports of d/(2p) entries, above noise; mini-batches are samples.

    The variances are 1 to a half over p, that of the noise ``noise`` over p in every direction. The reference is what
    descent in float64 reaches from the true components: the best known value. The metric is the mean of 1 - cosine
    between each true component and the nearest column.
    """

    d: int
    p: int
    samples: int = 1000
    noise: float = 0.05
    batch_size: int = 32

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"non-negative PCA {self.d}x{self.p}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return nonnegative_problem(self.d, self.p)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw supports, entries and samples."""
        width = self.d // (2 * self.p)
        components = torch.zeros(count, self.d, self.p)
        for i in range(count):
            support = torch.randperm(self.d, generator=generator)[: width * self.p].reshape(self.p, width)
            entries = 0.5 + torch.rand(self.p, width, generator=generator)
            components[i, support, torch.arange(self.p)[:, None]] = entries
        components = components / torch.linalg.vector_norm(components, dim=1, keepdim=True)
        strength = (torch.linspace(1.0, 0.5, self.p) / self.p).sqrt()
        scores = torch.randn(count, self.samples, self.p, generator=generator) * strength
        noise = (self.noise / self.p) ** 0.5 * torch.randn(count, self.samples, self.d, generator=generator)
        z = scores @ components.mT + noise
        covariance = z.mT @ z / self.samples
        reference = reference_by_descent(self.problem, {"x": components}, {"covariance": covariance})
        return {"z": z, "covariance": covariance, "components": components, "reference": reference.float()}

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Draw samples, with replacement."""
        return draw_rows(data, ("z",), self.batch_size, generator, steps)

    def measured(self, data: Data) -> Data:
        """Return covariance and components."""
        return {name: data[name] for name in ("covariance", "components", "reference")}


def group_norms(x: Tensor) -> Tensor:
    """Return |X_g| for groups of ``ROWS`` successive rows, smoothed."""
    return (x.reshape(-1, ROWS, x.shape[-1]).square().sum(dim=(1, 2)) + SMOOTHING**2).sqrt()


def group_sparse_loss(params: Params, batch: Batch) -> Tensor:
    """Return -tr X^T C X + weight sum_g |X_g|, smoothed."""
    x = params["x"]
    return GROUP_WEIGHT * group_norms(x).sum() - (x * (batch["covariance"] @ x)).sum()


def group_sparsity(params: Params, data: Data) -> Tensor:
    """Return the share of groups whose norm is below the smoothing length times 3."""
    return (group_norms(params["x"]) < 3.0 * SMOOTHING).to(params["x"].dtype).mean()


@functools.cache
def group_sparse_problem(d: int, p: int) -> Problem:
    """Return the problem of one size."""
    geometry = Geometry.from_rules({"x": torch.empty(d, p, device="meta")}, {"x": Grassmann()})
    return Problem(geometry, group_sparse_loss, group_sparse_loss, group_sparsity)


@dataclass(frozen=True)
class GroupSparsePCA(TaskFamily):
    """A p-dimensional subspace of the variables of a third of all groups, above noise.

    The variances are 1 to a quarter over p, that of the noise is 0.1 over p. The reference is what descent in float64
    reaches from the true subspace: the best known value. The metric is the share of groups that vanish.
    """

    d: int
    p: int
    samples: int = 500

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"group-sparse PCA {self.d}x{self.p}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return group_sparse_problem(self.d, self.p)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw groups, subspaces and samples."""
        groups = self.d // ROWS
        active = groups // 3
        basis = torch.zeros(count, groups, ROWS, self.p)
        dense = Stiefel().random_point((count, active * ROWS, self.p), generator)
        dense = dense.reshape(count, active, ROWS, self.p)
        for i in range(count):
            basis[i, torch.randperm(groups, generator=generator)[:active]] = dense[i]
        basis = basis.flatten(1, 2)
        strength = (torch.linspace(1.0, 0.25, self.p) / self.p).sqrt()
        scores = torch.randn(count, self.samples, self.p, generator=generator) * strength
        noise = (0.1 / self.p) ** 0.5 * torch.randn(count, self.samples, self.d, generator=generator)
        z = scores @ basis.mT + noise
        data = {"covariance": z.mT @ z / self.samples}
        return {**data, "reference": reference_by_descent(self.problem, {"x": basis}, data).float()}

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Return the covariance at every step."""
        return repeat(data, ("covariance",), steps)
