"""A longer step never ends nearer to the start than a shorter one; steps and gradients of any size of a type."""

import math

import pytest
import torch
from manifold_cases import CASES, FEW, label, seeded, step_of_norm

import subspace_meta as sm
from subspace_meta.manifolds import (
    SPD,
    Cayley,
    Euclidean,
    Geodesic,
    Grassmann,
    Oblique,
    Product,
    Sphere,
    SphereExponential,
    Stiefel,
)

CURVED = [case for case in CASES if not isinstance(case[0], Euclidean | Product)]
LENGTHS = (
    1e-3,
    1e-2,
    0.1,
    0.3,
    0.6,
    1,
    1.3,
    1.57,
    1.7,
    2,
    2.5,
    3,
    3.14,
    3.3,
    4,
    5,
    6,
    6.3,
    8,
    10,
    30,
    100,
    1e3,
    1e4,
    1e6,
)
curved = pytest.mark.parametrize("case", CURVED, ids=label)


def away(manifold, x, y):
    """Return how far ``y`` is from ``x``, ``(...)``: it grows with every angle and every eigenvalue's ratio."""
    x, y = x.double(), y.double()
    if isinstance(manifold, SPD):
        root = torch.linalg.cholesky(x)
        return torch.linalg.eigvalsh(torch.linalg.solve(root, torch.linalg.solve(root, y).mT)).log().norm(dim=-1)
    if isinstance(manifold, Grassmann):
        return torch.linalg.matrix_norm(y - x @ (x.mT @ y))  # the root of the sum of sin(angle)^2
    return torch.linalg.matrix_norm(y - x)


@curved
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_a_longer_step_never_ends_nearer(case, dtype):
    manifold, shape = case
    rounding = (1e-4 if isinstance(manifold, SPD) else 1e-6) if dtype == torch.float32 else 1e-12
    for rank in (None, 1, 2):
        for seed in range(4):
            x = manifold.random_point(shape, seeded(seed), dtype)
            v = step_of_norm(manifold, x, 1.0, rank, seed + 1)
            distances = torch.stack([away(manifold, x, manifold.retract(x, length * v)) for length in LENGTHS])
            fallen = (distances.cummax(dim=0).values - distances) / distances.clamp(min=1.0)
            assert fallen.max() < rounding, (rank, seed, LENGTHS[int(fallen.amax(dim=-1).argmax())])
            assert distances[-1].min() > 0.3


@curved
@pytest.mark.parametrize("size", [1e15, 1e20, 1e25, 1e30])
def test_a_step_whose_square_overflows_keeps_its_direction(case, size):
    manifold, shape = case
    x = manifold.random_point(shape, seeded(), torch.float32)
    v = manifold.random_tangent(x, seeded(1))
    expected = manifold.retract(x, 1e6 * v)
    moved = manifold.retract(x, size * v)
    torch.testing.assert_close(moved, expected, rtol=2e-3, atol=2e-3)
    assert manifold.violation(moved.double()).max() < 1e-5

    def loss(v):
        return manifold.retract(x, v).square().sum()

    traced = torch.func.vmap(lambda v: manifold.retract(x, v))((size * v)[None])[0]
    torch.testing.assert_close(traced, moved, rtol=1e-5, atol=1e-5)
    assert torch.func.grad(loss)(size * v).isfinite().all()
    assert not manifold.retract(x, torch.inf * v).isfinite().all() or isinstance(manifold, SPD)


@pytest.mark.parametrize("case", FEW, ids=label)
@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e-15, 1e15, 1e25, 1e30])
def test_gradients_of_every_size(case, scale):
    """Multiplying the Euclidean gradient multiplies the Riemannian one; what is normal stays nothing."""
    manifold, shape = case
    x = manifold.random_point(shape, seeded(), torch.float32)
    gradient = torch.randn(shape, generator=seeded(1))
    plain = manifold.riemannian_gradient(x, gradient)
    for compute in (manifold.riemannian_gradient, torch.func.vmap(manifold.riemannian_gradient)):
        scaled = compute(x, scale * gradient) / scale
        torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))
    if not isinstance(manifold, Euclidean | SPD | Product):
        normal = x * (scale if isinstance(manifold, Sphere | Oblique) else scale * 0.7)
        assert manifold.riemannian_gradient(x, normal).abs().max() == 0


@curved
def test_descent_at_any_rate_is_no_silent_fixed_point(case):
    manifold, shape = case
    x = manifold.random_point(shape, seeded(), torch.float32)
    target = manifold.random_point(shape, seeded(1), torch.float32)
    geometry = sm.Geometry.from_rules({"x": x}, {"x": manifold})
    scale = torch.linspace(1.0, 10.0, shape[-1])

    def loss(p):
        return ((p["x"] - target) * scale).square().sum()

    for rate in (1e-3, 1e-2, 0.1, 0.25, 0.3, 1.0, 3.0, 10.0, 100.0, 1e3):
        optimizer = sm.RSGD(geometry, rate)
        params = {"x": x}
        state = optimizer.init(params)
        for step in range(30):
            grads = torch.func.grad(loss)(params)
            before = params["x"]
            params, state = optimizer.update(grads, state, params)
            assert params["x"].isfinite().all()
            still = (params["x"] - before).abs().amax(dim=(-2, -1)) < 1e-7
            gradient = manifold.riemannian_gradient(before, grads["x"])
            slope = manifold.inner(before, gradient, gradient).sqrt()
            assert not (still & (rate * slope > 1e-4)).any(), (rate, step)


@pytest.mark.parametrize("bound", [0.0, -1.0, 3.2, math.inf, math.nan])
def test_bounds_beyond_the_way_back_are_refused(bound):
    for retraction in (Geodesic, SphereExponential):
        with pytest.raises(ValueError, match="comes back"):
            retraction(max_norm=bound)


def test_grassmann_tightens_what_would_come_back():
    x = Grassmann().random_point((6, 2), seeded(), torch.float64)
    v = step_of_norm(Grassmann(), x, 1.0)
    for retraction, bound in (
        (Cayley(), 2.0),
        (Cayley(1.5), 1.5),
        (Geodesic(), math.pi / 2),
        (Geodesic(max_norm=1.0), 1.0),
    ):
        manifold = Grassmann(retraction)
        torch.testing.assert_close(manifold.retract(x, 50.0 * v), manifold.retract(x, bound * v), rtol=1e-9, atol=1e-9)
        assert manifold == Grassmann(retraction)
        assert manifold.retraction is retraction
    assert not torch.allclose(Stiefel(Cayley()).retract(x, 5.0 * v), Stiefel(Cayley()).retract(x, 2.0 * v))
