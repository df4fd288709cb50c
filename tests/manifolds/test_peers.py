"""Agreement with pymanopt and geoopt where those are right, to 1e-13 in float64.

The same formulas are checked without them in ``test_formulas.py``, so nothing is lost where they are not installed.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from manifold_cases import seeded

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
    Sphere,
    SphereExponential,
    Stiefel,
    StiefelCanonical,
)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(name="pymanopt_manifolds")
def _pymanopt_manifolds():
    return pytest.importorskip("pymanopt.manifolds", reason="pymanopt is not installed")


@pytest.fixture(name="geoopt")
def _geoopt():
    return pytest.importorskip("geoopt", reason="geoopt is not installed")


def close(a, b, tolerance=1e-13):
    b = torch.as_tensor(np.asarray(b), dtype=torch.float64).reshape(a.shape)
    assert float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


def drawn(manifold, shape, length=0.5):
    x = manifold.random_point(shape, seeded(), torch.float64)
    g = torch.randn(shape, generator=seeded(1), dtype=torch.float64)
    u, v = (manifold.random_tangent(x, seeded(seed)) for seed in (2, 3))
    u, v = (length * t / manifold.inner(x, t, t).sqrt() for t in (u, v))
    return x, g, u, v


def compare_embedded(ours, theirs, shape):
    """Projection, gradient and metric; returns what was drawn."""
    x, g, u, v = drawn(ours, shape)
    point, ambient, a, b = (t.numpy() for t in (x, g, u, v))
    close(ours.project(x, g), theirs.projection(point, ambient))
    close(ours.riemannian_gradient(x, g), theirs.euclidean_to_riemannian_gradient(point, ambient))
    close(ours.inner(x, u, v), theirs.inner_product(point, a, b))
    assert ours.dimension(shape) == theirs.dim
    return x, u, v


def compare_closed_forms(ours, theirs, x, v):
    y = ours.exp(x, v)
    close(y, theirs.exp(x.numpy(), v.numpy()))
    close(ours.log(x, y), theirs.log(x.numpy(), y.numpy()))
    close(ours.distance(x, y), theirs.dist(x.numpy(), y.numpy()))


def test_stiefel_and_pymanopt(pymanopt_manifolds):
    for retraction, name in ((CholeskyQR(), "qr"), (HouseholderQR(), "qr"), (PolarNewtonSchulz(), "polar")):
        theirs = pymanopt_manifolds.Stiefel(7, 3, retraction=name)
        ours = Stiefel(retraction)
        x, _, v = compare_embedded(ours, theirs, (7, 3))
        close(ours.retract(x, v), theirs.retraction(x.numpy(), v.numpy()))
        close(ours.exp(x, v), theirs.exp(x.numpy(), v.numpy()))


def test_grassmann_and_pymanopt(pymanopt_manifolds):
    theirs = pymanopt_manifolds.Grassmann(7, 3)
    x, _, v = compare_embedded(Grassmann(), theirs, (7, 3))
    y = theirs.retraction(x.numpy(), v.numpy())
    close(Grassmann().retract(x, v) @ Grassmann().retract(x, v).T, y @ y.T)
    y = Grassmann().exp(x, v)
    close(y, theirs.exp(x.numpy(), v.numpy()))
    close(Grassmann().log(x, y), theirs.log(x.numpy(), y.numpy()))
    # Their distance takes the arc cosine of the singular values, which loses half the digits at small angles.
    close(Grassmann().distance(x, y), theirs.dist(x.numpy(), y.numpy()), 1e-12)


def test_sphere_and_oblique_and_pymanopt(pymanopt_manifolds):
    theirs = pymanopt_manifolds.Sphere(5, 2)
    x, _, v = compare_embedded(Sphere(), theirs, (5, 2))
    close(Sphere().retract(x, v), theirs.retraction(x.numpy(), v.numpy()))
    compare_closed_forms(Sphere(), theirs, x, v)
    close(Sphere(SphereExponential()).retract(x, v), theirs.exp(x.numpy(), v.numpy()))
    theirs = pymanopt_manifolds.Oblique(5, 3)
    x, _, v = compare_embedded(Oblique(), theirs, (5, 3))
    close(Oblique().retract(x, v), theirs.retraction(x.numpy(), v.numpy()))
    compare_closed_forms(Oblique(), theirs, x, v)


def test_spd_and_pymanopt(pymanopt_manifolds):
    theirs = pymanopt_manifolds.SymmetricPositiveDefinite(4)
    x, _, v = compare_embedded(SPD(), theirs, (4, 4))
    close(SPD().retract(x, v), theirs.retraction(x.numpy(), v.numpy()))
    compare_closed_forms(SPD(), theirs, x, v)


def test_rotations_and_pymanopt(pymanopt_manifolds):
    """Their tangents are the skew matrices X^T V, and their metric is the same."""
    for retraction, name in ((CholeskyQR(), "qr"), (PolarNewtonSchulz(), "polar")):
        ours, theirs = Rotations(retraction), pymanopt_manifolds.SpecialOrthogonalGroup(4, retraction=name)
        x, g, u, v = drawn(ours, (4, 4))
        point, a, b = x.numpy(), (x.T @ u).numpy(), (x.T @ v).numpy()
        close(x.T @ ours.project(x, g), theirs.projection(point, g.numpy()))
        close(x.T @ ours.riemannian_gradient(x, g), theirs.euclidean_to_riemannian_gradient(point, g.numpy()))
        close(ours.inner(x, u, v), theirs.inner_product(point, a, b))
        close(ours.retract(x, v), theirs.retraction(point, b))
        y = ours.exp(x, v)
        close(y, theirs.exp(point, b))
        close(x.T @ ours.log(x, y), theirs.log(point, y.numpy()))
        close(ours.distance(x, y), theirs.dist(point, y.numpy()))
        assert ours.dimension((4, 4)) == theirs.dim


def test_stiefel_and_geoopt(geoopt):
    theirs, ours = geoopt.EuclideanStiefel(), Stiefel()
    x, g, u, v = drawn(ours, (7, 3))
    close(ours.project(x, g), theirs.proju(x, g))
    close(ours.riemannian_gradient(x, g), theirs.egrad2rgrad(x, g))
    close(ours.retract(x, v), theirs.retr(x, v))
    close(ours.inner(x, u, v), theirs.inner(x, u, v).sum())
    y = ours.retract(x, v)
    close(ours.transport(x, y, u), theirs.transp(x, y, u))


def test_canonical_stiefel_and_geoopt(geoopt):
    theirs, ours = geoopt.CanonicalStiefel(), StiefelCanonical()
    x, g, u, v = drawn(ours, (7, 3))
    close(ours.riemannian_gradient(x, g), theirs.egrad2rgrad(x, g))
    close(ours.inner(x, u, v), theirs.inner(x, u, v).reshape(-1)[0])
    # Their step is the Cayley transform of V X^T - X V^T without the factor P: ours of the tangent that this means.
    skew = v @ x.T - x @ v.T
    identity = torch.eye(7, dtype=torch.float64)
    expected = torch.linalg.solve(identity - 0.5 * skew, (identity + 0.5 * skew) @ x)
    close(Cayley()(x, skew @ x), expected)


def test_sphere_and_geoopt(geoopt):
    theirs, ours = geoopt.Sphere(), Sphere()
    x, g, u, v = drawn(ours, (5, 1))
    flat = [t[:, 0] for t in (x, g, u, v)]
    close(ours.project(x, g)[:, 0], theirs.proju(flat[0], flat[1]))
    close(ours.retract(x, v)[:, 0], theirs.retr(flat[0], flat[3]))
    close(ours.exp(x, v)[:, 0], theirs.expmap(flat[0], flat[3]))
    y = ours.exp(x, v)
    close(ours.log(x, y)[:, 0], theirs.logmap(flat[0], y[:, 0]), 1e-12)


def test_spd_and_geoopt(geoopt):
    theirs, ours = geoopt.SymmetricPositiveDefinite(), SPD()
    x, g, u, v = drawn(ours, (4, 4))
    close(ours.project(x, g), theirs.proju(x, g))
    close(ours.riemannian_gradient(x, g), theirs.egrad2rgrad(x, g))
    close(ours.inner(x, u, v), theirs.inner(x, u, v))
    close(ours.exp(x, v), theirs.expmap(x, v))
    y = ours.exp(x, v)
    close(ours.log(x, y), theirs.logmap(x, y))
    close(ours.distance(x, y), theirs.dist(x, y))
    close(ours.retract(x, v), theirs.retr(x, v))
    close(ours.transport(x, y, u), theirs.transp(x, y, u))


def test_geodesics_of_both_metrics_differ():
    """What tells the two apart, without any peer: off the fibre the geodesics agree to first order only."""
    x, _, _, v = drawn(Stiefel(), (7, 3))
    gap = (Geodesic("embedded")(x, v) - Geodesic("canonical")(x, v)).abs().max()
    assert gap > 1e-3
