"""All parameters of a run as one point of one product manifold: lengths, distances, curvature, geodesic steps.

Methods that choose their own step take one scalar for the whole run, as their papers do on products: the squared length
of a tangent is the sum over all matrices of all parameters, and so is the squared distance of two points. (So a run is
what one state belongs to: several runs side by side are a ``vmap``, not :meth:`Geometry.stacked`.)

*Curvature*, from below: SPD with the affine-invariant metric has -1/2, since the curvature of the plane of two
orthonormal symmetric X, Y at the identity is -|[X, Y]|_F^2 / 4; Stiefel with the embedded metric has -1/2, with the
canonical one 0 (Zimmermann and Stoye, "High curvature means low rank", 2024, arXiv 2403.01879); all others here have 0.

*Distance* on Stiefel has no closed form. The chord |X - Y|_F stands for it, divided by sqrt(2) in the canonical metric:
a lower bound, because no curve is shorter than the straight line and the canonical length of a tangent is at least its
embedded length over sqrt(2). It is exact to second order for near points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from subspace_meta.geometry import Geometry
from subspace_meta.manifolds import (
    SPD,
    Geodesic,
    Grassmann,
    Manifold,
    Oblique,
    Product,
    SPDExponential,
    Sphere,
    SphereExponential,
    Stiefel,
    StiefelCanonical,
)
from subspace_meta.manifolds.base import MATRIX, gram, power_of_two, spectral_bound
from subspace_meta.manifolds.oblique import COLUMN
from subspace_meta.optimizers.base import ORTHONORMAL, retract_all

QUARTER = 0.5 * math.pi

# The exponential maps; each shortens steps beyond its ``max_norm``, where a length has no meaning any more.
_SPHERE = SphereExponential()
_SPD = SPDExponential()
_EMBEDDED, _CANONICAL = Geodesic("embedded"), Geodesic("canonical")
_GRASSMANN = _CANONICAL.on_grassmann()


def exponential(manifold: Manifold, x: Tensor, v: Tensor) -> Tensor:
    """Return the geodesic's point at time 1; by the manifold's own retraction where no exponential map is known.

    Steps are shortened to half a turn on spheres and for orthonormal columns, a quarter of one for subspaces, and
    |E|_2 = 5 (factors of 148) on SPD.
    """
    if isinstance(manifold, Product):
        points, tangents = (torch.split(z, list(manifold.sizes), dim=manifold.axis) for z in (x, v))
        return torch.cat(list(map(exponential, manifold.factors, points, tangents)), dim=manifold.axis)
    if isinstance(manifold, Sphere | Oblique):
        return _SPHERE(x, v, MATRIX if isinstance(manifold, Sphere) else COLUMN)
    if isinstance(manifold, SPD):
        return _SPD(x, v)
    if isinstance(manifold, StiefelCanonical):
        return _CANONICAL(x, v)
    if isinstance(manifold, Grassmann):
        return _GRASSMANN(x, v)
    return _EMBEDDED(x, v) if isinstance(manifold, ORTHONORMAL) else manifold.retract(x, v)


def _share(manifold: Manifold, x: Tensor, v: Tensor) -> Tensor:
    """Return how long a tangent is, the longest of a batch, where 1 is half of what :func:`exponential` shortens to."""
    if isinstance(manifold, Product):
        points, tangents = (torch.split(z, list(manifold.sizes), dim=manifold.axis) for z in (x, v))
        return torch.stack(list(map(_share, manifold.factors, points, tangents))).amax()
    if isinstance(manifold, Sphere | Oblique):
        return torch.linalg.vector_norm(v, dim=MATRIX if isinstance(manifold, Sphere) else COLUMN).amax() / QUARTER
    if isinstance(manifold, SPD):
        return manifold.norm(x, v).amax() / (0.5 * _SPD.max_norm)
    if isinstance(manifold, ORTHONORMAL):
        scale = power_of_two(v)
        longest = (spectral_bound(gram(v / scale)).sqrt() * scale).amax()
        return longest / (0.5 * QUARTER if isinstance(manifold, Grassmann) else QUARTER)
    return v.new_zeros(())


def shortening(geometry: Geometry, points: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor:
    """Return the factor, at most 1, by which a step of the whole run ends half-way to where geodesics come back.

    That is a quarter turn on spheres and for orthonormal columns, an eighth for subspaces, |E| = 2.5 on SPD. Twice as
    far, gradients say nothing about curvature: from a point to its antipode those of an even loss do not change.
    """
    shares = [_share(g.manifold, x, v.detach()) for g, x, v in zip(geometry.groups, points, tangents, strict=True)]
    longest = torch.stack([share.to(shares[0].dtype) for share in shares]).amax()
    # What is not finite is for others to notice.
    return torch.where(longest > 1.0, 1.0 / longest.clamp(min=1.0), 1.0)


def move(geometry: Geometry, points: Sequence[Tensor], tangents: Sequence[Tensor], geodesic: bool) -> list[Tensor]:
    """Step along every group's tangent, by the exponential map or by the group's own retraction."""
    if not geodesic:
        return retract_all(geometry, points, tangents)
    return [exponential(g.manifold, x, v) for g, x, v in zip(geometry.groups, points, tangents, strict=True)]


def inner(geometry: Geometry, points: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor]) -> Tensor:
    """Return the inner product of two tangents in the product metric, a scalar of the first group's type."""
    groups = zip(geometry.groups, points, u, v, strict=True)
    parts = [group.manifold.inner(x, a, b).sum() for group, x, a, b in groups]
    return torch.stack([part.to(parts[0].dtype) for part in parts]).sum()


def curvature_bound(manifold: Manifold) -> float:
    """Return a lower bound of the sectional curvature, at most 0; of a manifold from elsewhere 0."""
    if isinstance(manifold, Product):
        return min(map(curvature_bound, manifold.factors))
    return -0.5 if isinstance(manifold, SPD | Stiefel) else 0.0


def has_distance(manifold: Manifold) -> bool:
    """Return whether :func:`squared_distance` knows ``manifold``."""
    if isinstance(manifold, Product):
        return all(map(has_distance, manifold.factors))
    return isinstance(manifold, Stiefel | StiefelCanonical) or manifold.has_distance


def squared_distance(manifold: Manifold, x: Tensor, y: Tensor) -> Tensor:
    """Return the squared distance, on Stiefel the squared lower bound of the module's text, of shape ``(...)``."""
    if isinstance(manifold, Product):
        starts, ends = (torch.split(z, list(manifold.sizes), dim=manifold.axis) for z in (x, y))
        parts = map(squared_distance, manifold.factors, starts, ends)
        return torch.stack(list(parts)).sum(dim=0)
    if isinstance(manifold, Stiefel | StiefelCanonical):
        squared = (x - y).square().sum(dim=(-2, -1))
        return squared if isinstance(manifold, Stiefel) else 0.5 * squared
    return manifold.squared_distance(x, y)


def distance(geometry: Geometry, starts: Sequence[Tensor], points: Sequence[Tensor]) -> Tensor:
    """Return the distance of two points of the product manifold, a scalar: a constant for every derivative.

    Where it decomposes matrices it has no derivative at equal points, where every run starts. NaN where a point is not
    finite (and nothing raises).
    """
    total = None
    for group, x, y in zip(geometry.groups, starts, points, strict=True):
        x, y = x.detach(), y.detach()
        finite = torch.isfinite(y).all(dim=-1).all(dim=-1)
        squared = squared_distance(group.manifold, x, torch.where(finite[..., None, None], y, x))
        part = torch.where(finite, squared, math.nan).sum()
        total = part if total is None else total + part.to(total.dtype)
    assert total is not None
    return total.sqrt()
