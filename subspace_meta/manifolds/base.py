"""The contract that every manifold keeps, and the few linear-algebra words that all of them use.

A manifold is a frozen, hashable value object: it holds settings (its retraction, say) and no tensors. Its methods are
pure functions of tensors whose last two dimensions are the matrix, ``(..., d, p)``; leading dimensions are a batch.
They work under ``torch.func.grad``, ``vmap`` and ``torch.compile(fullgraph=True)``, and never look at values: no data
dependent branch, no exception about numbers. Shapes are checked once, by :meth:`Manifold.check_shape`.

Points are float32 or float64. Tangents and gradients may come in a shorter type (bfloat16): every method brings them to
the point's type first, and answers in it.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable

import torch
from torch import Tensor

from subspace_meta._tracing import known_true, values_at_hand

# The dimensions of a matrix, for what works along chosen ones.
MATRIX = (-2, -1)


class Manifold(abc.ABC):
    """A matrix manifold embedded in R^{d x p} (the contract; see the module's text).

    Subclasses are frozen dataclasses and final. ``x`` is a point, ``u`` and ``v`` are tangent vectors at ``x``, all of
    shape ``(..., d, p)``.
    """

    @property
    def name(self) -> str:
        """The field's name of the manifold, as printed in tables."""
        return type(self).__name__

    @property
    def vectors(self) -> str:
        """What the columns of a point are, in a word: "orthonormal", "unit"; empty where they are nothing special."""
        return ""

    @property
    def retraction_order(self) -> float:
        """The proven order of :meth:`retract`: the largest k with dist(R_x(tv), Exp_x(tv)) = O(t^(k+1)).

        ``math.inf`` for the exponential map itself.
        """
        return 1

    @property
    def isometric_transport(self) -> bool:
        """Whether :meth:`transport` keeps inner products."""
        return False

    @property
    def has_distance(self) -> bool:
        """Whether there is a :meth:`distance`."""
        mine = type(self)
        return mine.distance is not Manifold.distance or mine.squared_distance is not Manifold.squared_distance

    @abc.abstractmethod
    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise ``ValueError`` naming ``shape`` and what would be right, if points cannot have that shape."""

    @abc.abstractmethod
    def dimension(self, shape: tuple[int, ...]) -> int:
        """Return the dimension of the manifold of points of shape ``(..., d, p)``, summed over the batch."""

    @abc.abstractmethod
    def project(self, x: Tensor, v: Tensor) -> Tensor:
        """Project an ambient ``v`` on the tangent space at ``x``, orthogonally in the manifold's metric."""

    @abc.abstractmethod
    def riemannian_gradient(self, x: Tensor, euclidean_gradient: Tensor) -> Tensor:
        """Turn the Euclidean gradient at ``x`` into the Riemannian one: <grad, v>_x = tr(G^T v) for tangent v."""

    @abc.abstractmethod
    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Return the metric <u, v>_x, of shape ``(...)``."""

    @abc.abstractmethod
    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        """Move from ``x`` along the tangent ``v`` and come back to the manifold."""

    @abc.abstractmethod
    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Carry the tangent ``v`` at ``x`` to the tangent space at ``y``. Linear in ``v``."""

    @abc.abstractmethod
    def nearest(self, x: Tensor) -> Tensor:
        """Return the nearest point (Frobenius norm) to an ambient ``x``. Used at set-up; its derivative is not.

        Raises:
            ValueError: points cannot have that shape.
        """

    @abc.abstractmethod
    def random_point(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw a random point of shape ``(..., d, p)``; uniform where the manifold is compact.

        Raises:
            ValueError: points cannot have that shape.
        """

    @abc.abstractmethod
    def violation(self, x: Tensor) -> Tensor:
        """Return the largest absolute constraint error of ``x``, of shape ``(...)``; 0 on the manifold."""

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        """Follow the geodesic from ``x`` with velocity ``v`` for unit time, however long that is.

        Raises:
            NotImplementedError: no closed form is known or implemented; use :meth:`retract`.
        """
        raise NotImplementedError(f"{self.name} has no closed exponential here; use retract")

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        """Invert :meth:`exp`: the shortest tangent at ``x`` that leads to ``y``.

        Raises:
            NotImplementedError: no closed form is known or implemented.
        """
        raise NotImplementedError(f"{self.name} has no closed logarithm here")

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the geodesic distance, of shape ``(...)``. Its derivative at equal points, where it has none, is 0.

        Raises:
            NotImplementedError: no closed form is known or implemented.
        """
        return root(self.squared_distance(x, y))

    def squared_distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the squared geodesic distance, ``(...)``: smooth at equal points, its Hessian is twice the metric.

        A manifold that has :meth:`distance` only gives its square, which is not.

        Raises:
            NotImplementedError: no closed form is known or implemented.
        """
        if type(self).distance is Manifold.distance:
            raise NotImplementedError(f"{self.name} has no closed distance here")
        return self.distance(x, y).square()

    def norm(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the length of ``v`` in the metric, of shape ``(...)``; its derivative at 0 is 0.

        No square overflows or vanishes while the entries do not.
        """
        v = v.to(x.dtype)
        scale = power_of_two(v)
        return root(self.inner(x, v / scale, v / scale)) * scale[..., 0, 0]

    def random_tangent(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw a tangent vector at ``x``: the projection of a standard normal matrix."""
        return self.project(x, normal_like(x, generator))

    def coordinates(self, x: Tensor, v: Tensor) -> Tensor:
        """Return ``v`` in coordinates in which the metric at ``x`` is Euclidean; there statistics are taken.

        The identity for every embedded metric.
        """
        return v.to(x.dtype)

    def from_coordinates(self, x: Tensor, v: Tensor) -> Tensor:
        """Invert :meth:`coordinates`. The result need not be tangent: project it."""
        return v.to(x.dtype)


# Far above every bound of a retraction, and below where squares of squares overflow in float32.
_HUGE = 2.0**28


def without_huge(
    v: Tensor, squares: Callable[[Tensor], Tensor], dim: tuple[int, ...] = MATRIX
) -> tuple[Tensor, Tensor]:
    """Return V and ``squares(V)``; a step so long that these may overflow is brought to the length 2^28 along ``dim``.

    Every bound shortens it further, and its direction is all that counts; so the factor is a constant.
    """
    if values_at_hand(v):
        squared = squares(v)
        if known_true(squared < _HUGE * _HUGE):
            return v, squared
    norm = torch.linalg.vector_norm(v.detach(), dim=dim, keepdim=True, dtype=torch.float64)
    v = v * (_HUGE / norm.clamp(min=_HUGE)).to(v.dtype)
    return v, squares(v)


def normal_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw independent standard normal entries in the shape, type and place of ``x``."""
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def symmetric_part(a: Tensor) -> Tensor:
    """Return (A + A^T) / 2 of a ``(..., p, p)`` tensor."""
    return 0.5 * (a + a.mT)


def skew_part(a: Tensor) -> Tensor:
    """Return (A - A^T) / 2 of a ``(..., p, p)`` tensor."""
    return 0.5 * (a - a.mT)


def identity_like(a: Tensor) -> Tensor:
    """Return the p x p identity in the type and place of a ``(..., d, p)`` tensor."""
    return torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)


def euclidean_inner(u: Tensor, v: Tensor) -> Tensor:
    """Return tr(U^T V) of ``(..., d, p)`` tensors of one type, of shape ``(...)``, without a temporary."""
    inner: Tensor = torch.linalg.vecdot(u.flatten(-2), v.flatten(-2))
    return inner


def embedded_inner(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Return tr(U^T V) in the type of the point ``x``: the metric of every embedded manifold."""
    return euclidean_inner(u.to(x.dtype), v.to(x.dtype))


# A Riemannian gradient smaller than this many units of rounding of the Euclidean one points anywhere.
ROUNDING_UNITS = 64.0


def without_rounding(gradient: Tensor, euclidean_gradient: Tensor) -> Tensor:
    """Return a projected gradient, or 0 for matrices in which the projection left rounding errors only.

    Where the Euclidean gradient is normal to the manifold the exact result is 0; what is computed is about eps times
    its size, points anywhere, is not even tangent, and would become a step of any length in an optimizer that divides
    by the gradient's size. Sizes are Frobenius norms; two passes over the inputs, nothing is copied.
    """

    whole, rest = euclidean_gradient.to(gradient.dtype), gradient
    threshold = (ROUNDING_UNITS * torch.finfo(gradient.dtype).eps) ** 2
    squared = euclidean_inner(rest, rest)
    # The usual way out. What follows gives the same, and is exact where squares overflow or vanish, too.
    if known_true(squared > threshold * euclidean_inner(whole, whole)):
        return gradient
    scale = 1.0 / power_of_two(whole)
    whole, rest = whole * scale, rest * scale
    size = euclidean_inner(whole, whole)
    # A gradient that is not finite goes on as it is.
    lost = (euclidean_inner(rest, rest) <= threshold * size) & torch.isfinite(size)
    return torch.where(lost[..., None, None], torch.zeros_like(gradient), gradient)


def power_of_two(a: Tensor) -> Tensor:
    """Return the power of two up to the largest absolute entry, a constant ``(..., 1, 1)``: dividing by it is exact.

    1 for a matrix that is 0; 1/4 of the largest power, at most, so that its inverse is a normal number.
    """
    largest = a.detach().abs().amax(dim=(-2, -1), keepdim=True)
    exponent = torch.where(largest == 0, 1.0, largest).log2().floor()
    top = math.floor(math.log2(torch.finfo(a.dtype).max))
    return torch.exp2(exponent.clamp(-top + 1, top - 2))


def subtract_product(v: Tensor, x: Tensor, a: Tensor, factor: float = 1.0) -> Tensor:
    """Return V - factor X A for ``(..., d, p)`` V and X; the large product is accumulated in place for one matrix."""
    if v.ndim == 2 and x.ndim == 2:
        return torch.addmm(v, x, a, alpha=-factor)
    return v - x @ (factor * a)


def root(squares: Tensor) -> Tensor:
    """Return the square root of what is not negative, with derivative 0 at 0."""
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0 * squares)


def trace(a: Tensor) -> Tensor:
    """Return the trace of a ``(..., p, p)`` tensor, of shape ``(...)``."""
    return torch.diagonal(a, dim1=-2, dim2=-1).sum(dim=-1)


# Below this many columns one product is faster than four smaller ones (measured on one core: 256).
_BLOCKED_FROM = 256


def column_blocks(p: int) -> list[tuple[int, int]]:
    """Return start and end of the blocks in which wide triangular products are done: up to four, or one."""
    width = p if p < _BLOCKED_FROM else 64 * -(-p // 256)
    return [(start, min(start + width, p)) for start in range(0, p, width)]


def gram(y: Tensor) -> Tensor:
    """Return Y^T Y of a ``(..., d, p)`` tensor; for wide p only blocks on and below the diagonal are multiplied.

    2dp^2 flops, from 256 columns on 5/4 dp^2.
    """
    blocks = column_blocks(y.shape[-1])
    if len(blocks) == 1:
        return y.mT @ y
    lower = [y[..., start:end].mT @ y[..., :end] for start, end in blocks]
    rows = []
    for i, row in enumerate(lower):
        above = [lower[j][..., blocks[i][0] : blocks[i][1]].mT for j in range(i + 1, len(blocks))]
        rows.append(torch.cat([row, *above], dim=-1))
    return torch.cat(rows, dim=-2)


def divide_by_lower(y: Tensor, factor: Tensor) -> Tensor:
    """Return Y L^{-T} of a ``(..., d, p)`` tensor and a lower triangular one; dp^2 flops, 5/4 of that from 256 columns.

    Substitution by blocks of columns: Q_j = (Y_j - sum_{i<j} Q_i L_ji^T) L_jj^{-T}. Small inverses and products of tall
    matrices with small ones: a solve with a tall side takes up to twice as long.
    """
    blocks = column_blocks(y.shape[-1])
    columns: list[Tensor] = []
    for start, end in blocks:
        corner = factor[..., start:end, start:end].mT
        rest = y[..., start:end]
        for (first, last), q in zip(blocks, columns, strict=False):
            rest = subtract_product(rest, q, factor[..., start:end, first:last].mT)
        columns.append(rest @ torch.linalg.solve_triangular(corner, identity_like(corner), upper=True))
    return torch.cat(columns, dim=-1) if len(columns) > 1 else columns[0]


def _differentiated(a: Tensor) -> bool:
    """Return whether a plain tensor carries derivatives, in reverse or in forward mode."""
    dual = torch.autograd.forward_ad.unpack_dual(a)  # type: ignore[no-untyped-call]
    return a.requires_grad or dual.tangent is not None


def squared_angles(squared_sines: Tensor, angles: Tensor) -> Tensor:
    """Return sum t_i^2 with right first and second derivatives, shape ``(...)``, though it takes a decomposition.

    ``squared_sines`` is a symmetric S, ``(..., p, p)``, with eigenvalues sin(t_i)^2; ``angles`` are its t_i in
    [0, pi/2], ascending, by whatever way is most accurate. With E = U^T (S - S_0) U in the eigenbasis of the constant
    S_0 = S, so E = 0 but for its derivatives, and f(q) = asin(sqrt q)^2,

        tr f(S) = sum_i t_i^2 + sum_i f'_i E_ii + sum_ij f'[q_i, q_j] E_ij^2 / 2 + O(E^3),

    with divided differences f'[.,.] (Daleckii and Krein 1965; Higham, "Functions of Matrices", 2008, theorem 3.11):
    no eigenvalue gap is divided by. Derivatives of third order are not right, and at t = pi/2 none exists.
    """
    t = angles.detach()
    if values_at_hand(squared_sines) and not _differentiated(squared_sines):
        return t.square().sum(dim=-1)
    eps = torch.finfo(t.dtype).eps
    constant = squared_sines.detach()
    basis = torch.linalg.eigh(constant).eigenvectors
    e = basis.mT @ (squared_sines - constant) @ basis
    # f' = 2t / sin 2t. The floors keep what does not exist at pi/2 finite.
    slope = 1.0 / torch.sinc(2.0 / math.pi * t).clamp(min=eps)
    ti, tj = t[..., :, None], t[..., None, :]
    middle = 0.5 * (ti + tj)
    # f'' = (2 sin 2t - 4t cos 2t) / sin(2t)^3; near 0 by its series, sum_n 4^n (n-1) q^(n-2) / (2n binom(2n, n)).
    q = middle.sin().square()
    series = torch.zeros_like(q)
    for n in range(16, 1, -1):
        series = series * q + 4**n * (n - 1) / (2 * n * math.comb(2 * n, n))
    wide = torch.where(q < 0.1, 0.5, middle)
    sine = (2.0 * wide).sin()
    curvature = torch.where(q < 0.1, series, (2.0 * sine - 4.0 * wide * (2.0 * wide).cos()) / sine.clamp(min=eps) ** 3)
    # sin(s)^2 - sin(t)^2 = sin(s + t) sin(s - t); at angles this close the middle's f'' errs less than a difference.
    close = (ti - tj).abs() < eps ** (1 / 3)
    gap = (ti + tj).sin() * (ti - tj).sin()
    ratio = (slope[..., :, None] - slope[..., None, :]) / torch.where(close | (gap == 0), 1.0, gap)
    divided = torch.where(close, curvature, ratio)
    first = (slope * torch.diagonal(e, dim1=-2, dim2=-1)).sum(dim=-1)
    value: Tensor = t.square().sum(dim=-1) + first + 0.5 * (divided * e.square()).sum(dim=(-2, -1))
    return value


def root_at(value: Tensor, squared: Tensor) -> Tensor:
    """Return ``value`` with the first and second derivatives of the root of ``squared`` = value^2; 0 at 0."""
    value = value.detach()
    safe = torch.where(value == 0, 1.0, value)
    change = (squared - squared.detach()) / safe
    return value + torch.where(value == 0, 0.0, 0.5 * change - 0.125 * change.square() / safe)


def gram_error(x: Tensor) -> Tensor:
    """Return the largest absolute entry of X^T X - I, of shape ``(...)``."""
    return (gram(x) - identity_like(x)).abs().amax(dim=(-2, -1))


def spectral_bound(a: Tensor) -> Tensor:
    """Bound the spectral norm of symmetric ``(..., p, p)`` matrices from above, shape ``(..., 1, 1)``.

    |m| + sqrt((p-1) s^2) with the mean m and the variance s^2 of the eigenvalues, both traces (Wolkowicz and Styan,
    "Bounds for eigenvalues using traces", 1980). It is exact for rank one and for multiples of the identity, never
    above the Frobenius norm, and the same for A and Q^T A Q, which a bound by row sums is not: a rule that
    shortens steps by it treats all bases of a subspace alike. O(p^2); smooth, also at A = 0. Infinite where the
    entries' squares overflow.
    """
    p = a.shape[-1]
    mean = (trace(a) / p)[..., None, None]
    # Centred before squaring: nothing cancels when all eigenvalues are equal.
    spread = (a - mean * identity_like(a)).square().sum(dim=(-2, -1), keepdim=True) * ((p - 1) / p)
    # The floor keeps the derivatives of the root finite there.
    return mean.abs() + (spread + torch.finfo(a.dtype).eps ** 2).sqrt()
