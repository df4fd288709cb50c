"""What the retractions are made of: step bound, the polar iteration's plan, shortening, symmetry, Cayley's solve."""

from __future__ import annotations

import math

import pytest
import torch
from manifold_cases import ORTHONORMAL, seeded, spectral, step_of_norm
from mpmath import mp, mpf

from subspace_meta.manifolds import (
    SPD,
    Cayley,
    CholeskyQR,
    Geodesic,
    Grassmann,
    HouseholderQR,
    Oblique,
    PolarNewtonSchulz,
    Rotations,
    SPDExponential,
    SPDSecondOrder,
    Sphere,
    SphereExponential,
    Stiefel,
)
from subspace_meta.manifolds.base import column_blocks, divide_by_lower, gram, spectral_bound
from subspace_meta.manifolds.matrix_functions import matrix_exponential
from subspace_meta.manifolds.retractions import INVERSE_ROOT_SERIES, inverse_root_plan, newton_schulz_step, positive_qr
from subspace_meta.manifolds.spd import keep_positive


def orthogonal(n, seed=0):
    return torch.linalg.qr(torch.randn(n, n, generator=seeded(seed), dtype=torch.float64)).Q


def symmetric(*shape, seed=0):
    a = torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)
    return a + a.mT


def bound_of(a):
    return spectral_bound(a)[..., 0, 0]


class TestSpectralBound:
    def test_is_between_the_spectral_and_the_frobenius_norm(self):
        for n in (1, 2, 5, 16):
            a = symmetric(50, n, n, seed=n)
            for b in (a, a @ a.mT):
                assert (bound_of(b) >= torch.linalg.matrix_norm(b, 2) * (1 - 1e-12)).all()
                assert (bound_of(b) <= torch.linalg.matrix_norm(b) * (1 + 1e-12)).all()

    def test_is_exact_for_rank_one_and_multiples_of_the_identity(self):
        v = torch.randn(6, 1, generator=seeded(), dtype=torch.float64)
        torch.testing.assert_close(bound_of(v @ v.mT), (v * v).sum(), rtol=1e-13, atol=0)
        assert bound_of(-3.0 * torch.eye(6, dtype=torch.float64)) == pytest.approx(3.0, abs=1e-13)

    def test_does_not_depend_on_the_basis(self):
        a, q = symmetric(6, 6), orthogonal(6)
        torch.testing.assert_close(bound_of(q @ a @ q.T), bound_of(a), rtol=1e-12, atol=0)

    def test_has_finite_derivatives_at_zero(self):
        zero = torch.zeros(4, 4)
        assert torch.func.grad(lambda a: spectral_bound(a).sum())(zero).isfinite().all()
        hessian = torch.func.jacrev(torch.func.grad(lambda a: spectral_bound(a).clamp(min=1.0).sum()))(zero)
        assert hessian.isfinite().all()


@pytest.mark.parametrize("p", [1, 64, 255, 256, 300, 513, 520])
def test_blocked_products_equal_whole_ones(p):
    y = torch.randn(2, 40, p, generator=seeded(p), dtype=torch.float64)
    lower = torch.linalg.cholesky(y.mT @ y + torch.eye(p, dtype=torch.float64))
    blocks = column_blocks(p)
    assert [start for start, _ in blocks] == [0, *(end for _, end in blocks[:-1])]
    assert blocks[-1][1] == p
    assert len(blocks) == {256: 4, 300: 3, 513: 3, 520: 3}.get(p, 1)
    torch.testing.assert_close(gram(y), y.mT @ y, rtol=1e-13, atol=1e-12)
    torch.testing.assert_close(divide_by_lower(y, lower) @ lower.mT, y, rtol=1e-13, atol=1e-11)


@pytest.mark.parametrize("shape", [(5, 5), (7, 4), (8, 4), (600, 260)])
def test_cholesky_and_householder_give_the_same_factor(shape):
    x = Stiefel().random_point(shape, seeded(), torch.float64)
    for length in (0.1, 1.0):
        v = step_of_norm(Stiefel(), x, length)
        v = v * min(1.0, 9.0 / float(v.norm()))
        torch.testing.assert_close(CholeskyQR()(x, v), HouseholderQR()(x, v), rtol=0, atol=2e-14)


class TestPolarPlan:
    def test_coefficients_are_those_of_the_inverse_root(self):
        for row, coefficients in enumerate(INVERSE_ROOT_SERIES):
            assert len(coefficients) == max(2, 2 * row + 1)
            assert coefficients == tuple(math.comb(2 * j, j) / 4**j for j in range(len(coefficients)))

    def test_plans_of_the_default(self):
        polar = PolarNewtonSchulz()
        assert polar.plan(torch.float32) == (3, 2)
        assert polar.plan(torch.float64) == (2, 3)
        assert polar.steps(torch.float64) == 3

    @pytest.mark.parametrize("max_norm", [0.1, 0.5, 1.0, 2.0, 5.0])
    @pytest.mark.parametrize("tolerance", [2.0**-21, 2.0**-50])
    def test_plan_converges_with_two_derivatives_and_fewest_products(self, max_norm, tolerance):
        """The scalar iteration in 80 digits, at the worst eigenvalue, differentiated by mpmath."""
        row, steps = inverse_root_plan(max_norm, tolerance)
        start = mpf(max_norm) ** 2 / (2 + mpf(max_norm) ** 2)

        def residual(row, steps):
            def f(r):
                for _ in range(steps):
                    q = sum(mpf(c) * r**j for j, c in enumerate(INVERSE_ROOT_SERIES[row]))
                    r = 1 - (1 - r) * q * q
                return r

            return max(abs(mp.diff(f, start, n)) for n in range(3))

        assert residual(row, steps) < tolerance * 1.001
        products = row * steps + 3 * (steps - 1)
        for other in range(len(INVERSE_ROOT_SERIES)):
            for n in range(1, 8):
                if other * n + 3 * (n - 1) < products:
                    assert residual(other, n) > tolerance * 0.999

    @pytest.mark.parametrize("max_norm", [0.1, 0.5, 1.0, 2.0, 5.0])
    def test_every_bound_gives_the_polar_factor(self, max_norm):
        x = Stiefel().random_point((3, 8, 4), seeded(), torch.float64)
        # Spread singular values, within the bound by any estimate.
        v = 0.6 * max_norm * step_of_norm(Stiefel(), x, 1.0)
        u, _, vh = torch.linalg.svd(x + v, full_matrices=False)
        torch.testing.assert_close(PolarNewtonSchulz(max_norm)(x, v), u @ vh, rtol=0, atol=2e-15 * (2 + max_norm**2))

    @pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan, 1e9])
    def test_impossible_bounds_are_refused(self, max_norm):
        with pytest.raises(ValueError, match="max_norm"):
            PolarNewtonSchulz(max_norm)


LIMITED = [
    (Stiefel(CholeskyQR()), 7.0),
    (Stiefel(HouseholderQR()), 7.0),
    (Stiefel(CholeskyQR(3.0)), 3.0),
    (Grassmann(PolarNewtonSchulz()), 2.0),
    (Rotations(PolarNewtonSchulz(1.0)), 1.0),
    (Stiefel(Cayley()), 10.0),
    (Grassmann(Cayley()), 2.0),
    (Stiefel(Geodesic()), math.pi),
    (Grassmann(Geodesic("canonical", 2.0)), math.pi / 2),
    (Rotations(Geodesic(max_norm=3.0)), 3.0),
    (Sphere(SphereExponential()), math.pi),
    (Sphere(SphereExponential(1.0)), 1.0),
    (SPD(SPDSecondOrder()), 2.0),
    (SPD(SPDExponential()), 5.0),
    (SPD(SPDExponential(1.0)), 1.0),
]


@pytest.mark.parametrize(("manifold", "limit"), LIMITED, ids=[f"{m.name}-{m.retraction}" for m, _ in LIMITED])
def test_a_step_beyond_the_bound_is_the_step_of_that_length(manifold, limit):
    """Along a rank-one direction (a plane rotation on SO(n)) the bound is exact; the direction stays."""
    square = isinstance(manifold, SPD | Rotations)
    x = manifold.random_point((4, 4) if square else (7, 3), seeded(), torch.float64)
    if isinstance(manifold, SPD):
        column = torch.randn(4, 1, generator=seeded(1), dtype=torch.float64)
        root = torch.linalg.cholesky(x)
        v = root @ spectral(column @ column.mT) @ root.mT
    elif isinstance(manifold, Rotations):
        plane = torch.zeros(2, 2, dtype=torch.float64)
        plane[0, 1], plane[1, 0] = 1.0, -1.0
        # Equal angles in two planes: all singular values of the step are 1.
        v = x @ torch.block_diag(plane, plane)
    else:
        normal = torch.linalg.qr(x, mode="complete").Q[:, -1:]
        v = normal @ torch.tensor([[0.6, 0.0, 0.8]], dtype=torch.float64)
        if isinstance(manifold, Sphere):
            v = manifold.project(x, v)
            v = v / v.norm()
    at_the_bound = manifold.retract(x, 0.999999999 * limit * v)
    scale = max(1.0, float(at_the_bound.abs().max()))
    for length in (1.0001, 30.0, 1e3, 1e6):
        assert (manifold.retract(x, length * limit * v) - at_the_bound).abs().max() < 1e-7 * scale, length
    within = manifold.retract(x, 0.9 * limit * v)
    assert (within - at_the_bound).abs().max() > 1e-3


@pytest.mark.parametrize("retraction", ORTHONORMAL, ids=lambda r: f"{type(r).__name__}{getattr(r, 'metric', '')}")
@pytest.mark.parametrize("length", [0.3, 30.0])
def test_symmetry_of_the_retractions(retraction, length):
    """All commute with orthogonal factors on the left; all but QR on the right as well, long steps included."""
    x = Stiefel().random_point((7, 4), seeded(), torch.float64)
    v = step_of_norm(Stiefel(), x, length)
    left, right = orthogonal(7, 2), orthogonal(4, 3)
    torch.testing.assert_close(retraction(left @ x, left @ v), left @ retraction(x, v), rtol=0, atol=1e-12)
    turned = retraction(x @ right, v @ right) - retraction(x, v) @ right
    if isinstance(retraction, CholeskyQR | HouseholderQR):
        assert turned.abs().max() > 1e-3
    else:
        assert turned.abs().max() < 1e-12


@pytest.mark.parametrize("retraction", [SPDSecondOrder(), SPDExponential()], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("length", [0.3, 30.0])
def test_spd_retractions_are_affine_invariant(retraction, length):
    manifold = SPD(retraction)
    x = manifold.random_point((4, 4), seeded(), torch.float64)
    v = step_of_norm(manifold, x, length)
    b = torch.randn(4, 4, generator=seeded(4), dtype=torch.float64)
    moved = retraction(b @ x @ b.T, b @ v @ b.T)
    torch.testing.assert_close(moved, b @ retraction(x, v) @ b.T, rtol=1e-11, atol=1e-11)


def test_cayley_is_the_solve_of_size_two_p():
    """Wen and Yin 2013, lemma 4: X + U (I - V^T U / 2)^{-1} V^T X with U = [PV, X], V = [X, -PV]."""
    x = Stiefel().random_point((9, 3), seeded(), torch.float64)
    v = step_of_norm(Stiefel(), x, 1.5)
    pv = v - 0.5 * x @ (x.T @ v)
    u, w = torch.cat([pv, x], dim=1), torch.cat([x, -pv], dim=1)
    identity = torch.eye(6, dtype=torch.float64)
    expected = x + u @ torch.linalg.solve(identity - 0.5 * w.T @ u, w.T @ x)
    torch.testing.assert_close(Cayley()(x, v), expected, rtol=0, atol=1e-14)


def test_qr_has_a_positive_diagonal_and_keeps_zero_columns():
    y = torch.randn(20, 6, 3, generator=seeded(), dtype=torch.float64)
    diagonal = torch.diagonal(positive_qr(y).mT @ y, dim1=-2, dim2=-1)
    assert (diagonal > 0).all()
    y[:, :, 1] = 0.0
    torch.testing.assert_close(positive_qr(y).mT @ positive_qr(y), torch.eye(3, dtype=torch.float64).expand(20, 3, 3))


def test_newton_schulz_step_squares_the_error():
    x = Stiefel().random_point((6, 3), seeded(), torch.float64)
    y = x @ (torch.eye(3, dtype=torch.float64) + 1e-4 * symmetric(3, 3))
    error = (newton_schulz_step(y) - x).norm() / (y - x).norm() ** 2
    # (1 + e) (3 - (1 + e)^2) / 2 = 1 - 3 e^2 / 2 - ...
    assert error < 1.6
    assert (newton_schulz_step(x) - x).abs().max() < 1e-15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matrix_exponential_of_rotations(dtype):
    """cos and sin in a plane, to the type's precision, at every length up to the bound."""
    plane = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=dtype)
    for length in (0.0, 1e-3, 0.04, 0.3, 0.55, 1.0, 3.0, 10.0):
        c, s = math.cos(torch.tensor(length, dtype=dtype)), math.sin(torch.tensor(length, dtype=dtype))
        expected = torch.tensor([[c, -s], [s, c]], dtype=dtype)
        error = (matrix_exponential(length * plane, 10.0) - expected).abs().max()
        assert error <= (2 + length) * torch.finfo(dtype).eps, length
    # A bound far above the norm costs nothing in accuracy.
    small = (matrix_exponential(1e-3 * plane, 1e4) - torch.linalg.matrix_exp(1e-3 * plane)).abs().max()
    assert small <= 2 * torch.finfo(dtype).eps


class TestSpdPolish:
    def test_well_conditioned_matrices_are_only_made_symmetric(self):
        x = SPD().random_point((3, 5, 5), seeded())
        skew = torch.randn(5, 5, generator=seeded(1))
        assert torch.equal(keep_positive(x), x)
        kept = keep_positive(x + 0.1 * (skew - skew.mT))
        torch.testing.assert_close(kept, x)
        assert torch.equal(kept, kept.mT)

    @pytest.mark.parametrize("smallest", [1e-9, 0.0, -1e-7])
    def test_matrices_that_are_singular_in_float32_get_a_ridge(self, smallest):
        q = orthogonal(5)
        x = (q @ torch.diag(torch.tensor([smallest, 1.0, 1.0, 2.0, 3.0], dtype=torch.float64)) @ q.T).float()
        kept = keep_positive(x)
        floor = 4 * 5 * torch.finfo(torch.float32).eps * x.diagonal().max()
        torch.testing.assert_close(kept - x, floor * torch.eye(5), rtol=0.2, atol=3e-7)
        assert torch.linalg.eigvalsh(kept.double())[0] > 0
        assert torch.linalg.cholesky_ex(kept).info == 0

    def test_steps_stay_positive_from_an_ill_conditioned_point(self):
        q = orthogonal(5)
        x = (q @ torch.diag(torch.tensor([1e-4, 1e-2, 1.0, 2.0, 3.0], dtype=torch.float64)) @ q.T).float()
        for retraction in (SPDSecondOrder(), SPDExponential()):
            manifold = SPD(retraction)
            for length in (1.0, 10.0, 1e3, 1e6):
                for sign in (1.0, -1.0):
                    for rank in (None, 1):
                        y = manifold.retract(x, sign * step_of_norm(manifold, x, length, rank))
                        assert torch.linalg.eigvalsh(y.double())[0] > 0


def test_oblique_bounds_each_column_on_its_own():
    manifold = Oblique(SphereExponential())
    x = manifold.random_point((5, 2), seeded(), torch.float64)
    v = manifold.random_tangent(x, seeded(1))
    v = v / v.norm(dim=0) * torch.tensor([0.1, 1e3], dtype=torch.float64)
    y = manifold.retract(x, v)
    torch.testing.assert_close((x[:, 0] * y[:, 0]).sum(), torch.tensor(0.1, dtype=torch.float64).cos())
    torch.testing.assert_close(y[:, 1], -x[:, 1])


def test_unknown_geodesics_are_refused():
    with pytest.raises(ValueError, match="metric"):
        Geodesic("euclidean")
