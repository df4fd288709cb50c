"""The max-cut relaxation: one unit vector for each node, neighbours far apart.

minimise the mean over edges of (1 + x_i^T x_j) / 2, a share of uncut edges, over X in the oblique manifold (p, n).
Sources: Goemans and Williamson, "Improved approximation algorithms for maximum cut", J. ACM 42 (1995); Burer and
Monteiro, "A nonlinear programming algorithm for solving semidefinite programs via low-rank factorization", Math.
Program. 95 (2003). For p > sqrt(2n) no bad local minimum exists for almost every graph's weights (Boumal, Voroninski,
Bandeira, NeurIPS 2016), so descent finds the value of the semidefinite program; the tests check its dual certificate.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from subspace_meta.geometry import Geometry, MatrixView, Params, Rule
from subspace_meta.manifolds import Oblique
from subspace_meta.tasks.base import Batch, Data, Problem, TaskFamily, repeat
from subspace_meta.tasks.references import reference_by_descent


def uncut_share(params: Params, batch: Batch) -> Tensor:
    """Return the mean over edges of (1 + x_i^T x_j) / 2 for the adjacency ``graph`` ``(n, n)``."""
    x, graph = params["x"], batch["graph"]
    return 0.5 + 0.5 * (x * (x @ graph)).sum() / graph.sum()


def rounded_cut(params: Params, data: Data) -> Tensor:
    """Return the largest share of edges that one of the coordinate hyperplanes cuts."""
    signs = torch.where(params["x"] >= 0.0, 1.0, -1.0).to(params["x"].dtype)
    graph = data["graph"]
    return (0.5 - 0.5 * (signs * (signs @ graph)).sum(dim=-1) / graph.sum()).amax()


@functools.cache
def max_cut_problem(n: int, p: int) -> Problem:
    """Return the problem of one size."""
    # The view is given: the default one turns a wide matrix, and here the columns are the unit vectors.
    rule = Rule(Oblique(), MatrixView("p n -> p n"))
    geometry = Geometry.from_rules({"x": torch.empty(p, n, device="meta")}, {"x": rule})
    return Problem(geometry, uncut_share, uncut_share, rounded_cut)


@dataclass(frozen=True)
class MaxCut(TaskFamily):
    """Max-cut relaxation of a random graph of n nodes in which each pair is joined with probability ``density``.

    The reference is the value of the semidefinite program, by descent in float64. The metric is the share of edges in
    the best of p cuts by coordinate hyperplanes.
    """

    n: int
    p: int
    density: float = 0.2

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"max-cut relaxation {self.p}x{self.n}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return max_cut_problem(self.n, self.p)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw graphs."""
        joined = torch.rand(count, self.n, self.n, generator=generator, device=generator.device) < self.density
        upper = torch.triu(joined, diagonal=1).float()
        data = {"graph": upper + upper.mT}
        start = Oblique().random_point((count, self.p, self.n), generator, device=generator.device)
        return {**data, "reference": reference_by_descent(self.problem, {"x": start}, data, 2000).float()}

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Return the graph at every step."""
        return repeat(data, ("graph",), steps)
