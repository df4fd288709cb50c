"""SPD matrices where it is hard: long steps, all scales, ill conditioned pairs, equal points."""

from __future__ import annotations

import itertools
import math

import pytest
import scipy.linalg
import torch
from manifold_cases import seeded
from mpmath import diag, mp
from mpmath_references import derivatives, symmetric_function, to_mp, to_torch

import subspace_meta as sm
from subspace_meta.manifolds import SPD, SPDExponential, SPDSecondOrder
from subspace_meta.manifolds.matrix_functions import (
    symmetric_exponential,
    symmetric_logarithm,
    symmetric_square_root,
)

RETRACTIONS = pytest.mark.parametrize(
    "retraction", [SPDSecondOrder(), SPDExponential()], ids=lambda r: type(r).__name__
)
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}


def basis(n, seed=0):
    return torch.linalg.qr(torch.randn(n, n, generator=seeded(seed), dtype=torch.float64)).Q


def with_eigenvalues(values, seed=0):
    """A symmetric float64 matrix of random eigenvectors."""
    values = torch.as_tensor(values, dtype=torch.float64)
    q = basis(len(values), seed)
    a = q @ torch.diag(values) @ q.T
    return 0.5 * (a + a.T)


def step_at(x, values, seed=5):
    """The float64 tangent at ``x`` whose whitened eigenvalues are ``values``."""
    factor = torch.linalg.cholesky(x.double())
    v = factor @ with_eigenvalues(values, seed) @ factor.T
    return 0.5 * (v + v.T)


def far(x, y):
    """The distance by generalised eigenvalues, in float64."""
    values = scipy.linalg.eigh(y.double().numpy(), x.double().numpy(), eigvals_only=True)
    return float(torch.from_numpy(values).log().norm())


def relative(a, b):
    b = torch.as_tensor(b, dtype=torch.float64)
    return float((a.double() - b).norm() / b.norm())


SPECTRA = {
    "contraction": [-1.0, -1.0, -1.0, -1.0],
    "rank one": [-1.0, 0.0, 0.0, 0.0],
    "rank two": [-1.0, -0.7, 0.0, 0.0],
    "close": [-1.0, -0.9999, -0.999, -0.99],
    "expansion": [0.2, 0.5, 1.0, 1.0],
    "rank one expansion": [0.0, 0.0, 0.0, 1.0],
    "both": [-1.0, -0.5, 0.3, 1.0],
    "mostly expansion": [-0.2, 0.3, 0.9, 1.0],
    "mostly contraction": [-1.0, -1.0, -0.1, 0.05],
    "one dimension": [-1.0],
    "two": [-1.0, 0.4],
    "many": [-1.0 + i / 16 for i in range(32)],
}


@RETRACTIONS
@TYPES
@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA)
def test_a_longer_step_never_ends_nearer(values, dtype, retraction):
    n = len(values)
    lengths = [10.0 ** (k / 20) for k in range(-60, 121)]
    for x in (torch.eye(n, dtype=dtype), SPD().random_point((n, n), seeded(), dtype)):
        v = step_at(x, values)
        ends = [retraction(x, (length * v).to(dtype)) for length in lengths]
        distances = [far(x, y) for y in ends]
        # The eigenvalue -1 of a step is found to 1e-3 (float32) or better, and the map is flat there.
        flat = 3e-6 if dtype == torch.float32 else 1e-12
        for (nearer, _), (farther, y) in itertools.pairwise(zip(distances, ends, strict=True)):
            slack = max(flat, 4 * EPS[dtype] * float(torch.linalg.cond(y.double())))
            assert farther >= nearer - slack * (1.0 + nearer)
        # Not by standing still: a step of length 1 has gone as far as the formula says.
        e = torch.tensor(values, dtype=torch.float64)
        log = e if isinstance(retraction, SPDExponential) else (1.0 + e + 0.5 * e * e).log()
        assert distances[60] == pytest.approx(float(log.norm()), rel=1e-5)
        assert distances[-1] >= distances[60] * (1.0 - 1e-5)


@TYPES
@pytest.mark.parametrize("n", [2, 5, 16])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_steps_within_the_bounds_are_not_shortened(sign, n, dtype):
    """M + V + V M^-1 V / 2 up to eigenvalues of -1 and of 2, to the last bit of the same expression."""
    x = SPD().random_point((n, n), seeded(), dtype)
    e = torch.linspace(-1.0, 1.0, n) if sign > 0 else -torch.linspace(0.1, 1.0, n)
    for length in (1e-3, 0.5, 0.99999):
        v = step_at(x, length * e).to(dtype)
        factor = torch.linalg.cholesky(x)
        step = torch.linalg.solve_triangular(factor, v, upper=False).mT
        moved = factor + step
        expected = 0.5 * (x + moved @ moved.mT)
        assert torch.equal(SPDSecondOrder()(x, v), 0.5 * (expected + expected.mT))
    expansion = step_at(x, [1.999] * n).to(dtype)
    assert relative(SPDSecondOrder()(x, expansion), (1 + 1.999 + 1.999**2 / 2) * x.double()) < 20 * EPS[dtype]


@pytest.mark.parametrize(("n", "values"), [(6, [-5.0, -1.0, 0.5, 1.0, 2.0, 9.0]), (3, [-3.0, -3.0, 1.0])])
def test_the_derivative_of_a_shortened_step(n, values):
    """First and second, against finite differences, and against a longer start of the same ray."""
    x = SPD().random_point((n, n), seeded(), torch.float64)
    u, w = step_at(x, values), SPD().random_tangent(x, seeded(3))
    g = torch.randn(n, n, generator=seeded(4), dtype=torch.float64)

    def along(t):
        return (g * SPDSecondOrder()(x, u + t * w)).sum()

    zero = torch.zeros((), dtype=torch.float64)
    first = torch.func.grad(along)(zero)
    if values[0] != values[1]:
        second = torch.func.grad(torch.func.grad(along))(zero)
        h = 1e-5
        torch.testing.assert_close(first, (along(zero + h) - along(zero - h)) / (2 * h), rtol=1e-7, atol=1e-8)
        slope = torch.func.grad(along)
        torch.testing.assert_close(second, (slope(zero + h) - slope(zero - h)) / (2 * h), rtol=1e-6, atol=1e-7)
    assert torch.func.grad(torch.func.grad(along))(zero).isfinite()
    # Along the ray nothing changes any more.
    ray = torch.func.grad(lambda t: (g * SPDSecondOrder()(x, (1.0 + t) * u)).sum())(zero)
    assert abs(float(ray)) < 1e-6


@RETRACTIONS
def test_what_is_known_changes_no_result(retraction):
    """Values cannot be seen under vmap: there nothing is left out."""
    x = SPD().random_point((5, 4, 4), seeded(), torch.float64)
    for values in (
        [-0.1, 0.0, 0.1, 0.2],
        [3.0, 3.0, 3.0, 3.0],
        [-0.6, -0.6, 0.7, 0.8],
        [-0.9, 0.0, 0.3, 3.0],
        [-4.0, -1.0, 1.0, 2.0],
    ):
        v = torch.stack([step_at(point, values, seed) for seed, point in enumerate(x)])
        for scale in (1.0, 1e5):
            one_by_one = torch.stack([retraction(a, scale * b) for a, b in zip(x, v, strict=True)])
            torch.testing.assert_close(torch.func.vmap(retraction)(x, scale * v), one_by_one, rtol=1e-12, atol=0)
            torch.testing.assert_close(retraction(x, scale * v), one_by_one, rtol=1e-12, atol=0)


@RETRACTIONS
@pytest.mark.parametrize("size", [1e12, 1e20, 1e30])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e6])
def test_huge_tangents_keep_their_direction(scale, size, retraction):
    x = scale * torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 0.7]])
    v = torch.tensor([[1.0, -0.7, 0.3], [-0.7, -0.5, 0.1], [0.3, 0.1, 0.8]])
    expected = retraction((x / scale).double(), 1e3 * v.double())
    assert relative(retraction(x, size * v) / scale, expected) < 1e-5
    assert torch.func.vmap(retraction)(x[None], size * v[None]).isfinite().all()
    assert torch.func.grad(lambda u: retraction(x, u).sum())(size * v).isfinite().all()


@RETRACTIONS
def test_tiny_tangents_are_not_lost(retraction):
    x = 1e-25 * torch.eye(3)
    v = 1e-25 * torch.tensor([[0.1, 0.2, 0.0], [0.2, -0.3, 0.1], [0.0, 0.1, 0.2]])
    expected = retraction(torch.eye(3).double(), 1e25 * v.double())
    for apply in (retraction, lambda a, b: torch.func.vmap(retraction)(a[None], b[None])[0]):
        assert relative(apply(x, v) / 1e-25, expected) < 1e-6
    # Second derivatives in a step whose square is below the range.
    identity = torch.eye(3)
    once = torch.func.jacfwd(lambda t: retraction(identity, t * 1e25 * v))
    assert torch.func.jacfwd(once)(torch.tensor(1e-25)).isfinite().all()


@RETRACTIONS
@pytest.mark.parametrize("rate", [1e-3, 1e-2, 0.1, 0.25, 0.3, 0.9, 1.0, 2.0, 7.0, 30.0, 1e3])
def test_descent_does_not_stand_still(rate, retraction):
    """tr(A X) - log det X from the identity, whose minimum is A^-1: it arrives, or it moves; it is never stuck."""
    a = torch.tensor([10.0, 1.0])
    optimizer = sm.RSGD(sm.Geometry.from_rules({"x": torch.eye(2)}, {"x": SPD(retraction)}), rate)
    params = {"x": torch.eye(2)}
    state = optimizer.init(params)
    path = [params["x"]]
    for _ in range(200):
        gradient = torch.diag(a) - torch.linalg.inv(params["x"])
        params, state = optimizer.update({"x": gradient}, state, params)
        path.append(params["x"])
    error = far(torch.diag(1.0 / a), path[-1])
    moved = far(path[-2], path[-1])
    assert math.isfinite(error)
    assert path[-1].isfinite().all()
    assert error < 1e-5 or moved > 1e-4 * error
    if 0.1 <= rate <= 1.0:
        assert error < 1e-5


class TestScales:
    """Nothing depends on the unit of the matrices."""

    @pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e-8, 1e-3, 1e8, 1e30])
    @TYPES
    def test_everything_is_equivariant(self, dtype, scale):
        x = with_eigenvalues([0.5, 1.0, 1.0, 20.0]).to(dtype)
        y = with_eigenvalues([0.2, 0.3, 3.0, 4.0], 1).to(dtype)
        u, v = step_at(x, [-0.5, -0.1, 0.3, 0.7]).to(dtype), step_at(x, [-4.0, 1.0, 0.3, 0.7], 6).to(dtype)
        tolerance = 300 * EPS[dtype]
        for m in (SPD(), SPD(SPDExponential())):
            for method in (m.retract, m.exp, m.from_coordinates):
                for w in (u, v):
                    assert relative(method(scale * x, scale * w if method != m.from_coordinates else w) / scale,
                                    method(x, w).double()) < tolerance  # fmt: skip
            assert relative(m.log(scale * x, scale * y) / scale, m.log(x, y).double()) < tolerance
            assert relative(m.transport(scale * x, scale * y, scale * u) / scale, m.transport(x, y, u)) < tolerance
            assert relative(m.distance(scale * x, scale * y), m.distance(x, y)) < tolerance
            assert relative(m.inner(scale * x, scale * u, scale * v), m.inner(x, u, v)) < tolerance
            assert relative(m.norm(scale * x, scale * u), m.norm(x, u)) < tolerance
            assert relative(m.coordinates(scale * x, scale * u), m.coordinates(x, u)) < tolerance
        root = symmetric_square_root(scale * x)
        assert relative(root @ root / scale, x) < tolerance
        shift = math.log(scale) * torch.eye(4, dtype=torch.float64)
        assert relative(symmetric_logarithm(scale * x), symmetric_logarithm(x.double()) + shift) < tolerance

    @pytest.mark.parametrize("scale", [1e-30, 1e-15, 1.0, 1e30])
    def test_a_matrix_whitened_by_itself_is_the_identity(self, scale):
        m = scale * torch.diag(torch.tensor([1.0, 2.0]))
        torch.testing.assert_close(SPD().coordinates(m, m), torch.eye(2))

    def test_wider_in_float64(self):
        x = 1e-200 * with_eigenvalues([0.5, 1.0, 2.0])
        torch.testing.assert_close(SPD().coordinates(x, x), torch.eye(3).double(), rtol=0, atol=1e-13)
        assert float(SPD().distance(x, 1e300 * x)) == pytest.approx(300 * math.log(10) * math.sqrt(3), rel=1e-13)

    def test_second_derivatives(self):
        """log(c A) has 1/c and 1/c^2 times the derivatives of log(A)."""
        x, w = with_eigenvalues([0.5, 1.0, 2.0]), with_eigenvalues([-0.5, 0.1, 2.0], 1)
        zero = torch.zeros((), dtype=torch.float64)

        def second(scale):
            return torch.func.jacfwd(torch.func.jacfwd(lambda t: symmetric_logarithm(scale * (x + t * w))))(zero)

        assert relative(second(1e-200), second(1.0)) < 1e-12

    def test_nearest(self):
        a = torch.diag(torch.tensor([-2.0, -3.0]))
        torch.testing.assert_close(SPD().nearest(1e-20 * a), 1e-20 * SPD().nearest(a), rtol=1e-6, atol=0)


class TestFarApart:
    """Logarithms and exponentials that are large."""

    @TYPES
    @pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-8, 1e8, 1e30])
    def test_distance_to_a_multiple(self, dtype, scale):
        identity = torch.eye(2, dtype=dtype)
        expected = abs(math.log(scale)) * math.sqrt(2)
        assert float(SPD().distance(identity, scale * identity)) == pytest.approx(expected, rel=4 * EPS[dtype])
        assert float(SPD().distance(scale * identity, identity)) == pytest.approx(expected, rel=4 * EPS[dtype])
        logarithm = SPD().log(identity, scale * torch.diag(torch.tensor([1.0, 2.0], dtype=dtype)))
        expected = torch.tensor([math.log(scale), math.log(2 * scale)], dtype=torch.float64)
        assert relative(logarithm.diagonal(), expected) < 4 * EPS[dtype]

    def test_distance_across_the_range(self):
        identity = torch.eye(2)
        assert float(SPD().distance(1e-20 * identity, 1e20 * identity)) == pytest.approx(
            40 * math.log(10) * math.sqrt(2), rel=1e-6
        )

    @TYPES
    def test_first_derivatives(self, dtype):
        """Divided differences, entry by entry, over 40 powers of ten."""
        logs = torch.tensor([-50.0, -3.0, 0.0, 2.0, 50.0], dtype=torch.float64)
        ones = torch.ones(5, 5, dtype=dtype)
        gaps = logs[:, None] - logs
        divided = torch.where(
            gaps == 0, logs.exp(), (logs[:, None].exp() - logs.exp()) / torch.where(gaps == 0, 1.0, gaps)
        )
        _, exponential = torch.func.jvp(symmetric_exponential, (torch.diag(logs).to(dtype),), (ones,))
        torch.testing.assert_close(exponential.double(), divided, rtol=1000 * EPS[dtype], atol=0)
        # Up to what a decomposition keeps beside the largest eigenvalue.
        near = slice(1, 4)
        _, logarithm = torch.func.jvp(
            symmetric_logarithm, (torch.diag(logs[near].exp()).to(dtype),), (ones[near, near],)
        )
        torch.testing.assert_close(logarithm.double(), 1.0 / divided[near, near], rtol=100 * EPS[dtype], atol=0)

    @TYPES
    @pytest.mark.parametrize("values", [[-40.0, -40.0], [-40.0, 0.0], [-30.0, 40.0], [60.0, 60.0], [-1e-3, 1e-3]])
    def test_exponential(self, dtype, values):
        expected = [float(mp.exp(value)) for value in values]
        identity, v = torch.eye(2, dtype=dtype), torch.diag(torch.tensor(values, dtype=dtype))
        for end in (
            symmetric_exponential(v),
            SPD().exp(identity, v),
            torch.func.vmap(SPD().exp)(identity[None], v[None])[0],
        ):
            for got, value in zip(end.diagonal().tolist(), expected, strict=True):
                assert got == pytest.approx(value, rel=100 * EPS[dtype], abs=0.0)
        # Such a retraction is allowed, too; its polish raises what is below rounding.
        if values == [-40.0, -40.0]:
            far_away = SPDExponential(max_norm=80.0)(identity, v)
            assert far_away.diagonal().tolist() == pytest.approx(expected, rel=100 * EPS[dtype], abs=0.0)

    @TYPES
    def test_distances_are_symmetric(self, dtype):
        for seed in range(5):
            x, y = (
                with_eigenvalues([0.01, 0.5, 3.0], seed).to(dtype),
                1e-6 * with_eigenvalues([0.2, 1.0, 9.0], 9 + seed),
            )
            y = y.to(dtype)
            there, back = float(SPD().distance(x, y)), float(SPD().distance(y, x))
            assert there == pytest.approx(back, rel=10 * EPS[dtype])
            assert there == pytest.approx(far(x, y), rel=10 * EPS[dtype])


def test_a_network_with_a_logarithm_layer_trains_as_with_eigh():
    """Covariances of size 1e-8 in float32, as those of an EEG: mapping, logarithm, linear layer, 30 steps."""
    generator = seeded()
    labels = torch.arange(64) % 2
    spectrum = torch.logspace(0, -2, 6) * (1.0 + labels[:, None] * torch.linspace(0.0, 2.0, 6))
    noise = torch.randn(64, 6, 200, generator=generator) * spectrum.sqrt()[..., None]
    samples = 1e-8 * (noise @ noise.mT) / 200

    def eigh_logarithm(a):
        values, vectors = torch.linalg.eigh(a)
        return (vectors * values.log()[..., None, :]) @ vectors.mT

    def train(logarithm):
        w = basis(6)[:, :4].float().requires_grad_()
        head = torch.zeros(16, 2, requires_grad=True)
        losses = []
        for _ in range(30):
            features = (logarithm(w.mT @ samples @ w) + 20.0 * torch.eye(4)).flatten(1)
            loss = torch.nn.functional.cross_entropy(features @ head, labels)
            gradients = torch.autograd.grad(loss, (w, head))
            with torch.no_grad():
                for parameter, gradient in zip((w, head), gradients, strict=True):
                    parameter -= 0.1 * gradient
            losses.append(float(loss.detach()))
        return losses

    ours, theirs = train(symmetric_logarithm), train(eigh_logarithm)
    assert theirs[-1] < 0.7 * theirs[0]
    assert ours == pytest.approx(theirs, rel=1e-3)
    # Where eigh has no derivative: equal eigenvalues. d log at c I is the identity over c.
    gradient = torch.func.grad(lambda a: symmetric_logarithm(a).sum())(1e-8 * torch.eye(4))
    torch.testing.assert_close(gradient, 1e8 * torch.ones(4, 4), rtol=1e-5, atol=0)


class TestEqualPoints:
    @TYPES
    def test_hessian_of_the_squared_distance_is_twice_the_metric(self, dtype):
        m = SPD()
        x = with_eigenvalues([0.5, 1.0, 1.0, 3.0]).to(dtype)
        u = m.random_tangent(x, seeded(1))
        zero = torch.zeros_like(x)
        tolerance = 100 * EPS[dtype]
        along = torch.func.grad(lambda v: m.squared_distance(x, m.exp(x, v)))
        assert along(zero).abs().max() < 1e-5 if dtype == torch.float32 else 1e-13
        _, hessian = torch.func.jvp(along, (zero,), (u,))
        assert relative((hessian * u).sum(), 2 * m.inner(x, u, u)) < tolerance
        # In both arguments, at bitwise equal points too: x + tu and x + tw.
        w = m.random_tangent(x, seeded(2))
        one = torch.tensor(0.0, dtype=dtype)
        both = torch.func.grad(torch.func.grad(lambda t: m.squared_distance(x + t * u, x + t * w)))(one)
        assert relative(both, 2 * m.inner(x, u - w, u - w)) < tolerance
        for argument in (0, 1):
            hessian = torch.func.jacrev(torch.func.grad(m.squared_distance, argument), argument)(x, x)
            assert relative((hessian * u).sum(dim=(-2, -1)).mul(u).sum(), 2 * m.inner(x, u, u)) < tolerance

    def test_the_distance_is_exactly_0(self):
        """Where solving with a factor for the factor itself leaves rounding errors."""
        x = SPD().random_point((20, 33, 33), seeded())
        assert torch.equal(SPD().distance(x, x.clone()), torch.zeros(20))
        assert torch.equal(SPD().log(x, x), torch.zeros_like(x))

    def test_the_derivative_of_the_distance_is_finite(self):
        x = with_eigenvalues([0.5, 1.0, 3.0])
        assert float(SPD().distance(x, x)) == 0.0
        for argument in (0, 1):
            assert torch.equal(torch.func.grad(SPD().distance, argument)(x, x), torch.zeros_like(x))
        x, y = x.expand(2, 3, 3).clone(), torch.stack([x, 2.0 * x])
        assert SPD().squared_distance(x, y).tolist() == pytest.approx([0.0, 3.0 * math.log(2.0) ** 2])

    def test_norm(self):
        m = SPD()
        x = with_eigenvalues([0.5, 1.0, 3.0])
        v = m.random_tangent(x, seeded())
        torch.testing.assert_close(m.norm(x, v), m.inner(x, v, v).sqrt(), rtol=1e-13, atol=0)
        torch.testing.assert_close(
            torch.func.grad(m.norm, 1)(x, v),
            torch.func.grad(lambda u: m.inner(x, u, u).sqrt())(v),
            rtol=1e-12,
            atol=1e-12,
        )
        assert float(m.norm(x, 0.0 * v)) == 0.0
        assert torch.equal(torch.func.grad(m.norm, 1)(x, 0.0 * v), torch.zeros_like(v))
        assert torch.func.hessian(m.norm, 1)(x, 0.0 * v).isfinite().all()
        for size in (1e-30, 1e30):
            got = m.norm(x.float(), size * v.float())
            assert float(got) == pytest.approx(size * float(m.norm(x, v)), rel=1e-6, abs=0.0)
            assert m.norm(x.float()[None], size * v.float()[None]).shape == (1,)


def reference(x, y, v):
    """Distance, logarithm and transported tangent in 50 digits and more."""
    x, y, v = to_mp(x), to_mp(y), to_mp(v)
    root, inverse = symmetric_function(x, mp.sqrt), symmetric_function(x, lambda t: 1 / mp.sqrt(t))
    between = inverse * y * inverse
    between = (between + between.T) / 2
    logarithm = symmetric_function(between, mp.log)
    carry = root * symmetric_function(between, mp.sqrt) * inverse
    distance = mp.sqrt(mp.fsum(entry * entry for entry in logarithm))
    return float(distance), to_torch(root * logarithm * root), to_torch(carry * v * carry.T)


@pytest.mark.parametrize(
    ("dtype", "condition", "distance", "logarithm", "transport", "length"),
    [
        (torch.float32, 1e3, 5e-6, 1e-5, 5e-5, 1e-5),
        (torch.float32, 1e5, 4e-4, 4e-4, 1e-2, 2e-4),
        (torch.float32, 1e6, 4e-3, 4e-3, 1e-1, 4e-3),
        (torch.float64, 1e6, 5e-12, 5e-12, 2e-9, 5e-12),
        (torch.float64, 1e10, 3e-7, 3e-7, 1e-4, 3e-7),
    ],
)
def test_ill_conditioned_pairs(dtype, condition, distance, logarithm, transport, length):
    """5 x 5, both of that condition number, in unrelated bases; half of the digits lost is what the bounds allow."""
    m = SPD()
    values = torch.logspace(0, -math.log10(condition), 5, dtype=torch.float64)
    for seed in range(4):
        x, y = (with_eigenvalues(values, 2 * seed + k).to(dtype) for k in range(2))
        v = m.random_tangent(x, seeded(seed))
        expected = reference(x, y, v)
        assert float(m.distance(x, y)) == pytest.approx(expected[0], rel=distance)
        assert float(m.squared_distance(x, y)) == pytest.approx(expected[0] ** 2, rel=2 * distance)
        assert relative(m.log(x, y), expected[1]) < logarithm
        moved = m.transport(x, y, v)
        assert relative(moved, expected[2]) < transport
        assert float(m.norm(y, moved)) == pytest.approx(float(m.norm(x, v)), rel=length)


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e6])
@pytest.mark.parametrize("name", ["distance", "log", "transport", "exp"])
def test_derivatives_between_two_points(name, condition):
    """Two orders, in the second point (the tangent, for exp), against 80 digits; the third by its own difference."""
    m = SPD()
    values = [1.0, 1.0, condition**-0.5, 1.0 / condition]
    x, y = with_eigenvalues(values), with_eigenvalues(values, 1)
    v = m.random_tangent(x, seeded(2))
    w = step_at(y, [0.3, -0.5, 0.1, 0.7])
    if name == "exp":
        start, w = step_at(x, [0.5, 0.5, -1.0, 3.0]), step_at(x, [0.3, -0.5, 0.1, 0.7], 7)
    else:
        start = y

    def ours(t):
        z = start + t * w
        return {
            "distance": lambda: m.squared_distance(x, z)[None, None],
            "log": lambda: m.log(x, z),
            "transport": lambda: m.transport(x, z, v),
            "exp": lambda: m.exp(x, z),
        }[name]()

    root = symmetric_function(to_mp(x), mp.sqrt)
    inverse = symmetric_function(to_mp(x), lambda t: 1 / mp.sqrt(t))

    def theirs(z):
        between = inverse * z * inverse
        between = (between + between.T) / 2
        if name == "exp":
            return root * symmetric_function(between, mp.exp) * root
        if name == "transport":
            carry = root * symmetric_function(between, mp.sqrt) * inverse
            return carry * to_mp(v) * carry.T
        logarithm = symmetric_function(between, mp.log)
        return root * logarithm * root if name == "log" else diag([mp.fsum(entry * entry for entry in logarithm)])

    value, first, second = derivatives(theirs, to_mp(start), to_mp(w))
    zero = torch.zeros((), dtype=torch.float64)
    tolerance = 1e-11 * condition

    def close(a, b):
        # The distance and the logarithm of equal points are 0.
        return float((a - b).norm()) < tolerance * (float(b.norm()) if condition > 1.0 else 1.0)

    once = torch.func.jacfwd(ours)
    twice = torch.func.jacrev(once)
    assert close(ours(zero), value)
    assert close(once(zero), first)
    assert close(twice(zero), second)
    if condition < 1e3:
        h = 1e-4
        third = (twice(zero + h) - twice(zero - h)) / (2 * h)
        assert relative(torch.func.jacfwd(twice)(zero), third) < 1e-5


def test_derivatives_in_the_first_point():
    m = SPD()
    x, y = with_eigenvalues([0.5, 1.0, 1.0, 4.0]), with_eigenvalues([0.3, 0.3, 2.0, 5.0], 1)
    u, v = m.random_tangent(x, seeded(1)), m.random_tangent(x, seeded(2))
    g = torch.randn(4, 4, generator=seeded(3), dtype=torch.float64)
    h = 1e-4
    for value in (
        lambda t: m.squared_distance(x + t * u, y),
        lambda t: m.distance(x + t * u, y),
        lambda t: (g * m.log(x + t * u, y)).sum(),
        lambda t: (g * m.transport(x + t * u, y, v)).sum(),
        lambda t: (g * m.exp(x + t * u, v)).sum(),
    ):
        zero = torch.zeros((), dtype=torch.float64)
        first, second = torch.func.grad(value)(zero), torch.func.grad(torch.func.grad(value))(zero)
        ahead, here, behind = value(h), value(0.0), value(-h)
        torch.testing.assert_close(first, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(second, (ahead - 2 * here + behind) / h**2, rtol=1e-4, atol=1e-5)


def test_forward_mode_without_transforms():
    """Dual numbers carry a derivative that no flag of the tensor shows."""
    y = with_eigenvalues([0.5, 1.0, 4.0])
    w = SPD().random_tangent(y, seeded(1))
    x = torch.eye(3, dtype=torch.float64)
    for method in (SPD().log, SPD().squared_distance, SPD().exp):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(y, w)
            tangent = torch.autograd.forward_ad.unpack_dual(method(x, dual)).tangent
        _, expected = torch.func.jvp(lambda z: method(x, z), (y,), (w,))  # noqa: B023
        torch.testing.assert_close(tangent, expected, rtol=1e-12, atol=1e-12)


@TYPES
def test_the_square_root_is_right_to_rounding(dtype):
    """The decomposition alone leaves three times as much."""
    x = SPD().random_point((32, 32), seeded(), dtype)
    root = symmetric_square_root(x).double()
    assert relative(root @ root, x.double()) < 4 * EPS[dtype]


def test_tangents_broadcast_against_points():
    m = SPD()
    x, y = with_eigenvalues([0.5, 1.0, 4.0]), with_eigenvalues([0.3, 2.0, 5.0], 1)
    v = m.random_tangent(x.expand(4, 3, 3), seeded())
    moved = m.transport(x, y, v)
    torch.testing.assert_close(moved, torch.stack([m.transport(x, y, one) for one in v]))
    torch.testing.assert_close(m.transport(x, torch.stack([y, x]), v[0])[1], v[0])
    torch.testing.assert_close(m.norm(x, v), torch.stack([m.norm(x, one) for one in v]))
    torch.testing.assert_close(m.retract(x, v), torch.stack([m.retract(x, one) for one in v]))
    assert m.distance(x, torch.stack([y, x])).shape == (2,)


def test_what_is_not_finite_stays_so_and_raises_nothing():
    x = torch.eye(3).expand(2, 3, 3).clone()
    y = x.clone()
    y[0, 1, 1] = math.nan
    for result in (SPD().log(x, y), SPD().exp(x, y), SPD().transport(x, y, x), SPD().retract(x, y),
                   SPD().squared_distance(x, y)[:, None], symmetric_logarithm(y)):  # fmt: skip
        assert result[0].isnan().any()
        assert result[1].isfinite().all()


@pytest.mark.parametrize("name", ["log", "squared_distance", "distance", "exp", "norm"])
def test_compiled(name):
    torch._dynamo.reset()
    x, y = with_eigenvalues([0.5, 1.0, 4.0]), with_eigenvalues([0.3, 2.0, 5.0], 1)
    method = getattr(SPD(), name)
    compiled = torch.compile(method, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), method(x, y), rtol=1e-12, atol=1e-12)


def test_steps_are_measured_exactly_in_one_and_many_dimensions():
    """The largest contraction that is left unshortened has the eigenvalue -1, whatever the others are."""
    for values in ([-3.0], [-3.0, 1.0], [-3.0, -2.99, 0.5], [-3.0] + [0.5] * 15, [-3.0] * 16 + [2.0] * 16):
        x = SPD().random_point((len(values), len(values)), seeded(), torch.float64)
        end = SPDSecondOrder()(x, step_at(x, values))
        factors = torch.linalg.eigvalsh(spd_whitened(x, end))
        assert float(factors[0]) == pytest.approx(0.5, abs=1e-9)
        expected = SPDSecondOrder()(x, step_at(x, [value / 3.0 for value in values]))
        torch.testing.assert_close(end, expected, rtol=1e-6, atol=1e-7)


def spd_whitened(x, y):
    factor = torch.linalg.cholesky(x)
    return torch.linalg.solve(factor, torch.linalg.solve(factor, y).T)
