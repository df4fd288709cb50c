"""Distances, logarithms and transports where digits are lost: at equal points, near the cut locus, at it."""

import math

import pytest
import torch
from manifold_cases import CASES, label, seeded
from mpmath import mp, mpf

from subspace_meta.manifolds import SPD, Euclidean, Grassmann, Oblique, Orthogonal, Product, Rotations, Sphere, Stiefel

BOTH = Product((Sphere(), Euclidean()), (3, 1))
GAPS = [0.0, *(10.0**-k for k in range(1, 9))]
types = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


@pytest.fixture(autouse=True)
def fifty_digits():
    with mp.workdps(50):
        yield


def plane_rotation(n, angles, dtype, basis):
    """Return B R B^T for a rotation R by the given angles (mpmath) in the first planes, rounded once."""
    turned = mp.eye(n)
    for k, angle in enumerate(angles):
        i = 2 * k
        turned[i, i] = turned[i + 1, i + 1] = mp.cos(angle)
        turned[i, i + 1], turned[i + 1, i] = -mp.sin(angle), mp.sin(angle)
    b = mp.matrix(basis.double().tolist())
    exact = b * turned * b.T
    return torch.tensor([[float(exact[i, j]) for j in range(n)] for i in range(n)], dtype=torch.float64).to(dtype)


def orthonormal_to_50_digits(n, seed):
    """Return an orthogonal matrix whose entries are exact in float32: a signed permutation, and one that is not."""
    generator = seeded(seed)
    return torch.eye(n, dtype=torch.float64)[torch.randperm(n, generator=generator)]


@types
@pytest.mark.parametrize("kind", [Rotations, Orthogonal])
@pytest.mark.parametrize("gap", GAPS)
def test_rotations_near_pi_and_near_the_identity(kind, gap, dtype):
    manifold, eps = kind(), torch.finfo(dtype).eps
    pi = mp.pi
    for n, angles in (
        (3, [pi - mpf(gap)]),
        (3, [mpf(gap)]),
        (4, [pi - mpf(gap), pi - mpf(gap)]),
        (4, [pi - mpf(gap), mpf(gap)]),
        (5, [pi - mpf(gap), pi]),
        (7, [pi, pi, mpf(gap)]),
        (6, [pi - mpf(gap), mpf(1), mpf(gap) / 2]),
    ):
        basis = orthonormal_to_50_digits(n, seed=n)
        x = basis.to(dtype)
        y = (basis @ plane_rotation(n, angles, torch.float64, torch.eye(n))).to(dtype)
        exact = float(mp.sqrt(2 * sum(angle**2 for angle in angles)))
        distance = float(manifold.distance(x, y))
        # y was rounded: that alone moves it by eps.
        assert distance == pytest.approx(exact, rel=1e-6 if dtype == torch.float32 else 1e-14, abs=4 * n * eps)
        assert float(manifold.distance(y, x)) == pytest.approx(distance, rel=8 * eps, abs=8 * eps)
        log = manifold.log(x, y)
        assert float(log.norm()) == pytest.approx(exact, rel=1e-5 if dtype == torch.float32 else 1e-13, abs=8 * n * eps)
        torch.testing.assert_close(
            manifold.exp(x, log), y, rtol=0, atol=(40 if dtype == torch.float32 else 200) * n * eps
        )
        torch.testing.assert_close(manifold.project(x, log), log, rtol=0, atol=8 * n * eps)


def test_random_rotations_agree_with_scipy():
    scipy_linalg = pytest.importorskip("scipy.linalg")
    for n in (2, 3, 4, 6):
        x = Rotations().random_point((20, n, n), seeded(n), torch.float64)
        y = Rotations().random_point((20, n, n), seeded(n + 1), torch.float64)
        logs = torch.stack(
            [torch.tensor(scipy_linalg.logm((a.mT @ b).numpy()).real) for a, b in zip(x, y, strict=True)]
        )
        torch.testing.assert_close(x.mT @ Rotations().log(x, y), logs, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(Rotations().distance(x, y), torch.linalg.matrix_norm(logs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("manifold", [Orthogonal(), Rotations(), SPD()], ids=lambda m: m.name)
def test_where_there_is_no_path_there_is_no_distance(manifold):
    x = torch.eye(3).expand(2, 3, 3)
    for y in (torch.diag(torch.tensor([1.0, 1.0, -1.0])), -torch.eye(3)):
        y = torch.stack([torch.eye(3), y])
        assert manifold.distance(x, y)[0] == manifold.squared_distance(x, y)[0] == 0
        assert manifold.distance(x, y)[1].isnan()
        assert manifold.squared_distance(x, y)[1].isnan()
        assert manifold.log(x, y)[1].isnan().all()


def on_sphere(angle, dtype, d=3):
    """Return (1, 0, 0) and the point at an angle (mpmath) from it, and the angle of the rounded point."""
    x = torch.zeros(d, 1, dtype=dtype)
    x[0] = 1.0
    y = torch.zeros(d, 1, dtype=torch.float64)
    y[0], y[1] = float(mp.cos(angle)), float(mp.sin(angle))
    y = y.to(dtype)
    a, b = mpf(float(y[0])), abs(mpf(float(y[1])))
    return x, y, mp.atan2(b, a)


@types
@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("far", [False, True])
def test_spheres(gap, far, dtype):
    eps = torch.finfo(dtype).eps
    x, y, exact = on_sphere(mp.pi - mpf(gap) if far else mpf(gap), dtype)
    exact = float(exact)
    for manifold, a, b, expected in (
        (Sphere(), x, y, exact),
        (Oblique(), torch.cat([x, x], -1), torch.cat([y, y], -1), math.sqrt(2) * exact),
        (
            Product((Sphere(), Euclidean()), (3, 1)),
            torch.cat([x, x[:1]]),
            torch.cat([y, 0 * x[:1]]),
            math.hypot(exact, 1.0),
        ),
    ):
        assert float(manifold.distance(a, b)) == pytest.approx(expected, rel=8 * eps)
        assert float(manifold.squared_distance(a, b)) == pytest.approx(expected**2, rel=16 * eps)
        log = manifold.log(a, b)
        assert float(manifold.norm(a, log)) == pytest.approx(expected, rel=16 * eps, abs=8 * eps)
        torch.testing.assert_close(manifold.exp(a, log), b, rtol=0, atol=16 * eps)
    v = torch.tensor([[0.0], [0.6], [0.8]], dtype=dtype)
    carried = Sphere().transport(x, y, v)
    assert float(carried.norm()) == pytest.approx(1.0, rel=8 * eps)
    # The rounding of y turns the circle.
    assert float((carried * y).sum().abs()) < 8 * eps / (max(gap, eps) if far else 1.0)


@types
@pytest.mark.parametrize("gap", GAPS)
def test_subspaces_near_a_right_angle_and_near_each_other(gap, dtype):
    eps = torch.finfo(dtype).eps
    half = mp.pi / 2
    for angles in ([half - mpf(gap), mpf(gap)], [half - mpf(gap), half], [mpf(gap), mpf(gap) / 3]):
        x = torch.eye(5, 2, dtype=dtype)
        y = torch.zeros(5, 2, dtype=torch.float64)
        for k, angle in enumerate(angles):
            y[k, k], y[2 + k, k] = float(mp.cos(angle)), float(mp.sin(angle))
        y = y.to(dtype)
        exact = float(mp.sqrt(sum(mp.atan2(mpf(float(y[2 + k, k])), mpf(float(y[k, k]))) ** 2 for k in range(2))))
        assert float(Grassmann().distance(x, y)) == pytest.approx(exact, rel=32 * eps)
        there = Grassmann().exp(x, Grassmann().log(x, y))
        assert float(Grassmann().distance(there, y)) < 64 * eps


SMOOTH = [case for case in CASES if isinstance(case[0], Sphere | Oblique | Euclidean | SPD)] + [
    (Product((Sphere(), Euclidean()), (4, 2)), (2, 6, 3))
]


@pytest.mark.parametrize("case", SMOOTH, ids=label)
def test_the_squared_distance_has_twice_the_metric_as_hessian(case):
    manifold, shape = case
    x = manifold.random_point(shape[1:], seeded(), torch.float64)
    u, w = (manifold.random_tangent(x, seeded(k)) for k in (1, 2))

    def along(s, t):
        return manifold.squared_distance(x, manifold.exp(x, s * u + t * w))

    zero = torch.zeros((), dtype=torch.float64)
    first = torch.func.grad(along)(zero, zero)
    assert first.abs() < 1e-14
    mixed = torch.func.grad(torch.func.grad(along), 1)(zero, zero)
    torch.testing.assert_close(mixed, 2.0 * manifold.inner(x, u, w), rtol=1e-9, atol=1e-10)
    pure = torch.func.grad(torch.func.grad(along))(zero, zero)
    torch.testing.assert_close(pure, 2.0 * manifold.inner(x, u, u), rtol=1e-9, atol=1e-10)
    # The other argument, and the distance itself, whose derivative there is 0.
    moving = torch.func.grad(torch.func.grad(lambda s: manifold.squared_distance(manifold.exp(x, s * u), x)))(zero)
    torch.testing.assert_close(moving, 2.0 * manifold.inner(x, u, u), rtol=1e-9, atol=1e-10)
    assert torch.func.grad(lambda y: manifold.distance(x, y))(x).abs().max() == 0


@pytest.mark.parametrize("case", CASES, ids=label)
def test_norms_of_every_size(case):
    manifold, shape = case
    x = manifold.random_point(shape, seeded(), torch.float32)
    v = manifold.random_tangent(x, seeded(1))
    norm = manifold.norm(x, v)
    torch.testing.assert_close(norm, manifold.inner(x, v, v).sqrt(), rtol=1e-5, atol=0)
    for scale in (1e-30, 1e-20, 1e20, 1e30):
        torch.testing.assert_close(manifold.norm(x, scale * v) / scale, norm, rtol=1e-5, atol=0)
    slope = torch.func.grad(lambda v: manifold.norm(x, v).sum())(torch.zeros_like(v))
    assert slope.abs().max() == 0
    assert (manifold.norm(x, torch.zeros_like(v)) == 0).all()


@pytest.mark.parametrize("case", CASES, ids=label)
def test_transport_from_one_point_to_many(case):
    manifold, shape = case
    x = manifold.random_point(shape[1:], seeded(), torch.float64)
    v = manifold.random_tangent(x, seeded(1))
    ys = torch.stack([manifold.retract(x, 0.1 * manifold.random_tangent(x, seeded(k))) for k in (2, 3, 4)])
    together = manifold.transport(x, ys, v)
    assert together.shape == ys.shape
    for y, one in zip(ys, together, strict=True):
        torch.testing.assert_close(one, manifold.transport(x, y, v), rtol=1e-12, atol=1e-12)


def test_there_is_no_distance_on_stiefel():
    x = Stiefel().random_point((4, 2), seeded())
    for method in (Stiefel().distance, Stiefel().squared_distance):
        with pytest.raises(NotImplementedError, match="no closed distance"):
            method(x, x)


@pytest.mark.parametrize("case", CASES, ids=label)
@pytest.mark.parametrize("apart", [0.0, 1e-16, 1e-8, 1e-3])
def test_transport_to_points_nearby_where_values_are_unknown(case, apart):
    """A trace cannot look how far apart two points are; near a converged run they are equal but for rounding."""
    manifold, shape = case
    x = manifold.random_point(shape, seeded(1), torch.float64)
    u, v = (manifold.random_tangent(x, seeded(seed)) for seed in (2, 3))
    # Not the same bits, and not exactly of norm 1.
    y = manifold.retract(x, apart * u) * (1 + torch.finfo(x.dtype).eps)
    mapped = torch.func.vmap(manifold.transport)(x, y, v)
    torch.testing.assert_close(mapped, manifold.transport(x, y, v), rtol=0, atol=1e-11)
    torch.testing.assert_close(mapped, v, rtol=0, atol=1e-11 + 20 * apart * float(u.norm()))


@pytest.mark.parametrize("manifold", [Sphere(), Oblique()], ids=lambda m: m.name)
def test_the_derivative_of_transport_to_the_same_point(manifold):
    x = manifold.random_point((2, 6, 3), seeded(1), torch.float64)
    v = manifold.random_tangent(x, seeded(2))

    def carried(y):
        return (torch.func.vmap(manifold.transport)(x, y, v) * v.roll(1)).sum()

    assert torch.func.grad(carried)(x).isfinite().all()
    assert torch.func.grad(carried)(manifold.retract(x, 0.1 * v)).isfinite().all()
