"""Manifolds and retractions: does the code do what ``proofs/statements.json`` says it is proven to do?

A test has the name of its statement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from drawing import (
    canonical,
    close,
    definite,
    dot,
    is_orthonormal,
    is_tangent,
    orthonormal,
    seeds,
    step_within,
    symmetric,
    tall,
    tangent,
)
from hypothesis import given
from hypothesis import strategies as st
from making import normal
from torch import Tensor

import subspace_meta as sm
from subspace_meta.manifolds import (
    SPD,
    Cayley,
    CholeskyQR,
    Grassmann,
    HouseholderQR,
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
