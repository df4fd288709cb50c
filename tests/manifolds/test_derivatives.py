"""Values, first and second derivatives of every retraction against 80 digits, at steps from 0 to 1."""

from __future__ import annotations

import functools

import pytest
import torch
from manifold_cases import FEW, seeded, spectral
from manifold_cases import label as label_of
from mpmath import mp
from mpmath_references import derivatives, reference_of, symmetric_function, to_mp

from subspace_meta.manifolds import (
    SPD,
    Cayley,
    CholeskyQR,
    Geodesic,
    Grassmann,
    HouseholderQR,
    Normalization,
    PolarNewtonSchulz,
    Rotations,
    SPDExponential,
    SPDSecondOrder,
    Sphere,
    SphereExponential,
    Stiefel,
    StiefelCanonical,
)
from subspace_meta.manifolds.matrix_functions import symmetric_logarithm, symmetric_square_root

LENGTHS = (0.0, 1e-6, 1e-4, 1e-2, 0.3, 1.0)
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-11}

CASES = [
    *[(Stiefel(r), (5, 3)) for r in (CholeskyQR(), HouseholderQR(), PolarNewtonSchulz(), Geodesic("embedded"))],
    *[(StiefelCanonical(r), (5, 3)) for r in (Cayley(), Geodesic("canonical"))],
    *[(Grassmann(r), (5, 3)) for r in (PolarNewtonSchulz(), Cayley())],
    *[(Rotations(r), (4, 4)) for r in (PolarNewtonSchulz(), Cayley(), Geodesic())],
    *[(Sphere(r), (3, 2)) for r in (Normalization(), SphereExponential())],
    *[(SPD(r), (4, 4)) for r in (SPDSecondOrder(), SPDExponential())],
]


def label(case):
    retraction = case[0].retraction
    return f"{case[0].name}-{type(retraction).__name__}{getattr(retraction, 'metric', '')}"


@functools.cache
def inputs(case, dtype):
    """A point, a tangent of norm 1 (spectral, on SPD whitened) and another one, exact in ``dtype``."""
    manifold, shape = case
    x = manifold.random_point(shape, seeded(), dtype)
    if isinstance(manifold, SPD):
        # Two equal eigenvalues, and a condition number that leaves float32 its digits.
        x = torch.diag(torch.tensor([1.0, 1.0, 1.5, 0.5], dtype=dtype))
        x[2, 3] = x[3, 2] = 0.25
    elif dtype == torch.float32 and not isinstance(manifold, Sphere):
        # A point that is orthonormal exactly, so that the textbook formulas mean the same as the library's, which
        # remove the error of a point that is not.
        signs = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=dtype)
        x = torch.zeros(shape, dtype=dtype)
        x[:4] = 0.5 * signs[:, : shape[1]]
    tangents = [manifold.random_tangent(x, seeded(seed)) for seed in (1, 2)]
    return x, *(spectral(v) * (0.5 if isinstance(manifold, SPD) else 1.0) for v in tangents)


def relative(a, b):
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_retraction_against_eighty_digits(case, length, dtype):
    manifold, _ = case
    x, u, w = inputs(case, dtype)
    u = length * u

    def retract(v):
        return manifold.retract(x, v)

    # Reverse mode, once and twice; jacrev is vmap over vjp, so this is also vmap(grad) and its second derivative.
    def along(v):
        return (torch.func.jacrev(retract)(v) * w).sum(dim=(-2, -1))

    first = along(u)
    second = (torch.func.jacrev(along)(u) * w).sum(dim=(-2, -1))
    reference = reference_of(manifold.retraction)
    value, first_reference, second_reference = derivatives(lambda v: reference(to_mp(x), v), to_mp(u), to_mp(w))
    tolerance = TOLERANCE[dtype]
    assert relative(retract(u), value) <= tolerance
    assert relative(first, first_reference) <= tolerance
    assert relative(second, second_reference) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("name", ["square root", "logarithm"])
def test_matrix_functions_at_equal_and_close_eigenvalues(name, spread, dtype):
    """Three orders of derivatives of the symmetric square root and logarithm, at gaps from 0 to 1."""
    function, scalar = {
        "square root": (symmetric_square_root, mp.sqrt),
        "logarithm": (symmetric_logarithm, mp.log),
    }[name]
    n = 4
    q = torch.linalg.qr(torch.randn(n, n, generator=seeded(), dtype=torch.float64)).Q
    a = q @ torch.diag(2.0 + spread * torch.arange(n, dtype=torch.float64)) @ q.T
    a = (0.5 * (a + a.T)).to(dtype)
    noise = torch.randn(n, n, generator=seeded(1), dtype=torch.float64)
    w = spectral(noise + noise.T).to(dtype)

    def along(f):
        return lambda b: (torch.func.jacrev(f)(b) * w).sum(dim=(-2, -1))

    once, twice = along(function), along(along(function))
    value, first, second = derivatives(lambda b: symmetric_function(b, scalar), to_mp(a), to_mp(w))
    tolerance = TOLERANCE[dtype]
    assert relative(function(a), value) <= tolerance
    assert relative(once(a), first) <= tolerance
    assert relative(twice(a), second) <= tolerance
    thrice = along(twice)(a)
    assert thrice.isfinite().all()


def test_third_derivative_of_the_square_root():
    """At the identity d^3 sqrt(I + tW) = 3/8 W^3."""
    noise = torch.randn(4, 4, generator=seeded(1), dtype=torch.float64)
    w = spectral(noise + noise.T)
    function = symmetric_square_root
    for _ in range(3):
        function = (lambda f: lambda b: (torch.func.jacrev(f)(b) * w).sum(dim=(-2, -1)))(function)
    assert relative(function(torch.eye(4, dtype=torch.float64)), 0.375 * w @ w @ w) < 1e-12


def test_derivatives_flow_through_spd_coordinates_and_transport_at_the_identity():
    """The start of every SPD problem: all eigenvalues equal, all derivatives finite and right."""
    manifold = SPD()
    identity = torch.eye(3, dtype=torch.float64)
    noise = torch.randn(2, 3, 3, generator=seeded(2), dtype=torch.float64)
    v, w = noise + noise.mT
    # S^{-1} V S^{-1} with S = I + H/2 + O(H^2): the derivative in direction H is -(HV + VH)/2.
    jacobian = torch.func.jacrev(lambda m: manifold.coordinates(m, v))(identity)
    torch.testing.assert_close((jacobian * w).sum(dim=(-2, -1)), -0.5 * (w @ v + v @ w))
    # B V B with B = (I + H)^{1/2} = I + H/2.
    jacobian = torch.func.jacrev(lambda y: manifold.transport(identity, y, v))(identity)
    torch.testing.assert_close((jacobian * w).sum(dim=(-2, -1)), 0.5 * (w @ v + v @ w))
    for loss in (
        lambda m: manifold.distance(m, 2.0 * identity),
        lambda m: manifold.log(m, 2.0 * identity).square().sum(),
        lambda m: manifold.from_coordinates(m, v).square().sum(),
    ):
        hessian = torch.func.jacrev(torch.func.grad(loss))(identity)
        assert hessian.isfinite().all()


@pytest.mark.parametrize("case", FEW, ids=label_of)
def test_second_derivatives_do_not_depend_on_the_mode(case):
    """Forward over reverse, which torch.func.hessian is, reverse over forward, and reverse over reverse."""
    manifold, (_, *shape) = case
    x, y = (manifold.random_point(tuple(shape), seeded(s), torch.float64) for s in (1, 2))
    v, w = (0.3 * manifold.random_tangent(x, seeded(s)) for s in (3, 4))
    functions = {
        "inner": lambda x: manifold.inner(x, v, w),
        "gradient": lambda x: (manifold.riemannian_gradient(x, w) * w).sum(),
        "retract": lambda x: (manifold.retract(x, v) * w).sum(),
        "coordinates": lambda x: (manifold.coordinates(x, v) * w).sum(),
    }
    if manifold.has_distance:
        functions["apart"] = lambda x: manifold.squared_distance(x, y)
        functions["equal"] = lambda z: manifold.squared_distance(z, x)
    forward, reverse = torch.func.jacfwd, torch.func.jacrev
    for name, function in functions.items():
        expected = reverse(reverse(function))(x)
        for found in (forward(reverse(function))(x), reverse(forward(function))(x)):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: name + text)
