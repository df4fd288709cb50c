"""Inner problems for the tests of estimators: quadratics, tasks that are spoiled, fixed points that move."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from making import normal
from torch import Tensor

import subspace_meta as sm
from subspace_meta.meta.estimators import Estimator, EvolutionStrategies, PersistentES, Segment, SinglePerturbationES
from subspace_meta.meta.unroll import InnerLoop
from subspace_meta.optimizers.base import retract_all
from subspace_meta.tasks import Problem

Theta = dict[str, Tensor]
ES_KINDS = [EvolutionStrategies, PersistentES, SinglePerturbationES]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mean_over_steps(objectives: Tensor) -> Tensor:
    return objectives.mean(0)


def last_step(objectives: Tensor) -> Tensor:
    return objectives[-1]


def quadratic(params: Theta, batch: Theta) -> Tensor:
    """x^T H x / 2."""
    return 0.5 * params["x"] @ batch["h"] @ params["x"]


def rayleigh(params: Theta, batch: Theta) -> Tensor:
    """-tr(X^T H X) / 2."""
    return -0.5 * (params["x"] * (batch["h"] @ params["x"])).sum()


def distance(params: Theta, data: Theta) -> Tensor:
    return 0.5 * (params["x"] - data["target"]).square().sum()


def make_rsgd(geometry: sm.Geometry, theta: Theta) -> sm.RSGD:
    return sm.RSGD(geometry, theta["log_lr"].exp())


class Momentum(NamedTuple):
    buffers: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Shifted:
    """M <- beta transport(M) + P_X(gradient + shift), X <- Retr_X(-lr M): a fixed point that moves with the shift."""

    geometry: sm.Geometry
    theta: Theta
    momentum: float

    def init(self, params: Mapping[str, Tensor]) -> Momentum:
        return Momentum(tuple(torch.zeros_like(x) for x in self.geometry.gather(params)) if self.momentum else ())

    def update(
        self, grads: Mapping[str, Tensor], state: Momentum, params: Mapping[str, Tensor], value: Tensor | None = None
    ) -> tuple[Theta, Momentum]:
        points = self.geometry.gather(params)
        shifted = self.geometry.gather({name: grad + self.theta["shift"] for name, grad in grads.items()})
        # Not gather_gradients: at a fixed point it takes what is rounding errors for 0, and the derivative with it.
        moves = [g.manifold.project(x, v) for g, x, v in zip(self.geometry.groups, points, shifted, strict=True)]
        if self.momentum:
            moves = [self.momentum * m + r for m, r in zip(state.buffers, moves, strict=True)]
        moved = retract_all(self.geometry, points, (-self.theta["log_lr"].exp() * m for m in moves))
        if not self.momentum:
            return self.geometry.scatter(moved), state
        carried = [
            g.manifold.transport(x, y, m) for g, x, y, m in zip(self.geometry.groups, points, moved, moves, strict=True)
        ]
        return self.geometry.scatter(moved), Momentum(tuple(carried))


def make_shifted(geometry: sm.Geometry, theta: Theta) -> Shifted:
    return Shifted(geometry, theta, 0.0)


def make_heavy(geometry: sm.Geometry, theta: Theta) -> Shifted:
    return Shifted(geometry, theta, 0.5)


@functools.cache
def loop_of(
    shape: tuple[int, ...], manifold: sm.Manifold, loss: Callable, objective: Callable, make: Callable
) -> InnerLoop:
    geometry = sm.Geometry.from_rules({"x": torch.empty(shape)}, {"x": manifold})
    return InnerLoop(Problem(geometry, loss, objective), make, compiled=False)


def cut(tasks: Segment, pieces: int) -> list[Segment]:
    """Cut a segment into equal ones."""
    parts = {name: value.chunk(pieces) for name, value in tasks.batches.items()}
    return [tasks._replace(batches={name: value[i] for name, value in parts.items()}) for i in range(pieces)]


def whole(estimator: Estimator, theta: Theta, params: Theta, segments: list[Segment], random: torch.Generator) -> Theta:
    """The sum of the estimates of all segments of one inner problem."""
    carry = estimator.start(theta, params, random)
    total = {name: torch.zeros_like(value) for name, value in theta.items()}
    for segment in segments:
        estimate = estimator(theta, segment, carry, random)
        carry, total = estimate.carry, {name: total[name] + value for name, value in estimate.gradient.items()}
    return total


def flat(theta: Theta) -> Tensor:
    return torch.cat([value.flatten() for value in theta.values()])


def relative(found: Theta | Tensor, expected: Theta | Tensor) -> float:
    a, b = (flat(value) if isinstance(value, dict) else value.flatten() for value in (found, expected))
    return float((a - b).norm() / b.norm())


# --- two quadratic problems in two dimensions, theta = (log lr, shift) ---

SIGMA, ES_STEPS = 0.3, 6
ES_LOOP = loop_of((2,), sm.Euclidean(), quadratic, quadratic, make_shifted)


@functools.cache
def smooth_setting() -> tuple[Theta, Theta, Segment]:
    data = {"h": torch.diag_embed(torch.tensor([[1.5, 0.4], [0.9, 0.6]], dtype=torch.float64))}
    theta = {k: torch.tensor(v, dtype=torch.float64) for k, v in (("log_lr", math.log(0.2)), ("shift", 0.3))}
    params = {"x": torch.tensor([[1.0, -1.5], [0.7, 1.2]], dtype=torch.float64)}
    return theta, params, Segment({"h": data["h"].expand(ES_STEPS, -1, -1, -1)}, data, mean_over_steps)


def spoiled(tasks: Segment, task: int) -> Segment:
    """NaN in one task's mini-batches, from the second step on."""
    h = tasks.batches["h"].clone()
    h[1:, task] = math.nan
    return tasks._replace(batches={"h": h})


def without(tree: Theta, task: int, axis: int) -> Theta:
    return {
        name: torch.cat([value.narrow(axis, 0, task), value.narrow(axis, task + 1, value.shape[axis] - task - 1)], axis)
        for name, value in tree.items()
    }


@functools.cache
def eight_tasks() -> tuple[Theta, Theta, Segment]:
    root = 0.5 * normal(8, 2, 2, seed=6)
    data = {"h": root @ root.mT}
    tasks = Segment({"h": data["h"].expand(ES_STEPS, -1, -1, -1)}, data, mean_over_steps)
    return smooth_setting()[0], {"x": normal(8, 2, seed=7)}, tasks


# --- a fixed point that moves ---

STIEFEL = sm.Stiefel(retraction=sm.PolarNewtonSchulz())


class Moving(NamedTuple):
    """A fixed point that moves with the shift."""

    theta: Theta
    params: Theta
    h: Tensor
    target: Tensor


def settle(loop: InnerLoop, theta: Theta, params: Theta, h: Tensor, steps: int = 3000) -> Theta:
    """Iterate to the fixed point."""
    carry = loop.start(theta, params)
    for _ in range(steps):
        last, carry = carry, loop.step(theta, carry, {"h": h}, {"target": params["x"]})[0]
        if (carry.params["x"] - last.params["x"]).norm() < 1e-15:
            break
    return carry.params


@functools.cache
def moving(manifold: sm.Manifold, shape: tuple[int, ...], make: Callable, lr: float) -> tuple[InnerLoop, Moving]:
    n = shape[0]
    basis = torch.linalg.qr(normal(n, n, seed=11))[0]
    loss = quadratic if isinstance(manifold, sm.Euclidean) else rayleigh
    spectrum = torch.linspace(0.5, 2.0, n, dtype=torch.float64)
    h = (basis * spectrum @ basis.mT)[None]
    loop = loop_of(shape, manifold, loss, distance, make)
    theta = {"log_lr": torch.tensor(math.log(lr), dtype=torch.float64), "shift": 0.3 * normal(*shape, seed=12)}
    start = basis[:, -shape[1] :] if len(shape) == 2 else torch.zeros(n, dtype=torch.float64)
    params = settle(loop, theta, {"x": start[None]}, h)
    return loop, Moving(theta, params, h, normal(1, *shape, seed=13))
