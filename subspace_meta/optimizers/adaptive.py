"""RAdaGD and Riemannian AdGD: gradient descent whose step follows the local smoothness, for deterministic losses.

*RAdaGD*. Source: "Adaptive gradient descent on Riemannian manifolds and its applications to Gaussian variational
inference", ICLR 2026; facts from its published implementation (wldyddl5510/RAdaGD), the sequences A = 3, B = 5/4 and
zeta = 1 that are its default. After a step of length factor s from x with gradient g and loss f to x' with g' and f',

    L = |P g' - g|^2 / (-2 (f' - f + s <g, P g'>)),    0 where that is negative or not a number,

    s' = min(4/3 s, r / L),    r = A B / (A^2 + B (B + zeta)) = 20/63 where s L >= 1,    4/3 where it is less.

It needs the values of the loss. L is a quotient of second-order differences: near the solution, where f' - f is below
the rounding of f, it is noise, and the step with it.

*Riemannian AdGD*. Source: Ansari-Onnestam and Malitsky, "Adaptive gradient descent on Riemannian manifolds with
nonnegative curvature", 2025 (arXiv 2504.16724), of which summaries and the comparison in RAdaGD's implementation were
read, not the paper. It needs gradients only:

    a_k = min(sqrt(1 + theta_{k-1}) a_{k-1}, |a_{k-1} g_{k-1}| / (sqrt(2) |g_k - P g_{k-1}|)),
    theta_k = a_k / a_{k-1},    theta_0 = 0.

Norms are those of the product of all parameters: one step for the run. P is the manifold's own transport: parallel
on spheres and SPD, isometric on orthogonal matrices, a projection on Stiefel and Grassmann. Gradients are carried
forward from x to x', where the published RAdaGD carries them backward; for parallel transport, and for projections in
the inner product, that is the same. *Ours* is that the factor of a step stays where the gradient is exactly 0: there
the published rules let it grow without bound; and that a step of more than a quarter turn is shortened to that
(:func:`~subspace_meta.optimizers.runs.shortening`), with all that is concluded from its length. Both methods are for
deterministic losses: with mini-batches, L is that of the noise. Cost: one gradient is kept; an exponential map and a
transport a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from subspace_meta.geometry import Geometry, Params
from subspace_meta.optimizers.base import check_rate, check_start, gather_gradients
from subspace_meta.optimizers.runs import inner, move, shortening

GROWTH = 4 / 3
CAUTION = 20 / 63


def _check_positive(name: str, value: float) -> None:
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def _carry(
    geometry: Geometry, points: Sequence[Tensor], moved: Sequence[Tensor], tangents: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    groups = zip(geometry.groups, points, moved, tangents, strict=True)
    return tuple(group.manifold.transport(x, y, v) for group, x, y, v in groups)


class RAdaGDState(NamedTuple):
    """Step count, s, ``lr`` s, the loss at the last point, and per group its gradient, carried to the current one."""

    step: Tensor
    size: Tensor
    moved: Tensor
    value: Tensor
    gradient: tuple[Tensor, ...]


@dataclass(frozen=True)
class RAdaGD:
    """Adaptive gradient descent from losses and gradients: no learning rate to choose.

    Attributes:
        geometry: where the parameters live.
        lr: a factor of the step, for schedules; a float or a scalar tensor. 1 is the published method.
        smoothness: the first guess of L, so the first step is 20/63 / ``smoothness``. A guess too large costs about
            eight steps for each factor of ten, one too small a first step that is too long.
        geodesic: move along geodesics, as published; otherwise by each manifold's own retraction.

    Raises:
        ValueError: a setting is out of its range.
    """

    geometry: Geometry
    lr: float | Tensor = 1.0
    smoothness: float = 1.0
    geodesic: bool = True

    def __post_init__(self) -> None:
        check_rate(self.lr)
        _check_positive("smoothness", self.smoothness)

    def init(self, params: Mapping[str, Tensor]) -> RAdaGDState:
        """Return the state before the first step."""
        check_start(self.geometry, params)
        points = self.geometry.gather(params)
        zero = torch.zeros((), dtype=points[0].dtype, device=points[0].device)
        size = zero + 1.0 / self.smoothness
        return RAdaGDState(zero, size, zero.clone(), zero.clone(), tuple(map(torch.zeros_like, points)))

    def update(
        self, grads: Mapping[str, Tensor], state: RAdaGDState, params: Mapping[str, Tensor], value: Tensor | None = None
    ) -> tuple[Params, RAdaGDState]:
        """Take one step; see :meth:`subspace_meta.optimizers.base.Optimizer.update`.

        Raises:
            ValueError: names or shapes do not fit the geometry, or ``value`` is missing.
        """
        if value is None:
            raise ValueError("RAdaGD takes its step from the loss: give it, update(grads, state, params, value=loss)")
        points, lazily = gather_gradients(self.geometry, params, grads)
        gradients = list(lazily)
        value = value.to(state.value.dtype).reshape(())
        change = [r - g for r, g in zip(gradients, state.gradient, strict=True)]
        numerator = inner(self.geometry, points, change, change)
        slope = inner(self.geometry, points, state.gradient, gradients)
        denominator = -2.0 * (value - state.value + state.moved * slope)
        curved = (denominator > 0.0) & (numerator > 0.0) & (state.moved > 0.0)
        estimate = torch.where(curved, numerator, 0.0) / torch.where(curved, denominator, 1.0)
        smoothness = torch.where(state.step == 0, self.smoothness, estimate)
        # 4/3 s is the smaller one wherever s L < 1, and r / L wherever it is not.
        long = state.size * smoothness >= 1.0
        size = torch.where(long, CAUTION / torch.where(long, smoothness, 1.0), GROWTH * state.size)
        size = torch.where(inner(self.geometry, points, gradients, gradients) == 0.0, state.size, size)
        moved, size, taken = _step(self, points, gradients, size)
        carried = _carry(self.geometry, points, moved, gradients)
        return self.geometry.scatter(moved), RAdaGDState(state.step + 1, size, taken, value, carried)


class RAdGDState(NamedTuple):
    """Step count, a, theta, |``lr`` a g| at the last point, and per group its gradient, carried to the current one."""

    step: Tensor
    size: Tensor
    ratio: Tensor
    length: Tensor
    gradient: tuple[Tensor, ...]


@dataclass(frozen=True)
class RAdGD:
    """Adaptive gradient descent from gradients alone: no learning rate to choose.

    Attributes:
        geometry: where the parameters live.
        lr: a factor of the step, for schedules; a float or a scalar tensor. 1 is the published method.
        initial: the first step's factor of the gradient. Later ones grow by up to sqrt(2) and more, so a small one
            costs about five steps for each factor of ten; one too large, a first step that is too long.
        geodesic: move along geodesics, as published; otherwise by each manifold's own retraction.

    Raises:
        ValueError: a setting is out of its range.
    """

    geometry: Geometry
    lr: float | Tensor = 1.0
    initial: float = 1.0
    geodesic: bool = True

    def __post_init__(self) -> None:
        check_rate(self.lr)
        _check_positive("initial", self.initial)

    def init(self, params: Mapping[str, Tensor]) -> RAdGDState:
        """Return the state before the first step."""
        check_start(self.geometry, params)
        points = self.geometry.gather(params)
        zero = torch.zeros((), dtype=points[0].dtype, device=points[0].device)
        gradient = tuple(map(torch.zeros_like, points))
        return RAdGDState(zero, zero + self.initial, zero.clone(), zero.clone(), gradient)

    def update(
        self, grads: Mapping[str, Tensor], state: RAdGDState, params: Mapping[str, Tensor], value: Tensor | None = None
    ) -> tuple[Params, RAdGDState]:
        """Take one step; see :meth:`subspace_meta.optimizers.base.Optimizer.update`."""
        points, lazily = gather_gradients(self.geometry, params, grads)
        gradients = list(lazily)
        change = [r - g for r, g in zip(gradients, state.gradient, strict=True)]
        squared = inner(self.geometry, points, change, change)
        known = (squared > 0.0) & (state.length > 0.0)
        limit = state.length / (2.0 * torch.where(known, squared, 1.0)).sqrt()
        grown = (1.0 + state.ratio).sqrt() * state.size
        size = torch.where(known, torch.minimum(grown, limit), grown)
        energy = inner(self.geometry, points, gradients, gradients)
        size = torch.where(energy == 0.0, state.size, size)
        moved, size, taken = _step(self, points, gradients, size)
        started = (state.step > 0) & (state.size > 0.0)
        ratio = torch.where(started, size / torch.where(started, state.size, 1.0), 0.0)
        carried = _carry(self.geometry, points, moved, gradients)
        # No length, rather than a tiny one, where the gradient was zero: the next step then learns nothing from this.
        length = taken * torch.where(energy > 0.0, torch.where(energy > 0.0, energy, 1.0).sqrt(), energy)
        return self.geometry.scatter(moved), RAdGDState(state.step + 1, size, ratio, length, carried)


def _step(
    method: RAdaGD | RAdGD, points: Sequence[Tensor], gradients: Sequence[Tensor], size: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Move against the gradients; return points, ``size`` and ``lr * size``.

    A step that is too long is shortened as a whole, so that what the next one concludes is from the one that was taken.
    """
    wanted = [(method.lr * size).to(r.dtype) * r for r in gradients]
    size = size * shortening(method.geometry, points, wanted).to(size.dtype)
    taken = (method.lr * size).to(size.dtype)
    moved = move(method.geometry, points, [-taken.to(r.dtype) * r for r in gradients], method.geodesic)
    return moved, size, taken
