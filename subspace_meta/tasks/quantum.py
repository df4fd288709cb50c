"""Quantum state tomography: a density matrix of low rank from the outcomes of Pauli measurements.

minimise the mean over settings of the divergence sum_o f_o log(f_o / p_o) of the measured frequencies f from the
probabilities p_o = <o| Y Y^* |o> over Y of unit Frobenius norm: the maximum likelihood, and rho = Y Y^* is a state
whatever Y is. Complex numbers are held as real pairs, the real part of Y above its imaginary one, so Y lies on a sphere
of real (2d, rank) matrices; Y W is the same state for a unitary W. A share of the outcomes is read wrongly, which keeps
the logarithm smooth. Sources: Hradil, "Quantum-state estimation", Phys. Rev. A 55 (1997); Gross, Liu, Flammia, Becker,
Eisert, "Quantum state tomography via compressed sensing", Phys. Rev. Lett. 105 (2010); in factors: Kyrillidis et al.,
"Provable compressed sensing quantum state tomography via non-convex methods", npj Quantum Information 4 (2018).
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from subspace_meta.geometry import Geometry, Params
from subspace_meta.manifolds import Sphere
from subspace_meta.tasks.base import Batch, Data, Problem, TaskFamily, draw_rows, once_per_task
from subspace_meta.tasks.references import reference_by_descent

MISREAD = 0.02


def outcome_probabilities(y: Tensor, vectors: Tensor) -> Tensor:
    """Return p ``(S, d)`` of states ``y`` ``(2d, rank)`` for ``vectors`` ``(S, 2, d, 2d)``, misreadings included.

    ``vectors`` gives the real and the imaginary part of <o|y> as products with real pairs.
    """
    p = (vectors @ y).square().sum(dim=(-3, -1))
    return (1.0 - MISREAD) * p + MISREAD / p.shape[-1]


def tomography_loss(params: Params, batch: Batch) -> Tensor:
    """Return the mean over settings of the divergence of the frequencies from the probabilities."""
    p = outcome_probabilities(params["y"], batch["vectors"])
    return (-(batch["frequencies"] * p.log()).sum(dim=-1) - batch["entropy"]).mean()


def state_error(params: Params, data: Data) -> Tensor:
    """Return |Y Y^* - T T^*|_F."""

    def overlap(a: Tensor, b: Tensor) -> Tensor:
        """Return |A^* B|_F^2 for real pairs."""
        (ar, ai), (br, bi) = a.chunk(2, dim=-2), b.chunk(2, dim=-2)
        return (ar.mT @ br + ai.mT @ bi).square().sum() + (ar.mT @ bi - ai.mT @ br).square().sum()

    y, truth = params["y"], data["truth"]
    return (overlap(y, y) + overlap(truth, truth) - 2.0 * overlap(y, truth)).clamp(min=0.0).sqrt()


@functools.cache
def tomography_problem(d: int, rank: int) -> Problem:
    """Return the problem of one size."""
    geometry = Geometry.from_rules({"y": torch.empty(2 * d, rank, device="meta")}, {"y": Sphere()})
    return Problem(geometry, tomography_loss, tomography_loss, state_error)


@functools.cache
def pauli_vectors(qubits: int) -> Tensor:
    """Return the product bases of all 3^q settings as real operators ``(3^q, 2, d, 2d)``, d = 2^q."""
    root = 0.5**0.5
    bases = torch.tensor(
        [[[root, root], [root, -root]], [[root, 1j * root], [root, -1j * root]], [[1.0, 0.0], [0.0, 1.0]]],
        dtype=torch.complex64,
    )  # of X, Y, Z: outcome, entry
    settings = itertools.product(bases, repeat=qubits)
    vectors = torch.stack([functools.reduce(torch.kron, setting) for setting in settings])
    real, imaginary = vectors.real, vectors.imag
    # <o|y> = conj(o) . y
    return torch.stack(
        [torch.cat([real, imaginary], dim=-1), torch.cat([-imaginary, real], dim=-1)], dim=1
    ).contiguous()


@dataclass(frozen=True)
class StateTomography(TaskFamily):
    """A random state of some qubits, ``shots`` measurements in each product basis; mini-batches are bases.

    The state's largest eigenvalue is twice the next, and so on. The reference is what descent in float64 reaches from
    the true state: the best known value. The metric is the Hilbert-Schmidt distance to the true state.
    """

    qubits: int
    rank: int = 2
    shots: int = 200
    batch_size: int = 9

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"tomography of {self.qubits} qubits {2 * 2**self.qubits}x{self.rank}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return tomography_problem(2**self.qubits, self.rank)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw states and outcomes."""
        d, vectors = 2**self.qubits, pauli_vectors(self.qubits)
        parts = torch.randn(2, count, d, self.rank, generator=generator)
        columns = torch.linalg.qr(torch.complex(parts[0], parts[1]))[0]
        weights = 0.5 ** torch.arange(self.rank)
        columns = columns * (weights / weights.sum()).sqrt()
        truth = torch.cat([columns.real, columns.imag], dim=-2)
        p = torch.func.vmap(outcome_probabilities, in_dims=(0, None))(truth, vectors)
        draws = torch.multinomial(p.flatten(0, 1), self.shots, replacement=True, generator=generator)
        counts = torch.zeros(len(draws), d).scatter_add_(1, draws, torch.ones(draws.shape))
        frequencies = (counts / self.shots).reshape(count, -1, d)
        data = {
            "frequencies": frequencies,
            "entropy": -torch.xlogy(frequencies, frequencies).sum(dim=-1),
            **once_per_task({"vectors": vectors}, count),
        }
        return {**data, "truth": truth, "reference": reference_by_descent(self.problem, {"y": truth}, data).float()}

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Draw bases, with replacement."""
        return draw_rows(data, ("vectors", "frequencies", "entropy"), self.batch_size, generator, steps)
