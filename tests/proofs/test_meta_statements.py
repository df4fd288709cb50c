"""Meta-gradients: does the code do what ``proofs/statements.json`` says it is proven to do?

A test has the name of its statement.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from drawing import close, definite, orthonormal, seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from making import lively_weights, normal
from torch import Tensor

import subspace_meta as sm
from subspace_meta.manifolds import Stiefel
from subspace_meta.manifolds.checks import slope
from subspace_meta.meta.cost import CreatedStorages
from subspace_meta.meta.estimators import EvolutionStrategies, ImplicitDifferentiation, PersistentES, Segment
from subspace_meta.meta.unroll import InnerLoop, pull_back, run
from subspace_meta.tasks import Problem


@dataclass(frozen=True, eq=False)
class Scripted:
    """An optimizer whose step is any function ``(theta, params, state) -> (params, state)``."""

    geometry: sm.Geometry
    theta: dict[str, Tensor]
    step: Callable[..., Any]
    begin: Any

    def init(self, params: dict[str, Tensor]) -> Any:
        return self.begin

    def update(self, grads: Any, state: Any, params: dict[str, Tensor], value: Any = None) -> Any:
        return self.step(self.theta, params, state)


def scripted_loop(params: dict[str, Tensor], step: Callable[..., Any], objective: Any, begin: Any = ()) -> InnerLoop:
    """An eager inner loop of such an optimizer on Euclidean parameters; the loss is of no effect."""
    problem = Problem(sm.Geometry.from_rules(params), lambda p, batch: sum(x.sum() for x in p.values()), objective)
    return InnerLoop(problem, lambda geometry, theta: Scripted(geometry, theta, step, begin), compiled=False)


@given(n=st.integers(2, 6), seed=seeds)
def test_neumann_truncation(n, seed):
    """One step of a preconditioned descent on |x|_H^2 / 2 - x^T B theta, whose end is known."""
    h, b, theta = definite(n, seed), normal(n, 3, seed=seed + 1), normal(3, seed=seed + 2)
    inverse = torch.linalg.inv(h)
    noise = normal(n, n, seed=seed + 3)
    preconditioner = (torch.eye(n, dtype=torch.float64) + 0.2 * noise / noise.norm()) @ (0.7 * inverse)
    matrix = torch.eye(n, dtype=torch.float64) - preconditioner @ h
    norm = float(torch.linalg.matrix_norm(matrix, 2))
    assert norm < 1.0
    fixed = inverse @ b @ theta
    target = fixed - normal(n, seed=seed + 4)

    def descend(theta: dict[str, Tensor], params: dict[str, Tensor], state: Any) -> tuple[dict[str, Tensor], Any]:
        return {"x": params["x"] - (params["x"] @ h.mT - b @ theta["t"]) @ preconditioner.mT}, state

    def objective(params: dict[str, Tensor], data: dict[str, Tensor]) -> Tensor:
        return 0.5 * (params["x"] - target).square().sum()

    loop = scripted_loop({"x": torch.empty(n)}, descend, objective)
    weights = {"t": theta}
    segment = Segment({"z": torch.zeros(1, 1, 1)}, {"none": torch.zeros(1)}, lambda objectives: objectives[-1])
    carry = loop.start(weights, {"x": fixed[None]})
    exact = torch.linalg.solve(torch.eye(n, dtype=torch.float64) - matrix.mT, fixed - target)
    whole = b.mT @ preconditioner.mT @ exact
    close(whole, b.mT @ inverse @ (fixed - target), 1e-10)
    for terms in (1, 2, 5, 12, 80):
        found = ImplicitDifferentiation(loop, terms)(weights, segment, carry, torch.Generator()).gradient["t"]
        left_out = torch.linalg.matrix_power(matrix.mT, terms) @ exact
        close(whole - found, b.mT @ preconditioner.mT @ left_out, 1e-10)
        assert float(left_out.norm()) <= norm**terms * float(exact.norm()) + 1e-11


@pytest.mark.parametrize("sigma", [0.1, 1.0])
@settings(max_examples=2)
@given(seed=seeds)
def test_pes_unbiased(sigma, seed):
    """Two segments with polynomial losses, whose smoothed gradient is known."""
    pairs, repeats = 10_000, 30
    theta = torch.tensor([0.7, -0.4], dtype=torch.float64)
    a, b, c = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, -1.0], [1.5, 0.5], [0.3, -0.2]))

    def record(
        theta: dict[str, Tensor], params: dict[str, Tensor], state: tuple[Tensor, Tensor]
    ) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        """Make the loss of each segment the parameter; the first segment's theta is the state."""
        step, one = state
        two = theta["t"]
        first = two.square().sum() + two[0] ** 3
        last = (one @ a).square() * (two @ b) + two @ c
        value = torch.where(step == 0, first, last).expand(params["value"].shape)
        return {"value": value}, (step + 1, torch.where(step == 0, two, one))

    start = (torch.zeros((), dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    loop = scripted_loop({"value": torch.empty(1)}, record, lambda params, data: params["value"].sum(), start)
    segment = Segment({"z": torch.zeros(1, 1, 1)}, {"none": torch.zeros(1)}, lambda objectives: objectives[-1])

    variance = sigma**2
    unit_0 = torch.tensor([1.0, 0.0], dtype=torch.float64)
    first = 2 * theta + 3 * (theta[0] ** 2 + variance) * unit_0
    last = ((theta @ a) ** 2 + variance * a.square().sum()) * b + c  # by the second perturbation alone
    smoothed = first + last + 2 * (theta @ a) * (theta @ b) * a

    def sample(estimator: Any) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        found = []
        for _ in range(repeats):
            carry = estimator.start({"t": theta}, {"value": torch.zeros(1, 1, dtype=torch.float64)}, generator)
            total = torch.zeros(2, dtype=torch.float64)
            for _ in range(2):
                estimate = estimator({"t": theta}, segment, carry, generator)
                total, carry = total + estimate.gradient["t"], estimate.carry
            found.append(total)
        return torch.stack(found)

    def deviation(sample: Tensor, expected: Tensor) -> Tensor:
        return (sample.mean(0) - expected).abs() / (sample.std(0) / repeats**0.5)

    assert (deviation(sample(PersistentES(loop, sigma, pairs)), smoothed) < 4.0).all()
    segments = sample(EvolutionStrategies(loop, sigma, pairs))
    assert (deviation(segments, smoothed) > 10.0).all()
    # With the first segment's theta a constant, nothing but the two parts that each segment sees is left.
    close(first + (theta @ a) ** 2 * b + c, segments.mean(0), 5 * float((segments.std(0) / repeats**0.5).max()))


def pca_problem(d: int, p: int, after_step: Callable[[], None]) -> Problem:
    """A problem that calls ``after_step`` once in each step, forward or recomputed."""

    def loss(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        return -(batch["z"] @ params["x"]).square().sum()

    def objective(params: dict[str, Tensor], data: dict[str, Tensor]) -> Tensor:
        after_step()
        return loss(params, {"z": data["all"]})

    return Problem(sm.Geometry.from_rules({"x": torch.empty(d, p)}, {"x": Stiefel()}), loss, objective)


def make_base(geometry: sm.Geometry, theta: dict[str, Tensor]) -> sm.SubspaceOptimizer:
    return sm.SubspaceOptimizer(geometry, theta, "base")


def make_rsgd(geometry: sm.Geometry, theta: dict[str, Tensor]) -> sm.RSGD:
    return sm.RSGD(geometry, theta["lr"])


class LiveBytes(CreatedStorages):
    """``peak`` is the most bytes that were measured."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0

    def measure(self) -> None:
        self.peak = max(self.peak, self.alive())


@settings(max_examples=2)
@given(seed=seeds)
def test_segment_recomputation(seed):
    d, p, tasks, steps = 5, 2, 2, 6
    calls: list[None] = []
    problem = pca_problem(d, p, lambda: calls.append(None))
    theta = lively_weights("base", 1)
    params = {"x": torch.stack([orthonormal(d, p, seed + i) for i in range(tasks)])}
    batches, data = {"z": normal(steps, tasks, 4, d, seed=seed)}, {"all": normal(tasks, 9, d, seed=seed + 1)}
    weights = normal(steps, tasks, seed=seed + 2)
    whole = InnerLoop(problem, make_base, interval=steps, compiled=False)

    def unrolled(theta: dict[str, Tensor]) -> Tensor:
        carry, objectives = whole.start(theta, params), []
        for t in range(steps):
            carry, values = whole.step(theta, carry, {"z": batches["z"][t]}, data)
            objectives.append(values)
        return torch.stack(objectives)

    plain = torch.func.grad(lambda theta: (unrolled(theta) * weights).sum())(theta)
    objectives = unrolled(theta)
    for interval in (1, 2, 4, 6):
        loop = replace(whole, interval=interval)
        carry = loop.start(theta, params)
        calls.clear()
        trace = run(loop, theta, carry, batches, data)
        assert len(trace.borders) == math.ceil(steps / interval)
        gradient = pull_back(loop, theta, trace, batches, data, weights).theta
        # The last interval is not run again.
        assert len(calls) == 2 * steps - (steps - interval * (len(trace.borders) - 1))
        assert torch.equal(trace.objectives, objectives)
        for name, value in plain.items():
            # The parts of the segments are added in another order than without segments.
            torch.testing.assert_close(gradient[name], value, rtol=1e-11, atol=1e-11 * float(value.abs().max()))


def test_segment_recomputation_memory():
    """The exponent in the number of steps of what lives at the peak."""
    peaks, lengths = [], (16, 64, 256)
    theta = {"lr": torch.tensor(1e-3, dtype=torch.float64)}
    params = {"x": orthonormal(16, 3, 0)[None]}
    for steps in lengths:
        live = LiveBytes()
        problem = pca_problem(16, 3, live.measure)
        loop = InnerLoop(problem, make_rsgd, interval=math.isqrt(steps), compiled=False)
        batches, data = {"z": normal(1, 1, 2, 16).expand(steps, 1, 2, 16)}, {"all": normal(1, 2, 16)}
        with live:
            trace = run(loop, theta, loop.start(theta, params), batches, data)
            pull_back(loop, theta, trace, batches, data, torch.ones(steps, 1, dtype=torch.float64))
        peaks.append(live.peak)
    assert 0.3 < slope(lengths, peaks, 0.0) < 0.6
