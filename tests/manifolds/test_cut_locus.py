"""Distances and logarithms up to the cut locus, against 50 digits; derivatives at equal points."""

from __future__ import annotations

import math

import pytest
import torch
from manifold_cases import CASES, label, seeded
from mpmath import mp, mpf

from subspace_meta.manifolds import SPD, Euclidean, Grassmann, Oblique, Orthogonal, Product, Rotations, Sphere

GAPS = (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 1e-2, 1e-1, 1.0)
FREE = [case for case in CASES if not isinstance(case[0], SPD) and "SPD" not in case[0].name]
WITH_DISTANCE = [(Euclidean(), (5, 3)), (Sphere(), (5, 3)), (Oblique(), (5, 3)), (Grassmann(), (6, 3))]
WITH_DISTANCE += [(Rotations(), (4, 4)), (Orthogonal(), (5, 5)), (Product((Sphere(), Rotations()), (2, 3)), (5, 3))]
every_distance = pytest.mark.parametrize("case", WITH_DISTANCE, ids=label)
both_types = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
every_gap = pytest.mark.parametrize("gap", GAPS)
mp_dps = 50


def rows(a):
    return mp.matrix(a.double().tolist())


def mp_sphere(x, y):
    """The angle of two vectors as they are, with 50 digits: of their directions."""
    with mp.workdps(mp_dps):
        a, b = ([mpf(float(e)) for e in t.flatten()] for t in (x, y))
        dot = mp.fsum(p * q for p, q in zip(a, b, strict=True))
        squares = mp.fsum(p * p for p in a) * mp.fsum(q * q for q in b)
        return mp.atan2(mp.sqrt(squares - dot * dot), dot)


def mp_orthonormal(a):
    """Gram-Schmidt in 50 digits: what the rounded columns stand for."""
    q = rows(a)
    for j in range(q.cols):
        column = q[:, j]
        for _ in range(2):
            for k in range(j):
                column = column - q[:, k] * (q[:, k].T * column)[0]
        column = column / mp.sqrt((column.T * column)[0])
        for i in range(q.rows):
            q[i, j] = column[i]
    return q


def mp_angles(s, c, scale):
    """sum (scale atan2(sqrt s, sqrt c))^2 over matched eigenvalues of squared sines and cosines."""
    sines, cosines = sorted(mp.eigsy(s, eigvals_only=True)), sorted(mp.eigsy(c, eigvals_only=True), reverse=True)
    clean = lambda e: mp.sqrt(max(e, mpf(0)))  # noqa: E731
    return mp.sqrt(mp.fsum((scale * mp.atan2(clean(p), clean(q))) ** 2 for p, q in zip(sines, cosines, strict=True)))


def mp_rotation(x, y):
    with mp.workdps(mp_dps):
        a, b = mp_orthonormal(x), mp_orthonormal(y)
        return mp_angles((b - a).T * (b - a) / 4, (b + a).T * (b + a) / 4, 2)


def mp_grassmann(x, y):
    with mp.workdps(mp_dps):
        a, b = mp_orthonormal(x), mp_orthonormal(y)
        n = b - a * (a.T * b)
        return mp_angles(n.T * n, (b.T * a) * (a.T * b), 1)


def drawn(manifold, shape, seed=0):
    x = manifold.random_point(shape, seeded(seed), torch.float64)
    return x, manifold.random_tangent(x, seeded(seed + 1))


def tolerance(dtype):
    return 2e-15 if dtype == torch.float64 else 4e-7


@every_gap
@both_types
@pytest.mark.parametrize("end", [0.0, math.pi])
def test_angles_on_spheres(gap, dtype, end):
    """Near 0 and near pi, relative to the angle itself (near 0 to what float32 leaves of it)."""
    for manifold in (Sphere(), Oblique()):
        x, v = drawn(manifold, (5, 3))
        axes = (-2, -1) if isinstance(manifold, Sphere) else (-2,)
        v = v / v.square().sum(dim=axes, keepdim=True).sqrt()
        y = (x * math.cos(abs(end - gap)) + v * math.sin(abs(end - gap))).to(dtype)
        x = x.to(dtype)
        columns = [(x, y)] if isinstance(manifold, Sphere) else list(zip(x.mT, y.mT, strict=True))
        angles = [mp_sphere(a, b) for a, b in columns]
        exact = float(mp.sqrt(mp.fsum(a * a for a in angles)))
        distance = manifold.distance(x, y)
        eps = torch.finfo(dtype).eps
        assert abs(float(distance) - exact) <= tolerance(dtype) * exact + eps
        assert float(manifold.squared_distance(x, y)) == pytest.approx(float(distance) ** 2, rel=8 * eps, abs=eps**2)
        assert (manifold.exp(x, manifold.log(x, y)) - y).abs().max() <= 10 * eps
        assert abs(float(manifold.log(x, y).norm()) - exact) <= tolerance(dtype) * exact + 4 * eps
        assert abs(float((x * manifold.log(x, y)).sum())) <= 20 * eps


def planes(angles, n, dtype, seed=0):
    """A random point and the one that is turned by ``angles`` in planes, both rounded to ``dtype``."""
    turn = torch.eye(n, dtype=torch.float64)
    for i, angle in enumerate(angles):
        block = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        turn[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = torch.tensor(block, dtype=torch.float64)
    x = Rotations().random_point((n, n), seeded(seed), torch.float64)
    q = Rotations().random_point((n, n), seeded(seed + 1), torch.float64)
    return x.to(dtype), (x @ q @ turn @ q.T).to(dtype)


ANGLES = {
    "one": lambda g: ([math.pi - g], 3),
    "half a turn in two planes": lambda g: ([math.pi - g, math.pi - g], 5),
    "0 and pi": lambda g: ([math.pi - g, g], 4),
    "pi and almost": lambda g: ([math.pi, math.pi - g], 4),
    "three": lambda g: ([math.pi - g, math.pi - 2 * g, 0.5], 7),
    "pi thrice": lambda g: ([math.pi, math.pi, math.pi - g], 6),
    "right angles too": lambda g: ([math.pi / 2, math.pi / 2, math.pi - g], 6),
    "small": lambda g: ([g, 0.3 * g], 4),
    "many": lambda g: ([math.pi - g, math.pi - g, 3.0, 2.9, 2.0, 1.6, 1.5, 0.1], 17),
}


@every_gap
@both_types
@pytest.mark.parametrize("name", ANGLES)
def test_rotations_at_every_angle(name, gap, dtype):
    angles, n = ANGLES[name](gap)
    x, y = planes(angles, n, dtype)
    exact = float(mp_rotation(x, y)) if n < 10 else math.sqrt(2 * sum(a * a for a in angles))
    eps = torch.finfo(dtype).eps
    for manifold in (Rotations(), Orthogonal()):
        distance = manifold.distance(x, y)
        allowed = (1e-6 if dtype == torch.float32 else 4e-15) * exact + 2 * n * eps
        assert abs(float(distance) - exact) <= allowed
        log = manifold.log(x, y)
        assert log.isfinite().all()
        assert (x.mT @ log + log.mT @ x).abs().max() <= 20 * eps
        assert (manifold.exp(x, log) - y).abs().max() <= 60 * eps
        assert abs(float(log.norm()) - exact) <= 1e-6 * exact + 40 * eps
        assert float(manifold.squared_distance(x, y)) == pytest.approx(
            float(distance) ** 2, rel=1e-6, abs=(n * eps) ** 2
        )


def test_half_turns_are_as_long_as_they_are():
    identity, turned = torch.eye(3), torch.diag(torch.tensor([1.0, -1.0, -1.0]))
    for manifold in (Rotations(), Orthogonal()):
        assert float(manifold.distance(identity, turned)) == pytest.approx(math.sqrt(2) * math.pi, rel=1e-7)
        batch = torch.stack([identity, turned])
        torch.testing.assert_close(manifold.distance(identity, batch), torch.tensor([0.0, math.sqrt(2) * math.pi]))
        log = manifold.log(identity.expand(2, 3, 3), batch)
        torch.testing.assert_close(torch.linalg.matrix_norm(log), torch.tensor([0.0, math.sqrt(2) * math.pi]))
    minus = -torch.eye(6)
    assert float(Rotations().distance(minus, -minus)) == pytest.approx(math.sqrt(6) * math.pi, rel=1e-6)
    torch.testing.assert_close(Rotations().exp(-minus, Rotations().log(-minus, minus)), minus, rtol=0, atol=2e-6)
    # Through vmap, where no values are at hand.
    torch.testing.assert_close(
        torch.func.vmap(Rotations().log)(batch, batch.flip(0)), Rotations().log(batch, batch.flip(0))
    )
    for n in (1, 2):
        assert Rotations().distance(torch.eye(n), torch.eye(n)) == 0


@pytest.mark.parametrize("seed", range(5))
def test_random_rotations_against_scipy(seed):
    import scipy.linalg

    x, y = (Rotations().random_point((8, 8), seeded(2 * seed + i), torch.float64) for i in range(2))
    log = x @ torch.from_numpy(scipy.linalg.logm((x.T @ y).numpy()).real)
    torch.testing.assert_close(Rotations().log(x, y), log, rtol=0, atol=2e-12)
    torch.testing.assert_close(Rotations().distance(x, y), log.norm(), rtol=1e-13, atol=0)


@every_gap
@both_types
def test_principal_angles_at_every_angle(gap, dtype):
    for angles in ([math.pi / 2 - gap, math.pi / 2], [gap, 0.5 * gap], [math.pi / 2 - gap, gap], [1.0, 1.0 + gap]):
        x = Grassmann().random_point((6, 2), seeded(), torch.float64)
        normal = torch.linalg.qr(x, mode="complete").Q[:, 2:4]
        t = torch.tensor(angles, dtype=torch.float64)
        q = Rotations().random_point((2, 2), seeded(3), torch.float64)
        y = ((x * t.cos() + normal * t.sin()) @ q).to(dtype)
        x = x.to(dtype)
        exact = float(mp_grassmann(x, y))
        eps = torch.finfo(dtype).eps
        distance = float(Grassmann().distance(x, y))
        assert abs(distance - exact) <= tolerance(dtype) * exact + 4 * eps
        log = Grassmann().log(x, y)
        assert abs(float(log.norm()) - exact) <= 2 * tolerance(dtype) * exact + 4 * eps
        assert float(Grassmann().distance(Grassmann().exp(x, log), y)) <= 20 * eps
        assert float(Grassmann().squared_distance(x, y)) == pytest.approx(distance**2, rel=1e-6, abs=(9 * eps) ** 2)


def test_products_add_squares_up_to_the_cut_locus():
    manifold = Product((Sphere(), Rotations()), (2, 3))
    x = torch.cat([torch.tensor([[1.0, 0, 0], [0, 0, 0]]), torch.eye(3)])
    y = torch.cat([-x[:2], torch.diag(torch.tensor([1.0, -1.0, -1.0]))])
    assert float(manifold.distance(x, y)) == pytest.approx(math.sqrt(3) * math.pi, rel=1e-6)
    assert float(manifold.squared_distance(x, y)) == pytest.approx(3 * math.pi**2, rel=1e-6)
    assert manifold.log(x, y).isfinite().all()


@every_distance
def test_hessian_of_the_squared_distance_is_twice_the_metric(case):
    """At equal points, in both arguments, by forward over reverse mode and by reverse over reverse."""
    manifold, shape = case
    x, u = drawn(manifold, shape)
    w = manifold.random_tangent(x, seeded(5))
    zero = torch.zeros(2, dtype=torch.float64)
    metric = torch.stack([manifold.inner(x, a, b) for a in (u, w) for b in (u, w)]).reshape(2, 2)
    for f in (manifold.squared_distance, lambda a, b: manifold.squared_distance(b, a)):

        def along(t, f=f):
            return f(x, manifold.exp(x, t[0] * u + t[1] * w))

        for hessian in (torch.func.hessian(along), torch.func.jacrev(torch.func.grad(along))):
            torch.testing.assert_close(hessian(zero), 2 * metric, rtol=1e-12, atol=1e-12)
        assert torch.func.grad(along)(zero).abs().max() < 1e-14
    assert torch.equal(torch.func.grad(lambda z: manifold.distance(x, z))(x), torch.zeros_like(x))
    assert torch.equal(torch.func.grad(lambda z: manifold.distance(z, x))(x), torch.zeros_like(x))


@every_distance
@pytest.mark.parametrize("length", [1e-3, 0.3, 1.2])
def test_derivatives_of_distances_between_points_that_differ(case, length):
    """First and second differences of the value; the gradient is minus twice the logarithm."""
    manifold, shape = case
    x, u = drawn(manifold, shape)
    u = length * u / torch.linalg.matrix_norm(u, 2)
    w = manifold.random_tangent(x, seeded(5))
    w = w / w.norm()
    y = manifold.exp(x, u)

    def along(t, f=manifold.squared_distance):
        return f(manifold.exp(x, t * w), y)

    zero, h = torch.zeros((), dtype=torch.float64), 2e-4
    expected = -2 * manifold.inner(x, u, w)
    torch.testing.assert_close(torch.func.grad(along)(zero), expected, rtol=1e-9, atol=1e-11)
    for f in (manifold.squared_distance, manifold.distance):
        if f == manifold.distance and length < 0.1:
            continue
        a, b, c, d, e = (along(zero + k * h, f) for k in (-2, -1, 0, 1, 2))
        second = (-a + 16 * b - 30 * c + 16 * d - e) / (12 * h * h)
        torch.testing.assert_close(
            torch.func.grad(torch.func.grad(lambda t, f=f: along(t, f)))(zero), second, rtol=1e-5, atol=1e-6
        )


@every_distance
def test_transforms_of_distances(case):
    manifold, shape = case
    x, u = drawn(manifold, (3, *shape))
    y = manifold.exp(x, 0.3 * u / torch.linalg.matrix_norm(u)[:, None, None])
    for f in (manifold.distance, manifold.squared_distance, manifold.log):
        torch.testing.assert_close(torch.func.vmap(f)(x, y), f(x, y), rtol=1e-12, atol=1e-12)
        assert f(x, y).shape == (x.shape if f == manifold.log else (3,))
    compiled = torch.compile(manifold.squared_distance, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), manifold.squared_distance(x, y), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_flat_distances_of_any_size(size):
    x = torch.zeros(2, 2)
    assert float(Euclidean().distance(x, x + size)) == pytest.approx(2 * size, rel=1e-6)


def test_bases_of_one_subspace_have_distance_zero():
    x, _ = drawn(Grassmann(), (6, 3))
    q = Rotations().random_point((3, 3), seeded(1), torch.float64)
    assert float(Grassmann().distance(x, x @ q)) < 1e-15
    assert torch.func.grad(lambda z: Grassmann().distance(x, z @ q))(x).isfinite().all()
