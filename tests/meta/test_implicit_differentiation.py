"""Implicit differentiation: against fixed points that are known, back-propagation, and every matrix written out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from estimator_problems import (
    ES_LOOP,
    ES_STEPS,
    STIEFEL,
    Moving,
    eight_tasks,
    generator,
    last_step,
    loop_of,
    make_heavy,
    make_rsgd,
    make_shifted,
    mean_over_steps,
    moving,
    rayleigh,
    relative,
    whole,
)
from making import normal
from torch import Tensor

import subspace_meta as sm
from subspace_meta.meta.estimators import Backpropagation, ImplicitDifferentiation, Segment
from subspace_meta.meta.unroll import InnerLoop


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
