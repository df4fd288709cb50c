"""Intrinsic Muon (iMuon): steepest descent in the spectral norm that each manifold's own metric defines.

Source: Li, Pandey, Sah, Han, Mostajeran, Jawanpuria, Mishra, "Intrinsic Muon: spectral optimization on Riemannian
matrix manifolds", 2026 (arXiv 2605.09238); the formulas are those of its published implementation
(1bang118/manifold-intrinsic-muon). In coordinates in which the metric is Euclidean the direction is the polar factor of
the gradient, and stays tangent without an inner loop. With the Euclidean gradient G at X

    Stiefel      D = X msign(skew(X^T G)) + msign((I - X X^T) G),    each block on its own: the canonical metric's
    Grassmann    D = msign((I - X X^T) G)
    SPD          D = S sign(S sym(G) S) S,    S = X^{1/2},

and X <- R_X(-lr D): by the polar factor, on SPD by the exponential map, whatever retraction the manifold has. Every
singular value of D in those coordinates is 1 or 0, so ``lr`` has to decay to converge. On SPD a step multiplies X by
factors of e^lr and e^-lr.

msign is that of :mod:`~subspace_meta.optimizers.spel`: like the published one it leaves singular values of 0 at 0 (a
skew matrix of odd size has one). A running mean of gradients is ours for Stiefel, Grassmann and SPD: the published
experiments there have none. Cost: on Stiefel 8dp^2 + 12p^3 flops for each of ``steps``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from subspace_meta.geometry import Geometry, Params
from subspace_meta.manifolds import SPD, Grassmann, Manifold, PolarNewtonSchulz
from subspace_meta.manifolds.base import skew_part, subtract_product, symmetric_part, without_rounding
from subspace_meta.manifolds.matrix_functions import symmetric_square_root
from subspace_meta.manifolds.spd import SPDExponential
from subspace_meta.optimizers.base import (
    ORTHONORMAL,
    check_decay,
    check_manifolds,
    check_rate,
    check_start,
    gather_euclidean,
)
from subspace_meta.optimizers.spel import matrix_sign

_POLAR, _EXPONENTIAL = PolarNewtonSchulz(), SPDExponential()


class IntrinsicMuonState(NamedTuple):
    """Per group the running mean of the Euclidean gradients; none without momentum."""

    momentum: tuple[Tensor, ...]


@dataclass(frozen=True)
class IntrinsicMuon:
    """Intrinsic Muon, on Stiefel (either metric), orthogonal matrices, rotations, Grassmann and SPD.

    Attributes:
        geometry: where the parameters live.
        lr: learning rate; a float or a scalar tensor.
        momentum: decay of the running mean of gradients, in [0, 1); 0, as published, keeps no buffer.
        steps: iterations of each polar factor.

    Raises:
        ValueError: a setting is out of its range, or a parameter lives elsewhere (Euclidean ones included).
    """

    geometry: Geometry
    lr: float | Tensor
    momentum: float = 0.0
    steps: int = 14

    def __post_init__(self) -> None:
        check_rate(self.lr)
        check_decay("momentum", self.momentum)
        check_manifolds(self.geometry, "intrinsic Muon", (*ORTHONORMAL, Grassmann, SPD))
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def init(self, params: Mapping[str, Tensor]) -> IntrinsicMuonState:
        """Return zero momentum."""
        check_start(self.geometry, params)
        points = self.geometry.gather(params) if self.momentum else []
        return IntrinsicMuonState(tuple(map(torch.zeros_like, points)))

    def update(
        self,
        grads: Mapping[str, Tensor],
        state: IntrinsicMuonState,
        params: Mapping[str, Tensor],
        value: Tensor | None = None,
    ) -> tuple[Params, IntrinsicMuonState]:
        """Take one step; see :meth:`subspace_meta.optimizers.base.Optimizer.update`."""
        points = self.geometry.gather(params)
        gradients = [g.to(x.dtype) for x, g in zip(points, gather_euclidean(self.geometry, grads), strict=True)]
        if self.momentum:
            gradients = [torch.lerp(m, g, 1 - self.momentum) for m, g in zip(state.momentum, gradients, strict=True)]
            state = IntrinsicMuonState(tuple(gradients))
        groups = zip(self.geometry.groups, points, gradients, strict=True)
        return self.geometry.scatter([self._move(group.manifold, x, g) for group, x, g in groups]), state

    def _move(self, manifold: Manifold, x: Tensor, g: Tensor) -> Tensor:
        if isinstance(manifold, SPD):
            root = symmetric_square_root(x)
            sign = matrix_sign(symmetric_part(root @ symmetric_part(g) @ root), self.steps)
            return _EXPONENTIAL(x, -self.lr * (root @ sign @ root))
        inner = x.mT @ g
        direction = torch.zeros_like(x)
        if x.shape[-2] > x.shape[-1]:
            direction = matrix_sign(without_rounding(subtract_product(g, x, inner), g), self.steps)
        if not isinstance(manifold, Grassmann):
            direction = direction + x @ matrix_sign(without_rounding(skew_part(inner), g), self.steps)
        return _POLAR(x, -self.lr * direction)
