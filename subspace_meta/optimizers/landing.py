"""The landing algorithm: descent among orthonormal matrices without a retraction, at a controlled distance from them.

Source: Ablin and Peyre, "Fast and accurate optimization on the orthogonal manifold without retraction", AISTATS 2022;
on Stiefel, with the safe step used here, Ablin, Vary, Gao, Absil, "Infeasible deterministic, stochastic, and
variance-reduction algorithms for optimization under orthogonality constraints", 2023 (arXiv 2303.16510). With
Delta = X^T X - I and the Euclidean gradient G,

    X <- X - eta L,    L = skew(G X^T) X + lambda X Delta.

Since X^T skew(G X^T) X is skew, Delta <- Delta - 2 eta lambda Delta (I + Delta) + eta^2 L^T L. For eta <= 1/(2 lambda)
and Frobenius norms delta = |Delta| < 1 and g = |L| the new distance is at most

    delta - 2 eta lambda delta (1 - delta) + eta^2 g^2,

which is epsilon at the positive root of a quadratic in eta: the *safe step*. The step is the smaller one of ``lr``, of
the safe step, and of 1/(2 lambda). Cost: 10dp^2 flops, only products; no state.
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
from subspace_meta.optimizers.base import check_manifolds, check_rate, check_start, gather_euclidean


def relative_gradient(x: Tensor, euclidean_gradient: Tensor, gram_matrix: Tensor) -> Tensor:
    """Return skew(G X^T) X = (G X^T X - X G^T X) / 2, given X^T X; all in the type of ``x``. 6dp^2 flops.

    It is tangent to the surface X^T X = constant on which X lies, near the orthonormal matrices as on them. There it is
    half the gradient in the canonical metric.
    """
    g = euclidean_gradient.to(x.dtype)
    return without_rounding(0.5 * (g @ gram_matrix - x @ (g.mT @ x)), g)


class LandingState(NamedTuple):
    """Nothing: the method has no memory."""


@dataclass(frozen=True)
class Landing:
    """The landing algorithm with safe step, on Stiefel (either metric), orthogonal matrices and rotations.

    Iterates are *not* on the manifold: |X^T X - I|_F <= ``epsilon``, which bounds ``geometry.violation`` too. It falls
    to rounding as the gradient does; ``geometry.project`` ends a run that stopped before.

    Attributes:
        geometry: where the parameters live.
        lr: largest step; a float or a scalar tensor.
        attraction: lambda, the weight of the way back to the manifold.
        epsilon: bound on the distance from the manifold, in (0, 1); it holds from a start within it.

    Raises:
        ValueError: a setting is out of its range, or a parameter lives elsewhere (Euclidean ones included).
    """

    geometry: Geometry
    lr: float | Tensor
    attraction: float = 1.0
    epsilon: float = 0.5

    def __post_init__(self) -> None:
        check_rate(self.lr)
        check_manifolds(self.geometry, "landing")
        if not self.attraction > 0.0:
            raise ValueError(f"attraction must be positive, got {self.attraction}")
        if not 0.0 < self.epsilon < 1.0:
            raise ValueError(f"epsilon must be in (0, 1), got {self.epsilon}")

    def distance(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return |X^T X - I|_F of each parameter, of shape ``(...)``: what ``epsilon`` bounds."""
        matrices = {p.name: p.view.to_matrix(params[p.name]) for p in self.geometry.parameters}
        return {name: torch.linalg.matrix_norm(gram(x) - identity_like(x)) for name, x in matrices.items()}

    def init(self, params: Mapping[str, Tensor]) -> LandingState:
        """Return the empty state; the start must be feasible to 1e-3."""
        check_start(self.geometry, params)
        return LandingState()

    def update(
        self,
        grads: Mapping[str, Tensor],
        state: LandingState,
        params: Mapping[str, Tensor],
        value: Tensor | None = None,
    ) -> tuple[Params, LandingState]:
        """Take one step; see :meth:`subspace_meta.optimizers.base.Optimizer.update`."""
        points, gradients = self.geometry.gather(params), gather_euclidean(self.geometry, grads)
        moved = [self._move(x, g) for x, g in zip(points, gradients, strict=True)]
        return self.geometry.scatter(moved), state

    def _move(self, x: Tensor, euclidean_gradient: Tensor) -> Tensor:
        gram_matrix = gram(x)
        excess = gram_matrix - identity_like(x)
        # The step at the full learning rate; the safe step is then a factor, which no scale of the gradient spoils.
        step = self.lr * (relative_gradient(x, euclidean_gradient, gram_matrix) + self.attraction * (x @ excess))
        # The root needs a derivative at an orthonormal X; a step with g^2 below 1e-12 is safe anyway.
        distance = (euclidean_inner(excess, excess) + torch.finfo(x.dtype).eps ** 2).sqrt()
        # In double: the square of a step of 1e20 overflows float32, and its safe part does not.
        squared = euclidean_inner(step.double(), step.double()).clamp(min=1e-12)
        pull = self.lr * self.attraction * distance * (1.0 - distance)
        # Beyond epsilon there may be no root; then the step that comes closest is taken.
        discriminant = (pull.square() + squared * (self.epsilon - distance)).clamp(min=TINY)
        safe = ((pull + discriminant.sqrt()) / squared).to(x.dtype)
        # The smaller one of lr and 1/(2 lambda), as a factor of lr.
        bound = 1.0 / (2.0 * self.attraction * self.lr * torch.ones_like(safe)).clamp(min=1.0)
        return x - torch.minimum(safe, bound)[..., None, None] * step
