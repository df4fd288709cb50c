"""Manifold Muon: the tangent of spectral norm 1 along which the loss falls most, on Stiefel, by dual ascent.

Source: Bernstein, "Modular manifolds", Thinking Machines Lab, 2025, and its published implementation
(thinking-machines-lab/manifolds), which has the settings. The direction at W with gradient G,

    min tr(G^T A)  over  |A|_2 <= 1,  W^T A + A^T W = 0    (and -A is taken),

has the dual max -|G + 2 W L|_* over symmetric L, which is ascended from the projection of G on the tangent space:

    L_0 = -(W^T G + G^T W) / 4,   A_k = msign(G + 2 W L_k),   L_{k+1} = L_k - alpha (1 - k/K) (W^T A_k + A_k^T W)

for k < K, and the step is W <- msign(W - lr A_{K-1}). With K = 1 it is :class:`~subspace_meta.optimizers.SPEL`, whose
direction leaves the tangent space; each iteration brings it closer. The published code stops when the root mean square
of W^T A + A^T W is below 1e-6; here K is fixed.

*Ours* is the scale: G is divided by the root mean square of the singular values of its tangent part, so that ``alpha``
means the same for every loss. The published code (``relative=False``, ``alpha=0.01``) takes G as it is: ``alpha``
drowns a small tangent part and does nothing to a large one. On random 64 x 16 problems the root mean square of
W^T A + A^T W after K = 100 is 4e-2 with SPEL's direction, 3e-2 as published (entries of G of size 1), and 6e-9 with the
settings here. msign is that of SPEL, where the published code has ten iterations of Polar Express in
bfloat16. An ADMM solver in place of the dual ascent (Buchanan, "Speeding up manifold Muon with ADMM", 2025) is
reported to be more than twice as fast; it is not here. Cost: 8dp^2 + 2p^3 flops for each of (K + 1) ``steps``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from subspace_meta.adapter.features import TINY
from subspace_meta.geometry import Geometry, Params
from subspace_meta.manifolds.base import euclidean_inner, symmetric_part, without_rounding
from subspace_meta.manifolds.stiefel import stiefel_projection
from subspace_meta.optimizers.base import check_decay, check_manifolds, check_rate, check_start, gather_euclidean
from subspace_meta.optimizers.spel import matrix_sign


class ManifoldMuonState(NamedTuple):
    """Per group the running mean of the Euclidean gradients; none without momentum."""

    momentum: tuple[Tensor, ...]


@dataclass(frozen=True)
class ManifoldMuon:
    """Manifold Muon, on Stiefel (either metric), orthogonal matrices and rotations.

    Attributes:
        geometry: where the parameters live.
        lr: learning rate below 1, where W - lr A cannot be singular; a float or a scalar tensor. It has to decay to
            converge: no step is shorter.
        momentum: decay of the running mean of gradients, in [0, 1); 0, as published, keeps no buffer.
        iterations: K of the dual ascent.
        alpha: its first step.
        relative: measure the gradient by its tangent part.
        steps: iterations of each polar factor.

    Raises:
        ValueError: a setting is out of its range, or a parameter lives elsewhere (Euclidean ones included).
    """

    geometry: Geometry
    lr: float | Tensor = 0.1
    momentum: float = 0.0
    iterations: int = 100
    alpha: float = 0.1
    relative: bool = True
    steps: int = 14

    def __post_init__(self) -> None:
        check_rate(self.lr)
        check_decay("momentum", self.momentum)
        check_manifolds(self.geometry, "manifold Muon")
        if not isinstance(self.lr, Tensor) and self.lr >= 1.0:
            raise ValueError(f"the learning rate of manifold Muon must be below 1, got {self.lr}")
        if not self.alpha > 0.0:
            raise ValueError(f"alpha must be positive, got {self.alpha}")
        for name in ("iterations", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def init(self, params: Mapping[str, Tensor]) -> ManifoldMuonState:
        """Return zero momentum."""
        check_start(self.geometry, params)
        points = self.geometry.gather(params) if self.momentum else []
        return ManifoldMuonState(tuple(map(torch.zeros_like, points)))

    def update(
        self,
        grads: Mapping[str, Tensor],
        state: ManifoldMuonState,
        params: Mapping[str, Tensor],
        value: Tensor | None = None,
    ) -> tuple[Params, ManifoldMuonState]:
        """Take one step; see :meth:`subspace_meta.optimizers.base.Optimizer.update`."""
        points = self.geometry.gather(params)
        gradients = [g.to(x.dtype) for x, g in zip(points, gather_euclidean(self.geometry, grads), strict=True)]
        if self.momentum:
            gradients = [torch.lerp(m, g, 1 - self.momentum) for m, g in zip(state.momentum, gradients, strict=True)]
            state = ManifoldMuonState(tuple(gradients))
        moved = [
            matrix_sign(x - self.lr * self.direction(x, g), self.steps) for x, g in zip(points, gradients, strict=True)
        ]
        return self.geometry.scatter(moved), state

    def direction(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Return A for ``(..., d, p)`` points and gradients; 0 where the gradient is normal to the manifold."""
        # G + 2 W L_0, and from here on L - L_0: the normal part of G, which may be far larger, cancels once.
        tangent = without_rounding(stiefel_projection(x, gradient), gradient)
        if self.relative:
            # Twice, because the square of a small norm underflows.
            tangent = tangent / tangent.detach().abs().amax(dim=(-2, -1), keepdim=True).clamp(min=TINY)
            mean = euclidean_inner(tangent, tangent)[..., None, None] / x.shape[-1]
            tangent = tangent / (mean + TINY).sqrt()
        direction = matrix_sign(tangent, self.steps)
        dual = torch.zeros_like(x.mT @ x)
        for k in range(self.iterations - 1):
            error = 2.0 * symmetric_part(x.mT @ direction)
            dual = dual - self.alpha * (1.0 - k / self.iterations) * error
            direction = matrix_sign(tangent + 2.0 * (x @ dual), self.steps)
        return direction
