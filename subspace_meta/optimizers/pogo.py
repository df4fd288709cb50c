"""POGO, the proximal one-step geometric orthoptimizer: a tangent step and one Newton-Schulz step back.

Source: Javaloy and Vergari, "An embarrassingly simple way to optimize orthogonal matrices at scale", 2026 (arXiv
2602.14656); facts of the step from its published implementation. With S = skew(G X^T) X, the landing algorithm's
tangent part,

    A = X - lr S,    X <- A + lambda A (I - A^T A),    lambda = 1/2,

and A^T A = X^T X + lr^2 S^T S exactly, so an orthonormal X is left by a fourth power of the step's length only. The
paper's other choice of lambda, a root of a quartic polynomial, is not here. G is the Euclidean gradient or its momentum
(the paper lets any Euclidean optimizer make it; its vector Adam is not here either).

*Ours* is the bound ``epsilon``. With e = |A^T A - I|_2 < 1 the new error is at most (3 e^2 + e^3) / 4 < e^2, so a step
shortened to |lr S|_2^2 <= sqrt(epsilon) - |X^T X - I|_2 keeps |X^T X - I|_2 <= epsilon. Where no step is that long, and
that is the paper's assumption, this changes nothing. Cost: 14dp^2 flops, 2 of them for the bound; only products.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from subspace_meta.geometry import Geometry, Params
from subspace_meta.manifolds.base import gram, identity_like, spectral_bound
from subspace_meta.manifolds.retractions import newton_schulz_step
from subspace_meta.optimizers.base import check_decay, check_manifolds, check_rate, check_start, gather_euclidean
from subspace_meta.optimizers.landing import relative_gradient


class POGOState(NamedTuple):
    """One buffer of Euclidean gradients per group; none without momentum."""

    momentum: tuple[Tensor, ...]


@dataclass(frozen=True)
class POGO:
    """POGO with lambda = 1/2, on Stiefel (either metric), orthogonal matrices and rotations.

    Iterates are close to the manifold, not on it: |X^T X - I|_2 <= ``epsilon``, which bounds ``geometry.violation``
    too, and is far less for short steps. ``geometry.project`` ends a run.

    Attributes:
        geometry: where the parameters live.
        lr: learning rate; a float or a scalar tensor.
        momentum: heavy-ball coefficient of the Euclidean gradients, in [0, 1); 0 keeps no buffer.
        epsilon: bound on the distance from the manifold, in (0, 1); longer steps are shortened.

    Raises:
        ValueError: a setting is out of its range, or a parameter lives elsewhere (Euclidean ones included).
    """

    geometry: Geometry
    lr: float | Tensor
    momentum: float = 0.0
    epsilon: float = 0.01

    def __post_init__(self) -> None:
        check_rate(self.lr)
        check_decay("momentum", self.momentum)
        check_manifolds(self.geometry, "POGO")
        if not 0.0 < self.epsilon < 1.0:
            raise ValueError(f"epsilon must be in (0, 1), got {self.epsilon}")

    def distance(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return |X^T X - I|_2 of each parameter, of shape ``(...)``: what ``epsilon`` bounds."""
        matrices = {p.name: p.view.to_matrix(params[p.name]) for p in self.geometry.parameters}
        return {name: torch.linalg.matrix_norm(gram(x) - identity_like(x), ord=2) for name, x in matrices.items()}

    def init(self, params: Mapping[str, Tensor]) -> POGOState:
        """Return zero momentum; the start must be feasible to 1e-3."""
        check_start(self.geometry, params)
        points = self.geometry.gather(params) if self.momentum else []
        return POGOState(tuple(map(torch.zeros_like, points)))

    def update(
        self, grads: Mapping[str, Tensor], state: POGOState, params: Mapping[str, Tensor], value: Tensor | None = None
    ) -> tuple[Params, POGOState]:
        """Take one step; see :meth:`subspace_meta.optimizers.base.Optimizer.update`."""
        points, directions = self.geometry.gather(params), gather_euclidean(self.geometry, grads)
        if self.momentum:
            directions = [self.momentum * m + g for m, g in zip(state.momentum, directions, strict=True)]
            state = POGOState(tuple(directions))
        moved = [self._move(x, g) for x, g in zip(points, directions, strict=True)]
        return self.geometry.scatter(moved), state

    def _move(self, x: Tensor, direction: Tensor) -> Tensor:
        gram_matrix = gram(x)
        step = -self.lr * relative_gradient(x, direction, gram_matrix)
        room = math.sqrt(self.epsilon) - spectral_bound(gram_matrix - identity_like(x))
        room = room.clamp(min=torch.finfo(x.dtype).eps)
        shorter = (room / torch.maximum(spectral_bound(gram(step)), room)).sqrt()
        return newton_schulz_step(x + shorter * step)
