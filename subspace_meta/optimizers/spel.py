"""SPEL, spectral steepest descent on Stiefel: Muon for matrices with orthonormal columns.

Source: Yang and Lai, "Manifold constrained steepest descent", 2026 (arXiv 2601.21487): the steepest direction in the
spectral norm is the polar factor msign of the Riemannian gradient, and the way back is the polar factor again,

    M <- beta M + (1 - beta) G,    X <- msign(X - lr msign(P_X(M))),    msign(Y) = Y (Y^T Y)^{-1/2}.

M holds Euclidean gradients and is projected at each new point, so nothing is transported. All singular values of the
direction are 1: every column moves by about ``lr``, whatever the gradient's scale, and ``lr`` has to decay to converge.

Inferred is how msign is computed: by ``steps`` iterations Y <- Y (15 I - 10 Y^T Y + 3 (Y^T Y)^2) / 8 (the [2/0] Pade
iteration of Kenney and Laub 1991, third order) from Y / |Y|_F. It is smooth, and a singular value of 0 stays 0, where
the polar factor is not unique; one of s |Y|_F with s < 1.9^(3 - ``steps``) is not brought to 1 in full. Cost:
8dp^2 + 2p^3 flops for each of 2 ``steps``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from subspace_meta.adapter.features import TINY
from subspace_meta.geometry import Geometry, Params
from subspace_meta.manifolds.base import euclidean_inner, gram, identity_like, without_rounding
from subspace_meta.optimizers.base import check_decay, check_manifolds, check_rate, check_start, gather_euclidean


def matrix_sign(y: Tensor, steps: int) -> Tensor:
    """Return the polar factor of a ``(..., d, p)`` tensor: singular values become 1, those of 0 stay 0."""
    # Twice, because the square of a small norm underflows; the first division needs no derivative: the scale cancels.
    y = y / y.detach().abs().amax(dim=(-2, -1), keepdim=True).clamp(min=TINY)
    y = y / (euclidean_inner(y, y)[..., None, None] + TINY).sqrt()
    for _ in range(steps):
        k = gram(y)
        y = y @ (1.875 * identity_like(y) - 1.25 * k + 0.375 * (k @ k))
    return y


class SPELState(NamedTuple):
    """Per group the running mean of the Euclidean gradients."""

    momentum: tuple[Tensor, ...]


@dataclass(frozen=True)
class SPEL:
    """Spectral steepest descent, on Stiefel (either metric: both project alike), orthogonal matrices and rotations.

    Attributes:
        geometry: where the parameters live.
        lr: learning rate below 1, where X - lr D cannot be singular; a float or a scalar tensor.
        momentum: decay of the running mean of gradients, in [0, 1).
        steps: iterations of each polar factor.

    Raises:
        ValueError: a setting is out of its range, or a parameter lives elsewhere (Euclidean ones included).
    """

    geometry: Geometry
    lr: float | Tensor
    momentum: float = 0.9
    steps: int = 14

    def __post_init__(self) -> None:
        check_rate(self.lr)
        check_decay("momentum", self.momentum)
        check_manifolds(self.geometry, "SPEL")
        if not isinstance(self.lr, Tensor) and self.lr >= 1.0:
            raise ValueError(f"the learning rate of SPEL must be below 1, got {self.lr}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def init(self, params: Mapping[str, Tensor]) -> SPELState:
        """Return zero momentum."""
        check_start(self.geometry, params)
        return SPELState(tuple(map(torch.zeros_like, self.geometry.gather(params))))

    def update(
        self, grads: Mapping[str, Tensor], state: SPELState, params: Mapping[str, Tensor], value: Tensor | None = None
    ) -> tuple[Params, SPELState]:
        """Take one step; see :meth:`subspace_meta.optimizers.base.Optimizer.update`."""
        points, gradients = self.geometry.gather(params), gather_euclidean(self.geometry, grads)
        moved, momenta = [], []
        for group, x, g, m in zip(self.geometry.groups, points, gradients, state.momentum, strict=True):
            m = torch.lerp(m, g.to(x.dtype), 1 - self.momentum)
            direction = matrix_sign(without_rounding(group.manifold.project(x, m), m), self.steps)
            moved.append(matrix_sign(x - self.lr * direction, self.steps))
            momenta.append(m)
        return self.geometry.scatter(moved), SPELState(tuple(momenta))
