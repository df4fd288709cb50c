"""Alignment: unbalanced Procrustes, Wahba's problem, synchronisation of rotations.

*Unbalanced Procrustes.* minimise |A X - B|^2 / |B|^2 over St(d, p), d > p: no closed form, because A does not drop out.
Source: Elden and Park, "A Procrustes problem on the Stiefel manifold", Numer. Math. 82 (1999). Here B = A X* for a
known X*, so the minimum is 0.

*Wahba's problem.* minimise the mean of w |b - R a|^2 over R in SO(n). Source: Wahba, "A least squares estimate of
satellite attitude", SIAM Review 7 (1965); solved by a singular value decomposition: Markley, "Attitude determination
using vector observations and the singular value decomposition", J. Astronaut. Sci. 36 (1988).

*Synchronisation.* minimise the mean over measured pairs of |R_i - H_ij R_j|^2 over N rotations, H_ij a noisy R_i R_j^T.
Source: Boumal, Singer, Absil, Blondel, "Cramer-Rao bounds for synchronization of rotations", Information and Inference
3 (2014); that a critical point is the global minimum can be certified: Rosen, Carlone, Bandeira, Leonard, "SE-Sync",
IJRR 38 (2019); the tests do so.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from subspace_meta.geometry import Geometry, Params
from subspace_meta.manifolds import Rotations, Stiefel
from subspace_meta.tasks.base import Batch, Data, Problem, TaskFamily, draw_rows, repeat
from subspace_meta.tasks.references import reference_by_descent


def procrustes_loss(params: Params, batch: Batch) -> Tensor:
    """Return |A X - B|^2 / |B|^2."""
    return (batch["a"] @ params["x"] - batch["b"]).square().sum() / batch["b"].square().sum()


def distance_to_solution(params: Params, data: Data) -> Tensor:
    """Return |X - X*|_F / sqrt p."""
    return (params["x"] - data["solution"]).square().sum().sqrt() / params["x"].shape[-1] ** 0.5


@functools.cache
def procrustes_problem(d: int, p: int) -> Problem:
    """Return the problem of one size."""
    geometry = Geometry.from_rules({"x": torch.empty(d, p, device="meta")}, {"x": Stiefel()})
    return Problem(geometry, procrustes_loss, procrustes_loss, distance_to_solution)


@dataclass(frozen=True)
class UnbalancedProcrustes(TaskFamily):
    """Unbalanced Procrustes with singular values of A from 1 down to 1/condition and a known solution of value 0.

    The metric is the distance to the solution, relative to its size.
    """

    d: int
    p: int
    condition: float = 10.0

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"unbalanced Procrustes {self.d}x{self.p}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return procrustes_problem(self.d, self.p)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw matrices and solutions."""
        left, right = (
            Stiefel().random_point((count, self.d, self.d), generator, device=generator.device) for _ in range(2)
        )
        a = (left * self.condition ** -torch.linspace(0.0, 1.0, self.d, device=generator.device)) @ right.mT
        solution = Stiefel().random_point((count, self.d, self.p), generator, device=generator.device)
        return {
            "a": a,
            "b": a @ solution,
            "solution": solution,
            "reference": torch.zeros(count, device=generator.device),
        }

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Return the matrices at every step."""
        return repeat(data, ("a", "b"), steps)


def wahba_loss(params: Params, batch: Batch) -> Tensor:
    """Return the mean of w |b - R a|^2 over observations ``a``, ``b`` ``(B, n)`` and weights ``(B,)``."""
    error = batch["b"] - batch["a"] @ params["x"].mT
    return (batch["weights"] * error.square().sum(dim=-1)).mean()


@functools.cache
def wahba_problem(n: int) -> Problem:
    """Return the problem of one size."""
    geometry = Geometry.from_rules({"x": torch.empty(n, n, device="meta")}, {"x": Rotations()})
    return Problem(geometry, wahba_loss, wahba_loss, distance_to_solution)


def best_rotation(b: Tensor) -> Tensor:
    """Return the rotation that maximises tr(R^T B) for ``(..., n, n)``."""
    return Rotations().nearest(b)


@dataclass(frozen=True)
class Wahba(TaskFamily):
    """One rotation from weighted, noisy observations of unit vectors. The metric is the distance to the best one."""

    n: int = 3
    samples: int = 200
    noise: float = 0.1
    batch_size: int = 16

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"Wahba's problem SO({self.n})"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return wahba_problem(self.n)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw rotations and observations. Directions of small variance make the problem less round."""
        truth = Rotations().random_point((count, self.n, self.n), generator, device=generator.device)
        a = torch.randn(count, self.samples, self.n, generator=generator, device=generator.device) * torch.linspace(
            1.0, 0.2, self.n, device=generator.device
        )
        a = a / torch.linalg.vector_norm(a, dim=-1, keepdim=True)
        b = a @ truth.mT + self.noise * torch.randn(
            count, self.samples, self.n, generator=generator, device=generator.device
        )
        weights = 0.5 + torch.rand(count, self.samples, generator=generator, device=generator.device)
        data = {"a": a, "b": b, "weights": weights}
        exact = {name: value.double() for name, value in data.items()}
        solution = best_rotation((exact["weights"][..., None] * exact["b"]).mT @ exact["a"])
        reference = torch.func.vmap(wahba_loss)({"x": solution}, exact)
        return {**data, "solution": solution.float(), "reference": reference.float()}

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Draw observations, with replacement."""
        return draw_rows(data, ("a", "b", "weights"), self.batch_size, generator, steps)


def synchronisation_loss(params: Params, batch: Batch) -> Tensor:
    """Return the mean of |R_i - H_ij R_j|^2 over pairs, ``measurements`` ``(Nn, Nn)`` symmetric, 0 if not measured."""
    r = params["r"].flatten(0, 1)
    # |R_i - H R_j|^2 = 2n - 2 tr(R_i^T H R_j)
    return 2 * r.shape[-1] - 2 * (r * (batch["measurements"] @ r)).sum() / batch["pairs"]


def synchronisation_error(params: Params, data: Data) -> Tensor:
    """Return the root mean square of |R_i R_j^T - T_i T_j^T| over all pairs: it does not see a common rotation."""
    r, truth = params["r"].flatten(0, 1), data["truth"].flatten(0, 1)
    return (r @ r.mT - truth @ truth.mT).square().sum().sqrt() / params["r"].shape[0]


@functools.cache
def synchronisation_problem(rotations: int, n: int) -> Problem:
    """Return the problem of one size."""
    geometry = Geometry.from_rules({"r": torch.empty(rotations, n, n, device="meta")}, {"r": Rotations()})
    return Problem(geometry, synchronisation_loss, synchronisation_loss, synchronisation_error)


@dataclass(frozen=True)
class Synchronisation(TaskFamily):
    """N rotations from noisy relative ones on a random graph; noise is a rotation by about ``noise`` in every plane.

    The reference is what descent in float64 reaches from the truth; the metric is the root mean square error of all
    relative rotations.
    """

    rotations: int
    n: int = 3
    known: float = 0.4
    noise: float = 0.2

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"synchronisation of {self.rotations} rotations SO({self.n})"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return synchronisation_problem(self.rotations, self.n)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw rotations, graphs (with a cycle through all, so that they are connected) and measurements."""
        size, n = self.rotations, self.n
        truth = Rotations().random_point((count, size, n, n), generator, device=generator.device)
        turn = self.noise * torch.randn(count, size, size, n, n, generator=generator, device=generator.device)
        noise = torch.linalg.matrix_exp((turn - turn.mT) / 2**0.5)
        relative = truth[:, :, None] @ truth[:, None].mT @ noise
        chosen = torch.rand(count, size, size, generator=generator, device=generator.device) < self.known
        chosen[:, torch.arange(size - 1, device=generator.device), torch.arange(1, size, device=generator.device)] = (
            True
        )
        upper = torch.triu(chosen, diagonal=1).float()
        half = upper[..., None, None] * relative
        blocks = half.transpose(2, 3).reshape(count, size * n, size * n)
        data = {"measurements": blocks + blocks.mT, "pairs": 2.0 * upper.sum(dim=(1, 2))}
        reference = reference_by_descent(self.problem, {"r": truth}, data).float()
        return {**data, "truth": truth, "reference": reference}

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Return the measurements at every step."""
        return repeat(data, ("measurements", "pairs"), steps)
