"""RASA: row and column adaptive Riemannian stochastic gradient, the hand-made ancestor of subspace adaptation.

Source: Kasai, Jawanpuria, Mishra, "Riemannian adaptive stochastic gradient algorithms on matrix manifolds", ICML 2019
(arXiv 1902.01144), algorithm 1: L <- bL + (1-b) diag(R R^T)/p, C <- bC + (1-b) diag(R^T R)/d, running maxima of both,
direction diag(L)^{-1/4} R diag(C)^{-1/4} (one-sided variants: exponent -1/2), projected and retracted with step lr or
lr/sqrt(t). Statistics are taken in the manifold's Euclidean coordinates (whitened on SPD).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from subspace_kernels.reference import cross_matrix_means
from torch import Tensor

from subspace_meta.geometry import Geometry, Params
from subspace_meta.optimizers.base import check_rate, check_start, gather_gradients, retract_all


class RASAState(NamedTuple):
    """Step count; per group the averaged row and column statistics and their running maxima."""

    step: Tensor
    rows: tuple[Tensor, ...]
    columns: tuple[Tensor, ...]
    row_maxima: tuple[Tensor, ...]
    column_maxima: tuple[Tensor, ...]


@dataclass(frozen=True)
class RASA:
    """Row and column adaptive Riemannian stochastic gradient descent.

    Attributes:
        geometry: where the parameters live.
        lr: learning rate; a float or a scalar tensor.
        variant: which sides adapt: ``"L"`` rows, ``"R"`` columns, ``"LR"`` both.
        beta: decay of the statistics.
        decay: step ``lr / sqrt(t)`` instead of ``lr``.
        eps: start of the running maxima, as in the paper.
    """

    geometry: Geometry
    lr: float | Tensor
    variant: Literal["L", "R", "LR"] = "LR"
    beta: float = 0.99
    decay: bool = False
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_rate(self.lr)
        if self.variant not in ("L", "R", "LR"):
            raise ValueError(f"variant must be 'L', 'R' or 'LR', got {self.variant!r}")
        if not 0.0 <= self.beta < 1.0:
            raise ValueError(f"beta must be in [0, 1), got {self.beta}")

    def init(self, params: Mapping[str, Tensor]) -> RASAState:
        """Return zero statistics and maxima at ``eps``."""
        check_start(self.geometry, params)
        points = self.geometry.gather(params)
        rows = tuple(x.new_zeros(x.shape[:-1]) for x in points)
        columns = tuple(x.new_zeros((*x.shape[:-2], x.shape[-1])) for x in points)
        return RASAState(
            torch.zeros((), dtype=points[0].dtype, device=points[0].device),
            rows,
            columns,
            tuple(torch.full_like(value, self.eps) for value in rows),
            tuple(torch.full_like(value, self.eps) for value in columns),
        )

    def update(
        self, grads: Mapping[str, Tensor], state: RASAState, params: Mapping[str, Tensor], value: Tensor | None = None
    ) -> tuple[Params, RASAState]:
        """Take one step; see :meth:`subspace_meta.optimizers.base.Optimizer.update`."""
        points, gradients = gather_gradients(self.geometry, params, grads)
        step = state.step + 1
        lr = self.lr / step.sqrt() if self.decay else self.lr
        power = -0.25 if self.variant == "LR" else -0.5
        new_rows, new_columns, row_maxima, column_maxima, tangents = [], [], [], [], []
        for i, (group, x, r) in enumerate(zip(self.geometry.groups, points, gradients, strict=True)):
            r = group.manifold.coordinates(x, r)
            row_means, column_means = cross_matrix_means(r, r)
            rows = self.beta * state.rows[i] + (1 - self.beta) * row_means
            columns = self.beta * state.columns[i] + (1 - self.beta) * column_means
            row_maximum = torch.maximum(state.row_maxima[i], rows)
            column_maximum = torch.maximum(state.column_maxima[i], columns)
            direction = r
            if "L" in self.variant:
                direction = row_maximum.pow(power)[..., :, None] * direction
            if "R" in self.variant:
                direction = direction * column_maximum.pow(power)[..., None, :]
            tangents.append(-lr * group.manifold.project(x, group.manifold.from_coordinates(x, direction)))
            new_rows.append(rows)
            new_columns.append(columns)
            row_maxima.append(row_maximum)
            column_maxima.append(column_maximum)
        moved = retract_all(self.geometry, points, tangents)
        new_state = RASAState(step, tuple(new_rows), tuple(new_columns), tuple(row_maxima), tuple(column_maxima))
        return self.geometry.scatter(moved), new_state
