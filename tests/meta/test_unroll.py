"""The meta-gradient: against central differences, against plain autograd, and where it must stop."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from making import lively_weights, normal
from torch import Tensor
from torch.utils import _pytree as pytree

import subspace_meta as sm
from subspace_meta.meta.unroll import InnerLoop, pull_back, run
from subspace_meta.tasks import Problem
from subspace_meta.tasks.pca import pca_problem

TASKS, STEPS, D, P = 3, 10, 6, 2


def loss(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    z = batch["z"]
    return (z.square().sum() - (z @ params["x"]).square().sum()) / z.shape[0] + params["b"].square().sum()


def objective(params: dict[str, Tensor], data: dict[str, Tensor]) -> Tensor:
    return loss(params, {"z": data["all"]}) + 30.0


@functools.cache
def problem() -> Problem:
    names = {"x": torch.empty(D, P), "b": torch.empty(3)}
    return Problem(sm.Geometry.from_rules(names, {"x": sm.Stiefel()}), loss, objective)


def make(geometry: sm.Geometry, theta: dict[str, Tensor]) -> sm.SubspaceOptimizer:
    return sm.SubspaceOptimizer(geometry, theta, "base")


LOOP = InnerLoop(problem(), make, block=1, compiled=False)


@functools.cache
def setting() -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    theta = lively_weights("base", 1)
    params = {
        "x": sm.Stiefel().random_point((TASKS, D, P), torch.Generator().manual_seed(0), torch.float64),
        "b": normal(TASKS, 3, seed=5),
    }
    return theta, params, {"z": normal(STEPS, TASKS, 5, D, seed=1)}, {"all": normal(TASKS, 20, D, seed=2)}


COTANGENTS = normal(STEPS, TASKS, seed=3).abs()


def total(loop: InnerLoop, theta: dict[str, Tensor]) -> Tensor:
    _, params, batches, data = setting()
    return (run(loop, theta, loop.start(theta, params), batches, data).objectives * COTANGENTS).sum()


def meta_gradient(loop: InnerLoop) -> dict[str, Tensor]:
    theta, params, batches, data = setting()
    trace = run(loop, theta, loop.start(theta, params), batches, data)
    return pull_back(loop, theta, trace, batches, data, COTANGENTS)


def relative(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    difference = sum(float((a[k] - b[k]).square().sum()) for k in a) ** 0.5
    return difference / sum(float(b[k].square().sum()) for k in b) ** 0.5


def test_against_central_differences() -> None:
    theta = setting()[0]
    gradient = meta_gradient(LOOP)
    for seed in range(3):
        direction = {name: normal(*value.shape, seed=seed + 10) for name, value in theta.items()}
        h = 1e-5
        ends = [total(LOOP, {k: v + s * h * direction[k] for k, v in theta.items()}) for s in (1, -1)]
        numerical = float(ends[0] - ends[1]) / (2 * h)
        exact = sum(float((gradient[k] * direction[k]).sum()) for k in theta)
        assert exact == pytest.approx(numerical, rel=1e-6)


def test_recomputation_equals_plain_autograd() -> None:
    theta = {name: value.clone().requires_grad_() for name, value in setting()[0].items()}
    gradients = torch.autograd.grad(total(LOOP, theta), list(theta.values()))
    assert relative(meta_gradient(LOOP), dict(zip(theta, gradients, strict=True))) < 1e-12


def test_the_block_length_changes_nothing() -> None:
    assert relative(meta_gradient(replace(LOOP, block=5)), meta_gradient(LOOP)) < 1e-12
    assert relative(meta_gradient(replace(LOOP, block=STEPS)), meta_gradient(LOOP)) < 1e-12


def test_a_block_must_divide_the_steps() -> None:
    with pytest.raises(ValueError, match="10 steps are not a multiple of the block length 3"):
        total(replace(LOOP, block=3), setting()[0])


def test_first_order_is_something_else_but_similar() -> None:
    difference = relative(meta_gradient(replace(LOOP, first_order=True)), meta_gradient(LOOP))
    assert 1e-6 < difference < 1.0


def test_truncation_stops_at_the_first_border() -> None:
    theta, params, batches, data = setting()
    half = STEPS // 2
    first, second = ({"z": batches["z"][part]} for part in (slice(0, half), slice(half, STEPS)))
    carry = run(LOOP, theta, LOOP.start(theta, params), first, data).carry
    trace = run(LOOP, theta, carry, second, data)
    truncated = pull_back(LOOP, theta, trace, second, data, COTANGENTS[half:])

    def from_constant(theta: dict[str, Tensor]) -> Tensor:
        constant = pytree.tree_map(torch.detach, carry)
        return (run(LOOP, theta, constant, second, data).objectives * COTANGENTS[half:]).sum()

    leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
    expected = torch.autograd.grad(from_constant(leaves), list(leaves.values()))
    assert relative(truncated, dict(zip(leaves, expected, strict=True))) < 1e-12
    # and that is not the derivative of the whole
    whole = pull_back(
        LOOP,
        theta,
        run(LOOP, theta, LOOP.start(theta, params), batches, data),
        batches,
        data,
        torch.cat([torch.zeros(half, TASKS, dtype=torch.float64), COTANGENTS[half:]]),
    )
    assert relative(truncated, whole) > 1e-3


def test_each_task_is_what_it_would_be_alone() -> None:
    theta, params, batches, data = setting()
    together = run(LOOP, theta, LOOP.start(theta, params), batches, data).objectives
    for i in range(TASKS):
        one = slice(i, i + 1)
        alone = run(
            LOOP,
            theta,
            LOOP.start(theta, {k: v[one] for k, v in params.items()}),
            {k: v[:, one] for k, v in batches.items()},
            {k: v[one] for k, v in data.items()},
        ).objectives
        assert torch.allclose(together[:, one], alone, rtol=1e-12, atol=0)


def test_compiled_equals_eager_with_one_compilation_each_way() -> None:
    # One parameter only: a second group of matrices doubles the time to compile.
    theta, params, batches, data = ({name: value.float() for name, value in group.items()} for group in setting())
    params, data = {"x": params["x"]}, {"covariance": data["all"].mT @ data["all"] / 20}
    figures = {}
    for compiled in (False, True):
        loop = replace(LOOP, problem=pca_problem(D, P), compiled=compiled)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        trace = run(loop, theta, loop.start(theta, params), batches, data)
        gradient = pull_back(loop, theta, trace, batches, data, COTANGENTS.float())
        # Another horizon, other data: nothing is compiled again.
        again = {"z": batches["z"][: STEPS // 2] + 1}
        trace2 = run(loop, theta, trace.carry, again, data)
        pull_back(loop, theta, trace2, again, data, COTANGENTS.float()[: STEPS // 2])
        figures[compiled] = (gradient, trace.objectives, torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert figures[True][2] == 2
    assert torch.allclose(figures[True][1], figures[False][1], rtol=1e-5)
    assert relative(figures[True][0], figures[False][0]) < 1e-3
