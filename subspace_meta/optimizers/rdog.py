"""RDoG, RDoWG and NRDoG: step sizes from the distance that was travelled, over the gradients that were seen.

Source: Dodd, Sharrock, Nemeth, "Learning-rate-free stochastic optimization over Riemannian manifolds", ICML 2024 (arXiv
2406.02296); order and constants from its published implementation. With gradients g_i at x_i, i = 0, 1, ...,

    d_t = max(epsilon, max_{i <= t} dist(x_0, x_i)),    x_{t+1} = Exp(-eta_t g_t),    w_t = d_t^2 / zeta(d_t),

    RDoG     eta_t = sqrt(w_t) / (sqrt(sum_{i <= t} |g_i|^2) + eps)
    RDoWG    eta_t = w_t / (sqrt(sum_{i <= t} w_i |g_i|^2) + eps)
    NRDoG    eta_t = sqrt(w_t) / (sqrt(t + 1) |g_t| + eps)

where zeta(d) = sqrt|k| d / tanh(sqrt|k| d) for a lower bound k < 0 of the curvature, and 1 otherwise. Norms and
distances are those of the product of all parameters: one step size for the run, with the least of their bounds k.

A step is no longer than d_t (RDoWG: than d_t again), so d_t can double with every step, and the ``initial`` distance,
far too small on purpose, is left behind in tens of steps. The papers' guarantees are for an average of the iterates;
this returns the iterates. Cost: the start is kept, one distance and one exponential map a step: on Grassmann, rotations
and SPD a decomposition of p x p.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from subspace_meta.adapter.features import TINY
from subspace_meta.geometry import Geometry, Params
from subspace_meta.optimizers.base import check_rate, check_start, gather_gradients
from subspace_meta.optimizers.runs import curvature_bound, distance, has_distance, inner, move

Variant = Literal["RDoG", "RDoWG", "NRDoG"]


class RDoGState(NamedTuple):
    """Step count; largest distance from the start; sum of (weighted) squared gradient norms; the start, per group."""

    step: Tensor
    travelled: Tensor
    energy: Tensor
    start: tuple[Tensor, ...]


@dataclass(frozen=True)
class RDoG:
    """Distance over gradients: no learning rate to choose.

    On Stiefel, where no distance is known in closed form, the chord stands for it (see
    :mod:`~subspace_meta.optimizers.runs`): a lower bound, so steps are somewhat shorter. Derivatives of the new
    parameters take the distance for a constant.

    Attributes:
        geometry: where the parameters live.
        lr: a factor of the step, for schedules; a float or a scalar tensor. 1 is the published method.
        variant: ``"RDoG"``, ``"RDoWG"`` (weighted by the distance: longer steps) or ``"NRDoG"`` (normalised gradients,
            steps as 1/sqrt(t)).
        initial: epsilon, the distance that is taken for granted before the first step; a float or a scalar tensor.
        eps: added to the denominators; relative to the gradient's scale (in RDoWG ``initial`` times that) it should be
            negligible.
        curvature: k; ``None``: the least bound of the manifolds, and 0 for those that are not of this library. 0
            leaves zeta at 1.
        geodesic: move along geodesics, as published; otherwise by each manifold's own retraction.

    Raises:
        ValueError: a setting is out of its range, or a parameter is on a manifold without a distance.
    """

    geometry: Geometry
    lr: float | Tensor = 1.0
    variant: Variant = "RDoG"
    initial: float | Tensor = 1e-6
    eps: float = 1e-8
    curvature: float | None = None
    geodesic: bool = True

    def __post_init__(self) -> None:
        check_rate(self.lr)
        if self.variant not in get_args(Variant):
            raise ValueError(f"variant must be 'RDoG', 'RDoWG' or 'NRDoG', got {self.variant!r}")
        if not isinstance(self.initial, Tensor) and not 0.0 < self.initial < math.inf:
            raise ValueError(f"initial must be positive and finite, got {self.initial}")
        for parameter in self.geometry.parameters:
            if not has_distance(parameter.manifold):
                raise ValueError(
                    f"{self.variant} needs the distance from the start; parameter {parameter.name!r} is on "
                    f"{parameter.manifold.name}, which has none here: give it to another optimizer"
                )

    def init(self, params: Mapping[str, Tensor]) -> RDoGState:
        """Return no distance travelled but ``initial``, no gradients seen, and a copy of the start."""
        check_start(self.geometry, params)
        start = tuple(x.detach().clone() for x in self.geometry.gather(params))
        zero = torch.zeros((), dtype=start[0].dtype, device=start[0].device)
        return RDoGState(zero, zero + self.initial, zero.clone(), start)

    def update(
        self, grads: Mapping[str, Tensor], state: RDoGState, params: Mapping[str, Tensor], value: Tensor | None = None
    ) -> tuple[Params, RDoGState]:
        """Take one step; see :meth:`subspace_meta.optimizers.base.Optimizer.update`."""
        points, lazily = gather_gradients(self.geometry, params, grads)
        gradients = list(lazily)
        step = state.step + 1
        travelled = torch.maximum(state.travelled, distance(self.geometry, state.start, points))
        squared = inner(self.geometry, points, gradients, gradients)
        weight = travelled.square() / self._zeta(travelled)
        energy = state.energy + (weight * squared if self.variant == "RDoWG" else squared)
        # TINY keeps the root's derivative finite at a gradient of zero.
        if self.variant == "RDoWG":
            size = weight / ((energy + TINY).sqrt() + self.eps)
        elif self.variant == "RDoG":
            size = weight.sqrt() / ((energy + TINY).sqrt() + self.eps)
        else:
            size = weight.sqrt() / ((step * (squared + TINY)).sqrt() + self.eps)
        moved = move(self.geometry, points, [-(self.lr * size).to(r.dtype) * r for r in gradients], self.geodesic)
        return self.geometry.scatter(moved), RDoGState(step, travelled, energy, state.start)

    def _zeta(self, travelled: Tensor) -> Tensor:
        bound = self.curvature
        if bound is None:
            bound = min(curvature_bound(p.manifold) for p in self.geometry.parameters)
        if bound >= 0.0:
            return torch.ones_like(travelled)
        scaled = math.sqrt(-bound) * travelled
        return scaled / scaled.tanh()
