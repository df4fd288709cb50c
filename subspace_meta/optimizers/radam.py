"""Riemannian Adam and AMSGrad: momentum with transport, and one second moment per matrix.

Source: Becigneul and Ganea, "Riemannian adaptive optimization methods", ICLR 2019 (here, as in their algorithm for
product manifolds, one adaptive scalar for each factor: the squared norm of its Riemannian gradient). The squared norm
is divided by the number of entries, so that a learning rate means the same for every size; with that the step is
Adam's of Kingma and Ba, 2015, with a shared denominator.

RAMSGrad, in the same paper (its figure 1a), divides by the largest second moment so far. There it has no bias
correction; here it has Adam's, the maximum being taken before the correction, as in torch.optim.Adam(amsgrad=True).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from subspace_meta.adapter.features import TINY
from subspace_meta.geometry import Geometry, Params
from subspace_meta.optimizers.base import check_rate, check_start, gather_gradients


class RAdamState(NamedTuple):
    """Step count, first moments (tangent at the current point), second moments (one scalar a matrix), their maxima.

    The maxima are there with ``amsgrad`` only.
    """

    step: Tensor
    momentum: tuple[Tensor, ...]
    energy: tuple[Tensor, ...]
    peak: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class RAdam:
    """Riemannian Adam.

    Attributes:
        geometry: where the parameters live.
        lr: learning rate; a float or a scalar tensor.
        betas: decay of the first and of the second moment.
        eps: added to the square root of the second moment; relative to the gradient's scale it should be negligible.
        amsgrad: divide by the largest second moment so far: RAMSGrad.

    Raises:
        ValueError: a setting is out of its range.
    """

    geometry: Geometry
    lr: float | Tensor
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    amsgrad: bool = False

    def __post_init__(self) -> None:
        check_rate(self.lr)
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas}")

    def init(self, params: Mapping[str, Tensor]) -> RAdamState:
        """Return zero moments."""
        check_start(self.geometry, params)
        points = self.geometry.gather(params)
        step = torch.zeros((), dtype=points[0].dtype, device=points[0].device)
        energy = tuple(x.new_zeros(x.shape[:-2]) for x in points)
        peak = tuple(map(torch.zeros_like, energy)) if self.amsgrad else ()
        return RAdamState(step, tuple(map(torch.zeros_like, points)), energy, peak)

    def update(
        self, grads: Mapping[str, Tensor], state: RAdamState, params: Mapping[str, Tensor], value: Tensor | None = None
    ) -> tuple[Params, RAdamState]:
        """Take one step; see :meth:`subspace_meta.optimizers.base.Optimizer.update`."""
        beta1, beta2 = self.betas
        points, gradients = gather_gradients(self.geometry, params, grads)
        step = state.step + 1
        correction1 = 1 - beta1**step
        correction2 = 1 - beta2**step
        moved, momenta, energies, peaks = [], [], [], []
        groups = zip(self.geometry.groups, points, gradients, state.momentum, state.energy, strict=True)
        for i, (group, x, r, momentum, energy) in enumerate(groups):
            momentum = torch.lerp(momentum, r, 1 - beta1)
            energy = beta2 * energy + (1 - beta2) * group.manifold.inner(x, r, r) / (r.shape[-2] * r.shape[-1])
            divisor = energy
            if self.amsgrad:
                divisor = torch.maximum(state.peak[i], energy)
                peaks.append(divisor)
            # TINY keeps the root's derivative finite at a gradient of zero.
            denominator = (divisor / correction2 + TINY).sqrt() + self.eps
            tangent = (-self.lr / correction1 / denominator)[..., None, None] * momentum
            y = group.manifold.retract(x, tangent)
            moved.append(y)
            momenta.append(group.manifold.transport(x, y, momentum))
            energies.append(energy)
        return self.geometry.scatter(moved), RAdamState(step, tuple(momenta), tuple(energies), tuple(peaks))
