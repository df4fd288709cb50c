"""Tensors of low rank with three axes: Tucker's form, and sums of rank-one tensors; the factors are blocks of a matrix.

*Tucker.* minimise 1 - |T x_1 U^T x_2 V^T x_3 W^T|^2 / |T|^2 over St(a, p) x St(b, p) x St(c, p), with the best
core. Sources: De Lathauwer, De Moor, Vandewalle, "On the best rank-1 and rank-(R1, R2, ..., RN) approximation of
higher-order tensors", SIAM J. Matrix Anal. 21 (2000); Elden and Savas, "A Newton-Grassmann method for computing the
best multilinear rank-(r1, r2, r3) approximation of a tensor", SIAM J. Matrix Anal. 31 (2009).

*Rank-one terms.* minimise |T - sum_r w_r u_r o v_r o w_r|^2 / |T|^2 over unit vectors and weights. Sources: Kolda and
Bader, "Tensor decompositions and applications", SIAM Review 51 (2009); Breiding and Vannieuwenhoven, "A Riemannian
trust region method for the canonical tensor rank approximation problem", SIAM J. Optim. 28 (2018).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from subspace_meta.geometry import Geometry, Params
from subspace_meta.manifolds import Euclidean, Oblique, Product, Stiefel
from subspace_meta.tasks.base import Batch, Data, Problem, TaskFamily, repeat
from subspace_meta.tasks.references import reference_by_descent

Sizes = tuple[int, int, int]


def factors(x: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the blocks of ``x`` ``(a + b + c, p)`` for a tensor ``(a, b, c)``."""
    u, v, w = torch.split(x, list(like.shape), dim=0)
    return u, v, w


def tucker_core(x: Tensor, tensor: Tensor) -> Tensor:
    """Return T x_1 U^T x_2 V^T x_3 W^T, ``(p, p, p)``. 2abcp flops and less."""
    u, v, w = factors(x, tensor)
    return torch.einsum("jkp,jq,kr->pqr", torch.einsum("ijk,ip->jkp", tensor, u), v, w)


def tucker_loss(params: Params, batch: Batch) -> Tensor:
    """Return 1 - |core|^2 / |T|^2, ``tensor`` scaled to norm 1."""
    return 1.0 - tucker_core(params["x"], batch["tensor"]).square().sum()


def tucker_error(params: Params, data: Data) -> Tensor:
    """Return the root mean square sine of the angles of all three subspaces to the true ones."""
    pairs = zip(factors(params["x"], data["tensor"]), factors(data["truth"], data["tensor"]), strict=True)
    apart = torch.stack([(t - x @ (x.mT @ t)).square().sum() for x, t in pairs])
    return (apart.sum() / (3 * params["x"].shape[-1])).sqrt()


@functools.cache
def tucker_problem(sizes: Sizes, p: int) -> Problem:
    """Return the problem of one size."""
    rule = Product((Stiefel(), Stiefel(), Stiefel()), sizes)
    geometry = Geometry.from_rules({"x": torch.empty(sum(sizes), p, device="meta")}, {"x": rule})
    return Problem(geometry, tucker_loss, tucker_loss, tucker_error)


@dataclass(frozen=True)
class TuckerDecomposition(TaskFamily):
    """The best approximation of multilinear rank (p, p, p) of a noisy tensor of norm 1.

    The core's entries fall with the sum of their indices. The reference is what descent in float64 reaches from the
    true factors: the best known value. The metric is the root mean square sine of the angles to the true subspaces.
    """

    sizes: Sizes
    p: int
    noise: float = 0.3

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"Tucker decomposition {'x'.join(map(str, self.sizes))}, rank {self.p}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return tucker_problem(self.sizes, self.p)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw factors, cores and noise of ``noise`` times the norm of the signal."""
        parts = [Stiefel().random_point((count, size, self.p), generator, torch.float64) for size in self.sizes]
        index = torch.arange(self.p)
        fall = 0.6 ** (index[:, None, None] + index[:, None] + index).double()
        core = fall * torch.randn(count, self.p, self.p, self.p, generator=generator, dtype=torch.float64)
        signal = torch.einsum("npqr,nip,njq,nkr->nijk", core, *parts)
        noise = torch.randn(signal.shape, generator=generator, dtype=torch.float64)
        tensor = _unit(_unit(signal) + self.noise * _unit(noise))
        truth = torch.cat(parts, dim=1)
        reference = reference_by_descent(self.problem, {"x": truth}, {"tensor": tensor})
        return {"tensor": tensor.float(), "truth": truth.float(), "reference": reference.float()}

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Return the tensor at every step."""
        return repeat(data, ("tensor",), steps)


def _unit(tensor: Tensor) -> Tensor:
    return tensor / tensor.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()


def rank_one_sum(x: Tensor, weights: Tensor, like: Tensor) -> Tensor:
    """Return sum_r w_r u_r o v_r o w_r."""
    u, v, w = factors(x, like)
    return torch.einsum("ir,jr,kr->ijk", u * weights, v, w)


def rank_one_loss(params: Params, batch: Batch) -> Tensor:
    """Return |T - sum_r w_r u_r o v_r o w_r|^2, ``tensor`` scaled to norm 1."""
    return (batch["tensor"] - rank_one_sum(params["x"], params["weights"], batch["tensor"])).square().sum()


def term_error(params: Params, data: Data) -> Tensor:
    """Return the mean over the true terms of 1 - |cosine| with the nearest term."""
    pairs = zip(factors(params["x"], data["tensor"]), factors(data["truth"], data["tensor"]), strict=True)
    cosines = torch.stack([(t.mT @ x).abs() for x, t in pairs]).prod(dim=0)
    return (1.0 - cosines.amax(dim=-1)).mean()


@functools.cache
def rank_one_problem(sizes: Sizes, terms: int) -> Problem:
    """Return the problem of one size."""
    shapes = {"x": (sum(sizes), terms), "weights": (terms,)}
    geometry = Geometry.from_rules(
        {name: torch.empty(*shape, device="meta") for name, shape in shapes.items()},
        {"x": Product((Oblique(), Oblique(), Oblique()), sizes), "weights": Euclidean()},
    )
    return Problem(geometry, rank_one_loss, rank_one_loss, term_error)


@dataclass(frozen=True)
class RankOneTerms(TaskFamily):
    """A noisy tensor of norm 1 as a sum of rank-one tensors whose factors are not orthogonal, but of one common part.

    The reference is what descent in float64 reaches from the true terms: the best known value. The metric is the mean
    of 1 - |cosine| between each true term and the nearest.

    Attributes:
        sizes: of the axes.
        terms: number of rank-one tensors.
        common: the cosine of two factors along one axis.
    """

    sizes: Sizes
    terms: int
    common: float = 0.3
    noise: float = 0.1

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"canonical decomposition {'x'.join(map(str, self.sizes))}, {self.terms} terms"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return rank_one_problem(self.sizes, self.terms)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw terms and noise of ``noise`` times the norm of the signal."""
        parts = []
        for size in self.sizes:
            frame = Stiefel().random_point((count, size, self.terms + 1), generator, torch.float64)
            parts.append((1.0 - self.common) ** 0.5 * frame[..., 1:] + self.common**0.5 * frame[..., :1])
        weights = torch.linspace(1.0, 0.5, self.terms, dtype=torch.float64).expand(count, -1)
        signal = torch.einsum("nr,nir,njr,nkr->nijk", weights, *parts)
        norm = signal.square().sum(dim=(1, 2, 3)).sqrt()
        noise = torch.randn(signal.shape, generator=generator, dtype=torch.float64)
        noisy = _unit(signal) + self.noise * _unit(noise)
        length = noisy.square().sum(dim=(1, 2, 3)).sqrt()
        data = {"tensor": noisy / length[:, None, None, None]}
        truth = torch.cat(parts, dim=1)
        start = {"x": truth, "weights": weights / (norm * length)[:, None]}
        reference = reference_by_descent(self.problem, start, data)
        return {"tensor": data["tensor"].float(), "truth": truth.float(), "reference": reference.float()}

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Return the tensor at every step."""
        return repeat(data, ("tensor",), steps)
