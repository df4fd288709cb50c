"""The unit sphere {X in R^{d x p} : |X|_F = 1}, and the sphere's formulas along chosen dimensions.

A sphere of vectors is p = 1; a matrix with a unit sphere in every column is :class:`~subspace_meta.manifolds.Oblique`.
Everything is in closed form and costs O(dp). Source: Absil, Mahony, Sepulchre, "Optimization Algorithms on Matrix
Manifolds", 2008, examples 3.5.1, 4.1.1, 5.4.1 and 8.1.1.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from subspace_meta._tracing import known_true
from subspace_meta.manifolds.base import (
    MATRIX,
    Manifold,
    embedded_inner,
    root,
    without_huge,
    without_rounding,
)


def dot(u: Tensor, v: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Return the inner product along ``dim``, kept as dimensions of size one."""
    return (u * v).sum(dim=dim, keepdim=True)


def normalized(y: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Return Y divided by its norm along ``dim``."""
    return y * dot(y, y, dim).rsqrt()


def cosine_and_sinc(q: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos(t) and sin(t)/t of t = sqrt(q) >= 0, smooth in q at 0.

    Below q = 1 by their power series (relative error below 1e-19 with ten terms), above by the functions themselves.
    """
    near = q < 1.0
    small = torch.where(near, q, 0.0)
    root = torch.where(near, 1.0, q).sqrt()
    cosine = torch.ones_like(q)
    sinc = torch.ones_like(q)
    for k in range(10, 0, -1):
        cosine = 1.0 - cosine * small / ((2 * k - 1) * (2 * k))
        sinc = 1.0 - sinc * small / ((2 * k) * (2 * k + 1))
    return torch.where(near, cosine, root.cos()), torch.where(near, sinc, root.sin() / root)


class SphereRetraction(abc.ABC):
    """The contract of a retraction on unit spheres along chosen dimensions: a frozen value object with one method."""

    order: float = 1

    @abc.abstractmethod
    def __call__(self, x: Tensor, v: Tensor, dim: tuple[int, ...]) -> Tensor:
        """Retract the tangent ``v`` at ``x``, both ``(..., d, p)``; the spheres extend along ``dim``."""


@dataclass(frozen=True)
class Normalization(SphereRetraction):
    """(X + V) / |X + V|. Order 2. Corrects itself, and needs no bound: |X + V| >= 1."""

    order = 2

    def __call__(self, x: Tensor, v: Tensor, dim: tuple[int, ...]) -> Tensor:
        """Return the normalised sum."""
        v, _ = without_huge(v.to(x.dtype), lambda step: dot(step, step, dim), dim)
        return normalized(x + v, dim)


@dataclass(frozen=True)
class SphereExponential(SphereRetraction):
    """cos|V| X + sin|V| V/|V|, normalised at the end.

    Steps longer than ``max_norm`` are shortened to it. The default pi is the way to the antipode: a longer step would
    go round, and from |V| = 1/eps on its end would be a matter of rounding.

    Raises:
        ValueError: ``max_norm`` is not in (0, pi].
    """

    max_norm: float = math.pi
    order = math.inf

    def __post_init__(self) -> None:
        if not 0.0 < self.max_norm <= math.pi:
            raise ValueError(
                f"max_norm must be in (0, pi], beyond which a great circle comes back; got {self.max_norm}"
            )

    def __call__(self, x: Tensor, v: Tensor, dim: tuple[int, ...]) -> Tensor:
        """Return the geodesic's point at time 1."""
        v, squared = without_huge(v.to(x.dtype), lambda step: dot(step, step, dim), dim)
        limit = self.max_norm**2
        return great_circle(x, v * (limit / squared.clamp(min=limit)).sqrt(), dim)


def great_circle(x: Tensor, v: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Return cos|V| X + sin|V| V/|V|, polished by normalisation."""
    cosine, sinc = cosine_and_sinc(dot(v, v, dim))
    return normalized(cosine * x + sinc * v, dim)


def sphere_projection(x: Tensor, v: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Return V - <X, V> X along ``dim``, in the type of ``x``."""
    v = v.to(x.dtype)
    return v - x * dot(x, v, dim)


def parallel_transport(x: Tensor, y: Tensor, v: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Carry the tangent ``v`` along the shortest great circle to ``y``: V - <Y, V> (X + Y) / (1 + <X, Y>).

    Isometric to rounding up to the antipode, where 1 + <X, Y> cancels: with D = X - Y and the part S of X + Y normal to
    D it is the reflection V - 2 <S, V> S / |S|^2. The circle is not unique for Y = -X; there ``v`` stays, one limit.
    """
    v = v.to(x.dtype)
    total = x + y
    opening = 1.0 + dot(x, y, dim)
    near = opening > 0.5  # far from 0, where dividing by it loses nothing
    by_sum = v - total * (dot(y, v, dim) / torch.where(near, opening, 1.0))
    if known_true(near):
        return by_sum
    across = x - y
    # |X| and |Y| differ by rounding, which X + Y may be no larger than.
    middle = total - across * (dot(across, total, dim) / torch.where(near, 1.0, dot(across, across, dim)))
    # The smallest normal number stands for 0 / 0 at Y = -X.
    squared = torch.where(near, 1.0, dot(middle, middle, dim).clamp(min=torch.finfo(x.dtype).tiny))
    tangent = sphere_projection(x, v, dim)
    return torch.where(near, by_sum, tangent - middle * (2.0 * dot(middle, tangent, dim) / squared))


def sphere_log(x: Tensor, y: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Return (t / sin t) (Y - cos(t) X) with cos t = <X, Y>; smooth at Y = X. At Y = -X: one of the shortest."""
    cosine = dot(x, y, dim)
    # The part of Y normal to X, from whichever of Y - X and Y + X is small and hence exact.
    normal = sphere_projection(x, torch.where(cosine < 0, y + x, y - x), dim)
    q = dot(normal, normal, dim)
    # q is the squared sine of an angle, so the switch to the series is no scale of the data.
    near = (q < 1e-4) & (cosine > 0)
    small = torch.where(near, q, 0.0)
    # asin(s)/s = 1 + q/6 + 3q^2/40 + 5q^3/112 + 35q^4/1152 + ..., q = s^2.
    series = 1.0 + small * (1 / 6 + small * (3 / 40 + small * (5 / 112 + small * (35 / 1152))))
    opposite = (q == 0) & (cosine < 0)
    sine = torch.where(near | opposite, 1.0, q).sqrt()
    log = normal * torch.where(near, series, torch.atan2(sine, cosine) / sine)
    return torch.where(opposite, math.pi * _some_direction(x, dim), log)


def _some_direction(x: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Return a unit tangent at ``x``: of the first two axes the one that is farther from ``x``, projected."""
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    columns = slice(0, 1 if -1 in dim else None)
    first[..., 0, columns] = 1.0
    if x.shape[-2] > 1:
        second[..., 1, columns] = 1.0
    else:
        second[..., 0, 1] = 1.0
    axis = torch.where(dot(first, x, dim).abs() < 0.8, first, second)
    return normalized(axis - x * dot(axis, x, dim), dim)


# t^2 = q + q^2/12 + q^3/90 + ... for q = (2 sin(t/2))^2: the coefficients 2 / (k^2 binom(2k, k)). Ten terms are exact
# to 1e-18 below q = 0.1.
_SQUARED_ANGLE = tuple(2.0 / (k * k * math.comb(2 * k, k)) for k in range(1, 11))


def squared_angle(x: Tensor, y: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Return the squared angle between ``x`` and ``y`` along ``dim``, (2 atan2(|Y - X|, |Y + X|))^2.

    Accurate for small angles and for those near pi alike; smooth at equal points, with the right derivatives.
    """
    apart, between = y - x, y + x
    q = dot(apart, apart, dim)
    near = q < 0.1
    small = torch.where(near, q, 0.0)
    series = torch.zeros_like(small)
    for coefficient in reversed(_SQUARED_ANGLE):
        series = small * (coefficient + series)
    # Both lengths are away from 0 where the angle is large, but for the sum at the antipode.
    chord = torch.where(near, 1.0, q).sqrt()
    far = (2.0 * torch.atan2(chord, root(dot(between, between, dim)))).square()
    return torch.where(near, series, far)


def nearest_unit(x: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Return X / |X| along ``dim``. Zero is equally far from every point: it goes to the first basis vector."""
    first = torch.zeros_like(x)
    first[..., 0, : (1 if -1 in dim else None)] = 1.0
    # Dividing by the largest entry first keeps the squares of tiny and of huge entries in range.
    largest = x.abs().amax(dim=dim, keepdim=True)
    scaled = torch.where(largest == 0, first, x / torch.where(largest == 0, 1.0, largest))
    return normalized(scaled, dim)


def unit_error(x: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Return the largest | |X|^2 - 1 | / 2, the distance from the sphere to first order, of shape ``(...)``."""
    return 0.5 * (dot(x, x, dim) - 1.0).abs().amax(dim=MATRIX)


@dataclass(frozen=True)
class Sphere(Manifold):
    """Matrices of unit Frobenius norm, metric <u, v> = tr(u^T v). Parallel transport: isometric."""

    retraction: SphereRetraction = Normalization()

    @property
    def retraction_order(self) -> float:
        """The retraction's order."""
        return self.retraction.order

    @property
    def isometric_transport(self) -> bool:
        """True."""
        return True

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise ``ValueError`` unless there are at least two entries."""
        if len(shape) < 2 or math.prod(shape[-2:]) < 2:
            raise ValueError(f"Sphere needs matrices of shape (..., d, p) with dp >= 2, got {tuple(shape)}")

    def dimension(self, shape: tuple[int, ...]) -> int:
        """Return dp - 1 per matrix."""
        return math.prod(shape) - math.prod(shape[:-2])

    def project(self, x: Tensor, v: Tensor) -> Tensor:
        """Return V - tr(X^T V) X."""
        return sphere_projection(x, v, MATRIX)

    def riemannian_gradient(self, x: Tensor, euclidean_gradient: Tensor) -> Tensor:
        """Return G - tr(X^T G) X."""
        return without_rounding(sphere_projection(x, euclidean_gradient, MATRIX), euclidean_gradient)

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Return tr(U^T V)."""
        return embedded_inner(x, u, v)

    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        """Apply the chosen retraction."""
        return self.retraction(x, v, MATRIX)

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Carry ``v`` along the shortest great circle."""
        return parallel_transport(x, y, v, MATRIX)

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        """Follow the great circle."""
        return great_circle(x, v.to(x.dtype), MATRIX)

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the shortest tangent to ``y``; at the antipode one of the shortest."""
        return sphere_log(x, y, MATRIX)

    def squared_distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the squared angle between ``x`` and ``y``."""
        return squared_angle(x, y, MATRIX)[..., 0, 0]

    def nearest(self, x: Tensor) -> Tensor:
        """Return X / |X|; zero goes to the first basis matrix."""
        self.check_shape(x.shape)
        return nearest_unit(x, MATRIX)

    def random_point(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw from the uniform distribution."""
        self.check_shape(shape)
        return normalized(torch.randn(shape, generator=generator, dtype=dtype, device=device), MATRIX)

    def violation(self, x: Tensor) -> Tensor:
        """Return | |X|^2 - 1 | / 2."""
        return unit_error(x, MATRIX)
