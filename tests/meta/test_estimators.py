"""Estimators of the meta-gradient: back-propagation against closed forms and 50 digits; what holds for all of them."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mpmath
import pytest
import torch
from estimator_problems import (
    ES_KINDS,
    ES_LOOP,
    SIGMA,
    STIEFEL,
    Theta,
    cut,
    eight_tasks,
    flat,
    generator,
    last_step,
    loop_of,
    make_heavy,
    make_rsgd,
    mean_over_steps,
    moving,
    quadratic,
    rayleigh,
    relative,
    smooth_setting,
    spoiled,
    whole,
    without,
)
from making import normal
from torch import Tensor

import subspace_meta as sm
from subspace_meta.meta.estimators import Backpropagation, Estimator, ImplicitDifferentiation, Segment

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


# --- tasks that are not finite ---


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
