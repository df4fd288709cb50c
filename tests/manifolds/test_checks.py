"""The checks themselves: they pass a user's own manifold, and fail one that is wrong in any single respect."""

from __future__ import annotations

import doctest
import math
from dataclasses import dataclass

import pytest
import torch
from manifold_cases import seeded
from torch import Tensor

from subspace_meta.manifolds import SPD as SPDManifold
from subspace_meta.manifolds import (
    CholeskyQR,
    Manifold,
    ManifoldCheckError,
    OrthonormalRetraction,
    SPDSecondOrder,
    Sphere,
    Stiefel,
    StiefelCanonical,
    check_manifold,
    checks,
    product,
)


@dataclass(frozen=True)
class Hyperplane(Manifold):
    """A user's own: matrices whose entries add up to 1, without a closed exponential on offer."""

    def check_shape(self, shape):
        if len(shape) < 2:
            raise ValueError(f"Hyperplane needs matrices, got {shape}")

    def dimension(self, shape):
        return math.prod(shape) - math.prod(shape[:-2])

    def project(self, x, v):
        return v - v.mean(dim=(-2, -1), keepdim=True)

    def riemannian_gradient(self, x, euclidean_gradient):
        return self.project(x, euclidean_gradient)

    def inner(self, x, u, v):
        return (u * v).sum(dim=(-2, -1))

    def retract(self, x, v):
        return x + v

    def transport(self, x, y, v):
        return v

    def nearest(self, x):
        return x + (1 - x.sum(dim=(-2, -1), keepdim=True)) / (x.shape[-1] * x.shape[-2])

    def random_point(self, shape, generator=None, dtype=None, device=None):
        return self.nearest(torch.randn(shape, generator=generator, dtype=dtype, device=device))

    def violation(self, x):
        return (x.sum(dim=(-2, -1)) - 1).abs()


def test_a_users_own_manifold_passes():
    report = check_manifold(Hyperplane(), (2, 3, 4))
    assert report.passed
    assert report["exponential"].skipped
    assert report["logarithm"].note == "no closed logarithm"
    assert report["retraction order"].skipped
    assert "Hyperplane() at 2 x 3 x 4, torch.float64" in str(report)
    assert "skipped  exponential: no closed exponential" in str(report)
    with pytest.raises(KeyError):
        report["no such check"]


@dataclass(frozen=True)
class OwnSphere(Hyperplane):
    """A user's own curved manifold without an exponential: its claim of order 2 is checked by the acceleration."""

    bend: float = 0.0

    @property
    def retraction_order(self):
        return 2

    def project(self, x, v):
        return v - x * (x * v).sum(dim=(-2, -1), keepdim=True)

    def retract(self, x, v):
        turn = self.bend * (v * v).sum(dim=(-2, -1), keepdim=True)
        y = x + v + turn * self.project(x, torch.ones_like(x))
        return y / y.norm(dim=(-2, -1), keepdim=True)

    def transport(self, x, y, v):
        return self.project(y, v)

    def nearest(self, x):
        return x / x.norm(dim=(-2, -1), keepdim=True)

    def violation(self, x):
        return ((x * x).sum(dim=(-2, -1)) - 1).abs()


def test_order_two_is_seen_without_an_exponential():
    assert check_manifold(OwnSphere(), (2, 3, 2))["retraction order"].note == "exact to rounding"
    with pytest.raises(ManifoldCheckError, match="retraction order"):
        check_manifold(OwnSphere(bend=0.3), (2, 3, 2))


def broken(base, **methods):
    """A copy of ``base`` with some methods replaced; each new method gets the old one first."""
    cls = type(base)
    namespace = {}
    for name, replacement in methods.items():
        old = getattr(cls, name)
        if isinstance(old, property):
            namespace[name] = property(lambda self, r=replacement, o=old: r(o.fget(self), self))
        else:
            namespace[name] = lambda self, *a, r=replacement, o=old, **k: r(lambda *b: o(self, *b, **k), *a)
    # A property of the class, so no new field: build it like the base.
    return type(f"Broken{cls.__name__}", (cls,), namespace)(base.retraction)


BROKEN = {
    "projection with the wrong sign": (broken(Stiefel(), project=lambda f, x, v: 2 * v - f(x, v)), "idempotence"),
    "projection without the symmetric part": (
        broken(Stiefel(), project=lambda f, x, v: v - x @ (x.mT @ v)),
        "dimension",
    ),
    "projection without the factor 1/2": (
        broken(Stiefel(), project=lambda f, x, v: v - x @ (x.mT @ v + v.mT @ x)),
        "tangency",
    ),
    "an oblique projection": (
        broken(Sphere(), project=lambda f, x, v: v - x * v[..., :1, :1] / x[..., :1, :1]),
        "self-adjointness",
    ),
    "gradient of another metric": (
        broken(StiefelCanonical(), riemannian_gradient=lambda f, x, g: g - x @ (x.mT @ g + g.mT @ x) / 2),
        "gradient",
    ),
    "gradient that is not tangent": (broken(Sphere(), riemannian_gradient=lambda f, x, g: g), "gradient"),
    "asymmetric metric": (broken(Sphere(), inner=lambda f, x, u, v: (u * v.flip(-1)).sum((-2, -1))), "metric"),
    "quadratic metric": (broken(Sphere(), inner=lambda f, x, u, v: f(x, u, v) ** 2), "metric"),
    "negative metric": (broken(Sphere(), inner=lambda f, x, u, v: -f(x, u, v)), "metric"),
    "retraction that moves at 0": (broken(Sphere(), retract=lambda f, x, v: -f(x, v)), "retraction"),
    "retraction at half speed": (broken(Sphere(), retract=lambda f, x, v: f(x, v / 2)), "retraction"),
    "retraction off the manifold": (broken(Stiefel(), retract=lambda f, x, v: x + v), "retraction"),
    "order claimed too high": (broken(Stiefel(), retraction_order=lambda o, self: 2), "retraction order"),
    "exponential claimed": (broken(Sphere(), retraction_order=lambda o, self: math.inf), "retraction order"),
    "NaN for long steps": (
        broken(Sphere(), retract=lambda f, x, v: f(x, v + 0 * (v / 1e5).acos())),
        "long steps",
    ),
    "transport off the tangent space": (broken(Stiefel(), transport=lambda f, x, y, v: v), "transport"),
    "transport that is not linear": (broken(Stiefel(), transport=lambda f, x, y, v: f(x, y, v * v.abs())), "transport"),
    "isometry claimed": (broken(Stiefel(), isometric_transport=lambda o, self: True), "transport"),
    "coordinates without an inverse": (broken(StiefelCanonical(), from_coordinates=lambda f, x, v: v), "coordinates"),
    "coordinates of another metric": (
        broken(StiefelCanonical(), coordinates=lambda f, x, v: v, from_coordinates=lambda f, x, v: v),
        "coordinates",
    ),
    "exponential at double speed": (broken(Sphere(), exp=lambda f, x, v: f(x, 2 * v)), "exponential"),
    "exponential that bends": (
        broken(Sphere(), exp=lambda f, x, v: f(x, Sphere().project(x, v + 0.1 * v.norm() ** 2))),
        "exponential",
    ),
    "logarithm with the wrong sign": (broken(Sphere(), log=lambda f, x, y: -f(x, y)), "logarithm"),
    "norm of another metric": (broken(Sphere(), norm=lambda f, x, v: 2 * f(x, v)), "metric"),
    "squared distance not squared": (broken(Sphere(), squared_distance=lambda f, x, y: f(x, y).sqrt()), "logarithm"),
    "distance squared": (broken(Sphere(), distance=lambda f, x, y: f(x, y) ** 2), "logarithm"),
    "batch read as one matrix": (broken(Sphere(), inner=lambda f, x, u, v: (u * v).sum() + 0 * f(x, u, v)), "batch"),
    "infeasible random points": (broken(Sphere(), random_point=lambda f, *a: 2 * f(*a)), "feasibility"),
    "nearest that moves points": (
        broken(Sphere(), nearest=lambda f, x: f(x + 0.1 * torch.ones_like(x))),
        "nearest",
    ),
    "wrong dimension": (broken(Stiefel(), dimension=lambda f, shape: f(shape) + 1), "dimension"),
    "derivative that is NaN at 0": (
        broken(Sphere(), retract=lambda f, x, v: f(x, v / v.norm() * v.norm()) if v.any() else f(x, v * v.norm())),
        "derivatives",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_manifolds_fail_the_right_check(name):
    manifold, expected = BROKEN[name]
    report = check_manifold(manifold, (2, 5, 3), raise_on_failure=False)
    assert expected in [failure.name for failure in report.failures], str(report)
    with pytest.raises(ManifoldCheckError, match=rf"(?s)Broken.*FAILED   {expected}"):
        report.raise_on_failure()


@dataclass(frozen=True)
class UnsignedQR(OrthonormalRetraction):
    """QR as LAPACK returns it: columns flip."""

    def __call__(self, x: Tensor, v: Tensor) -> Tensor:
        return torch.linalg.qr(x + v).Q


@dataclass(frozen=True)
class UnboundedCholeskyQR(OrthonormalRetraction):
    """Cholesky QR without the bound on the step."""

    def __call__(self, x: Tensor, v: Tensor) -> Tensor:
        y = x + v
        return torch.linalg.solve_triangular(torch.linalg.cholesky_ex(y.mT @ y).L, y.mT, upper=False).mT


@dataclass(frozen=True)
class SvdPolar(OrthonormalRetraction):
    """The polar factor by SVD: right values, NaN derivatives."""

    order = 2

    def __call__(self, x: Tensor, v: Tensor) -> Tensor:
        u, _, vh = torch.linalg.svd(x + v, full_matrices=False)
        return u @ vh


@pytest.mark.parametrize(
    ("retraction", "dtype", "expected"),
    [
        (UnsignedQR(), torch.float64, "retraction"),
        (UnboundedCholeskyQR(), torch.float32, "long steps"),
        (SvdPolar(), torch.float64, "derivatives"),
    ],
)
def test_retractions_that_others_use_fail(retraction, dtype, expected):
    report = check_manifold(Stiefel(retraction), (6, 3), dtype=dtype, raise_on_failure=False)
    assert expected in [failure.name for failure in report.failures], str(report)
    assert check_manifold(Stiefel(CholeskyQR()), (6, 3), dtype=dtype).passed


def test_unclaimed_orders_are_not_asked_for():
    """A retraction that is better than its claim passes, and the note tells the measured slope."""

    @dataclass(frozen=True)
    class Modest(SPDSecondOrder):
        order = 1

    report = check_manifold(SPDManifold(Modest()), (4, 4))
    assert "slope 3.0" in report["retraction order"].note


def test_slope():
    steps = (0.1, 0.05, 0.02, 0.01)
    assert checks.slope(steps, [t**3 for t in steps], 0.0) == pytest.approx(3.0)
    assert checks.slope(steps, [7 * t**2 + (1e-3 if t < 0.03 else 0) for t in steps], 0.1) is None
    # Points at the floor are left out, so that rounding does not flatten the line.
    floored = [*(t**3 for t in steps[:3]), 1e-9]
    assert checks.slope(steps, floored, 2e-9) == pytest.approx(3.0)


def test_shapes_and_seeds():
    with pytest.raises(ValueError, match="tall"):
        check_manifold(Stiefel(), (3, 5))
    a, b = (check_manifold(Stiefel(), (5, 3), generator=seeded(s)) for s in (1, 1))
    assert a == b
    assert check_manifold(Stiefel(), (40, 30))["dimension"].skipped


@pytest.mark.parametrize("module", [checks, product])
def test_examples_in_docstrings(module):
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0
