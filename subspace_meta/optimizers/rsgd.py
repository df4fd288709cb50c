"""Riemannian stochastic gradient descent, with heavy-ball momentum if wanted.

Source: Bonnabel, "Stochastic gradient descent on Riemannian manifolds", IEEE TAC 58 (2013). Cost: projection and
retraction; with momentum one buffer and one more projection (the transport).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from subspace_meta.geometry import Geometry, Params
from subspace_meta.optimizers.base import check_rate, check_start, gather_gradients, retract_all


class RSGDState(NamedTuple):
    """One momentum buffer per group; none without momentum."""

    momentum: tuple[Tensor, ...]


@dataclass(frozen=True)
class RSGD:
    """X <- Retr_X(-lr M), M <- transport(momentum M) + grad f(X).

    Attributes:
        geometry: where the parameters live.
        lr: learning rate; a float or a scalar tensor.
        momentum: heavy-ball coefficient in [0, 1); 0 keeps no buffer.
    """

    geometry: Geometry
    lr: float | Tensor
    momentum: float = 0.0

    def __post_init__(self) -> None:
        check_rate(self.lr)
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")

    def init(self, params: Mapping[str, Tensor]) -> RSGDState:
        """Return zero momentum."""
        check_start(self.geometry, params)
        points = self.geometry.gather(params) if self.momentum else []
        return RSGDState(tuple(torch.zeros_like(x) for x in points))

    def update(
        self, grads: Mapping[str, Tensor], state: RSGDState, params: Mapping[str, Tensor], value: Tensor | None = None
    ) -> tuple[Params, RSGDState]:
        """Take one step; see :meth:`subspace_meta.optimizers.base.Optimizer.update`."""
        points, gradients = gather_gradients(self.geometry, params, grads)
        if not self.momentum:
            moved = retract_all(self.geometry, points, (-self.lr * r for r in gradients))
            return self.geometry.scatter(moved), state
        buffers = [self.momentum * m + r for m, r in zip(state.momentum, gradients, strict=True)]
        moved = retract_all(self.geometry, points, (-self.lr * m for m in buffers))
        carried = [
            group.manifold.transport(x, y, m)
            for group, x, y, m in zip(self.geometry.groups, points, moved, buffers, strict=True)
        ]
        return self.geometry.scatter(moved), RSGDState(tuple(carried))
