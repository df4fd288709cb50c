"""Constrained RMSProp: every entry of the Riemannian gradient divided by its own running root mean square.

Source: Kumar Roy, Mhammedi, Harandi, "Geometry aware constrained optimization techniques for deep learning", CVPR 2018,
the entry-wise baseline of RASA (Kasai, Jawanpuria, Mishra, ICML 2019). The second moment is *per entry*,

    V <- beta V + (1 - beta) R * R,    D = R / (sqrt(V) + eps),    X <- Retr_X(-lr P_X(D)),

with R = grad f(X) and no bias correction, in the manifold's Euclidean coordinates. Inferred, because the paper was not
at hand: V is kept where it is. A public implementation (TensorFlow RiemOpt) projects the squares and transports V; that
makes entries negative, whose roots are NaN. With one second moment per matrix the method is
:class:`~subspace_meta.optimizers.radam.RAdam` with ``betas=(0, beta)``, but for the bias correction.

Cost: projection and retraction, one more projection and one buffer of the parameter's size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from subspace_meta.adapter.features import TINY
from subspace_meta.geometry import Geometry, Params
from subspace_meta.optimizers.base import check_decay, check_rate, check_start, gather_gradients, retract_all


class CRMSPropState(NamedTuple):
    """Per group the running mean of the squared entries, ``(..., d, p)``."""

    energy: tuple[Tensor, ...]


@dataclass(frozen=True)
class CRMSProp:
    """Constrained RMSProp, on every manifold.

    Attributes:
        geometry: where the parameters live.
        lr: learning rate; a float or a scalar tensor.
        beta: decay of the second moment.
        eps: added to the root of the second moment.

    Raises:
        ValueError: a setting is out of its range.
    """

    geometry: Geometry
    lr: float | Tensor
    beta: float = 0.9
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_rate(self.lr)
        check_decay("beta", self.beta)

    def init(self, params: Mapping[str, Tensor]) -> CRMSPropState:
        """Return zero second moments."""
        check_start(self.geometry, params)
        return CRMSPropState(tuple(map(torch.zeros_like, self.geometry.gather(params))))

    def update(
        self,
        grads: Mapping[str, Tensor],
        state: CRMSPropState,
        params: Mapping[str, Tensor],
        value: Tensor | None = None,
    ) -> tuple[Params, CRMSPropState]:
        """Take one step; see :meth:`subspace_meta.optimizers.base.Optimizer.update`."""
        points, gradients = gather_gradients(self.geometry, params, grads)
        energies, tangents = [], []
        for group, x, r, energy in zip(self.geometry.groups, points, gradients, state.energy, strict=True):
            r = group.manifold.coordinates(x, r)
            energy = self.beta * energy + (1 - self.beta) * r.square()
            # TINY keeps the root's derivative finite at an entry of zero.
            direction = r / ((energy + TINY).sqrt() + self.eps)
            tangents.append(-self.lr * group.manifold.project(x, group.manifold.from_coordinates(x, direction)))
            energies.append(energy)
        return self.geometry.scatter(retract_all(self.geometry, points, tangents)), CRMSPropState(tuple(energies))
