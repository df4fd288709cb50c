"""Matrices of low rank: completion from a few entries, and approximation in the factors U S V^T.

*Completion.* Only the column space is a parameter: for X in Gr(d, p) every column m_j, known on the rows of the mask,
has its best coefficients in closed form, and

    f(X) = mean_j  min_w  |mask_j * (X w - m_j)|^2 + ridge |w|^2

is a smooth function of the span (the ridge makes it so where a column has too few entries). Mini-batches are columns.
Sources: Boumal and Absil, "RTRMC: a Riemannian trust-region method for low-rank matrix completion", NeurIPS 2011; Dai,
Kerman, Milenkovic, "A geometric approach to low-rank matrix completion", IEEE Trans. Inf. Theory 58 (2012).

*Approximation.* minimise |M - U S V^T|^2 / |M|^2 over St(d, p) x SPD(p) x St(n, p): the fixed-rank matrices as a
quotient. Source: Meyer, Bonnabel, Sepulchre, "Linear regression under fixed-rank constraints: a Riemannian approach",
ICML 2011. The reference is that of Eckart and Young.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from subspace_meta.geometry import Geometry, Params
from subspace_meta.manifolds import SPD, Grassmann, Stiefel
from subspace_meta.manifolds.base import identity_like
from subspace_meta.tasks.base import Batch, Data, Problem, TaskFamily, draw_rows, repeat
from subspace_meta.tasks.references import reference_by_descent

RIDGE = 1e-3


def _coefficients(x: Tensor, columns: Tensor, mask: Tensor) -> Tensor:
    """Return the best coefficients ``(B, p)`` of masked columns ``(B, d)``. 2Bdp^2 flops."""
    gram = (mask[:, :, None] * x).mT @ x
    factor = torch.linalg.cholesky_ex(gram + RIDGE * identity_like(gram)).L
    return torch.cholesky_solve(((mask * columns) @ x)[:, :, None], factor)[:, :, 0]


def completion_loss(params: Params, batch: Batch) -> Tensor:
    """Return the mean over columns of the squared error on known entries, with its ridge."""
    x, columns, mask = params["x"], batch["columns"], batch["mask"]
    w = _coefficients(x, columns, mask)
    error = mask * (w @ x.mT - columns)
    return (error.square().sum() + RIDGE * w.square().sum()) / columns.shape[0]


def completion_error(params: Params, data: Data) -> Tensor:
    """Return the root mean square error on the entries that are not known, relative to their size."""
    x, columns, hidden = params["x"], data["columns"], 1.0 - data["mask"]
    error = hidden * (_coefficients(x, columns, data["mask"]) @ x.mT - columns)
    return (error.square().sum() / (hidden * columns).square().sum()).sqrt()


@functools.cache
def completion_problem(d: int, p: int) -> Problem:
    """Return the problem of one size."""
    geometry = Geometry.from_rules({"x": torch.empty(d, p, device="meta")}, {"x": Grassmann()})
    return Problem(geometry, completion_loss, completion_loss, completion_error)


@dataclass(frozen=True)
class MatrixCompletion(TaskFamily):
    """Completion of ``(d, n)`` matrices of rank p with entries of unit variance, known with probability ``known``.

    The reference is what descent in float64 reaches from the true column space: the best known value (the true one is
    not quite optimal, because of the ridge). The metric is the relative error on unknown entries.
    """

    d: int
    p: int
    n: int = 256
    known: float = 0.3
    batch_size: int = 32

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"matrix completion {self.d}x{self.p}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return completion_problem(self.d, self.p)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw matrices, held as columns ``(count, n, d)``, and masks."""
        basis = Stiefel().random_point((count, self.d, self.p), generator, device=generator.device)
        w = torch.randn(count, self.n, self.p, generator=generator, device=generator.device) * (self.d / self.p) ** 0.5
        mask = (torch.rand(count, self.n, self.d, generator=generator, device=generator.device) < self.known).float()
        data = {"columns": w @ basis.mT, "mask": mask}
        return {**data, "reference": reference_by_descent(self.problem, {"x": basis}, data).float()}

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Draw columns, with replacement."""
        return draw_rows(data, ("columns", "mask"), self.batch_size, generator, steps)


def factorisation_loss(params: Params, batch: Batch) -> Tensor:
    """Return |M - U S V^T|^2 / |M|^2."""
    m = batch["matrix"]
    return (m - params["u"] @ params["s"] @ params["v"].mT).square().sum() / m.square().sum()


def factorisation_metric(params: Params, data: Data) -> Tensor:
    """Return the distance to the best approximation of this rank, relative to the matrix."""
    error = data["best"] - params["u"] @ params["s"] @ params["v"].mT
    return (error.square().sum() / data["matrix"].square().sum()).sqrt()


@functools.cache
def factorisation_problem(d: int, n: int, p: int) -> Problem:
    """Return the problem of one size."""
    shapes = {"u": (d, p), "s": (p, p), "v": (n, p)}
    geometry = Geometry.from_rules(
        {name: torch.empty(*shape, device="meta") for name, shape in shapes.items()},
        {"u": Stiefel(), "s": SPD(), "v": Stiefel()},
    )
    return Problem(geometry, factorisation_loss, factorisation_loss, factorisation_metric)


@dataclass(frozen=True)
class LowRankFactorisation(TaskFamily):
    """Approximation of a noisy matrix by U S V^T.

    Singular values are 3 to 1, and noise of ``noise`` times the largest possible norm is added. The reference is the
    sum of the other squared singular values over all of them; the metric is the distance to the best approximation.
    """

    d: int
    n: int
    p: int
    noise: float = 0.3

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"low-rank factorisation {self.d}x{self.p}, {self.p}x{self.p}, {self.n}x{self.p}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return factorisation_problem(self.d, self.n, self.p)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw matrices."""
        u, v = (
            Stiefel().random_point((count, size, self.p), generator, device=generator.device).double()
            for size in (self.d, self.n)
        )
        noise = torch.randn(count, self.d, self.n, generator=generator, dtype=torch.float64, device=generator.device)
        noise = self.noise * noise / (self.d**0.5 + self.n**0.5)  # the largest singular value of noise: about 1
        matrix = (u * torch.linspace(3.0, 1.0, self.p, dtype=torch.float64, device=generator.device)) @ v.mT + noise
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        best = (left[..., : self.p] * values[:, None, : self.p]) @ right[:, : self.p]
        reference = values[:, self.p :].square().sum(dim=-1) / values.square().sum(dim=-1)
        return {"matrix": matrix.float(), "best": best.float(), "reference": reference.float()}

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Return the matrix at every step."""
        return repeat(data, ("matrix",), steps)
