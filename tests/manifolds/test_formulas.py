"""Each manifold against formulas written down here, by other routes than the library's, to 1e-13 in float64."""

from __future__ import annotations

import math

import pytest
import scipy.linalg
import torch
from manifold_cases import seeded

from subspace_meta.manifolds import (
    SPD,
    Euclidean,
    Grassmann,
    Oblique,
    Orthogonal,
    Product,
    Rotations,
    Sphere,
    Stiefel,
    StiefelCanonical,
)


def close(a, b, tolerance=1e-13):
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


def drawn(manifold, shape):
    x = manifold.random_point(shape, seeded(), torch.float64)
    g = torch.randn(shape, generator=seeded(1), dtype=torch.float64)
    return x, g, manifold.random_tangent(x, seeded(2)), manifold.random_tangent(x, seeded(3))


def expm(a):
    return torch.from_numpy(scipy.linalg.expm(a.numpy()))


def test_euclidean():
    m = Euclidean()
    x, g, u, v = drawn(m, (3, 2))
    for vector in (m.project(x, g), m.riemannian_gradient(x, g), m.transport(x, u, g)):
        close(vector, g)
    close(m.exp(x, v), x + v)
    close(m.log(x, u), u - x)
    close(m.distance(x, u), (u - x).norm())
    assert m.dimension((4, 3, 2)) == 24
    assert m.violation(x) == 0


@pytest.mark.parametrize("family", [Stiefel, StiefelCanonical])
def test_stiefel_tangent_space(family):
    """Tangent: X^T V skew. The projection removes X S with the symmetric S that makes it so."""
    m = family()
    x, g, u, _ = drawn(m, (7, 3))
    close(x.T @ x, torch.eye(3, dtype=torch.float64))
    p = m.project(x, g)
    close(x.T @ p + p.T @ x, torch.zeros(3, 3))
    removed = g - p
    close(removed, x @ (x.T @ removed))
    close(x.T @ removed, removed.T @ x)
    close(m.project(x, u), u)
    assert m.dimension((2, 7, 3)) == 2 * (21 - 6)
    close(m.transport(m.random_point((7, 3), seeded(9), torch.float64), x, g), p)


def test_stiefel_geodesic_in_the_large():
    """exp(V X^T - X V^T) X exp(-X^T V), d x d."""
    m = Stiefel()
    x, _, v, _ = drawn(m, (6, 3))
    for t in (0.3, 2.0):
        close(m.exp(x, t * v), expm(t * (v @ x.T - x @ v.T)) @ x @ expm(-t * x.T @ v), 2e-13)


def test_canonical_stiefel():
    m = StiefelCanonical()
    x, g, u, v = drawn(m, (7, 3))
    middle = torch.eye(7, dtype=torch.float64) - 0.5 * x @ x.T
    close(m.inner(x, u, v), torch.trace(u.T @ middle @ v))
    close(m.riemannian_gradient(x, g), g - x @ g.T @ x)
    # The coordinates are the symmetric square root of the metric.
    root = torch.from_numpy(scipy.linalg.sqrtm(middle.numpy()).real)
    close(m.coordinates(x, v), root @ v)
    close(m.from_coordinates(x, v), torch.linalg.solve(root, v))
    w = middle @ v @ x.T - x @ v.T @ middle
    close(m.exp(x, 2.0 * v), expm(2.0 * w) @ x, 2e-13)


def test_grassmann():
    m = Grassmann()
    x, g, u, v = drawn(m, (7, 3))
    complement = torch.linalg.qr(x, mode="complete").Q[:, 3:]
    for vector in (m.project(x, g), m.riemannian_gradient(x, g)):
        close(vector, complement @ complement.T @ g)
    close(m.inner(x, u, v), (u * v).sum())
    # Geodesic and distance through the singular value decomposition of the lift.
    left, angles, right = torch.linalg.svd(v / v.norm(), full_matrices=False)
    y = x @ right.T @ torch.diag(angles.cos()) @ right + left @ torch.diag(angles.sin()) @ right
    close(m.exp(x, v / v.norm()), y)
    close(m.distance(x, y), torch.tensor(1.0))
    q = torch.linalg.qr(torch.randn(3, 3, generator=seeded(4), dtype=torch.float64)).Q
    close(m.log(x, y @ q), v / v.norm())
    close(m.distance(x @ q, y), torch.tensor(1.0))
    assert m.distance(x, x @ q) < 1e-14
    assert m.dimension((5, 7, 3)) == 5 * 12
    # At a right angle, where the cosine is 0.
    close(m.distance(x, complement[:, :3]), torch.tensor(math.sqrt(3) * math.pi / 2, dtype=torch.float64))


@pytest.mark.parametrize("family", [Sphere, Oblique])
def test_spheres(family):
    m = family()
    x, g, u, v = drawn(m, (5, 3))
    axes = (0, 1) if family is Sphere else (0,)

    def dot(a, b):
        return (a * b).sum(dim=axes, keepdim=True)

    close(dot(x, x), torch.ones_like(dot(x, x)))
    for vector in (m.project(x, g), m.riemannian_gradient(x, g)):
        close(vector, g - x * dot(x, g))
    close(m.inner(x, u, v), (u * v).sum())
    v = 0.4 * v
    length = dot(v, v).sqrt()
    y = x * length.cos() + v / length * length.sin()
    close(m.exp(x, v), y)
    close(m.log(x, y), v)
    close(m.distance(x, y), length.norm())
    # Parallel transport rotates the plane of the step and leaves the rest alone.
    direction = v / length
    along = dot(direction, u)
    close(m.transport(x, y, u), u - along * direction + along * (length.cos() * direction - length.sin() * x))
    close(m.retract(x, v), (x + v) / (1 + length**2).sqrt())
    assert m.dimension((2, 5, 3)) == (28 if family is Sphere else 24)
    close(m.violation(1.1 * x), torch.tensor(0.105), 1e-7)
    # Long and tiny angles.
    for angle in (3.0, 9e-3, 1e-9):
        far = x * math.cos(angle) + direction * math.sin(angle)
        close(m.log(x, far), angle * direction, 2e-15 / (math.pi - angle) ** 2 + 1e-15)
        expected = angle * (1 if family is Sphere else math.sqrt(3))
        close(m.distance(x, far), torch.tensor(expected, dtype=torch.float64), 1e-14)
    assert torch.func.grad(lambda z: m.log(z, x).square().sum())(x).isfinite().all()
    assert torch.func.grad(lambda z: m.distance(z, x))(x).isfinite().all()


def test_nearest_unit_handles_zero_tiny_and_huge_matrices():
    x = torch.zeros(4, 2)
    assert torch.equal(Sphere().nearest(x), torch.tensor([[1.0, 0], [0, 0], [0, 0], [0, 0]]))
    assert torch.equal(Oblique().nearest(x), torch.tensor([[1.0, 1.0], [0, 0], [0, 0], [0, 0]]))
    x[:, 0] = 1e-30 * torch.tensor([3.0, 4.0, 0.0, 0.0])
    x[:, 1] = 1e30 * torch.tensor([0.0, 3.0, 4.0, 0.0])
    close(Oblique().nearest(x), torch.tensor([[0.6, 0.0], [0.8, 0.6], [0.0, 0.8], [0.0, 0.0]]), 1e-6)


def test_spd():
    m = SPD()
    x, g, u, v = drawn(m, (4, 4))
    inverse = torch.linalg.inv(x)
    symmetric = 0.5 * (g + g.T)
    close(m.project(x, g), symmetric)
    close(m.riemannian_gradient(x, g), x @ symmetric @ x)
    close(m.inner(x, u, v), torch.trace(inverse @ u @ inverse @ v))
    close(m.inner(x, g, v), torch.trace(inverse @ g.T @ inverse @ v))
    root = torch.from_numpy(scipy.linalg.sqrtm(x.numpy()).real)
    close(m.coordinates(x, v), torch.linalg.inv(root) @ v @ torch.linalg.inv(root))
    close(m.from_coordinates(x, g), root @ g @ root)
    v = 0.5 * v
    y = x @ expm(inverse @ v)
    close(m.exp(x, v), y)
    close(m.log(x, y), v)
    close(m.distance(x, y), m.inner(x, v, v).sqrt())
    eigenvalues = torch.linalg.eigvals(torch.linalg.solve(x, y)).real
    close(m.distance(x, y), eigenvalues.log().norm())
    b = torch.from_numpy(scipy.linalg.sqrtm((y @ inverse).numpy()).real)
    close(m.transport(x, y, u), b @ u @ b.T)
    small = 0.2 * v / m.inner(x, v, v).sqrt()
    close(m.retract(x, small), x + small + 0.5 * small @ inverse @ small)
    assert m.dimension((2, 4, 4)) == 20
    assert m.violation(x) == 0
    skewed = x.clone()
    skewed[0, 1] += 0.1 * x.abs().max()
    close(m.violation(skewed), torch.tensor(0.1), 0.01)
    close(m.violation(torch.diag(torch.tensor([2.0, -0.5]))), torch.tensor(0.25))
    assert m.violation(torch.full((2, 2), torch.nan)).isnan()


def test_spd_random_tangents_are_standard_in_whitened_coordinates():
    m = SPD()
    x = m.random_point((4, 4), seeded(), torch.float64)
    x = (x + torch.diag(torch.tensor([100.0, 0, 0, 0], dtype=torch.float64))).expand(2000, 4, 4)
    v = m.random_tangent(x, seeded(1))
    # sym(Z): n(n+1)/2 independent directions of unit variance.
    close(m.inner(x, v, v).mean(), torch.tensor(10.0), 0.05)


def test_spd_nearest_is_the_projection_on_raised_eigenvalues():
    m = SPD()
    q = torch.linalg.qr(torch.randn(3, 3, generator=seeded(), dtype=torch.float64)).Q
    x = q @ torch.diag(torch.tensor([-1.0, 2.0, 3.0], dtype=torch.float64)) @ q.T
    close(m.nearest(x), q @ torch.diag(torch.tensor([3e-6, 2.0, 3.0], dtype=torch.float64)) @ q.T)
    close(m.nearest(torch.zeros(3, 3)), 1e-4 * torch.eye(3))
    assert m.violation(m.nearest(torch.randn(9, 6, 6, generator=seeded(1)))).max() == 0


@pytest.mark.parametrize("family", [Rotations, Orthogonal])
def test_rotations(family):
    m = family()
    x, g, u, v = drawn(m, (2, 5, 5))
    for vector in (m.project(x, g), m.riemannian_gradient(x, g)):
        close(vector, 0.5 * (g - x @ g.mT @ x))
    close(m.inner(x, u, v), (u * v).sum(dim=(-2, -1)))
    v = v / torch.linalg.matrix_norm(v, 2)[:, None, None]
    for t in (1e-7, 0.5, 2.5):
        y = x @ torch.stack([expm(t * x[i].T @ v[i]) for i in range(2)])
        close(m.exp(x, t * v), y, 1e-14)
        close(m.log(x, y), t * v, 1e-14)
        close(m.distance(x, y), t * torch.linalg.matrix_norm(v), 1e-14)
    close(m.transport(x, y, u), y @ x.mT @ u)
    assert m.dimension((2, 5, 5)) == 20
    close(m.log(x, x), torch.zeros(2, 5, 5))


def test_determinants():
    rotations, orthogonal = Rotations(), Orthogonal()
    for n in (1, 2, 3, 4):
        x = rotations.random_point((200, n, n), seeded(n), torch.float64)
        close(torch.linalg.det(x), torch.ones(200))
        assert rotations.violation(x).max() < 1e-14
    signs = torch.linalg.det(orthogonal.random_point((200, 3, 3), seeded(), torch.float64)).sign()
    assert 60 < (signs > 0).sum() < 140
    reflection = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    assert rotations.violation(reflection) == 2
    assert orthogonal.violation(reflection) == 0
    assert orthogonal.distance(torch.eye(3, dtype=torch.float64), reflection).isnan()
    assert orthogonal.distance(reflection, reflection) == 0
    # The nearest rotation: better than any of many others, and det 1.
    a = torch.randn(50, 3, 3, generator=seeded(5), dtype=torch.float64)
    nearest = rotations.nearest(a)
    close(torch.linalg.det(nearest), torch.ones(50))
    others = rotations.random_point((4000, 1, 3, 3), seeded(6), torch.float64)
    best = torch.linalg.matrix_norm(others - a).amin(dim=0)
    assert (torch.linalg.matrix_norm(nearest - a) <= best + 1e-12).all()


@pytest.mark.parametrize("family", [Stiefel, Grassmann, StiefelCanonical, Orthogonal])
def test_nearest_orthonormal_is_the_polar_factor(family):
    a = torch.randn(4, 4, generator=seeded(5), dtype=torch.float64)
    a = a if family is Orthogonal else a[:, :2]
    polar, _ = scipy.linalg.polar(a.numpy())
    close(family().nearest(a), torch.from_numpy(polar))


@pytest.mark.parametrize("axis", [-2, -1])
def test_product_is_its_blocks(axis):
    m = (
        Product((Stiefel(), SPD(), Sphere()), (5, 4, 3), axis)
        if axis == -2
        else Product((Stiefel(), SPD()), (2, 4), -1)
    )
    shape = (12, 4) if axis == -2 else (4, 6)
    x, g, u, v = drawn(m, shape)
    blocks = list(zip(m.factors, *(torch.split(t, list(m.sizes), dim=axis) for t in (x, g, u, v)), strict=True))
    cat = lambda items: torch.cat(list(items), dim=axis)  # noqa: E731
    close(m.project(x, g), cat(f.project(a, b) for f, a, b, _, _ in blocks))
    close(m.riemannian_gradient(x, g), cat(f.riemannian_gradient(a, b) for f, a, b, _, _ in blocks))
    close(m.retract(x, v), cat(f.retract(a, d) for f, a, _, _, d in blocks))
    close(m.inner(x, u, v), sum(f.inner(a, c, d) for f, a, _, c, d in blocks))
    close(m.coordinates(x, v), cat(f.coordinates(a, d) for f, a, _, _, d in blocks))
    y = m.retract(x, 0.1 * v)
    ends = torch.split(y, list(m.sizes), dim=axis)
    close(m.transport(x, y, u), cat(b[0].transport(b[1], e, b[3]) for b, e in zip(blocks, ends, strict=True)))
    assert m.dimension(shape) == sum(f.dimension(tuple(a.shape)) for f, a, _, _, _ in blocks)
    assert m.violation(2 * x) == max(f.violation(2 * a) for f, a, _, _, _ in blocks)
    assert not m.isometric_transport
    assert m.retraction_order == 1


def test_product_distance_adds_squares():
    m = Product((Sphere(), SPD()), (3, 2))
    x, _, v, _ = drawn(m, (5, 2))
    y = m.exp(x, 0.3 * v)
    close(m.distance(x, y), 0.3 * m.inner(x, v, v).sqrt())
    close(m.log(x, y), 0.3 * v)
    assert m.isometric_transport
    assert m.retraction_order == 2
    assert Product((Euclidean(), Euclidean()), (1, 1)).retraction_order == math.inf
    assert m.name == "Product(Sphere[3], SPD[2])"
    assert m.has_distance
    assert not Product((Sphere(), Stiefel()), (3, 2)).has_distance


@pytest.mark.parametrize(
    ("manifold", "shape", "message"),
    [
        (Stiefel(), (3, 5), "tall"),
        (Stiefel(), (3, 0), "tall"),
        (StiefelCanonical(), (3, 5), "StiefelCanonical needs tall"),
        (Grassmann(), (3, 5), "Grassmann needs tall"),
        (SPD(), (3, 5), "SPD needs square"),
        (Rotations(), (2, 3, 5), r"Rotations needs square matrices .* \(2, 3, 5\)"),
        (Orthogonal(), (4, 3), "Orthogonal needs square"),
        (Sphere(), (1, 1), "dp >= 2"),
        (Oblique(), (1, 4), "d >= 2"),
        (Euclidean(), (4,), "Euclidean"),
        (Product((Stiefel(), Euclidean()), (4, 2)), (7, 3), "needs 6 rows"),
        (Product((Stiefel(), Euclidean()), (4, 2), -1), (7, 3), "needs 6 columns"),
        (Product((Stiefel(), Euclidean()), (2, 4)), (6, 3), "Stiefel needs tall"),
    ],
)
def test_shapes_that_cannot_carry_the_manifold_are_refused(manifold, shape, message):
    for ask in (manifold.check_shape, manifold.random_point, lambda shape: manifold.nearest(torch.ones(shape))):
        with pytest.raises(ValueError, match=message):
            ask(shape)


@pytest.mark.parametrize("manifold", [Stiefel(), StiefelCanonical(), Grassmann()])
def test_rows_of_zeros_stay_where_the_others_have_full_rank(manifold):
    x = torch.randn(2, 7, 3, generator=seeded(), dtype=torch.float64)
    x[:, 2] = 0.0
    x[1, 3:] = 0.0  # two rows have no rank of 3: a zero row has to become another
    nearest = manifold.nearest(x)
    assert torch.equal(nearest[0, 2], torch.zeros(3, dtype=torch.float64))
    assert manifold.violation(nearest).max() < 1e-14
    close(nearest[0], torch.linalg.svd(x[0], full_matrices=False)[0] @ torch.linalg.svd(x[0], full_matrices=False)[2])


@pytest.mark.parametrize(
    "arguments", [((), ()), ((Euclidean(),), (1, 2)), ((Euclidean(),), (0,)), ((Euclidean(),), (1,), 0)]
)
def test_impossible_products_are_refused(arguments):
    with pytest.raises(ValueError, match="Product"):
        Product(*arguments)


@pytest.mark.parametrize("manifold", [Stiefel(), StiefelCanonical()])
def test_what_has_no_closed_form_says_so(manifold):
    x = manifold.random_point((4, 2), seeded())
    with pytest.raises(NotImplementedError, match=f"{manifold.name} has no closed logarithm"):
        manifold.log(x, x)
    with pytest.raises(NotImplementedError, match=f"{manifold.name} has no closed distance"):
        manifold.distance(x, x)


def test_random_points_are_uniform():
    """Haar measure: the mean is 0 and every entry has variance 1/d. QR without the sign rule fails here."""
    for manifold, shape in ((Stiefel(), (3, 3)), (Grassmann(), (4, 2)), (Rotations(), (3, 3)), (Sphere(), (4, 1))):
        x = manifold.random_point((20_000, *shape), seeded(), torch.float64)
        assert x.mean(dim=0).abs().max() < 0.02
        close(x.square().mean(dim=0), torch.full(shape, 1.0 / shape[0]), 0.02)
    columns = Oblique().random_point((20_000, 3, 2), seeded(), torch.float64)
    assert columns.mean(dim=0).abs().max() < 0.02
    wishart = SPD().random_point((20_000, 3, 3), seeded(), torch.float64)
    close(wishart.mean(dim=0), torch.eye(3, dtype=torch.float64), 0.02)
    assert SPD().violation(wishart).max() == 0


@pytest.mark.parametrize("manifold", [Stiefel(), Grassmann(), Rotations()], ids=lambda m: m.name)
def test_a_decomposition_that_fails_in_float32_is_done_in_float64(manifold, monkeypatch):
    """LAPACK's divide and conquer gives up on some matrices that are almost orthonormal (seen at 784 x 128)."""
    x = manifold.random_point((2, 4, 4), seeded(0)) + 0.01
    expected, svd, failed = manifold.nearest(x), torch.linalg.svd, []

    def failing(a, full_matrices=True):
        if a.dtype == torch.float32:
            failed.append(a)
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return svd(a, full_matrices=full_matrices)

    monkeypatch.setattr(torch.linalg, "svd", failing)
    found = manifold.nearest(x)
    assert failed
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(torch.func.vmap(manifold.nearest)(x), expected, rtol=0, atol=2e-6)
