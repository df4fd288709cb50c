"""One test for each proven statement: does the code do what ``proofs/statements.json`` says it is proven to do?

A test has the name of its statement. Where a statement has no code yet, its formula is tested by itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making import adapt_step, lively_weights, normal, start
from subspace_kernels import Layout
from subspace_kernels.reference import cross_matrix, cross_matrix_means, matrix_mean, rank2_matrix
from torch import Tensor
from torch.utils import _pytree as pytree

import subspace_meta as sm
from subspace_meta.adapter.base import BaseAdapter
from subspace_meta.adapter.paper import PaperAdapter
from subspace_meta.adapter.spectral import spectral_direction, spectral_factor
from subspace_meta.manifolds import (
    SPD,
    Cayley,
    CholeskyQR,
    Euclidean,
    Grassmann,
    HouseholderQR,
    OrthonormalRetraction,
    PolarNewtonSchulz,
    Rotations,
    SPDSecondOrder,
    Stiefel,
    StiefelCanonical,
)
from subspace_meta.manifolds.checks import check_retraction_order, draw, gap, slope, unit
from subspace_meta.manifolds.matrix_functions import symmetric_square_root
from subspace_meta.manifolds.retractions import newton_schulz_step, positive_qr
from subspace_meta.manifolds.stiefel import nearest_orthonormal, stiefel_projection
from subspace_meta.meta.cost import CreatedStorages
from subspace_meta.meta.estimators import EvolutionStrategies, ImplicitDifferentiation, PersistentES, Segment
from subspace_meta.meta.unroll import InnerLoop, pull_back, run
from subspace_meta.reference import reference_step
from subspace_meta.tasks import Problem

seeds = st.integers(0, 10**6)


@st.composite
def tall(draw: st.DrawFn, smallest: int = 1, spare: int = 0) -> tuple[int, int]:
    """Shapes (d, p) with p <= 4 and p + spare <= d <= 8."""
    p = draw(st.integers(smallest, 4))
    return draw(st.integers(p + spare, 8)), p


def dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum())


def close(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def orthonormal(d: int, p: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(d, p, seed=seed))[0]


def tangent(x: Tensor, seed: int) -> Tensor:
    """X A + N with a skew A and X^T N = 0: a tangent vector, made without the library."""
    a, n = normal(x.shape[1], x.shape[1], seed=seed), normal(*x.shape, seed=seed + 1)
    return x @ (a - a.mT) + n - x @ (x.mT @ n)


def step_within(x: Tensor, seed: int, norm: float) -> Tensor:
    """A tangent vector of at most this Frobenius norm."""
    u = tangent(x, seed)
    return u * min(1.0, norm / max(float(u.norm()), 1e-30))


def is_tangent(x: Tensor, v: Tensor) -> None:
    close(x.mT @ v + v.mT @ x, torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype))


def is_orthonormal(x: Tensor, tolerance: float = 1e-11) -> None:
    close(x.mT @ x, torch.eye(x.shape[1], dtype=x.dtype), tolerance)


def canonical(x: Tensor, u: Tensor, v: Tensor) -> float:
    """tr U^T (I - X X^T / 2) V, with the d x d matrix."""
    return dot(u, (torch.eye(x.shape[0], dtype=x.dtype) - 0.5 * x @ x.mT) @ v)


def definite(n: int, seed: int) -> Tensor:
    a = normal(n, 2 * n, seed=seed)
    return a @ a.mT / (2 * n) + 0.05 * torch.eye(n, dtype=torch.float64)


def symmetric(n: int, seed: int) -> Tensor:
    a = normal(n, n, seed=seed)
    return a + a.mT


def permutation(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


# Stiefel


@given(shape=tall(), seed=seeds)
def test_stiefel_projection(shape, seed):
    x = orthonormal(*shape, seed)
    u, v, t = normal(*shape, seed=seed + 1), normal(*shape, seed=seed + 2), tangent(x, seed + 3)
    for project in (stiefel_projection, Stiefel().project, StiefelCanonical().project):
        pu, pv = project(x, u), project(x, v)
        is_tangent(x, pv)
        close(project(x, pv), pv)
        close(project(x, t), t)
        for inner in (dot, lambda a, b: canonical(x, a, b)):
            assert inner(pu, v) == pytest.approx(inner(u, pv), abs=1e-11)
            assert inner(v - pv, t) == pytest.approx(0.0, abs=1e-11)


def satisfies_riesz(manifold, x, g, r, seed):
    """R has the same products with a spanning set of tangent vectors as G."""
    is_tangent(x, r)
    for i in range(x.numel()):
        v = tangent(x, seed + 2 + 2 * i)
        assert float(manifold.inner(x, r, v)) == pytest.approx(dot(g, v), abs=1e-10)


@given(shape=tall(), seed=seeds)
def test_stiefel_embedded_gradient(shape, seed):
    """A tangent vector with the same products with all of a spanning set as G: there is only one."""
    manifold, x, g = Stiefel(), orthonormal(*shape, seed), normal(*shape, seed=seed + 1)
    r = manifold.riemannian_gradient(x, g)
    satisfies_riesz(manifold, x, g, r, seed)
    other = r + manifold.project(x, normal(*shape, seed=seed + 5))
    assert dot(other - r, other - r) == pytest.approx(dot(other, other - r) - dot(g, other - r), abs=1e-10)


@given(shape=tall(), seed=seeds)
def test_stiefel_canonical_gradient(shape, seed):
    manifold, x, g = StiefelCanonical(), orthonormal(*shape, seed), normal(*shape, seed=seed + 1)
    r = manifold.riemannian_gradient(x, g)
    satisfies_riesz(manifold, x, g, r, seed)
    for i in range(shape[0] * shape[1]):
        v = tangent(x, seed + 2 + 2 * i)
        assert float(manifold.inner(x, g, v)) == pytest.approx(canonical(x, g, v), abs=1e-10)
    for u in (g, x, r):
        assert float(manifold.inner(x, u, u)) >= 0.5 * dot(u, u) - 1e-12
    assert float(manifold.inner(x, x, x)) == pytest.approx(0.5 * dot(x, x))


@given(shape=tall(), seed=seeds)
def test_stiefel_coordinates(shape, seed):
    manifold, x = StiefelCanonical(), orthonormal(*shape, seed)
    u, v = normal(*shape, seed=seed + 1), normal(*shape, seed=seed + 2)
    cu, cv = manifold.coordinates(x, u), manifold.coordinates(x, v)
    assert dot(cu, cv) == pytest.approx(canonical(x, u, v), abs=1e-10)
    close(cu, u - (1 - math.sqrt(0.5)) * x @ (x.mT @ u))
    close(manifold.from_coordinates(x, cu), u)
    close(manifold.coordinates(x, manifold.from_coordinates(x, u)), u)


@given(shape=tall(), extra=st.integers(0, 3), seed=seeds)
def test_stiefel_equivariance(shape, extra, seed):
    """For a P with orthonormal columns, square or not, and a rotation Q."""
    d, p = shape
    x, v = orthonormal(d, p, seed), normal(d, p, seed=seed + 1)
    left, right = orthonormal(d + extra, d, seed + 2), orthonormal(p, p, seed + 3)
    for act in (stiefel_projection, StiefelCanonical().riemannian_gradient):
        close(act(left @ x @ right, left @ v @ right), left @ act(x, v) @ right)


# Retractions


@given(shape=tall(), seed=seeds)
def test_cholesky_qr(shape, seed):
    x = orthonormal(*shape, seed)
    u = step_within(x, seed + 1, 9.0)  # within the bound, beyond which steps are shortened
    gram = (x + u).mT @ (x + u)
    close(gram, torch.eye(shape[1], dtype=x.dtype) + u.mT @ u)
    assert float(torch.linalg.eigvalsh(gram)[0]) >= 1.0 - 1e-11
    y = CholeskyQR()(x, u)
    is_orthonormal(y)
    factor = y.mT @ (x + u)  # L^T: upper triangular, positive diagonal, L L^T = I + u^T u
    close(factor.tril(-1), torch.zeros_like(factor), 1e-10)
    assert float(factor.diagonal().min()) > 0.0
    close(factor.mT @ factor, gram, 1e-10)
    close(y @ factor, x + u, 1e-10)
    # Not a tangent, not even at a point of the manifold: the code factors the real Gram matrix.
    a, b = normal(*shape, seed=seed + 4), normal(*shape, seed=seed + 5)
    is_orthonormal(CholeskyQR()(a, b * min(1.0, 9.0 / float(b.norm()))), 1e-6)


@given(shape=tall(smallest=2), seed=seeds)
def test_qr_not_equivariant(shape, seed):
    x = torch.eye(5, 2, dtype=torch.float64)
    u = torch.tensor([[0, 0], [0, 0], [1, 4], [1, 2], [1, 2]], dtype=torch.float64)
    first = torch.tensor([1, 0, 1, 1, 1], dtype=torch.float64) / 2
    second = torch.tensor([-2, 1, 2, 0, 0], dtype=torch.float64) / 3
    swapped = torch.tensor([0, 1, 4, 2, 2], dtype=torch.float64) / 5
    for qr in (CholeskyQR(), HouseholderQR(), lambda x, u: positive_qr(x + u)):
        close(qr(x, u), torch.stack([first, second], 1))
        close(qr(x.flip(1), u.flip(1))[:, 0], swapped)
    # In general: only if R is zero at every pair whose order is turned around.
    d, p = shape
    q, order = orthonormal(d, p, seed), torch.arange(p).flip(0)
    diagonal = torch.diag(normal(p, seed=seed + 1).abs() + 0.5)
    full = diagonal + torch.triu(normal(p, p, seed=seed + 2).sign() * 0.5, 1)
    close(positive_qr((q @ diagonal)[:, order]), q[:, order])
    close(positive_qr(q @ full), q)
    assert float((positive_qr((q @ full)[:, order]) - q[:, order]).abs().max()) > 1e-3


def generator_of(x: Tensor, u: Tensor) -> Tensor:
    n = u - 0.5 * x @ (x.mT @ u)
    return n @ x.mT - x @ n.mT


def cayley_by_definition(x: Tensor, u: Tensor) -> Tensor:
    w, identity = generator_of(x, u), torch.eye(x.shape[0], dtype=x.dtype)
    return torch.linalg.solve(identity - 0.5 * w, (identity + 0.5 * w) @ x)


@given(shape=tall(), length=st.floats(0.01, 4.0), seed=seeds)
def test_cayley(shape, length, seed):
    x = orthonormal(*shape, seed)
    u = length * step_within(x, seed + 1, 1.0)
    w, identity = generator_of(x, u), torch.eye(shape[0], dtype=x.dtype)
    assert float(torch.linalg.svdvals(identity - 0.5 * w)[-1]) >= 1.0 - 1e-11
    is_orthonormal(torch.linalg.solve(identity - 0.5 * w, identity + 0.5 * w))
    close(w @ x, u)
    y = Cayley()(x, u)
    is_orthonormal(y)
    close(y - x, torch.linalg.solve(identity - 0.5 * w, u))
    close((Cayley()(x, 1e-6 * u) - x) / 1e-6, u, 1e-4)


@given(shape=tall(), seed=seeds)
def test_cayley_small_solve(shape, seed):
    x = orthonormal(*shape, seed)
    u, p = step_within(x, seed + 1, 4.0), shape[1]
    wide = cayley_by_definition(x, u)
    n = u - 0.5 * x @ (x.mT @ u)
    left, right = torch.cat([n, x], 1), torch.cat([x, -n], 1)
    small = torch.eye(2 * p, dtype=x.dtype) - 0.5 * right.mT @ left
    close(x + left @ torch.linalg.solve(small, right.mT @ x), wide)
    close(Cayley()(x, u), wide)


@given(shape=tall(), seed=seeds)
def test_cayley_equivariant(shape, seed):
    d, p = shape
    x = orthonormal(d, p, seed)
    u, left, right = tangent(x, seed + 1), orthonormal(d, d, seed + 3), orthonormal(p, p, seed + 4)
    for scale in (0.1, 1.0, 10.0):
        expected = left @ Cayley()(x, scale * u) @ right
        close(Cayley()(left @ x @ right, scale * left @ u @ right), expected, 1e-10)


@given(shape=tall(), seed=seeds)
def test_polar(shape, seed):
    d, p = shape
    x = orthonormal(d, p, seed)
    u = step_within(x, seed + 1, 1.5)
    a = x + u
    for y in (PolarNewtonSchulz()(x, u), nearest_orthonormal(a)):
        is_orthonormal(y)
        s = y.mT @ a
        close(s, s.mT, 1e-10)
        assert float(torch.linalg.eigvalsh(s)[0]) > 0.0
        close(s @ s, torch.eye(p, dtype=x.dtype) + u.mT @ u, 1e-10)
        close(y @ s, a, 1e-10)
        for other in (orthonormal(d, p, seed + 3), positive_qr(a), positive_qr(y + 1e-3 * normal(d, p, seed=seed + 4))):
            assert dot(a - y, a - y) <= dot(a - other, a - other) + 1e-10
    left, right = orthonormal(d + 1, d, seed + 5), orthonormal(p, p, seed + 6)
    moved = PolarNewtonSchulz()(left @ x @ right, left @ u @ right)
    close(moved, left @ PolarNewtonSchulz()(x, u) @ right, 1e-10)
    close(nearest_orthonormal(left @ a @ right), left @ nearest_orthonormal(a) @ right, 1e-10)


@given(n=st.integers(1, 6), size=st.floats(0.01, 100.0), seed=seeds)
def test_spd_retraction(n, size, seed):
    m, v = definite(n, seed), size * symmetric(n, seed + 1)
    expected = m + v + 0.5 * v @ torch.linalg.solve(m, v)
    assert float(torch.linalg.eigvalsh(expected)[0]) > 0.0
    for retraction in (SPDSecondOrder(), SPDSecondOrder(max_norm=1e6)):
        y = retraction(m, v)
        assert torch.equal(y, y.mT)
        assert float(torch.linalg.eigvalsh(y)[0]) > 0.0
    # The formula itself, where the step is not shortened: no eigenvalue of M^-1 V is below -1.
    lowest = float(torch.linalg.eigvals(torch.linalg.solve(m, v)).real.min())
    v = v / max(1.0, -1.001 * lowest)
    expected, y = m + v + 0.5 * v @ torch.linalg.solve(m, v), SPDSecondOrder(max_norm=1e6)(m, v)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@given(n=st.integers(1, 6), seed=seeds)
def test_spd_square_root(n, seed):
    manifold, m, q = SPD(), definite(n, seed), orthonormal(n, n, seed + 1)
    u, v = symmetric(n, seed + 2), symmetric(n, seed + 3)
    root = symmetric_square_root(m)
    close(root @ root, m)
    assert float(torch.linalg.eigvalsh(root)[0]) > 0.0
    close(symmetric_square_root(root @ root), root, 1e-9)
    close(symmetric_square_root(q @ m @ q.mT), q @ root @ q.mT, 1e-10)
    cu, cv = manifold.coordinates(m, u), manifold.coordinates(m, v)
    close(root @ cu @ root, u, 1e-9)
    metric = float(torch.trace(torch.linalg.solve(m, u) @ torch.linalg.solve(m, v)))
    assert dot(cu, cv) == pytest.approx(metric, rel=1e-9, abs=1e-8)
    close(manifold.from_coordinates(m, cu), u, 1e-9)
    close(manifold.coordinates(q @ m @ q.mT, q @ u @ q.mT), q @ cu @ q.mT, 1e-8)


# Newton-Schulz


@given(shape=tall(), extra=st.integers(0, 3), seed=seeds)
def test_newton_schulz_equivariant(shape, extra, seed):
    d, p = shape
    x = 0.5 * normal(d, p, seed=seed) / d**0.5
    left, right = orthonormal(d + extra, d, seed + 1), orthonormal(p, p, seed + 2)
    plain, turned = x, left @ x @ right
    for _ in range(4):
        plain, turned = newton_schulz_step(plain), newton_schulz_step(turned)
        close(turned, left @ plain @ right)


@given(shape=tall(), extra=st.tuples(st.integers(0, 3), st.integers(0, 3)), seed=seeds)
def test_newton_schulz_padding(shape, extra, seed):
    d, p = shape
    x = normal(d, p, seed=seed)
    x[:, seed % p] = 0.0
    x[seed % d] = 0.0
    y = newton_schulz_step(x)
    assert not y[:, seed % p].any()
    assert not y[seed % d].any()
    larger = (0, extra[1], 0, extra[0])
    padded = newton_schulz_step(torch.nn.functional.pad(x, larger))
    close(padded, torch.nn.functional.pad(y, larger))
    assert not padded[d:].any()
    assert not padded[:, p:].any()


@given(shape=tall(), values=st.lists(st.floats(0.01, 1.73), min_size=4, max_size=4), seed=seeds)
def test_newton_schulz_singular_values(shape, values, seed):
    d, p = shape
    s = torch.tensor(values, dtype=torch.float64)[:p]
    left, right = orthonormal(d, p, seed), orthonormal(p, p, seed + 1)

    def after(s: Tensor) -> Tensor:
        """The singular values after one step, in the order of ``s``."""
        y = left.mT @ newton_schulz_step(left @ torch.diag(s) @ right.mT) @ right
        close(y, torch.diag(y.diagonal()), 1e-12)
        return y.diagonal()

    f = after(s)
    close(f, 0.5 * s * (3 - s * s), 1e-12)
    assert ((f > 0.0) & (f <= 1.0 + 1e-12)).all()
    close(1 - f, 0.5 * (1 - s).square() * (s + 2), 1e-12)
    below = s.clamp(max=1.0).sort().values
    g = after(below)
    assert (g >= below - 1e-12).all()
    assert (g[below < 0.99] > below[below < 0.99]).all()
    assert (g.diff() >= -1e-12).all()
    first = now = f.clamp(max=1.0)
    for n in range(1, 12):
        now = after(now)
        assert ((1 - now) * (1 + n * first * (1 + first) / 2) <= 1.0 + 1e-11).all()
    for _ in range(12):
        now = after(now)
    close(now, torch.ones_like(now))


@given(shape=tall(), seed=seeds)
def test_newton_schulz_defect(shape, seed):
    x = normal(*shape, seed=seed)
    s, y, identity = x.mT @ x, newton_schulz_step(x), torch.eye(shape[1], dtype=x.dtype)
    e = identity - s
    expected = e @ e @ (identity - 0.25 * s)
    torch.testing.assert_close(identity - y.mT @ y, expected, rtol=1e-10, atol=1e-11 * max(1.0, float(s.norm()) ** 3))
    # A small error E becomes 3/4 E^2.
    near = orthonormal(*shape, seed) @ (identity + 1e-4 * symmetric(shape[1], seed + 1))
    small, after = identity - near.mT @ near, identity - newton_schulz_step(near).mT @ newton_schulz_step(near)
    assert float((after - 0.75 * small @ small).norm()) <= float(small.norm()) ** 3 + 1e-14


# Statistics, adapter, whole update

STEPS = 3
PAPER = PaperAdapter(mean_statistics=True)
ADAPTERS = {"base": BaseAdapter(), "paper": PAPER}
adapters = st.sampled_from(sorted(ADAPTERS))
sizes = st.tuples(st.integers(1, 6), st.integers(1, 4))


def gradients_of(size: tuple[int, int], seed: int) -> list[Tensor]:
    """Gradients whose rows and columns have different scales, so that the coordinates do not look alike."""
    d, p = size
    scale = torch.exp(normal(d, 1, seed=seed + 50) + normal(1, p, seed=seed + 51))
    return [scale * normal(d, p, seed=seed + t) for t in range(STEPS)]


def adapt(name: str, gradients: list[Tensor], padded_from: tuple[int, int] | None = None) -> tuple[list[Tensor], Any]:
    """The updates of one matrix and the last state; those of ``base`` without their factor 1/sqrt(d)."""
    adapter, weights = ADAPTERS[name], lively_weights(name, 1)
    d, p = gradients[0].shape
    layout = Layout(((d, p),), (padded_from,) if padded_from else ())
    state, updates = adapter.init(layout, gradients[:1]), []
    for r in gradients:
        (update,), state = adapt_step(adapter, weights, state, layout, [r])
        updates.append(update * (padded_from or (d, p))[0] ** 0.5 if name == "base" else update)
    return updates, state


def states_correspond(name: str, state: Any, other: Any, rows: Tensor, columns: Tensor) -> None:
    """``other`` is ``state`` seen through the index maps ``rows`` and ``columns``."""
    d = state.momentum[0].shape[0] if name == "base" else int(rows.max()) + 1
    coordinates = torch.cat([rows, d + columns])
    for field in ("hidden", "cell", *(("fast", "slow") if name == "base" else ("maximum",))):
        close(getattr(other, field), getattr(state, field)[..., coordinates])
    if name == "base":
        close(other.momentum[0], state.momentum[0][rows][:, columns])
        close(other.peak[0], state.peak[0])


def reference_updates(name: str, gradients: list[Tensor]) -> list[Tensor]:
    """The same by the reference, on flat space, where a step is the update."""
    more = {"mean_statistics": True} if name == "paper" else {}
    x, state, updates = torch.zeros_like(gradients[0]), None, []
    for r in gradients:
        y, state = reference_step(lively_weights(name, 1), name, Euclidean(), x, r, state, **more)
        updates.append((y - x) * (r.shape[0] ** 0.5 if name == "base" else 1.0))
        x = y
    return updates


@given(name=adapters, size=sizes, times=st.tuples(st.integers(1, 3), st.integers(1, 3)), seed=seeds)
def test_adapter_pullback(name, size, times, seed):
    """Index maps that take every value equally often, in any order, and only they."""
    (d, p), plain = size, gradients_of(size, seed)
    rows, columns = permutation(times[0] * d, seed) % d, permutation(times[1] * p, seed + 1) % p
    pulled = [r[rows][:, columns] for r in plain]
    for (a, b), (small_a, small_b) in zip(itertools.pairwise(pulled), itertools.pairwise(plain), strict=True):
        row, column = cross_matrix_means(a, b)
        small_row, small_column = cross_matrix_means(small_a, small_b)
        close(row, small_row[rows])
        close(column, small_column[columns])
        close(small_row, (small_a @ small_b.mT).diagonal() / p)
        close(small_column, (small_a.mT @ small_b).diagonal() / d)
        assert float(matrix_mean(row, len(rows))) == pytest.approx(float(small_a.mul(small_b).mean()), abs=1e-10)
    updates, state = adapt(name, plain)
    others, other = adapt(name, pulled)
    for a, b in zip(updates, others, strict=True):
        close(b, a[rows][:, columns])
    states_correspond(name, state, other, rows, columns)
    for a, b in zip(reference_updates(name, plain[:2]), reference_updates(name, pulled[:2]), strict=True):
        close(b, a[rows][:, columns], 1e-10)
    if name == "paper":  # the direction is diag(l) R diag(k)
        rows_scale, columns_scale = state.maximum[:d], state.maximum[d:]
        close(updates[-1], -PAPER.step_size * torch.diag(rows_scale) @ plain[-1] @ torch.diag(columns_scale))


@given(name=adapters, size=sizes, times=st.tuples(st.integers(1, 3), st.integers(1, 3)), seed=seeds)
def test_adapter_duplication(name, size, times, seed):
    plain = gradients_of(size, seed)
    for a, b in zip(
        cross_matrix_means(plain[0], plain[1]), cross_matrix_means(*(r.repeat(times) for r in plain[:2])), strict=True
    ):
        close(b, a.repeat(b.numel() // a.numel()))
    for a, b in zip(adapt(name, plain)[0], adapt(name, [r.repeat(times) for r in plain])[0], strict=True):
        close(b, a.repeat(times))


@given(name=adapters, size=sizes, extra=st.tuples(st.integers(0, 3), st.integers(0, 3)), seed=seeds)
def test_adapter_padding(name, size, extra, seed):
    (d, p), plain = size, gradients_of(size, seed)
    padded = [torch.nn.functional.pad(r, (0, extra[1], 0, extra[0])) for r in plain]
    (rows, columns), expected = cross_matrix_means(padded[0], padded[1], size), cross_matrix_means(plain[0], plain[1])
    close(rows[:d], expected[0])
    close(columns[:p], expected[1])
    # Whatever stands outside the mask is not seen by the mean.
    garbage = torch.cat([expected[0], torch.full((extra[0],), torch.nan, dtype=torch.float64)])
    close(matrix_mean(garbage, d), expected[0].mean())
    assert Layout((tuple(padded[0].shape),), (size,)).sizes == (size,)
    for a, b in zip(adapt(name, plain)[0], adapt(name, padded, size)[0], strict=True):
        close(b[:d, :p], a)
        assert not b[d:].any()
        assert not b[:, p:].any()


@given(name=adapters, size=sizes, seed=seeds)
def test_adapter_permutation(name, size, seed):
    plain, rows, columns = gradients_of(size, seed), permutation(size[0], seed), permutation(size[1], seed + 1)
    updates, state = adapt(name, plain)
    others, other = adapt(name, [r[rows][:, columns] for r in plain])
    for a, b in zip(updates, others, strict=True):
        close(b, a[rows][:, columns])
    states_correspond(name, state, other, rows, columns)


FOLLOWING = {
    "polar": Stiefel(PolarNewtonSchulz()),
    "Cayley": Stiefel(Cayley()),
    "canonical, Cayley": StiefelCanonical(),
    "canonical, polar": StiefelCanonical(PolarNewtonSchulz()),
    "Grassmann": Grassmann(),
}


@given(key=st.sampled_from(sorted(FOLLOWING)), name=adapters, shape=tall(smallest=2), seed=seeds)
def test_update_equivariance(key, name, shape, seed):
    d, p = shape
    geometry, params = start({"x": shape}, {"x": FOLLOWING[key]}, seed)
    optimizer = sm.SubspaceOptimizer(geometry, lively_weights(name, 1), ADAPTERS[name])
    rows, columns = permutation(d, seed), permutation(p, seed + 1)
    target = normal(d, p, seed=seed + 2)

    def trajectory(x: Tensor, target: Tensor) -> tuple[list[Tensor], Any]:
        """Gradients (k X^3 + C) that follow the permutations of X when C is permuted."""
        here, points = {"x": x}, []
        state = optimizer.init(here)
        for k in range(STEPS):
            here, state = optimizer.update({"x": k * here["x"] ** 3 + target}, state, here)
            points.append(here["x"])
            is_orthonormal(here["x"])
        return points, state

    points, state = trajectory(params["x"], target)
    others, other = trajectory(params["x"][rows][:, columns], target[rows][:, columns])
    for a, b in zip(points, others, strict=True):
        close(b, a[rows][:, columns], 1e-9)
    # The group is a batch of one matrix.
    coordinates = torch.cat([rows, d + columns])
    close(other.cell, state.cell[..., coordinates], 1e-8)
    if name == "base":
        close(other.momentum[0].view(d, p), state.momentum[0].view(d, p)[rows][:, columns], 1e-8)
        momentum = state.momentum[0].view(d, p)
        close(FOLLOWING[key].project(points[-1], momentum), momentum)


# Grassmann


@given(shape=tall(), seed=seeds)
def test_grassmann_projection(shape, seed):
    manifold, x, q = Grassmann(), orthonormal(*shape, seed), orthonormal(shape[1], shape[1], seed + 1)
    u, v = normal(*shape, seed=seed + 2), normal(*shape, seed=seed + 3)
    pu, pv = manifold.project(x, u), manifold.project(x, v)
    close(x.mT @ pv, torch.zeros(shape[1], shape[1], dtype=x.dtype))
    close(manifold.project(x, pv), pv)
    assert dot(pu, v) == pytest.approx(dot(u, pv), abs=1e-11)
    close(manifold.project(x @ q, v @ q), pv @ q)
    horizontal = u - x @ (x.mT @ u)
    close(manifold.project(x, horizontal), horizontal)
    r = manifold.riemannian_gradient(x, v)
    close(r, v - x @ (x.mT @ v))
    assert float(manifold.inner(x, r, horizontal)) == pytest.approx(dot(v, horizontal), abs=1e-10)


@given(shape=tall(smallest=2), seed=seeds, repeated=st.booleans())
def test_grassmann_eigenbasis(shape, seed, repeated):
    """The formula itself, with a free choice of eigenbasis; then the orthonormal factor of the preset base.

    Its h is what the iterations make of one eigenvalue: of a matrix of one entry.
    """
    d, p = shape
    x, q = orthonormal(d, p, seed), orthonormal(p, p, seed + 1)
    g = normal(d, p, seed=seed + 2)
    if repeated:  # R^T R = identity: every orthogonal matrix is an eigenbasis
        g = orthonormal(d, p, seed + 2)

    def direction(r: Tensor, basis: Tensor) -> Tensor:
        mean = r.square().mean()
        rows = torch.exp(torch.tanh(r.square().mean(1) / (mean + 1e-3)))
        values = (basis.mT @ r.mT @ r @ basis).diagonal()
        close(basis @ torch.diag(values) @ basis.mT, r.mT @ r, 1e-9)
        scales = torch.exp(-torch.sqrt(values.clamp(min=0) + 0.1) / (mean + 1.0))
        return torch.diag(rows) @ r @ basis @ torch.diag(scales) @ basis.mT

    def eigenbasis(r: Tensor) -> Tensor:
        return torch.linalg.eigh(r.mT @ r).eigenvectors

    plain = direction(g, eigenbasis(g))
    others = [-eigenbasis(g)]
    others += [orthonormal(p, p, seed + 4)] if repeated else [eigenbasis(g).flip(1)]
    for basis in others:
        close(direction(g, basis), plain, 1e-9)
    close(direction(g @ q, eigenbasis(g @ q)), plain @ q, 1e-9)
    r = Grassmann().riemannian_gradient(x, g)
    whole = Grassmann().project(x, direction(r, eigenbasis(r)))
    turned = Grassmann().riemannian_gradient(x @ q, g @ q)
    close(Grassmann().project(x @ q, direction(turned, eigenbasis(turned))), whole @ q, 1e-8)
    # Column scales keep horizontal vectors horizontal.
    close(x.mT @ r @ torch.diag(normal(p, seed=seed)), torch.zeros(p, p, dtype=x.dtype))
    # The orthonormal factor of the code, of a direction of norm 1: these scales, with its own h.
    if d == p:  # nothing is horizontal
        return
    squared, one = r.mT @ r / r.square().sum(), torch.eye(1, dtype=r.dtype)
    values, basis = torch.linalg.eigh(squared)
    scales = torch.stack([spectral_factor(value.reshape(1, 1), one)[0, 0] for value in values])
    close(spectral_factor(squared, torch.eye(p, dtype=r.dtype)), basis @ torch.diag(scales) @ basis.mT, 1e-8)

    def mixed(r: Tensor) -> Tensor:
        squares = r.square().sum() / p
        return spectral_direction(r, squares, (d, p), torch.tensor(0.7, dtype=r.dtype))[0]

    close(mixed(turned), mixed(r) @ q, 1e-7)
    close(x.mT @ mixed(r), torch.zeros(p, p, dtype=x.dtype), 1e-8)


# Kernels


@given(size=sizes, seed=seeds)
def test_cross_adjoint(size, seed):
    d, p = size
    a, b, more = (normal(d, p, seed=seed + i) for i in range(3))
    (u, gr, du), (v, gc, dv) = ([normal(n, seed=seed + 10 + i) for i in range(3)] for n in size)
    rows, columns = cross_matrix(a, b, u, v)
    close(rows, (a @ torch.diag(v) @ b.mT).diagonal())
    close(columns, (a.mT @ torch.diag(u) @ b).diagonal())
    close(torch.cat(cross_matrix(b, a, u, v)), torch.cat([rows, columns]))
    close(
        torch.cat(cross_matrix(a + more, b, u, v)), torch.cat([rows, columns]) + torch.cat(cross_matrix(more, b, u, v))
    )
    close(
        torch.cat(cross_matrix(a, b, u + du, v + dv)),
        torch.cat([rows, columns]) + torch.cat(cross_matrix(a, b, du, dv)),
    )
    ga, gb, gu, gv = torch.func.vjp(cross_matrix, a, b, u, v)[1]((gr, gc))
    close(ga, rank2_matrix(b, gr, v, u, gc))
    close(gb, rank2_matrix(a, gr, v, u, gc))
    close(torch.cat([gu, gv]), torch.cat(cross_matrix(a, b, gr, gc)))
    close(torch.cat(cross_matrix(a, a)), torch.cat([(a @ a.mT).diagonal(), (a.mT @ a).diagonal()]))


@given(size=sizes, seed=seeds)
def test_rank2_adjoint(size, seed):
    d, p = size
    x, g, more = (normal(d, p, seed=seed + i) for i in range(3))
    (a, u, da), (v, b, dv) = ([normal(n, seed=seed + 10 + i) for i in range(3)] for n in size)
    y = rank2_matrix(x, a, v, u, b)
    close(y, torch.diag(a) @ x @ torch.diag(v) + torch.diag(u) @ x @ torch.diag(b))
    close(rank2_matrix(x + more, a, v, u, b), y + rank2_matrix(more, a, v, u, b))
    gx, ga, gv, gu, gb = torch.func.vjp(rank2_matrix, x, a, v, u, b)[1](g)
    close(gx, rank2_matrix(g, a, v, u, b))
    close(torch.cat([ga, gv]), torch.cat(cross_matrix(g, x, a, v)))
    close(torch.cat([gu, gb]), torch.cat(cross_matrix(g, x, u, b)))
    zero_u, zero_b = torch.zeros_like(u), torch.zeros_like(b)
    close(rank2_matrix(x, a + da, v, u, b), y + rank2_matrix(x, da, v, zero_u, zero_b))
    close(rank2_matrix(x, a, v + dv, u, b), y + rank2_matrix(x, a, dv, zero_u, zero_b))
    close(rank2_matrix(x, a, v, u + da, b), y + rank2_matrix(x, zero_u, torch.zeros_like(v), da, b))
    close(rank2_matrix(x, a, v, u, b + dv), y + rank2_matrix(x, torch.zeros_like(a), zero_b, u, dv))
    close(rank2_matrix(x, a, v), torch.diag(a) @ x @ torch.diag(v))


# Descent


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


# Meta-gradients


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


# Orders

WINDOW = tuple(2.0**-k for k in range(4, 9))
ORDERS = {
    "CholeskyQR": (CholeskyQR(), 1, 1, 2, 1),
    "HouseholderQR": (HouseholderQR(), 1, 1, 2, 1),
    "PolarNewtonSchulz": (PolarNewtonSchulz(), 2, 1, 2, 2),
    "Cayley": (Cayley(), 1, 2, 2, 2),
}


def order_of(manifold: sm.Manifold, x: Tensor, v: Tensor) -> float:
    """The measured slope, less one, in double precision with errors far above rounding."""
    errors = [gap(manifold, manifold.retract(x, t * v), manifold.exp(x, t * v)) for t in WINDOW]
    assert min(errors) > 1e-12
    return slope(WINDOW, errors, 0.0) - 1.0


@pytest.mark.parametrize("name", ORDERS)
@given(shape=tall(smallest=2, spare=2), seed=st.integers(0, 20))
def test_retraction_orders(name, shape, seed):
    retraction, *orders = ORDERS[name]
    for manifold, order in zip((Stiefel, StiefelCanonical, Grassmann, Rotations), orders, strict=True):
        m = manifold(retraction=retraction)
        size = (shape[0], shape[0]) if manifold is Rotations else shape
        sample = draw(m, size, generator=torch.Generator().manual_seed(seed))
        measured = order_of(m, sample.x, sample.v)
        assert order - 0.15 <= measured <= order + 0.15
        assert m.retraction_order == order
        assert check_retraction_order(sample).passed


@given(n=st.integers(2, 6), seed=seeds)
def test_retraction_orders_leading_terms(n, seed):
    """Cayley: W^3 X / 12, with the geodesic of the canonical metric. SPD: V M^-1 V M^-1 V / 6. To two digits."""
    t = 1e-2
    x = orthonormal(n + 2, 2, seed)
    u = unit(StiefelCanonical(), x, tangent(x, seed + 1))
    w = generator_of(x, u)
    error = Cayley()(x, t * u) - StiefelCanonical().exp(x, t * u)
    leading = w @ w @ w @ x / 12
    assert float((error / t**3).norm()) == pytest.approx(float(leading.norm()), rel=1e-2)
    spd, m = SPD(SPDSecondOrder()), definite(n, seed)
    v = unit(spd, m, symmetric(n, seed + 2))
    error = spd.exp(m, t * v) - spd.retract(m, t * v)
    leading = v @ torch.linalg.solve(m, v) @ torch.linalg.solve(m, v) / 6
    assert float((error / t**3).norm()) == pytest.approx(float(leading.norm()), rel=1e-2)
    sample = draw(spd, (n, n), generator=torch.Generator().manual_seed(seed))
    assert 1.85 <= order_of(spd, m, v) <= 2.15
    assert check_retraction_order(sample).passed


def test_retraction_orders_are_not_claimed_too_high():
    """The library's own check rejects a claim of order 2 for QR."""

    @dataclass(frozen=True)
    class Boasting(CholeskyQR):
        order = 2

    assert not check_retraction_order(draw(Stiefel(Boasting()), (6, 3))).passed


# Memory


@given(shapes=st.lists(tall(), min_size=1, max_size=3), hidden=st.integers(1, 6))
def test_optimizer_memory(shapes, hidden):
    points = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    layout = Layout(tuple(shapes))
    coordinates, entries = sum(d + p for d, p in shapes), sum(d * p for d, p in shapes)
    paper, base = PaperAdapter(hidden=hidden), BaseAdapter(hidden=hidden)

    def count(state: Any) -> int:
        return sum(leaf.numel() for leaf in pytree.tree_leaves(state))

    assert count(paper.init(layout, points)) == (4 * hidden + 1) * coordinates
    # The count of steps, and how many there will be, are shared by all matrices.
    assert count(base.init(layout, points)) == (2 * hidden + 2) * coordinates + 7 * len(shapes) + entries + 2
    for adapter in (paper, base):
        weights = {name: value.double() for name, value in adapter.init_weights().items()}
        assert {name: tuple(value.shape) for name, value in weights.items()} == adapter.weight_shapes()
        state = adapter.init(layout, points)
        after = adapter(weights, adapter.init(layout, points), layout, [normal(*s) for s in shapes])[-1]
        assert count(after) == count(state)
    for d, p in shapes:
        theirs = 34 * d * d + 1024 * d * p + 2049
        assert (theirs - 2049) / count(paper.init(Layout(((d, p),)), [points[0]])) >= 34 * d / (4 * hidden + 1)
    for (d, p), total in {(64, 64): 4335617, (512, 64): 42469377, (2048, 512): 1216350209}.items():
        assert 34 * d * d + 1024 * d * p + 2049 == total
