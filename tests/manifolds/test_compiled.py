"""Compiled with fullgraph, the step equals the eager one and stays on the manifold; so do meta-gradients."""

from __future__ import annotations

import pytest
import torch
from manifold_cases import CASES, FEW, label, seeded

from subspace_meta.manifolds import Stiefel

every_case = pytest.mark.parametrize("case", CASES, ids=label)
few_cases = pytest.mark.parametrize("case", FEW, ids=label)


def problem(manifold, shape, dtype):
    x = manifold.random_point(shape, seeded(), dtype)
    momentum = 0.1 * manifold.random_tangent(x, seeded(1))
    target = torch.randn(shape, generator=seeded(2), dtype=dtype)

    def step(x, momentum, rate):
        """One step of momentum, with everything an optimizer calls; the gradient is taken inside."""
        gradient = torch.func.grad(lambda z: 0.5 * ((z - target) ** 2).sum())(x)
        direction = manifold.riemannian_gradient(x, gradient)
        scaled = manifold.from_coordinates(x, 0.5 * manifold.coordinates(x, direction))
        momentum = 0.9 * momentum - rate * manifold.project(x, scaled)
        y = manifold.retract(x, momentum)
        return y, manifold.transport(x, y, momentum)

    return x, momentum, step


def outer_loss(step, x, momentum):
    """A function of the learning rate through two steps, to be differentiated."""

    def loss(rate):
        y, m = step(x, momentum, rate)
        y, m = step(y, m, rate)
        return (y * y.roll(1, -1)).sum() + (m * m).sum()

    return loss


@few_cases
def test_step_compiled_with_aot_eager(case):
    manifold, shape = case
    torch._dynamo.reset()
    x, momentum, step = problem(manifold, shape, torch.float64)
    rate = torch.tensor(0.05, dtype=torch.float64)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(x, momentum, rate), step(x, momentum, rate), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case[0] == Stiefel() else pytest.mark.slow) for case in FEW], ids=label
)
def test_meta_gradient_compiled_with_aot_eager(case):
    """grad of grad through two steps, in one graph."""
    manifold, shape = case
    torch._dynamo.reset()
    x, momentum, step = problem(manifold, shape, torch.float64)
    meta = torch.func.grad_and_value(outer_loss(step, x, momentum))
    rate = torch.tensor(0.05, dtype=torch.float64)
    compiled = torch.compile(meta, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(rate), meta(rate), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@every_case
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_hundred_steps_compiled_with_inductor(case):
    manifold, shape = case
    torch._dynamo.reset()
    x, momentum, step = problem(manifold, shape, torch.float32)
    compiled = torch.compile(step, fullgraph=True)
    eager, fast = (x, momentum), (x, momentum)
    for t in range(100):
        rate = torch.tensor(0.02 / (1 + t))
        eager, fast = step(*eager, rate), compiled(*fast, rate)
    assert (fast[0] - eager[0]).abs().max() <= 1e-5 * max(1.0, float(eager[0].abs().max()))
    assert manifold.violation(fast[0].double()).max() <= 1e-6
