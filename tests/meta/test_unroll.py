"""The meta-gradient: against central differences, against plain autograd, and where it must stop."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import pytest
import torch
from making import lively_weights, normal
from torch import Tensor

import subspace_meta as sm
from subspace_meta.meta import unroll
from subspace_meta.meta.unroll import Carry, InnerLoop, pull_back, run
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
    return pull_back(loop, theta, trace, batches, data, COTANGENTS).theta


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


def plain(theta: dict[str, Tensor], carry: Carry, batches: dict[str, Tensor], data: dict[str, Tensor]) -> Tensor:
    """The weighted sum of objectives by the textbook loop, for autograd."""
    objectives = []
    for t in range(len(batches["z"])):
        carry, values = LOOP.step(theta, carry, {"z": batches["z"][t]}, data)
        objectives.append(values)
    return (torch.stack(objectives) * COTANGENTS[-len(objectives) :]).sum()


def plain_gradient(carry: Carry, batches: dict[str, Tensor], data: dict[str, Tensor]) -> dict[str, Tensor]:
    theta = {name: value.clone().requires_grad_() for name, value in setting()[0].items()}
    objective = plain(theta, carry, batches, data)
    gradients = torch.autograd.grad(objective, list(theta.values()), materialize_grads=True)
    return dict(zip(theta, gradients, strict=True))


@pytest.mark.parametrize(("block", "interval"), [(1, None), (1, 1), (1, 3), (1, 10), (2, 4), (5, 10), (10, None)])
def test_blocks_and_intervals_change_nothing(block: int, interval: int | None) -> None:
    theta, params, batches, data = setting()
    expected = plain_gradient(LOOP.start(theta, params), batches, data)
    assert relative(meta_gradient(replace(LOOP, block=block, interval=interval)), expected) < 1e-12


def test_the_derivative_to_the_first_carry() -> None:
    theta, params, batches, data = setting()
    trace = run(LOOP, theta, LOOP.start(theta, params), batches, data)
    found = pull_back(LOOP, theta, trace, batches, data, COTANGENTS).carry.params["x"]
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    (expected,) = torch.autograd.grad(plain(theta, LOOP.start(theta, leaves), batches, data), [leaves["x"]])
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_a_block_must_divide_interval_and_steps() -> None:
    with pytest.raises(ValueError, match="the interval 5 is not a multiple of the block length 2"):
        replace(LOOP, block=2, interval=5)
    with pytest.raises(ValueError, match="a block needs at least one step, got 0"):
        replace(LOOP, block=0)
    with pytest.raises(ValueError, match="10 steps are not a multiple of the block length 3"):
        total(replace(LOOP, block=3), setting()[0])


def test_batches_and_cotangents_that_do_not_fit() -> None:
    theta, params, batches, data = setting()
    carry = LOOP.start(theta, params)
    with pytest.raises(ValueError, match="there are no steps: batches need at least one entry"):
        run(LOOP, theta, carry, {}, data)
    with pytest.raises(ValueError, match=r"different numbers of steps: \{'z': 10, 'y': 3\}"):
        run(LOOP, theta, carry, {**batches, "y": batches["z"][:3]}, data)
    trace = run(LOOP, theta, carry, batches, data)
    with pytest.raises(ValueError, match=r"the cotangents have shape \(9, 3\), the objectives \(10, 3\)"):
        pull_back(LOOP, theta, trace, batches, data, COTANGENTS[:9])


@pytest.mark.parametrize("kept", [1, 2, 9])
def test_kept_residuals_change_nothing(kept: int) -> None:
    loop = replace(LOOP, interval=4)
    assert relative(meta_gradient(replace(loop, kept=kept)), meta_gradient(loop)) < 1e-12


def test_no_interval_is_run_twice_if_its_residuals_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    plain = unroll._interval
    monkeypatch.setattr(unroll, "_interval", lambda *arguments, **named: runs.append(1) or plain(*arguments, **named))
    for kept, again in ((1, 4), (3, 2), (5, 0), (9, 0)):
        runs.clear()
        meta_gradient(replace(LOOP, interval=2, kept=kept))
        assert len(runs) == 5 + again


def test_bounded_scales_down_only_what_grows() -> None:
    """With objectives of the last interval only, each border is crossed once, and its bound is a multiple of the last.

    Long steps amplify: there it acts. Short ones do not: there it does nothing.
    """
    theta, params, batches, data = setting()
    loop = replace(LOOP, interval=2)
    cotangents = COTANGENTS.clone()
    cotangents[:-2] = 0.0

    def gradient(loop: InnerLoop, longer: float) -> dict[str, Tensor]:
        weights = {**theta, "length.bias": theta["length.bias"] + longer}
        trace = run(loop, weights, loop.start(weights, params), batches, data)
        return pull_back(loop, weights, trace, batches, data, cotangents).theta

    def size(gradient: dict[str, Tensor]) -> float:
        return sum(float(value.square().sum()) for value in gradient.values()) ** 0.5

    plain, bounded = gradient(loop, 6.0), gradient(replace(loop, bounded=True), 6.0)
    assert relative(bounded, plain) > 1e-3
    assert size(bounded) < size(plain)
    assert relative(gradient(replace(loop, bounded=True), -3.0), gradient(loop, -3.0)) < 1e-12
    # A single interval has no border.
    one = replace(LOOP, interval=STEPS)
    assert relative(gradient(replace(one, bounded=True), 6.0), gradient(one, 6.0)) == 0.0


def test_the_bound_is_about_the_tasks_of_all_processes() -> None:
    """Two threads, each with some of the tasks, add up their squared norms; together they find what one finds."""
    theta, params, batches, data = setting()
    theta = {**theta, "length.bias": theta["length.bias"] + 6.0}
    loop = replace(LOOP, interval=2, bounded=True)
    meeting, brought = Barrier(2, timeout=60.0), [torch.zeros(()), torch.zeros(())]

    def gradient(part: slice, place: int | None) -> dict[str, Tensor]:
        def total(value: Tensor) -> Tensor:
            if place is None:
                return value
            brought[place] = value
            meeting.wait()
            found = brought[0] + brought[1]
            meeting.wait()
            return found

        window = {name: value[:, part] for name, value in batches.items()}
        measured = {name: value[part] for name, value in data.items()}
        start = loop.start(theta, {name: value[part] for name, value in params.items()})
        trace = run(loop, theta, start, window, measured)
        return pull_back(loop, theta, trace, window, measured, COTANGENTS[:, part], total).theta

    with ThreadPoolExecutor(2) as pool:
        left, right = pool.map(gradient, (slice(0, 2), slice(2, TASKS)), (0, 1))
    together = gradient(slice(0, TASKS), None)
    assert relative({name: left[name] + right[name] for name in left}, together) < 1e-10
    # and each for itself does not
    alone = [gradient(part, None) for part in (slice(0, 2), slice(2, TASKS))]
    assert relative({name: alone[0][name] + alone[1][name] for name in left}, together) > 1e-6


def test_first_order_is_something_else_but_similar() -> None:
    difference = relative(meta_gradient(replace(LOOP, first_order=True)), meta_gradient(LOOP))
    assert 1e-6 < difference < 1.0


def test_truncation_stops_at_the_first_border() -> None:
    theta, params, batches, data = setting()
    half = STEPS // 2
    first, second = ({"z": batches["z"][part]} for part in (slice(0, half), slice(half, STEPS)))
    carry = run(LOOP, theta, LOOP.start(theta, params), first, data).carry
    trace = run(LOOP, theta, carry, second, data)
    truncated = pull_back(LOOP, theta, trace, second, data, COTANGENTS[half:]).theta
    assert relative(truncated, plain_gradient(carry, second, data)) < 1e-12
    # and that is not the derivative of the whole
    whole = pull_back(
        LOOP,
        theta,
        run(LOOP, theta, LOOP.start(theta, params), batches, data),
        batches,
        data,
        torch.cat([torch.zeros(half, TASKS, dtype=torch.float64), COTANGENTS[half:]]),
    ).theta
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
        gradient = pull_back(loop, theta, trace, batches, data, COTANGENTS.float()).theta
        # Another horizon, other data, other meta-parameters (learning rates among them): nothing is compiled again.
        again, moved = {"z": batches["z"][: STEPS // 2] + 1}, {name: 1.1 * value for name, value in theta.items()}
        trace2 = run(loop, moved, trace.carry, again, data)
        pull_back(loop, moved, trace2, again, data, COTANGENTS.float()[: STEPS // 2])
        figures[compiled] = (gradient, trace.objectives, torch._dynamo.utils.counters["stats"]["unique_graphs"])
    # One graph, which is compiled forward and backward.
    assert figures[True][2] == 1
    assert torch.allclose(figures[True][1], figures[False][1], rtol=1e-5)
    assert relative(figures[True][0], figures[False][0]) < 1e-3
