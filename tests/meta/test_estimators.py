"""Estimators of the meta-gradient: against closed forms, quadrature and 50 digits; and what they are biased for."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mpmath
import numpy as np
import pytest
import torch
from making import normal
from torch import Tensor

import subspace_meta as sm
from subspace_meta.meta.estimators import (
    Backpropagation,
    Estimator,
    EvolutionStrategies,
    ImplicitDifferentiation,
    PersistentES,
    Segment,
    SinglePerturbationES,
)
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


# --- back-propagation ---

RATE, HORIZON = math.log(0.13), 24


@functools.cache
def descent() -> tuple[Theta, Theta, Segment]:
    """Gradient descent on three quadratics in five dimensions, diagonal: f = sum_i h_i x_i^2 / 2."""
    h = 0.2 + 2.0 * torch.rand(3, 5, generator=generator(1), dtype=torch.float64)
    data = {"h": torch.diag_embed(h)}
    batches = {"h": data["h"].expand(HORIZON, -1, -1, -1)}
    theta = {"log_lr": torch.tensor(RATE, dtype=torch.float64)}
    return theta, {"x": normal(3, 5, seed=2)}, Segment(batches, data, mean_over_steps)


def descent_derivative(steps_seen: Callable[[int], int]) -> float:
    """The derivative to log lr of mean_t sum_i h_i ((1 - lr h_i)^t x_i)^2 / 2, of which the last steps are seen."""
    _, params, tasks = descent()
    h, lr = torch.diagonal(tasks.data["h"], dim1=-2, dim2=-1), math.exp(RATE)
    terms = [
        (-lr * steps_seen(t) * h.square() * (1 - lr * h) ** (2 * t - 1) * params["x"].square()).sum(1).mean()
        for t in range(1, HORIZON + 1)
    ]
    return float(sum(terms)) / HORIZON


DESCENT = loop_of((5,), sm.Euclidean(), quadratic, quadratic, make_rsgd)


@pytest.mark.parametrize(("block", "interval"), [(1, HORIZON), (1, 1), (2, 6), (1, None)])
def test_backpropagation_is_exact(block: int, interval: int | None) -> None:
    theta, params, tasks = descent()
    estimator = Backpropagation(replace(DESCENT, block=block, interval=interval))
    estimate = estimator(theta, tasks, estimator.start(theta, params, generator()), generator())
    assert float(estimate.gradient["log_lr"]) == pytest.approx(descent_derivative(lambda t: t), rel=1e-12)
    h, lr = torch.diagonal(tasks.data["h"], dim1=-2, dim2=-1), math.exp(RATE)
    end = (1 - lr * h) ** HORIZON * params["x"]
    torch.testing.assert_close(estimate.carry.params["x"], end, rtol=1e-12, atol=1e-15)
    losses = [0.5 * (h * ((1 - lr * h) ** t * params["x"]).square()).sum(1).mean() for t in range(1, HORIZON + 1)]
    assert estimate.metrics == pytest.approx({"loss": float(sum(losses)) / HORIZON, "non_finite_tasks": 0.0}, rel=1e-12)


def test_truncation_has_a_bias_that_falls_with_the_length_of_segments() -> None:
    theta, params, tasks = descent()
    exact, biases = descent_derivative(lambda t: t), []
    for pieces in (24, 8, 4, 2):
        length = HORIZON // pieces
        found = whole(Backpropagation(DESCENT), theta, params, cut(tasks, pieces), generator())["log_lr"] / pieces
        expected = descent_derivative(lambda t, length=length: (t - 1) % length + 1)
        assert float(found) == pytest.approx(expected, rel=1e-12)
        biases.append(abs(float(found) / exact - 1))
        print(f"truncated back-propagation, segments of {length:2d} of {HORIZON} steps: relative bias {biases[-1]:.3f}")
    assert all(now < last for last, now in itertools.pairwise(biases))
    assert biases[-1] > 0.05


def test_backpropagation_on_the_sphere_to_fifty_digits() -> None:
    # Riemannian descent on -x^T C x / 2 with normalisation: power-type iteration with (I + lr (C - rho)).
    n, steps = 4, 30
    root = normal(n, n, seed=3)
    c = (root @ root.mT)[None]
    x = normal(1, n, 1, seed=4)
    params = {"x": x / x.norm()}
    loop = loop_of((n, 1), sm.Sphere(), rayleigh, rayleigh, make_rsgd)
    tasks = Segment({"h": c.expand(steps, 1, n, n)}, {"h": c}, mean_over_steps)
    theta = {"log_lr": torch.tensor(math.log(0.1), dtype=torch.float64)}
    estimator = Backpropagation(loop)
    found = whole(estimator, theta, params, [tasks], generator())["log_lr"]

    with mpmath.workdps(50):
        matrix = mpmath.matrix(c[0].tolist())
        first = mpmath.matrix(params["x"][0].tolist())

        def outer(log_lr: Any) -> Any:
            point, total = first / mpmath.norm(first), mpmath.mpf(0)
            for _ in range(steps):
                image = matrix * point
                gradient = (point.T * image)[0] * point - image
                point = point - mpmath.exp(log_lr) * gradient
                point = point / mpmath.norm(point)
                total -= (point.T * (matrix * point))[0] / 2
            return total / steps

        at, h = mpmath.mpf(float(theta["log_lr"])), mpmath.mpf(10) ** -15
        expected = float((outer(at + h) - outer(at - h)) / (2 * h))
    assert float(found) == pytest.approx(expected, rel=1e-10)


# --- evolution strategies: two quadratic problems in two dimensions, theta = (log lr, shift) ---

SIGMA, ES_STEPS = 0.3, 6
ES_LOOP = loop_of((2,), sm.Euclidean(), quadratic, quadratic, make_shifted)


@functools.cache
def smooth_setting() -> tuple[Theta, Theta, Segment]:
    data = {"h": torch.diag_embed(torch.tensor([[1.5, 0.4], [0.9, 0.6]], dtype=torch.float64))}
    theta = {k: torch.tensor(v, dtype=torch.float64) for k, v in (("log_lr", math.log(0.2)), ("shift", 0.3))}
    params = {"x": torch.tensor([[1.0, -1.5], [0.7, 1.2]], dtype=torch.float64)}
    return theta, params, Segment({"h": data["h"].expand(ES_STEPS, -1, -1, -1)}, data, mean_over_steps)


def recursion(x: Tensor, log_lr: Tensor, shift: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Iterates ``(nodes, tasks, 2)`` after so many steps, and the mean of their objectives, ``(nodes,)``."""
    h = torch.diagonal(smooth_setting()[2].data["h"], dim1=-2, dim2=-1)
    total = torch.zeros(len(log_lr), dtype=torch.float64)
    for _ in range(steps):
        x = x - log_lr.exp()[:, None, None] * (h * x + shift[:, None, None])
        total = total + 0.5 * (h * x.square()).sum(-1).mean(-1)
    return x, total / steps


def smoothed_gradient(kind: type, pieces: int, nodes: int = 12) -> Tensor:
    """The gradient of what an estimator is said to be unbiased for, by Gauss-Hermite quadrature over perturbations.

    The derivative is taken inside of the mean, by autograd: no formula is shared with the estimators.
    """
    theta, params, _ = smooth_setting()
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    points, weights = torch.tensor(points), torch.tensor(weights / weights.sum())
    dimensions = 2 * pieces if kind is PersistentES else 2
    grid = SIGMA * torch.cartesian_prod(*[points] * dimensions)
    weight = torch.cartesian_prod(*[weights] * dimensions).prod(1)
    mean = torch.stack([theta["log_lr"], theta["shift"]]).requires_grad_()
    total, length, plain = torch.tensor(0.0), ES_STEPS // pieces, params["x"]
    x = plain.expand(len(grid), -1, -1)
    for t in range(pieces):
        own = grid[:, 2 * t : 2 * t + 2] if kind is PersistentES else grid
        used = mean + own
        if kind is EvolutionStrategies:
            x = plain.expand(len(grid), -1, -1)
            plain = recursion(plain[None], *mean.detach()[None].T, length)[0][0]
        x, losses = recursion(x, used[:, 0], used[:, 1], length)
        total = total + (weight * losses).sum()
    return torch.autograd.grad(total, mean)[0]


def sample(kind: type, pieces: int, calls: int, pairs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Mean and standard error of independent estimates of a whole inner problem."""
    theta, params, tasks = smooth_setting()
    random, segments = generator(seed), cut(tasks, pieces)
    found = [flat(whole(kind(ES_LOOP, SIGMA, pairs), theta, params, segments, random)) for _ in range(calls)]
    return torch.stack(found).mean(0), torch.stack(found).std(0) / calls**0.5


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("kind", ES_KINDS)
def test_evolution_strategies_are_unbiased_for_what_they_say(kind: type, pieces: int) -> None:
    expected = smoothed_gradient(kind, pieces)
    torch.testing.assert_close(expected, smoothed_gradient(kind, pieces, nodes=9), rtol=1e-5, atol=1e-7)
    mean, error = sample(kind, pieces, calls=60, pairs=400)
    deviations = [f"{value:+.2f}" for value in (mean - expected) / error]
    share = float(error.norm() / expected.norm())
    print(f"{kind.__name__}, {pieces} segments: off by {deviations} standard errors, each {share:.4f} of the gradient")
    assert float(error.norm()) <= 0.05 * float(expected.norm())
    assert ((mean - expected).abs() <= 3 * error).all()


def test_truncated_evolution_strategies_miss_the_full_horizon() -> None:
    mean, error = sample(EvolutionStrategies, 2, calls=60, pairs=400)
    for kind in (PersistentES, SinglePerturbationES):
        expected = smoothed_gradient(kind, 2)
        print(f"bias of truncated evolution strategies: {relative(mean, expected):.3f} of {kind.__name__}'s target")
        assert ((mean - expected).abs() > 5 * error).any()


def test_truncated_evolution_strategies_go_on_unperturbed() -> None:
    theta, params, tasks = smooth_setting()
    found, expected = (
        estimator(theta, tasks, estimator.start(theta, params, generator()), generator())
        for estimator in (EvolutionStrategies(ES_LOOP, SIGMA, 2), Backpropagation(ES_LOOP))
    )
    assert relative(found.carry.params, expected.carry.params) < 1e-14
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-14)


@pytest.mark.parametrize("kind", [PersistentES, SinglePerturbationES])
def test_particles_keep_their_states_and_sums(kind: type) -> None:
    theta, params, tasks = smooth_setting()
    estimator, random = kind(ES_LOOP, SIGMA, 2), generator()
    carry, sums = estimator.start(theta, params, random), []
    for segment in cut(tasks, 2):
        carry = estimator(theta, segment, carry, random).carry
        sums.append(flat(carry.weights))
    assert carry.carry.params["x"].shape == (4, 2, 2)
    assert torch.equal(*sums) == (kind is SinglePerturbationES)


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


@pytest.mark.parametrize("kind", ES_KINDS)
def test_a_task_that_is_not_finite_is_left_out_and_counted(kind: type) -> None:
    theta, params, tasks = eight_tasks()
    others = tasks._replace(batches=without(tasks.batches, 3, 1), data=without(tasks.data, 3, 0))
    estimator = kind(ES_LOOP, SIGMA, 5)
    estimates = []
    for start, segments in ((params, cut(spoiled(tasks, 3), 2)), (without(params, 3, 0), cut(others, 2))):
        random = generator(1)
        carry = estimator.start(theta, start, random)
        for segment in segments:
            estimate = estimator(theta, segment, carry, random)
            carry = estimate.carry
            estimates.append(estimate)
    for found, expected in zip(estimates[:2], estimates[2:], strict=True):
        assert relative(found.gradient, expected.gradient) < 1e-12
        assert found.metrics == pytest.approx(expected.metrics | {"non_finite_tasks": 1.0}, rel=1e-12)
        assert expected.metrics["non_finite_tasks"] == 0


@pytest.mark.parametrize("kind", ES_KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_sign_that_is_not_finite_takes_the_other_with_it(kind: type, bad: float) -> None:
    theta, params, tasks = eight_tasks()
    estimator = kind(ES_LOOP, SIGMA, 1)
    plain = Backpropagation(ES_LOOP)
    limit = plain(theta, tasks._replace(outer_loss=last_step), plain.start(theta, params, generator()), generator())
    between = ES_LOOP.objective(limit.carry.params, tasks.data)  # one sign of the only pair is above

    def outer_loss(objectives: Tensor) -> Tensor:
        spoil = (objectives[-1] > between) & (torch.arange(8) == 3)
        return torch.where(spoil, bad, objectives.mean(0))

    others = tasks._replace(batches=without(tasks.batches, 3, 1), data=without(tasks.data, 3, 0))
    estimates = []
    for start, segment in ((params, tasks._replace(outer_loss=outer_loss)), (without(params, 3, 0), others)):
        random = generator(1)
        estimates.append(estimator(theta, segment, estimator.start(theta, start, random), random))
    assert relative(estimates[0].gradient, estimates[1].gradient) < 1e-12
    assert [estimate.metrics["non_finite_tasks"] for estimate in estimates] == [1, 0]


@pytest.mark.parametrize("kind", ES_KINDS)
def test_a_pair_without_tasks_is_left_out_and_no_pair_is_no_estimate(kind: type) -> None:
    theta, params, tasks = eight_tasks()
    nothing = functools.reduce(spoiled, range(8), tasks)
    estimator = kind(ES_LOOP, SIGMA, 3)
    estimate = estimator(theta, nothing, estimator.start(theta, params, generator()), generator())
    assert torch.isnan(flat(estimate.gradient)).all()
    assert math.isnan(estimate.metrics["loss"])
    assert estimate.metrics["non_finite_tasks"] == 8


def test_back_propagation_leaves_out_a_task_that_is_not_finite() -> None:
    theta, params, tasks = eight_tasks()
    estimator = Backpropagation(ES_LOOP)
    others = tasks._replace(batches=without(tasks.batches, 3, 1), data=without(tasks.data, 3, 0))
    estimates = []
    for start, segment in ((params, spoiled(tasks, 3)), (without(params, 3, 0), others)):
        estimates.append(estimator(theta, segment, estimator.start(theta, start, generator()), generator()))
    assert relative(estimates[0].gradient, estimates[1].gradient) < 1e-12
    assert estimates[0].metrics["loss"] == pytest.approx(estimates[1].metrics["loss"])
    assert [estimate.metrics["non_finite_tasks"] for estimate in estimates] == [1, 0]


def test_implicit_differentiation_counts_tasks_that_are_not_finite_and_hides_nothing() -> None:
    theta, params, tasks = eight_tasks()
    estimator = ImplicitDifferentiation(ES_LOOP, 2)
    estimate = estimator(theta, spoiled(tasks, 3), estimator.start(theta, params, generator()), generator())
    assert torch.isnan(flat(estimate.gradient)).all()
    assert math.isnan(estimate.metrics["loss"])
    assert estimate.metrics["non_finite_tasks"] == 1


# --- implicit differentiation ---

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


def implicit(loop: InnerLoop, at: Moving, terms: int, steps: int = 1) -> Any:
    estimator = ImplicitDifferentiation(loop, terms)
    tasks = Segment({"h": at.h.expand(steps, *at.h.shape)}, {"target": at.target}, mean_over_steps)
    return estimator(at.theta, tasks, estimator.start(at.theta, at.params, generator()), generator())


def exact_on_euclidean(at: Moving) -> tuple[Tensor, float]:
    """H x* = -shift; and |A| = |I - lr H|."""
    h, lr = at.h[0], at.theta["log_lr"].exp()
    gradient = -torch.linalg.solve(h, (at.params["x"] - at.target)[0])
    return gradient, float(torch.linalg.matrix_norm(torch.eye(len(h), dtype=torch.float64) - lr * h, 2))


def exact_on_sphere(at: Moving) -> tuple[Tensor, float]:
    """g = -H x + shift = mu x on the sphere, differentiated with its constraint; and |A| on the tangent space.

    With lr the step, one step is x -> x - lr P g to first order at the fixed point, so A = I - lr (-H - mu).
    """
    h, x, lr = at.h[0], at.params["x"][0], float(at.theta["log_lr"].exp())
    n = len(x)
    mu = (x.mT @ (at.theta["shift"] - h @ x)).item()
    system = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    system[:n, :n] = -h - mu * torch.eye(n, dtype=torch.float64)
    system[:n, n:], system[n:, :n] = -x, x.mT
    outer = torch.cat([x - at.target[0], torch.zeros(1, 1, dtype=torch.float64)])
    gradient = -torch.linalg.solve(system.mT, outer)[:n]
    tangent = torch.linalg.svd(x, full_matrices=True)[0][:, 1:]
    a = torch.eye(n - 1, dtype=torch.float64) - lr * (tangent.mT @ system[:n, :n] @ tangent)
    return gradient, float(torch.linalg.matrix_norm(a, 2))


@pytest.mark.parametrize(
    ("manifold", "shape", "lr", "exact"),
    [(sm.Euclidean(), (4,), 0.7, exact_on_euclidean), (sm.Sphere(), (4, 1), 0.4, exact_on_sphere)],
)
def test_implicit_differentiation_of_a_moving_fixed_point(
    manifold: sm.Manifold, shape: tuple[int, ...], lr: float, exact: Callable
) -> None:
    loop, at = moving(manifold, shape, make_shifted, lr)
    expected, rate = exact(at)
    assert rate < 0.95
    errors = [float((implicit(loop, at, k).gradient["shift"] - expected).norm()) for k in range(1, 25)]
    ratios = [now / last for last, now in itertools.pairwise(errors)]
    print(
        f"{manifold.name}: |A| = {rate:.4f}, error ratios {min(ratios):.4f} to {max(ratios):.4f}, last {ratios[-1]:.4f}"
    )
    assert max(ratios) <= rate + 1e-9
    assert ratios[-1] == pytest.approx(rate, rel=0.05)
    limit = implicit(loop, at, 400, steps=3)
    assert relative(limit.gradient["shift"], expected) < 1e-10
    assert abs(float(limit.gradient["log_lr"])) < 1e-10  # the fixed point does not move with the step size


@pytest.mark.parametrize("make", [make_shifted, make_heavy])
@pytest.mark.parametrize(("manifold", "shape"), [(sm.Euclidean(), (4,)), (sm.Sphere(), (4, 1)), (STIEFEL, (5, 2))])
@pytest.mark.parametrize("terms", [1, 2, 7])
def test_terms_are_steps_of_backpropagation_at_a_fixed_point(
    manifold: sm.Manifold, shape: tuple[int, ...], make: Callable, terms: int
) -> None:
    # With momentum A acts on parameters and state together.
    loop, at = moving(manifold, shape, make, 0.3)
    tasks = Segment({"h": at.h.expand(terms, *at.h.shape)}, {"target": at.target}, last_step)
    expected = whole(Backpropagation(loop), at.theta, at.params, [tasks], generator())
    assert relative(implicit(loop, at, terms).gradient, expected) < 1e-11


def test_one_term_is_backpropagation_through_the_last_step_anywhere() -> None:
    theta, params, tasks = eight_tasks()
    schedule = torch.linspace(1.0, 0.5, ES_STEPS, dtype=torch.float64)[:, None, None, None]
    tasks = tasks._replace(batches={"h": schedule * tasks.batches["h"]}, outer_loss=last_step)
    first, last = ({"h": tasks.batches["h"][part]} for part in (slice(5), slice(5, 6)))
    plain = Backpropagation(ES_LOOP)
    carry = plain(theta, tasks._replace(batches=first), plain.start(theta, params, generator()), generator()).carry
    expected = plain(theta, tasks._replace(batches=last), carry, generator())
    for block in (1, 3):
        estimator = ImplicitDifferentiation(replace(ES_LOOP, block=block), 1)
        found = estimator(theta, tasks, estimator.start(theta, params, generator()), generator())
        assert relative(found.gradient, expected.gradient) < 1e-12
        assert relative(found.carry.params, expected.carry.params) < 1e-12
        assert found.metrics == pytest.approx(expected.metrics)


def test_away_from_a_fixed_point_cotangents_go_between_tangent_spaces() -> None:
    # The series with every matrix written out.
    n = 4
    loop, at = moving(sm.Sphere(), (n, 1), make_shifted, 0.4)
    x = normal(1, n, 1, seed=21)
    at = at._replace(params={"x": x / x.norm()})
    batch, data = {"h": at.h}, {"target": at.target}

    def step(point: Tensor, shift: Tensor) -> Tensor:
        carry = loop.start(at.theta, {"x": point[None, :, None]})
        return loop.step(at.theta | {"shift": shift}, carry, batch, data)[0].params["x"].flatten()

    point, shift = at.params["x"].flatten(), at.theta["shift"]
    after = step(point, shift)
    (j, b), identity = torch.func.jacrev(step, (0, 1))(point, shift), torch.eye(n, dtype=torch.float64)
    here, there = (identity - torch.outer(v, v) for v in (point, after))
    a = there @ j @ here
    v = there @ (after - at.target.flatten())
    total = v + there @ a.mT @ (v + there @ a.mT @ v)
    expected = (b.reshape(n, n).mT @ total)[:, None]
    assert relative(implicit(loop, at, 3).gradient["shift"], expected) < 1e-12
    ambient = v + j.mT @ (v + j.mT @ v)
    assert relative((b.reshape(n, n).mT @ ambient)[:, None], expected) > 1e-3


def test_without_second_derivatives_the_series_has_no_limit() -> None:
    # On R^n A is then the identity: every term is the first one.
    loop, at = moving(sm.Euclidean(), (4,), make_shifted, 0.7)
    one, many = (implicit(replace(loop, first_order=True), at, terms).gradient for terms in (1, 6))
    assert relative(many, {name: 6 * value for name, value in one.items()}) < 1e-14
    assert relative(one, implicit(loop, at, 1).gradient) < 1e-14


def test_implicit_differentiation_of_a_step_size() -> None:
    # A critical point is fixed for every step size: true and implicit meta-gradients both fade away, and on the way the
    # implicit one is biased, as the steps before were taken elsewhere.
    n = 5
    spectrum = torch.tensor([0.2, 0.5, 0.8, 1.0, 1.6], dtype=torch.float64)
    basis = torch.linalg.qr(normal(n, n, seed=15))[0]
    h = (basis * spectrum @ basis.mT)[None]
    x = normal(1, n, 1, seed=16)
    params = {"x": x / x.norm()}
    theta = {"log_lr": torch.tensor(math.log(0.3), dtype=torch.float64)}
    loop = loop_of((n, 1), sm.Sphere(), rayleigh, rayleigh, make_rsgd)
    sizes, biases = [], []
    for steps in (5, 20, 80, 300):
        tasks = Segment({"h": h.expand(steps, 1, n, n)}, {"h": h}, last_step)
        exact = whole(Backpropagation(loop), theta, params, [tasks], generator())["log_lr"]
        found = whole(ImplicitDifferentiation(loop, steps), theta, params, [tasks], generator())["log_lr"]
        sizes.append(abs(float(exact)))
        biases.append(abs(float(found - exact)))
        print(f"{steps:3d} steps: back-propagation {sizes[-1]:.1e}, bias of as many implicit terms {biases[-1]:.1e}")
    assert all(now < 0.5 * last for last, now in itertools.pairwise(sizes))
    assert sizes[-1] < 1e-12
    assert biases[0] > 0.1 * sizes[0]
    assert biases[-1] < 1e-12


@pytest.mark.parametrize("manifold", [sm.StiefelCanonical(), sm.SPD(), sm.Rotations(), sm.Grassmann(), sm.Oblique()])
def test_projections_are_their_own_adjoints(manifold: sm.Manifold) -> None:
    # Cotangents are projected like tangents, whatever the metric.
    x = manifold.random_point(
        (4, 4) if isinstance(manifold, sm.SPD | sm.Rotations) else (5, 2), generator(), torch.float64
    )
    u, v = normal(*x.shape, seed=1), normal(*x.shape, seed=2)
    left, right = (manifold.project(x, u) * v).sum(), (u * manifold.project(x, v)).sum()
    assert float(left) == pytest.approx(float(right), rel=1e-10)


# --- all of them ---

ALL = [Backpropagation(ES_LOOP), *(kind(ES_LOOP, SIGMA, 3) for kind in ES_KINDS), ImplicitDifferentiation(ES_LOOP, 3)]


@pytest.mark.parametrize("estimator", ALL, ids=lambda e: type(e).__name__)
def test_the_generator_decides_everything(estimator: Estimator) -> None:
    theta, params, tasks = smooth_setting()
    results = []
    for seed, noise in ((1, 5), (1, 6), (2, 5)):
        torch.manual_seed(noise)  # the global generator has no part in it
        results.append(flat(whole(estimator, theta, params, cut(tasks, 2), generator(seed))))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2]) != isinstance(estimator, tuple(ES_KINDS))


@pytest.mark.parametrize("estimator", ALL, ids=lambda e: type(e).__name__)
def test_what_comes_in_stays_as_it_is(estimator: Estimator) -> None:
    theta, params, tasks = smooth_setting()
    leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
    carry = estimator.start(leaves, params, generator())
    copies = [leaf.clone() for leaf in torch.utils._pytree.tree_leaves(carry)]
    estimate = estimator(leaves, tasks, carry, generator())
    for leaf, copy in zip(torch.utils._pytree.tree_leaves(carry), copies, strict=True):
        assert torch.equal(leaf, copy)
    assert estimate.gradient.keys() == theta.keys()
    for leaf in torch.utils._pytree.tree_leaves((estimate.gradient, estimate.carry)):
        assert not leaf.requires_grad
    for name, value in estimate.gradient.items():
        assert value.shape == theta[name].shape
        assert value.dtype == theta[name].dtype


@pytest.mark.parametrize("estimator", ALL, ids=lambda e: type(e).__name__)
def test_errors_say_what_is_wrong(estimator: Estimator) -> None:
    theta, params, tasks = smooth_setting()
    carry = estimator.start(theta, params, generator())
    with pytest.raises(ValueError, match=r"one number for each task, of shape \(2,\), got \(\)"):
        estimator(theta, tasks._replace(outer_loss=torch.mean), carry, generator())
    coarse = replace(estimator, loop=replace(ES_LOOP, block=4))
    with pytest.raises(ValueError, match="6 steps are not a multiple of the block length 4"):
        coarse(theta, tasks, carry, generator())


@pytest.mark.parametrize("kind", ES_KINDS)
def test_settings_are_checked(kind: type) -> None:
    for sigma in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="sigma must be positive and finite, got"):
            kind(ES_LOOP, sigma, 1)
    with pytest.raises(ValueError, match="at least one pair, got 0"):
        kind(ES_LOOP, 1.0, 0)
    with pytest.raises(ValueError, match="at least one term, got 0"):
        ImplicitDifferentiation(ES_LOOP, 0)


@pytest.mark.parametrize("kind", ES_KINDS)
def test_blocks_change_nothing_for_particles(kind: type) -> None:
    theta, params, tasks = smooth_setting()
    found = [
        whole(kind(replace(ES_LOOP, block=block), SIGMA, 3), theta, params, cut(tasks, 2), generator())
        for block in (1, 3)
    ]
    assert relative(found[0], found[1]) < 1e-13


@pytest.mark.slow
@pytest.mark.parametrize("kind", ES_KINDS)
def test_compiled_particles_with_one_compilation(kind: type) -> None:
    loop = moving(STIEFEL, (5, 2), make_heavy, 0.3)[0]
    at = moving(STIEFEL, (5, 2), make_heavy, 0.3)[1]
    tasks = Segment({"h": at.h.expand(6, *at.h.shape)}, {"target": at.target}, mean_over_steps)
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        estimator = kind(replace(loop, compiled=compiled), 0.1, 4)
        found.append(whole(estimator, at.theta, at.params, cut(tasks, 3), generator()))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert relative(found[1], found[0]) < 1e-9
