"""Descent: does the code do what ``proofs/statements.json`` says it is proven to do?

A test has the name of its statement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from drawing import close, definite, dot, orthonormal, seeds, symmetric, tall
from hypothesis import given
from hypothesis import strategies as st
from making import lively_weights, normal
from subspace_kernels import Layout
from subspace_kernels.reference import rank2_matrix
from torch import Tensor

import subspace_meta as sm
from subspace_meta.adapter.base import BaseAdapter
from subspace_meta.manifolds import (
    SPD,
    CholeskyQR,
    Euclidean,
    Grassmann,
    OrthonormalRetraction,
    PolarNewtonSchulz,
    Stiefel,
    StiefelCanonical,
)


class Straight(OrthonormalRetraction):
    """No retraction at all: the step itself becomes visible."""

    def __call__(self, x: Tensor, v: Tensor) -> Tensor:
        return x + v


@dataclass(frozen=True)
class Scales:
    """An adapter whose row and column scales, times a step length, are given."""

    rows: Tensor
    columns: Tensor
    length: float = 1.0
    hidden = 0
    name = "given scales"

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"unused": ()}

    def init(self, layout: Layout, points: list[Tensor]) -> tuple[()]:
        return ()

    def buffers(self, state: tuple[()]) -> tuple[()]:
        return ()

    def __call__(
        self, weights: dict[str, Tensor], state: tuple[()], layout: Layout, gradients: list[Tensor], *where: Any
    ) -> tuple[list[Tensor], list[float], tuple[()]]:
        return [rank2_matrix(r, self.rows, self.columns) for r in gradients], [-self.length] * len(gradients), state


NO_WEIGHTS = {"unused": torch.zeros((), dtype=torch.float64)}


def one_step(manifold: sm.Manifold, x: Tensor, g: Tensor, adapter: Any, weights: dict[str, Tensor]) -> Tensor:
    """Where the optimizer's first step with this gradient leads."""
    geometry = sm.Geometry.from_rules({"x": x}, {"x": manifold})
    optimizer = sm.SubspaceOptimizer(geometry, weights, adapter)
    return optimizer.update({"x": g}, optimizer.init({"x": x}), {"x": x})[0]["x"]


@st.composite
def positive_scales(draw: st.DrawFn, d: int, p: int) -> tuple[Tensor, Tensor]:
    numbers = st.floats(0.1, 10.0)
    values = draw(st.lists(numbers, min_size=d + p, max_size=d + p))
    return torch.tensor(values[:d], dtype=torch.float64), torch.tensor(values[d:], dtype=torch.float64)


def bounds(rows: Tensor, columns: Tensor) -> tuple[float, float]:
    """The constants a and b of the statement."""
    return float(rows.min() * columns.min()), float(rows.max() * columns.max()) ** 2


@given(data=st.data(), shape=tall(), seed=seeds)
def test_descent_direction(data, shape, seed):
    rows, columns = data.draw(positive_scales(*shape))
    a, b = bounds(rows, columns)
    x, g = orthonormal(*shape, seed), normal(*shape, seed=seed + 1)
    for manifold in (Stiefel(Straight()), StiefelCanonical(Straight()), Grassmann(Straight()), Euclidean()):
        r = manifold.riemannian_gradient(x, g)
        square = float(manifold.inner(x, r, r))
        u = x - one_step(manifold, x, g, Scales(rows, columns), NO_WEIGHTS)
        close(manifold.project(x, u), u)
        assert float(manifold.inner(x, r, u)) >= a * square * (1 - 1e-9) - 1e-12
        assert float(manifold.inner(x, u, u)) <= b * square * (1 + 1e-9) + 1e-12
        seen = manifold.coordinates(x, r)
        expected = float((rank2_matrix(seen, rows, columns) * seen).sum())
        assert float(manifold.inner(x, r, u)) == pytest.approx(expected, rel=1e-9, abs=1e-12)
        # At the first step the momentum of preset base is the gradient, and all its scales are positive.
        first = x - one_step(manifold, x, g, BaseAdapter(), lively_weights("base", seed))
        assert square < 1e-20 or float(manifold.inner(x, r, first)) > 0.0
    # On positive definite matrices the metric is not that of the surrounding space either: the same by hand.
    spd, m, n = SPD(), definite(shape[0], seed), shape[0]
    r = spd.riemannian_gradient(m, normal(n, n, seed=seed + 2))
    sides = rows, rows.flip(0)
    a, b = bounds(*sides)
    u = spd.project(m, spd.from_coordinates(m, rank2_matrix(spd.coordinates(m, r), *sides)))
    square = float(spd.inner(m, r, r))
    assert float(spd.inner(m, r, u)) >= a * square * (1 - 1e-7)
    assert float(spd.inner(m, u, u)) <= b * square * (1 + 1e-7)


@given(data=st.data(), shape=tall(spare=1), polar=st.booleans(), seed=seeds)
def test_sufficient_decrease(data, shape, polar, seed):
    """PCA, f(X) = -tr(X^T A X), where the curvature along retracted steps is at most twice the spread of A."""
    rows, columns = (v.clamp(0.5, 2.0) for v in data.draw(positive_scales(*shape)))
    a, b = bounds(rows, columns)
    matrix = symmetric(shape[0], seed)
    values = torch.linalg.eigvalsh(matrix)
    curvature = 2 * float(values[-1] - values[0])
    manifold = Stiefel(PolarNewtonSchulz()) if polar else Stiefel(CholeskyQR())
    longest = a / (curvature * b)
    kappa = float(rows.max() * columns.max() / (rows.min() * columns.min()))
    c, least = 3 / (8 * curvature * kappa**2), -float(values[-shape[1] :].sum())

    def f(x: Tensor) -> float:
        return -dot(x, matrix @ x)

    def moved(x: Tensor, length: float) -> Tensor:
        return one_step(manifold, x, -2 * matrix @ x, Scales(rows, columns, length), NO_WEIGHTS)

    x, squares = orthonormal(*shape, seed + 1), []
    first = f(x)
    for k in range(4):
        r = manifold.riemannian_gradient(x, -2 * matrix @ x)
        square = dot(r, r)
        assert f(x) - f(moved(x, longest)) >= square / (2 * curvature * kappa**2) - 1e-12
        # Halving from a longer step ends above half of that length; base is taken where the guard accepts it.
        length = longest * 5.3
        while f(moved(x, length)) > f(x) - c * square:
            length *= 0.5
            assert length > 0.5 * longest
        candidate = one_step(manifold, x, -2 * matrix @ x, BaseAdapter(), lively_weights("base", k))
        squares.append(square)
        x = candidate if f(candidate) <= f(x) - c * square else moved(x, length)
    assert min(squares) <= (first - least) / (c * len(squares)) + 1e-12


@given(angle=st.floats(0.0, math.pi), shape=tall(), seed=seeds)
def test_ambient_counter_example(angle, shape, seed):
    manifold = StiefelCanonical(Straight())
    x = torch.tensor([[3, 0], [-4, 0], [0, 5]], dtype=torch.float64) / 5
    g = torch.tensor([[0, 1], [0, 7], [5, 0]], dtype=torch.float64)
    rows, columns = torch.tensor([64, 1, 1], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    r = manifold.riemannian_gradient(x, g)
    close(r, torch.tensor([[0, -2], [0, 11], [10, 0]], dtype=torch.float64))
    ambient = manifold.project(x, rank2_matrix(r, rows, columns))
    assert float(manifold.inner(x, r, ambient)) == pytest.approx(-1.0, abs=1e-10)
    assert dot(g, ambient) == pytest.approx(-1.0, abs=1e-10)
    # In the manifold's coordinates, in which the optimizer works, the same scales descend.
    u = x - one_step(manifold, x, g, Scales(rows, columns), NO_WEIGHTS)
    assert dot(g, u) >= float(manifold.inner(x, r, r)) > 0.0
    assert float((manifold.coordinates(x, r) - r).abs().max()) > 1e-2

    # Below a ratio of 17 + 12 sqrt 2 no scales ascend: the smallest value of <R, LR>_c / |R|^2 over all matrices R.
    def smallest(y: Tensor, l: Tensor, k: Tensor) -> float:  # noqa: E741
        metric = torch.eye(len(l), dtype=torch.float64) - 0.5 * y @ y.mT
        form = torch.kron(metric, torch.eye(len(k), dtype=torch.float64)) * torch.outer(l, k).reshape(-1)
        return float(torch.linalg.eigvalsh(0.5 * (form + form.mT))[0])

    (d, p), (low, high) = shape, (1.0, 33.9**0.5)
    l, k = ((low + (high - low) * torch.sigmoid(4 * normal(n, seed=seed + n))) for n in (d, p))  # noqa: E741
    assert smallest(orthonormal(d, p, seed), l, k) > 0.0
    one = torch.ones(1, dtype=torch.float64)
    turned = torch.tensor([[math.cos(angle)], [math.sin(angle)]], dtype=torch.float64)
    assert smallest(turned, torch.tensor([33.9, 1.0], dtype=torch.float64), one) > 0.0
    # The bound is sharp: a little above it some direction of X makes the form indefinite.
    grid = torch.linspace(0.0, math.pi, 181, dtype=torch.float64)
    points = torch.stack([grid.cos(), grid.sin()], 1)[:, :, None]
    above = torch.tensor([36.0, 1.0], dtype=torch.float64)
    assert min(smallest(y, above, one) for y in points) < 0.0
