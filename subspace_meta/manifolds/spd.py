"""Symmetric positive definite matrices with the affine-invariant metric <u, v>_M = tr(M^{-1} u M^{-1} v).

Source: Pennec, Fillard, Ayache, "A Riemannian framework for tensor computing", IJCV 66 (2006); Bhatia, "Positive
Definite Matrices", 2007, chapter 6; the second-order retraction: Jeuris, Vandebril, Vandereycken, "A survey and
comparison of contemporary algorithms for computing the matrix geometric mean", ETNA 39 (2012), section 4.2.

Steps are measured in *whitened* coordinates, E = L^{-1} V L^{-T} with M = L L^T: an eigenvalue e of E multiplies M by
about exp(e) in its direction. The Cholesky factor serves where only eigenvalues of E count; coordinates for statistics
use the symmetric square root, because a Cholesky factor depends on the order of rows.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from subspace_meta._tracing import known_true
from subspace_meta.manifolds.base import (
    Manifold,
    euclidean_inner,
    identity_like,
    normal_like,
    power_of_two,
    root,
    spectral_bound,
    symmetric_part,
    trace,
)
from subspace_meta.manifolds.matrix_functions import (
    compose,
    known_zero,
    logarithm_difference,
    matrix_exponential,
    polar_difference,
    symmetric_exponential,
    symmetric_square_root,
)
from subspace_meta.manifolds.orthogonal import check_square


class SPDRetraction(abc.ABC):
    """The contract of a retraction on SPD matrices: a frozen value object with one method."""

    order: float = 1

    @abc.abstractmethod
    def __call__(self, x: Tensor, v: Tensor) -> Tensor:
        """Retract the symmetric ``v`` at ``x``, both ``(..., n, n)``."""


def cholesky(x: Tensor) -> Tensor:
    """Return the lower Cholesky factor; where there is none the result is meaningless, but nothing raises.

    That of the symmetric part: torch's own derivatives at a matrix that is not symmetric depend on the mode.
    """
    factor: Tensor = torch.linalg.cholesky_ex(symmetric_part(x)).L
    return factor


def whiten(factor: Tensor, v: Tensor) -> Tensor:
    """Return L^{-1} V L^{-T} for a symmetric ``v``."""
    half = torch.linalg.solve_triangular(factor, v, upper=False)
    return symmetric_part(torch.linalg.solve_triangular(factor, half.mT, upper=False))


def _in_range(v: Tensor) -> tuple[Tensor, Tensor | float]:
    """Return V / c and the constant c >= 1, of shape ``(..., 1, 1)`` or a number, such that no entry is above 2.

    So whitening does not overflow; products of whitened matrices are for :func:`_length` to keep in range.
    """
    if known_true(v.detach().abs().amax() < 2.0):
        return v, 1.0
    size = power_of_two(v).clamp(min=1.0)
    return v / size, size


# Squarings in the power method below: the weight of an eigenvalue is its 2^12-th (2^24-th) power.
_SQUARINGS = {torch.float32: 12, torch.float64: 24}


def _largest_contraction(e: Tensor, bound: Tensor) -> Tensor:
    """Return the largest eigenvalue l of -E, ``(..., 1, 1)``, for |E|_2 <= ``bound``; two right derivatives if simple.

    -tr(P E) with P = (c I - E)^m / trace, m = 2^12 (float64: 2^24), by squaring: a mean of eigenvalues, so never above
    l, and below it by at most (l + c) log(n)/m where other eigenvalues are as near: 1e-3 (1e-7), else by rounding. The
    second-order retraction is flat there; half of the square is what it loses. P is a constant, the projection on an
    eigenvector w as a rule; then, to second order, l(E + H) = l - tr(P H) + |(E + l I)^{-1/2} (I - P) H w|^2. At equal
    eigenvalues P is a mean. 24n^3 (48n^3) flops, and 5n^3: a decomposition takes three times as long on a CPU.
    """
    constant, identity = e.detach(), identity_like(e)
    # A little more than the bound, or nothing would be left of a multiple of the identity.
    power = 1.125 * bound.detach() * identity - constant
    for step in range(_SQUARINGS[e.dtype]):
        if step % 3 == 0:
            # Of trace 1, the eighth power is in range.
            power = power / trace(power)[..., None, None]
        power = power @ power
    power = power / trace(power)[..., None, None]
    largest = -euclidean_inner(power, e)[..., None, None]
    change = e - constant
    if known_zero(change):
        return largest
    # On the range of P, where (I - P) H w has no part, anything positive makes the matrix definite.
    size = e.shape[-1] * bound.detach()
    factor, failure = torch.linalg.cholesky_ex(constant + largest.detach() * identity + size * power)
    across = torch.linalg.solve_triangular(factor, (identity - power) @ change @ power, upper=False)
    second = across.square().sum(dim=(-2, -1), keepdim=True)
    return largest + torch.where(failure[..., None, None] == 0, second, 0.0)


def _length(e: Tensor, size: Tensor | float, max_norm: float, max_contraction: float = math.inf) -> Tensor | float:
    """Return the largest s <= ``size``, ``(..., 1, 1)``, with s|E|_2 <= ``max_norm`` and s E >= -``max_contraction``.

    |E|_2 is bounded from above; the smallest eigenvalue is exact to rounding, because a step within both bounds must
    not be shortened where the other eigenvalues are large. On a CPU, outside of transforms: n^2 flops for steps that
    are short in the Frobenius norm, 3n^3 for other short ones; else, 3n^3 and :func:`_largest_contraction`.
    """
    limited = max_contraction < math.inf

    def no_contraction_beyond(length: Tensor | float) -> bool:
        # A Cholesky factor of c I + s E says that no eigenvalue is below -c.
        shifted = max_contraction * identity_like(e) + length * e.detach()
        return known_true(torch.linalg.cholesky_ex(shifted).info == 0)

    # Not shortcuts to another result, these and the one below: the minimum would be ``size``. |E|_2 <= |E|_F, and
    # |E|_2^2 <= |E^2|_F. Where ``size`` is a tensor, squares may leave the range.
    bound = None
    if isinstance(size, float):
        if known_true(torch.linalg.vector_norm(e, dim=(-2, -1)) <= min(max_norm, max_contraction)):
            return size
        squared = e @ e
        within = known_true(torch.linalg.vector_norm(squared, dim=(-2, -1)) <= max_norm * max_norm)
        if within and (not limited or no_contraction_beyond(size)):
            return size
        # E^2 has the squared eigenvalues; bounding it is sharper than bounding E.
        bound = spectral_bound(squared).sqrt()
    scale: Tensor | float = 1.0
    if bound is None or not known_true(torch.isfinite(bound)):
        # Entries of size 1, so that squares neither overflow nor vanish. The entries of a short step stay below that:
        # dividing them by something tiny would give derivatives that overflow before they meet their factor 0.
        # A number stays on the CPU, from where kernels of every device take it: to copy it there is to wait.
        scale = torch.maximum(
            power_of_two(e), torch.as_tensor(1.0 / size, device="cpu" if isinstance(size, float) else size.device)
        )
        e = e / scale
        bound = spectral_bound(e @ e).sqrt()
    length = (max_norm / bound).clamp(max=size * scale)
    if limited and not no_contraction_beyond(length.detach()):
        # The floor is for steps that contract nowhere; max_norm / bound has shortened them to far less.
        contraction = torch.maximum(_largest_contraction(e, bound), torch.finfo(e.dtype).eps * bound)
        length = torch.minimum(length, max_contraction / contraction)
    return length / scale


def keep_positive(x: Tensor) -> Tensor:
    """Polish: make ``x`` exactly symmetric, and add a ridge if it is too close to singular for its type.

    If a Cholesky pivot falls below 4 n eps times the largest diagonal entry (or there is no factor), that much is
    added to the diagonal. So however often and however far one steps, the next step starts from a positive definite
    matrix; the price is that eigenvalue ratios beyond 1/(4 n eps) (4e5 for n = 5 in float32) do not survive.
    """
    x = symmetric_part(x)
    constant = x.detach()
    factor, failure = torch.linalg.cholesky_ex(constant)
    largest = torch.diagonal(constant, dim1=-2, dim2=-1).amax(dim=-1)
    floor = 4 * x.shape[-1] * torch.finfo(x.dtype).eps * largest
    pivot = torch.diagonal(factor, dim1=-2, dim2=-1).square().amin(dim=-1)
    ridge = torch.where((failure > 0) | (pivot < floor), floor, 0.0)
    return x + ridge[..., None, None] * identity_like(x)


@dataclass(frozen=True)
class SPDSecondOrder(SPDRetraction):
    """M + V + V M^{-1} V / 2, computed as (M + F F^T)/2 with F = L (I + E): a sum of two positive matrices. Order 2.

    Eigenvalues e of E go to 1 + e + e^2/2 >= 1/2, which falls to 1/2 at e = -1 and turns there: a longer contraction
    would end nearer to the start, and at -2 there again. So steps are shortened to E >= -1, besides to |E|_2 <=
    ``max_norm``, and a longer step never ends nearer. One Cholesky factor, two triangular solves, two products: 7n^3
    flops (steps beyond the bounds: :func:`_length`).
    """

    max_norm: float = 2.0
    order = 2

    def __call__(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the retracted point, polished by :func:`keep_positive`."""
        factor = cholesky(x)
        v, size = _in_range(symmetric_part(v.to(x.dtype)))
        # L E = V L^{-T}
        step = torch.linalg.solve_triangular(factor, v, upper=False).mT
        whitened = symmetric_part(torch.linalg.solve_triangular(factor, step, upper=False))
        moved = factor + _length(whitened, size, self.max_norm, max_contraction=1.0) * step
        return keep_positive(0.5 * (x + moved @ moved.mT))


@dataclass(frozen=True)
class SPDExponential(SPDRetraction):
    """The exponential map L exp(E) L^T, computed as F F^T with F = L exp(E/2).

    Steps are shortened to |E|_2 <= ``max_norm``: the default 5 multiplies an eigenvalue by 1/148 to 148. About twice
    the cost of the second-order retraction.
    """

    max_norm: float = 5.0
    order = math.inf

    def __call__(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the geodesic's point at time 1, polished by :func:`keep_positive`."""
        factor = cholesky(x)
        v, size = _in_range(symmetric_part(v.to(x.dtype)))
        whitened = whiten(factor, v)
        half = 0.5 * _length(whitened, size, self.max_norm) * whitened
        # Products have an error of eps relative to 1; exp(-5/2) keeps all digits but one, exp(-20) would keep none.
        short = self.max_norm <= 5.0
        half = factor @ (matrix_exponential(half, 0.5 * self.max_norm) if short else symmetric_exponential(half))
        return keep_positive(half @ half.mT)


@dataclass(frozen=True)
class _Pair:
    """Two points in terms of each other: L^{-1} Y L^{-T} = K K^T, K = L^{-1} (factor of y) = U diag(s) W^T.

    The singular values' ratio is the square root of the eigenvalues' ratio, so this keeps half of the digits that a
    decomposition of K K^T loses. Like there (:mod:`~subspace_meta.manifolds.matrix_functions`), the decomposition is a
    constant, and ``difference`` = U^T K W - diag(s) has the value 0 and the derivatives.
    """

    factor: Tensor
    end: Tensor
    left: Tensor
    values: Tensor
    right: Tensor
    difference: Tensor
    definite: Tensor  # whether both points are positive definite, (..., 1)

    @staticmethod
    def of(x: Tensor, y: Tensor) -> _Pair:
        """Decompose. 3n^3 flops and a singular value decomposition."""
        (factor, wrong), (end, also_wrong) = (torch.linalg.cholesky_ex(symmetric_part(point)) for point in (x, y))
        k = torch.linalg.solve_triangular(factor, end, upper=False)
        constant = k.detach()
        # At equal points K is the identity, without the rounding errors that solving leaves. A matrix that is not
        # finite starts there too, because the decomposition would raise; the difference is NaN then.
        finite = torch.isfinite(constant).all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
        equal = (x.detach() == y.detach()).all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
        left, values, right = torch.linalg.svd(torch.where(finite & ~equal, constant, identity_like(constant)))
        # A matrix that is not positive definite has no factor, and K may be singular; logarithms stay finite.
        values = values.clamp(min=torch.finfo(k.dtype).tiny)
        definite = (wrong + also_wrong == 0)[..., None]
        return _Pair(factor, end, left, values, right.mT, left.mT @ (k - constant) @ right.mT, definite)

    def logarithm(self) -> tuple[Tensor, Tensor]:
        """Return g and X of value 0 with log(K K^T) = U (diag(g) + X) U^T, g = 2 log s; NaN for want of K."""
        logs = torch.where(self.definite, 2.0 * self.values.log(), torch.nan)
        # K K^T = U diag(s) (I + N)(I + N^T) diag(s) U^T
        n = self.difference / self.values[..., :, None]
        return logs, logarithm_difference(logs, n + n.mT + n @ n.mT)


@dataclass(frozen=True)
class SPD(Manifold):
    """Symmetric positive definite matrices, affine-invariant metric. Parallel transport: isometric.

    Statistics are taken in the whitened tangent S^{-1} v S^{-1} with the symmetric square root S = M^{1/2}. All matrix
    functions have finite derivatives at equal eigenvalues, to third order
    (:mod:`~subspace_meta.manifolds.matrix_functions`).
    """

    retraction: SPDRetraction = SPDSecondOrder()

    @property
    def retraction_order(self) -> float:
        """The retraction's order."""
        return self.retraction.order

    @property
    def isometric_transport(self) -> bool:
        """True."""
        return True

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise ``ValueError`` unless matrices are square."""
        check_square(self.name, shape)

    def dimension(self, shape: tuple[int, ...]) -> int:
        """Return n(n+1)/2 per matrix."""
        n = shape[-1]
        return math.prod(shape[:-2]) * (n * (n + 1) // 2)

    def project(self, x: Tensor, v: Tensor) -> Tensor:
        """Return sym(V)."""
        return symmetric_part(v.to(x.dtype))

    def riemannian_gradient(self, x: Tensor, euclidean_gradient: Tensor) -> Tensor:
        """Return M sym(G) M. 4n^3 flops."""
        return symmetric_part(x @ symmetric_part(euclidean_gradient.to(x.dtype)) @ x)

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Return tr(M^{-1} U M^{-1} V)."""
        factor = cholesky(x)
        left = torch.cholesky_solve(u.to(x.dtype), factor)
        right = torch.cholesky_solve(v.to(x.dtype), factor)
        return euclidean_inner(left.mT, right)

    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        """Apply the chosen retraction."""
        return self.retraction(x, v)

    def norm(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the length of ``v`` in the metric, |L^{-1} V L^{-T}|_F; derivative 0 at 0; no square overflows."""
        factor = cholesky(x)
        v, size = _in_range(v.to(x.dtype))
        whitened = torch.linalg.solve_triangular(factor, v, upper=False).mT
        whitened = torch.linalg.solve_triangular(factor, whitened, upper=False)
        scale = power_of_two(whitened)
        return (root((whitened / scale).square().sum(dim=(-2, -1), keepdim=True)) * scale * size)[..., 0, 0]

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Carry ``v`` along the geodesic to ``y``: B V B^T, B = (Y M^{-1})^{1/2}.

        With K = L^{-1} (factor F of y) and its orthogonal polar factor Q, B = L (K K^T)^{1/2} L^{-1} = F Q^T L^{-1}: an
        isometry to rounding.
        """
        pair = _Pair.of(x, y)
        turn = identity_like(y) + polar_difference(pair.values, pair.difference)
        left = pair.end @ (pair.left @ turn @ pair.right.mT).mT
        return symmetric_part(left @ whiten(pair.factor, symmetric_part(v.to(x.dtype))) @ left.mT)

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        """Return L exp(E) L^T as F F^T, F = L exp(E/2): wherever the result is in the type's range."""
        factor = cholesky(x)
        half = factor @ symmetric_exponential(0.5 * whiten(factor, symmetric_part(v.to(x.dtype))))
        return symmetric_part(half @ half.mT)

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        """Return L log(L^{-1} Y L^{-T}) L^T; NaN where a matrix is not positive definite."""
        pair = _Pair.of(x, y)
        return compose(pair.factor @ pair.left, *pair.logarithm())

    def squared_distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Return |log(L^{-1} Y L^{-T})|_F^2; three right derivatives, also at equal points.

        NaN where a matrix is not positive definite.
        """
        logs, difference = _Pair.of(x, y).logarithm()
        return (torch.diag_embed(logs) + difference).square().sum(dim=(-2, -1))

    def nearest(self, x: Tensor) -> Tensor:
        """Return sym(X) with eigenvalues raised to 1e-6 times the largest in float64 (1e-4 in float32).

        The set is open, so there is no nearest point; this is the nearest one that is safely inside. A matrix without a
        positive eigenvalue goes to that multiple of its largest absolute one (of 1, if it is 0) times the identity.
        """
        self.check_shape(x.shape)
        values, vectors = torch.linalg.eigh(symmetric_part(x))
        share = 1e-6 if x.dtype == torch.float64 else 1e-4
        largest = values[..., -1:]
        size = values[..., :1].abs()
        size = torch.where(largest > 0, largest, torch.where(size > 0, size, 1.0))
        raised = torch.maximum(values, share * size)
        return symmetric_part((vectors * raised[..., None, :]) @ vectors.mT)

    def random_point(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw a Wishart matrix of 2n degrees of freedom, divided by them: mean I, condition number about 34."""
        self.check_shape(shape)
        n = shape[-1]
        root = torch.randn((*shape[:-1], 2 * n), generator=generator, dtype=dtype, device=device)
        return symmetric_part(root @ root.mT) / (2 * n)

    def violation(self, x: Tensor) -> Tensor:
        """Return the larger of max|M - M^T| and minus the smallest eigenvalue (if negative), over the largest entry."""
        finite = torch.isfinite(x).all(dim=-1).all(dim=-1)
        safe = torch.where(finite[..., None, None], x, identity_like(x))
        scale = safe.abs().amax(dim=(-2, -1))
        asymmetry = (safe - safe.mT).abs().amax(dim=(-2, -1))
        negative = (-torch.linalg.eigvalsh(symmetric_part(safe))[..., 0]).clamp(min=0.0)
        return torch.where(finite, torch.maximum(asymmetry, negative) / scale, torch.nan)

    def random_tangent(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw L sym(Z) L^T with a standard normal Z: its length in the metric does not depend on ``x``."""
        factor = cholesky(x)
        return symmetric_part(factor @ symmetric_part(normal_like(x, generator)) @ factor.mT)

    def coordinates(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the whitened tangent S^{-1} V S^{-1}, S = M^{1/2} symmetric."""
        inverse: Tensor = torch.linalg.inv(symmetric_square_root(x))
        return inverse @ v.to(x.dtype) @ inverse

    def from_coordinates(self, x: Tensor, v: Tensor) -> Tensor:
        """Return S V S."""
        half = symmetric_square_root(x)
        return half @ v.to(x.dtype) @ half
