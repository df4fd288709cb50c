"""A longer step never ends nearer to the start, never stands still, and has no size at which it vanishes.

Over every manifold with every retraction, in float32 and float64, at every rank.
"""

from __future__ import annotations

import math

import pytest
import torch
from manifold_cases import CASES, label, seeded
from mpmath import mp, mpf

import subspace_meta as sm
from subspace_meta.manifolds import (
    SPD,
    Cayley,
    CholeskyQR,
    Euclidean,
    Geodesic,
    Grassmann,
    HouseholderQR,
    Manifold,
    Oblique,
    PolarNewtonSchulz,
    Product,
    Rotations,
    Sphere,
    SphereExponential,
    Stiefel,
    StiefelCanonical,
)
from subspace_meta.manifolds.base import skew_part, without_rounding

FREE = [case for case in CASES if not isinstance(case[0], SPD) and "SPD" not in case[0].name]
every_case = pytest.mark.parametrize("case", FREE, ids=label)
both_types = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
LENGTHS = torch.logspace(-3, 6, 181, dtype=torch.float64)


def far(manifold: Manifold, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The geodesic distance where there is one, otherwise that of the surrounding space; in float64."""
    x, y = x.double().expand_as(y), y.double()
    try:
        return manifold.distance(x, y)
    except NotImplementedError:
        return torch.linalg.matrix_norm(y - x)


def largest_fall(manifold, x, v, lengths=LENGTHS):
    """How far, over all lengths, the distance falls below what it was for a shorter step."""
    steps = lengths.to(v.dtype).reshape(-1, *[1] * v.ndim) * v
    ends = manifold.retract(x.expand_as(steps), steps)
    assert ends.isfinite().all()
    distance = far(manifold, x, ends)
    return float((distance.cummax(dim=0).values - distance).max() / distance.max())


@every_case
@both_types
def test_distance_does_not_fall_with_the_length(case, dtype):
    manifold, shape = case
    for rank in range(1, shape[-1] + 1):
        for seed in range(6):
            generator = seeded(100 * rank + seed)
            x = manifold.random_point(shape, generator, dtype)
            left = torch.randn(*shape[:-1], rank, generator=generator, dtype=dtype)
            right = torch.randn(*shape[:-2], rank, shape[-1], generator=generator, dtype=dtype)
            v = manifold.project(x, left @ right)
            assert largest_fall(manifold, x, v) <= 40 * torch.finfo(dtype).eps, (rank, seed)


def rank_one_and_a_turn(p, normal, turn):
    """At X = [I; 0] of size (p + 1) x p: the tangent with one normal row and a skew part."""
    x = torch.eye(p + 1, dtype=torch.float64)[:, :p]
    a = torch.zeros(p, p, dtype=torch.float64)
    for (i, j), value in turn.items():
        a[i, j], a[j, i] = value, -value
    return x, torch.cat([a, torch.tensor([normal], dtype=torch.float64)])


@pytest.mark.parametrize("retraction", [CholeskyQR(), HouseholderQR()], ids=lambda r: type(r).__name__)
def test_qr_along_the_directions_where_its_columns_turn_back(retraction):
    """Found by maximising the change of the distance with the length, from several starts."""
    manifold = Stiefel(retraction)
    generator = seeded()
    x = torch.eye(5, dtype=torch.float64)[:, :4]
    z = torch.randn(32, 5, 4, generator=generator, dtype=torch.float64) * 0.03
    z[:, 4] += torch.randn(32, 4, generator=generator, dtype=torch.float64)
    z.requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.02)

    def tangent():
        v = manifold.project(x, z)
        return v / torch.linalg.matrix_norm(v)[:, None, None]

    def overlap(length):
        y = x + length * tangent()
        factor = torch.linalg.cholesky(y.mT @ y)
        return torch.linalg.solve_triangular(factor, y.mT, upper=False).mT.mul(x).sum(dim=(-2, -1))

    for _ in range(300):
        optimizer.zero_grad()
        (overlap(7.99) - overlap(8.01)).sum().backward()
        optimizer.step()
    v = tangent().detach()
    # The textbook formula does turn back there.
    assert (overlap(8.5) > overlap(7.7)).any()
    lengths = torch.linspace(0.1, 20.0, 200, dtype=torch.float64)
    assert largest_fall(manifold, x, v, lengths) <= 1e-13


def test_canonical_geodesic_turns_faster_than_its_step():
    """V = [aJ; nI] with n = sqrt 2 a, whose generator is 2 / sqrt 3 longer: beyond 2.94 it comes back."""
    x = torch.eye(4, dtype=torch.float64)[:, :2]
    j = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    v = torch.cat([math.sqrt(1 / 3) * j, math.sqrt(2 / 3) * torch.eye(2, dtype=torch.float64)])
    assert torch.linalg.matrix_norm(v, 2) == pytest.approx(1.0)
    manifold = StiefelCanonical(Geodesic("canonical"))
    exact = torch.stack([torch.linalg.matrix_norm(manifold.exp(x, t * v) - x) for t in (2.93, 3.1)])
    assert exact[1] < exact[0] - 1e-3
    assert largest_fall(manifold, x, v, torch.linspace(0.1, 12, 240, dtype=torch.float64)) <= 1e-13


def quadratic(manifold, shape, dtype):
    """A loss with one matrix in front and one to aim at."""
    weight = torch.randn(*shape[:-2], shape[-2], shape[-2], generator=seeded(1), dtype=dtype)
    weight = weight @ weight.mT / shape[-2]
    if isinstance(manifold, Grassmann):
        return lambda x: -(x.mT @ weight @ x).diagonal(dim1=-2, dim2=-1).sum()
    target = torch.randn(shape, generator=seeded(2), dtype=dtype)
    return lambda x: 0.5 * (x * (weight @ x)).sum() - (target * x).sum()


@every_case
@both_types
def test_no_rate_stands_still(case, dtype):
    """Whatever the rate, a step from where the gradient is not zero arrives somewhere else."""
    manifold, shape = case
    loss = quadratic(manifold, shape, dtype)
    start = {"x": manifold.random_point(shape, seeded(), dtype)}
    geometry = sm.Geometry.from_rules(start, {"x": manifold})
    for rate in (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1e3):
        optimizer = sm.RSGD(geometry, lr=rate)
        params, state = start, optimizer.init(start)
        for _ in range(5):
            gradient = torch.func.grad(loss)(params["x"])
            riemannian = manifold.riemannian_gradient(params["x"], gradient)
            moved, state = optimizer.update({"x": gradient}, state, params)
            if not moved["x"].isfinite().all():
                # Flat space has no bound: a diverging run says so.
                assert "Euclidean" in manifold.name
                break
            if float(riemannian.abs().max()) > 1e-3:
                assert float(far(manifold, params["x"], moved["x"]).min()) > 1e-6, rate
            params = moved


@pytest.mark.parametrize("metric", ["embedded", "canonical"])
def test_a_full_turn_is_no_fixed_point(metric):
    """The rate at which the exact geodesic comes all the way round, to the start: after 2 pi, for a span after pi."""
    start = torch.tensor([[math.cos(0.7), -math.sin(0.7)], [math.sin(0.7), math.cos(0.7)]], dtype=torch.float64)
    for manifold, x, turn in (
        (Rotations(Geodesic(metric)), start, 2 * math.pi),
        (Grassmann(Geodesic(metric)), start[:, :1], math.pi),
    ):
        gradient = torch.tensor([[1.0, 0.3], [0.2, -2.0]], dtype=torch.float64)[:, : x.shape[1]]
        length = torch.linalg.matrix_norm(manifold.riemannian_gradient(x, gradient), 2)
        optimizer = sm.RSGD(sm.Geometry.from_rules({"x": x}, {"x": manifold}), lr=float(turn / length))
        moved, _ = optimizer.update({"x": gradient}, optimizer.init({"x": x}), {"x": x})
        assert float(manifold.distance(x, moved["x"])) > 1.5


@every_case
@pytest.mark.parametrize("size", [1e-30, 1e-25, 1e-20, 1e20, 1e25, 1e30])
def test_no_float32_entry_is_too_small_or_too_large(case, size):
    """Gradient, projection, norm, retraction and transport at any size are those in float64."""
    manifold, shape = case
    x = manifold.random_point(shape, seeded(), torch.float32)
    y = manifold.random_point(shape, seeded(1), torch.float32)
    g = torch.randn(shape, generator=seeded(2), dtype=torch.float64)
    v = manifold.project(x.double(), g)
    big, vector = (size * g).float(), (size * v).float()

    def agree(single, double, scale=1.0):
        double = double / scale
        torch.testing.assert_close(single.double() / scale, double, rtol=0, atol=2e-5 * float(double.abs().max()))

    def check(x, y):
        exact = (x.double(), y.double())
        agree(manifold.project(x, big), manifold.project(exact[0], big.double()), size)
        agree(manifold.riemannian_gradient(x, big), manifold.riemannian_gradient(exact[0], big.double()), size)
        agree(manifold.norm(x, vector), manifold.norm(exact[0], vector.double()), size)
        agree(manifold.transport(x, y, vector), manifold.transport(*exact, vector.double()), size)
        agree(manifold.retract(x, vector), manifold.retract(exact[0], vector.double()))

    check(x, y)
    # Traced or transformed no values are at hand: the other way to the same results.
    for method, a, b in (
        (manifold.riemannian_gradient, x, big),
        (manifold.retract, x, vector),
        (manifold.norm, x, vector),
    ):
        transformed = torch.func.vmap(method)(a, b)
        scale = 1.0 if method == manifold.retract else size
        agree(transformed, method(a, b).double(), scale)
    assert float(manifold.norm(x, vector).min()) > 0.0
    slope = torch.func.grad(lambda w: manifold.retract(x, w).sum())(vector)
    assert slope.isfinite().all()


@pytest.mark.parametrize("manifold", [Sphere(), Sphere(SphereExponential()), Oblique(), Oblique(SphereExponential())])
def test_huge_steps_of_spheres_go_to_the_limit(manifold):
    """Normalization's is the direction itself, the exponential's the antipode; derivatives are those in float64."""
    x = manifold.random_point((5, 3), seeded(), torch.float32)
    v = (1e25 * manifold.random_tangent(x.double(), seeded(1))).float()
    axes = (-2, -1) if isinstance(manifold, Sphere) else (-2,)
    direction = v.double() / v.double().square().sum(dim=axes, keepdim=True).sqrt()
    limit = -x.double() if isinstance(manifold.retraction, SphereExponential) else direction
    torch.testing.assert_close(manifold.retract(x, v).double(), limit, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1.0, 1e18, 1e30])
def test_gradients_that_are_rounding_are_dropped_at_every_size(size):
    generator = seeded()
    g = torch.randn(3, 5, 4, generator=generator)
    small = g * torch.tensor([1e-7, 1.0, 1e-5])[:, None, None]
    for method in (without_rounding, torch.func.vmap(without_rounding)):
        kept = method(size * small, size * g)
        assert torch.equal(kept[0], torch.zeros(5, 4))
        assert torch.equal(kept[1:], (size * small)[1:])
    assert without_rounding(torch.full((2, 2), math.nan), g[0, :2, :2]).isnan().all()
    assert torch.equal(without_rounding(torch.zeros(2, 2), torch.zeros(2, 2)), torch.zeros(2, 2))


@every_case
def test_norm_is_the_root_of_the_metric(case):
    """Against the sum in 50 digits (block by block where there are several metrics); its derivative at 0 is 0."""
    manifold, shape = case
    x = manifold.random_point(shape, seeded(), torch.float64)
    v = manifold.random_tangent(x, seeded(1))
    for size in (1e-200, 1e-3, 1.0, 1e200):
        norm = manifold.norm(x, size * v)
        assert norm.shape == shape[:-2]
        for i in range(shape[0]):
            with mp.workdps(50):
                total = mp.fsum(mpf(float(e)) ** 2 for e in v[i].flatten())
                if isinstance(manifold, StiefelCanonical):
                    total -= mp.fsum(mpf(float(e)) ** 2 for e in (x[i].T @ v[i]).flatten()) / 2
                expected = float(mp.sqrt(total))
            assert float(norm[i]) / size == pytest.approx(expected, rel=1e-14)
    zero = torch.zeros_like(v)
    assert torch.equal(torch.func.grad(lambda w: manifold.norm(x, w).sum())(zero), zero)
    slope = torch.func.grad(lambda w: manifold.norm(x, w).sum())(v)
    torch.testing.assert_close((slope * v).sum(dim=(-2, -1)), manifold.norm(x, v), rtol=1e-13, atol=0)


@every_case
def test_transport_to_several_points_at_once(case):
    """One tangent to a batch of points, and to one point that is itself broadcast."""
    manifold, shape = case
    x = manifold.random_point(shape[1:], seeded(), torch.float64)
    v = manifold.random_tangent(x, seeded(1))
    ys = manifold.random_point((3, *shape[1:]), seeded(2), torch.float64)
    moved = manifold.transport(x, ys, v)
    assert moved.shape == ys.shape
    for y, w in zip(ys, moved, strict=True):
        torch.testing.assert_close(w, manifold.transport(x, y, v), rtol=1e-13, atol=1e-13)


def test_products_with_flat_factors_transport_to_several_points():
    manifold = Product((Stiefel(), Euclidean()), (4, 2))
    x = manifold.random_point((6, 3), seeded())
    ys = manifold.random_point((5, 6, 3), seeded(1))
    v = manifold.random_tangent(x, seeded(2))
    assert torch.equal(manifold.transport(x, ys, v)[2, 4:], v[4:])


@pytest.mark.parametrize("family", [Sphere, Oblique])
@pytest.mark.parametrize("gap", [1e-1, 1e-3, 1e-5])
def test_float32_transport_near_the_antipode_is_isometric(family, gap):
    manifold = family()
    generator = seeded()
    x = manifold.random_point((20, 5, 3), generator, torch.float64)
    u = manifold.random_tangent(x, generator)
    axes = (-2, -1) if family is Sphere else (-2,)
    u = u / u.square().sum(dim=axes, keepdim=True).sqrt()
    y = (-math.cos(gap) * x + math.sin(gap) * u).float()
    x, v = x.float(), manifold.random_tangent(x, generator).float()
    moved = manifold.transport(x, y, v)
    # The other way, without looking at values, is the same.
    torch.testing.assert_close(torch.func.vmap(manifold.transport)(x, y, v), moved, rtol=0, atol=2e-6)
    ratio = moved.double().square().sum(dim=axes) / v.double().square().sum(dim=axes)
    assert (ratio - 1).abs().max() < 2e-6
    assert (y.double() * moved).sum(dim=axes).abs().max() < 1e-5
    # At the antipode itself the tangent spaces are one.
    torch.testing.assert_close(manifold.transport(x, -x, v), v, rtol=0, atol=1e-6)


def test_bound_is_the_curves_own_turning_point_on_grassmann():
    """In one plane: beyond the right angle the subspace comes nearer, and the unbounded formulas do."""
    x = torch.eye(2, dtype=torch.float64)[:, :1]
    v = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for retraction, angle in (
        (Cayley(), lambda s: 2 * math.atan(s / 2)),
        (Geodesic(), lambda s: s),
        (PolarNewtonSchulz(), math.atan),
        (CholeskyQR(), math.atan),
    ):
        manifold = Grassmann(retraction)
        for s in (0.1, 1.0, 1.5):
            assert float(manifold.distance(x, manifold.retract(x, s * v))) == pytest.approx(angle(s), rel=1e-13)
        for s in (2.5, 4.0, 12.0):
            y = manifold.retract(x, s * v)
            assert float(manifold.distance(x, y)) >= math.atan(2.0) - 1e-12
    assert float(skew_part(x @ x.T).abs().max()) == 0.0
