"""Averages of iterates: where noise limits a method, the mean of its last points is better than the last one.

Source: Shamir and Zhang, "Stochastic gradient descent for non-smooth optimization", ICML 2013, section 4: polynomial
decay, xbar_t = (1 - w_t) xbar_{t-1} + w_t x_t with w_t = (eta + 1) / (t + eta), which looks back over about
t / (eta + 1) steps at any time; eta = 3 as in their experiments. On a manifold the mean is taken in the surrounding
space and handed out as the nearest point (the *extrinsic* mean: Bhattacharya and Patrangenaru, "Large sample theory of
intrinsic and extrinsic sample means on manifolds", Ann. Statist. 31, 2003). It does not enter the steps: the iterates
are those of the method. On Grassmann the mean is that of the bases, which is right as long as the retraction does not
turn them (a polar factor does not). Cost: a copy of the parameters, one pass over them a step, and one ``nearest`` for
each time that the average is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor

from subspace_meta.geometry import Geometry, Params
from subspace_meta.manifolds import Manifold
from subspace_meta.optimizers.base import Optimizer, check_order


class AveragingState(NamedTuple):
    """Step count, the method's own state, and per group the mean in the surrounding space."""

    step: Tensor
    method: Any
    mean: tuple[Tensor, ...]


@dataclass(frozen=True)
class Averaging:
    """A method with an average of its iterates beside it.

    Attributes:
        method: the optimizer whose iterates are averaged.
        power: eta, at least 0; 0 is the mean of all iterates.

    Raises:
        ValueError: ``power`` is negative.
    """

    method: Optimizer
    power: float = 3.0

    def __post_init__(self) -> None:
        if not self.power >= 0.0:
            raise ValueError(f"power must be at least 0, got {self.power}")

    @property
    def geometry(self) -> Geometry:
        """The geometry of the parameters."""
        return self.method.geometry

    def init(self, params: Mapping[str, Tensor]) -> AveragingState:
        """Return the state before the first step: the average is the start."""
        state = self.method.init(params)
        points = self.geometry.gather(params)
        return AveragingState(points[0].new_zeros(()), state, tuple(x.clone() for x in points))

    def update(
        self,
        grads: Mapping[str, Tensor],
        state: AveragingState,
        params: Mapping[str, Tensor],
        value: Tensor | None = None,
    ) -> tuple[Params, AveragingState]:
        """Take one step of the method; see :meth:`subspace_meta.optimizers.base.Optimizer.update`."""
        check_order(grads, params)
        moved, method = self.method.update(grads, state.method, params, value)
        step = state.step + 1
        weight = (self.power + 1) / (step + self.power)
        points = self.geometry.gather(moved)
        mean = tuple(m + weight.to(x.dtype) * (x - m) for m, x in zip(state.mean, points, strict=True))
        return moved, AveragingState(step, method, mean)

    def averaged(self, state: AveragingState) -> Params:
        """Return the average as parameters: for each, the nearest point of its manifold to the mean (NaN without one).

        A mean that is not finite has no nearest point, and the decompositions of some manifolds would raise.
        """
        groups = zip(self.geometry.groups, state.mean, strict=True)
        return self.geometry.scatter([_nearest(group.manifold, mean) for group, mean in groups])


class Averaged(Protocol):
    """An optimizer that hands out averages."""

    def averaged(self, state: Any) -> Params:
        """Return the average as parameters."""


def hands_out_averages(optimizer: object) -> TypeGuard[Averaged]:
    """Return whether what counts of an optimizer are averages, ``optimizer.averaged(state)``, not its iterates."""
    return isinstance(optimizer, Averaging) or bool(getattr(optimizer, "averaging", False))


def _nearest(manifold: Manifold, mean: Tensor) -> Tensor:
    finite = torch.isfinite(mean).all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
    return torch.where(finite, manifold.nearest(torch.where(finite, mean, 1.0)), torch.nan)
