"""Riemannian stochastic gradient descent, with heavy-ball or Nesterov momentum if wanted.

Source: Bonnabel, "Stochastic gradient descent on Riemannian manifolds", IEEE TAC 58 (2013); the momentum is Polyak's
(1964), carried along by the manifold's transport. Nesterov's variant is taken in the form of Sutskever et al., "On the
importance of initialization and momentum in deep learning", ICML 2013, rewritten for the shifted variable, as in
torch.optim.SGD: gradients are taken where the parameters are, and the step looks one momentum step ahead. Cost:
projection and retraction; with momentum one buffer and one more projection (the transport).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from subspace_meta.geometry import Geometry, Params
from subspace_meta.optimizers.base import check_decay, check_rate, check_start, gather_gradients, retract_all


class RSGDState(NamedTuple):
    """One momentum buffer per group; none without momentum."""

    momentum: tuple[Tensor, ...]


@dataclass(frozen=True)
class RSGD:
    """M <- transport(momentum M) + grad f(X), X <- Retr_X(-lr M); Nesterov: X <- Retr_X(-lr (grad f(X) + momentum M)).

    Attributes:
        geometry: where the parameters live.
        lr: learning rate; a float or a scalar tensor.
        momentum: heavy-ball coefficient in [0, 1); 0 keeps no buffer.
        nesterov: look ahead by one momentum step; needs ``momentum``.

    Raises:
        ValueError: a setting is out of its range.
    """

    geometry: Geometry
    lr: float | Tensor
    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        check_rate(self.lr)
        check_decay("momentum", self.momentum)
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0, got 0.0")

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
        buffers, directions = [], []
        for m, r in zip(state.momentum, gradients, strict=True):
            m = self.momentum * m + r
            buffers.append(m)
            directions.append(r + self.momentum * m if self.nesterov else m)
        moved = retract_all(self.geometry, points, (-self.lr * v for v in directions))
        carried = [
            group.manifold.transport(x, y, m)
            for group, x, y, m in zip(self.geometry.groups, points, moved, buffers, strict=True)
        ]
        return self.geometry.scatter(moved), RSGDState(tuple(carried))
