"""Retractions on matrices with orthonormal columns, as value objects.

A retraction R_x(v) = x + v + O(|v|^2) brings a tangent step back to the manifold; its *order* is the largest k with
dist(R_x(tv), Exp_x(tv)) = O(t^{k+1}). Meta-gradients run through it, so only formulas that are smooth at v = 0 are
here: a polar factor by SVD or by the eigenvectors of the Gram matrix has NaN derivatives at small steps.

====================  ==========================  ============================  ===================================
retraction            order (embedded, canonical  steps longer than this are    cost in flops beside the d x p
                      metric, Grassmann, SO(n))   shortened to it               additions
====================  ==========================  ============================  ===================================
CholeskyQR            1, 1, 2, 1                  |V|_F = 7                     4dp^2 + p^3 (p >= 256: 5/2 dp^2)
HouseholderQR         1, 1, 2, 1                  |V|_F = 7                     4dp^2, in LAPACK's slower kernels
PolarNewtonSchulz     2, 1, 2, 2                  |V|_2 = 2                     6dp^2 + 18p^3 (float64: 24p^3)
Cayley                1, 2, 2, 2                  |V|_2 = 10, Grassmann: 2      14dp^2 + 2p^3; d = p: 13p^3
Geodesic              exact in its metric         |V|_2 = pi, Grassmann: pi/2;  16dp^2 and exp of 2p x 2p; d = p:
                                                  canonical, d > p: 2.72        6p^3 and exp of p x p
====================  ==========================  ============================  ===================================

No bound lies beyond the point where the curve turns back: a longer step never ends nearer to the start than a shorter
one along the same ray. In a plane, a step of length s turns by s on a geodesic, by 2 atan(s/2) with Cayley, by atan(s)
with the others; two subspaces are at most pi/2 apart, so on Grassmann the first two have tighter bounds. In detail:

* A polar step has tr(X^T R) = tr (I + t^2 V^T V)^(-1/2) on the ray tV, which falls for all t. With Cayley it is a
  positive sum of the cosines of the angles 2 atan(t w / 2) < pi of the planes of W (below).
* The curvature of the embedded geodesic is |V^T V|_F / |V|_F^2, so its tangent turns by at most |V|_2 t, and while that
  is below pi the chord grows (as in Schur's comparison theorem). The canonical one turns the planes of W by angles up
  to t |W|_2 <= (2 / sqrt 3) t |V|_2.
* QR orthonormalises column by column; its span is that of the polar step, but its columns turn back along directions
  close to rank one: from |V|_F = 8.6 on for p = 2, 7.7 for p = 4, 7.3 for p = 12 (found by maximising the change of
  tr(X^T R)).

CholeskyQR and PolarNewtonSchulz work on the real Gram matrix K = (X+V)^T (X+V), which equals I + V^T V for a tangent V.
Taking K instead of assuming that identity makes every step remove the error the last ones left. In finite precision K
is only as good as its condition number 1 + |V|^2, so a step longer than the documented bound is *shortened* to it: the
direction stays, and a step so long has left the region where its length meant anything. K is formed after that. (To
rescale a K that was formed before takes X^T X = I and X^T V + V^T X = 0 for granted, and multiplies the error in them
by the bound: on Gr(6, 4) seven such steps in a row destroy a float32 point.) Cayley and Geodesic do not correct
themselves: they end with one Newton-Schulz step, the *polish*.

Orders and formulas: Absil, Mahony, Sepulchre, "Optimization Algorithms on Matrix Manifolds", 2008, section 4.1;
Absil and Malick, "Projection-like retractions on matrix manifolds", SIAM J. Optim. 22 (2012); Wen and Yin, "A feasible
method for optimization with orthogonality constraints", Math. Program. 142 (2013); Edelman, Arias, Smith, "The geometry
of algorithms with orthogonality constraints", SIAM J. Matrix Anal. 20 (1998).
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from subspace_meta.manifolds.base import (
    divide_by_lower,
    euclidean_inner,
    gram,
    identity_like,
    skew_part,
    spectral_bound,
    without_huge,
)
from subspace_meta.manifolds.matrix_functions import matrix_exponential


class OrthonormalRetraction(abc.ABC):
    """The contract of a retraction on {X : X^T X = I}: a frozen value object with one method.

    ``order`` is the order on Stiefel with the embedded metric; the other three are those on Stiefel with the canonical
    metric, on Grassmann (where only the span counts), and on SO(n) and O(n). A retraction that proves nothing has 1.
    """

    order: float = 1
    canonical_order: float = 1
    grassmann_order: float = 1
    rotation_order: float = 1

    @abc.abstractmethod
    def __call__(self, x: Tensor, v: Tensor) -> Tensor:
        """Retract the tangent ``v`` at ``x``, both ``(..., d, p)``."""

    def on_grassmann(self) -> OrthonormalRetraction:
        """Return the retraction with its bound no further than where a subspace would come nearer again."""
        return self


def positive_qr(y: Tensor) -> Tensor:
    """Return the orthonormal factor of ``y = QR`` by Householder reflections, with R's diagonal not negative."""
    q, r = torch.linalg.qr(y)
    diagonal = torch.diagonal(r, dim1=-2, dim2=-1)
    # Not sgn(): a zero on the diagonal must not erase the column.
    signed: Tensor = q * torch.where(diagonal < 0, -1.0, 1.0).to(q.dtype)[..., None, :]
    return signed


def newton_schulz_step(y: Tensor) -> Tensor:
    """Return Y (3I - Y^T Y) / 2: an error e of Y^T Y - I becomes 3e^2/4 + O(e^3). 4dp^2 flops."""
    return y @ (1.5 * identity_like(y) - 0.5 * gram(y))


def _squared_scale(squared_norm: Tensor, max_norm: float) -> Tensor:
    """Return s^2 = min(1, max_norm^2 / squared_norm): exactly 1, with derivative 0, for steps within the bound."""
    limit = max_norm * max_norm
    return limit / squared_norm.clamp(min=limit)


def _squared_frobenius(v: Tensor) -> Tensor:
    return euclidean_inner(v, v)[..., None, None]


def _shortened(v: Tensor, max_norm: float) -> Tensor:
    """Return ``v``, or sv with spectral norm at most ``max_norm`` where ``v`` may be longer. 2dp^2 flops.

    |V|_2 is bounded by :func:`~subspace_meta.manifolds.base.spectral_bound` of V^T V: never too small.
    """
    v, inner = without_huge(v, gram)
    return v * _squared_scale(spectral_bound(inner), max_norm).sqrt()


@dataclass(frozen=True)
class CholeskyQR(OrthonormalRetraction):
    """The QR retraction (orthonormal factor, positive diagonal) through the Cholesky factor of the Gram matrix.

    Up to twice as fast as Householder QR, smooth everywhere. Steps with Frobenius norm above ``max_norm`` are
    shortened to it (see the module's text): that is the step's length in the metric, never less than the spectral
    norm, and costs one pass over V where the spectral norm would cost another Gram matrix. At the bound the float32
    orthonormality error is below 1e-5 for a step of rank one, and below 1e-6 for one of full rank.
    """

    max_norm: float = 7.0
    order = 1
    grassmann_order = 2

    def __call__(self, x: Tensor, v: Tensor) -> Tensor:
        """Return (X+V) L^{-T} with L L^T = (X+V)^T (X+V)."""
        v, squared_norm = without_huge(v.to(x.dtype), _squared_frobenius)
        y = torch.addcmul(x, _squared_scale(squared_norm, self.max_norm).sqrt(), v)
        # cholesky_ex does not raise: a non-finite step must propagate, not stop the other tasks under vmap.
        factor = torch.linalg.cholesky_ex(gram(y)).L
        if y.shape[-2] >= 2 * y.shape[-1]:
            return divide_by_lower(y, factor)
        q: Tensor = torch.linalg.solve_triangular(factor.mT, y, upper=True, left=False)
        # LAPACK returns columns; the rows that everything else is stored in cost one copy.
        return q.contiguous()


@dataclass(frozen=True)
class HouseholderQR(OrthonormalRetraction):
    """The same QR retraction by LAPACK's Householder reflections.

    Steps with Frobenius norm above ``max_norm`` are shortened to it: where |V| is large, X is lost in the sum, and the
    result is only as good as eps (1 + |V|^2), its derivative too. The float32 orthonormality error is below 1e-6 at
    every length, rank-deficient steps included.
    """

    max_norm: float = 7.0
    order = 1
    grassmann_order = 2

    def __call__(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the orthonormal factor of X+V."""
        v, squared_norm = without_huge(v.to(x.dtype), _squared_frobenius)
        return positive_qr(torch.addcmul(x, _squared_scale(squared_norm, self.max_norm).sqrt(), v))


# The polynomials q_k(r) = sum_{j<=k} binom(2j, j) (r/4)^j are the Taylor sections of (1-r)^{-1/2}. The iteration
# Z <- Z q_k(I - Z A Z) converges to A^{-1/2} with order k+1: k = 1 is Newton-Schulz, the others are the [k/0] Pade
# iterations of Kenney and Laub, "Rational iterative methods for the matrix sign function", SIAM J. Matrix Anal. 12
# (1991), table 1; Higham, "Functions of Matrices", 2008, section 6.7. Row s holds degree k = 2s (row 0: k = 1), which
# costs s products of p x p matrices by the scheme of Paterson and Stockmeyer, "On the number of nonscalar
# multiplications necessary to evaluate polynomials", SIAM J. Comput. 2 (1973).
INVERSE_ROOT_SERIES: tuple[tuple[float, ...], ...] = (
    (1.0, 1 / 2),
    (1.0, 1 / 2, 3 / 8),
    (1.0, 1 / 2, 3 / 8, 5 / 16, 35 / 128),
    (1.0, 1 / 2, 3 / 8, 5 / 16, 35 / 128, 63 / 256, 231 / 1024),
    (1.0, 1 / 2, 3 / 8, 5 / 16, 35 / 128, 63 / 256, 231 / 1024, 429 / 2048, 6435 / 32768),
)


def _residual_after(coefficients: tuple[float, ...], steps: int, start: float) -> float:
    """Return the largest of the scalar residual 1 - z^2 a and its first two derivatives after ``steps`` iterations."""
    residual, first, second = start, 1.0, 0.0
    for _ in range(steps):
        q = dq = ddq = 0.0
        for coefficient in reversed(coefficients):
            q, dq, ddq = q * residual + coefficient, dq * residual + q, ddq * residual + 2.0 * dq
        rest = 1.0 - residual
        slope = q * q - 2.0 * rest * q * dq
        curvature = 4.0 * q * dq - 2.0 * rest * (dq * dq + q * ddq)
        residual, first, second = 1.0 - rest * q * q, slope * first, curvature * first * first + slope * second
    return max(abs(residual), abs(first), abs(second))


def inverse_root_plan(max_norm: float, tolerance: float) -> tuple[int, int]:
    """Choose the row s of ``INVERSE_ROOT_SERIES`` and the number of steps n with the fewest p x p products.

    For steps of spectral norm up to m the residual starts at no more than m^2 / (2 + m^2). Value, first and second
    derivative must all come below ``tolerance``: derivatives converge later than values, and meta-gradients need them.
    The products are s per polynomial and three per further step. Ties go to fewer steps.
    """
    start = max_norm**2 / (2.0 + max_norm**2)
    plans = []
    for row, coefficients in enumerate(INVERSE_ROOT_SERIES):
        steps = next((n for n in range(1, 64) if _residual_after(coefficients, n, start) < tolerance), None)
        if steps is not None:
            plans.append((row * steps + 3 * (steps - 1), steps, row))
    if not plans:
        raise ValueError(f"no plan reaches {tolerance:.0e} for steps of norm {max_norm}; give a smaller max_norm")
    _, steps, row = min(plans)
    return row, steps


def _series_minus_one(coefficients: tuple[float, ...], r: Tensor) -> Tensor:
    """Evaluate q(R) - I, for the polynomial of degree 2s (or 1) of that row, with s (or 0) products."""
    if len(coefficients) == 2:
        return coefficients[1] * r
    half = len(coefficients) // 2
    powers = [r]
    while len(powers) < half:
        powers.append(powers[-1] @ r)
    low = coefficients[1] * r if half > 1 else torch.zeros_like(r)
    for coefficient, power in zip(coefficients[2:half], powers[1:], strict=False):
        low = torch.add(low, power, alpha=coefficient)
    high = coefficients[half] * identity_like(r)
    for coefficient, power in zip(coefficients[half + 1 :], powers, strict=True):
        high = torch.add(high, power, alpha=coefficient)
    return low + powers[-1] @ high


@dataclass(frozen=True)
class PolarNewtonSchulz(OrthonormalRetraction):
    """The polar retraction (X+V) K^{-1/2}, by a coupled Newton-Schulz iteration on the small Gram matrix K.

    Only products of p x p matrices, so it is smooth everywhere. It commutes with orthogonal factors on both sides: an
    update through it is equivariant to the order of the columns and, on Grassmann, does not depend on the
    representative. Steps with spectral norm above ``max_norm`` are shortened to it; the bound on the norm is exact for
    rank one and for equal singular values, and otherwise too large by less than p^(1/4).

    The eigenvalues of K lie in [1, 1 + b] with a bound b of |V|^2 that is computed for each matrix; divided by the
    middle of that interval they are within b/(2+b) of 1, where the iteration (:func:`inverse_root_plan`) converges.
    The number of steps is that of the longest step, b = ``max_norm``^2; shorter ones only start closer.

    Raises:
        ValueError: ``max_norm`` is not positive, or so large that no plan reaches the precision.
    """

    max_norm: float = 2.0
    order = 2
    grassmann_order = 2
    rotation_order = 2
    _single: tuple[int, int] = field(init=False, repr=False, compare=False)
    _double: tuple[int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.max_norm > 0.0:
            raise ValueError(f"max_norm must be positive, got {self.max_norm}")
        for name, dtype in (("_single", torch.float32), ("_double", torch.float64)):
            object.__setattr__(self, name, inverse_root_plan(self.max_norm, 4.0 * torch.finfo(dtype).eps))

    def plan(self, dtype: torch.dtype) -> tuple[int, int]:
        """Return the row of ``INVERSE_ROOT_SERIES`` and the number of iterations for full precision in ``dtype``."""
        return self._double if dtype == torch.float64 else self._single

    def steps(self, dtype: torch.dtype) -> int:
        """Return the number of iterations for full precision in ``dtype``."""
        return self.plan(dtype)[1]

    def __call__(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the orthogonal polar factor of X+V."""
        v, inner = without_huge(v.to(x.dtype), gram)
        squared_norm = spectral_bound(inner)
        y = torch.addcmul(x, _squared_scale(squared_norm, self.max_norm).sqrt(), v)
        # The limit does not depend on the centre 1 + h, so its derivative is left out.
        half_width = 0.5 * squared_norm.detach().clamp(max=self.max_norm**2)
        centre = 1.0 + half_width
        row, steps = self.plan(x.dtype)
        coefficients = INVERSE_ROOT_SERIES[row]
        identity = identity_like(x)
        # With A = K/centre and Z -> A^{-1/2}, the residual R = I - ZAZ goes to 0. Everything is kept as its difference
        # from I (Z = I + z, q(R) = I + e): products of what is small round little, and 1 - 1e-8 would be lost.
        r = (half_width * identity - (gram(y) - identity)) / centre
        e = _series_minus_one(coefficients, r)
        z = e
        for _ in range(steps - 1):
            # (I + e) (I - R) (I + e) = I - R', all commuting.
            squared = 2.0 * e + e @ e
            r = r - squared + r @ squared
            e = _series_minus_one(coefficients, r)
            z = z + e + z @ e
        return (y + y @ z) * centre.rsqrt()


@dataclass(frozen=True)
class Cayley(OrthonormalRetraction):
    """The Cayley retraction (I - W/2)^{-1} (I + W/2) X, with W = N X^T - X N^T + X A X^T of V = N + XA, A = X^T V.

    The usual solve is 2p x 2p (Wen and Yin 2013, lemma 4). With X^T X = I and X^T N = 0 it reduces to p x p: inserting
    (2X + N) C - X into (I - W/2) Y = (I + W/2) X gives

        Y = (2X + N) C - X,   C = (I + N^T N / 4 - A/2)^{-1},

    whose matrix has a symmetric part of at least I, so the solve is safe. Steps with spectral norm above ``max_norm``
    are shortened to it, and the result is polished. It commutes with orthogonal factors on both sides.
    """

    max_norm: float = 10.0
    order = 1
    canonical_order = 2
    grassmann_order = 2
    rotation_order = 2

    def on_grassmann(self) -> Cayley:
        """Return it with steps up to 2, where 2 atan(s/2) is pi/2."""
        return Cayley(min(self.max_norm, 2.0))

    def __call__(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the Cayley transform of W applied to X, polished."""
        v, inner = without_huge(v.to(x.dtype), gram)
        identity = identity_like(x)
        squared_scale = _squared_scale(spectral_bound(inner), self.max_norm)
        scale = squared_scale.sqrt()
        a = scale * skew_part(x.mT @ v)
        if x.shape[-2] == x.shape[-1]:
            right, left = identity - 0.5 * a, 2.0 * x
        else:
            # N^T N = V^T V - A^T A, and 2X + N = V + X (2I - A).
            right = identity + 0.25 * (squared_scale * inner + a @ a) - 0.5 * a
            left = torch.addcmul(x @ (2.0 * identity - a), scale, v)
        # The inverse and a product: a solve with a tall right-hand side takes twice as long.
        return newton_schulz_step(left @ torch.linalg.inv(right) - x)


# How far the exponential maps follow a geodesic accurately: |V|_2 in radians, ten times around.
GEODESIC_NORM = 64.0


def embedded_geodesic(x: Tensor, v: Tensor, max_norm: float = GEODESIC_NORM) -> Tensor:
    """Return the geodesic of the embedded metric at time 1 (Edelman, Arias, Smith 1998, equation 2.7), polished.

    [X, V] exp([[A, -V^T V], [I, A]]) [I; 0] exp(-A) with A = X^T V; on square matrices X exp(A).
    """
    a = skew_part(x.mT @ v)
    if x.shape[-2] == x.shape[-1]:
        return newton_schulz_step(x @ matrix_exponential(a, max_norm))
    return newton_schulz_step(_geodesic_block(x, v, a, a, max_norm) @ matrix_exponential(-a, max_norm))


def canonical_geodesic(x: Tensor, v: Tensor, max_norm: float = GEODESIC_NORM) -> Tensor:
    """Return the geodesic of the canonical metric at time 1 (Edelman, Arias, Smith 1998, section 2.4), polished.

    exp(W) X = [X, N] exp([[A, -N^T N], [I, 0]]) [I; 0] with A = X^T V and N = V - XA: their QR factor of N is avoided,
    since it is not smooth at N = 0. On Grassmann A = 0 and this is the geodesic there; on square matrices X exp(A).
    """
    a = skew_part(x.mT @ v)
    if x.shape[-2] == x.shape[-1]:
        return newton_schulz_step(x @ matrix_exponential(a, max_norm))
    return newton_schulz_step(_geodesic_block(x, v - x @ a, a, torch.zeros_like(a), max_norm))


def _geodesic_block(x: Tensor, n: Tensor, a: Tensor, corner: Tensor, max_norm: float) -> Tensor:
    """Return [X, N] exp([[A, -N^T N], [I, corner]]) [I; 0], balanced by writing N as s (N/s)."""
    p = x.shape[-1]
    inner = gram(n)
    size = spectral_bound(inner).detach().clamp(min=1.0).sqrt()
    top = torch.cat([a, -inner / size], dim=-1)
    bottom = torch.cat([size * identity_like(x).expand_as(a), corner], dim=-1)
    # |A|, |N| and hence the balanced off-diagonal blocks are at most |V|, or 1.
    exponential = matrix_exponential(torch.cat([top, bottom], dim=-2), 2.0 * max(1.0, max_norm))[..., :p]
    return x @ exponential[..., :p, :] + n @ (exponential[..., p:, :] / size)


# With W = [[A, -N^T], [N, 0]] of V = XA + N the largest |W|_2 / |V|_2 is 2 / sqrt 3, for |N| = sqrt 2 |A|.
CANONICAL_TURN = 0.5 * math.sqrt(3.0) * math.pi


@dataclass(frozen=True)
class Geodesic(OrthonormalRetraction):
    """The exponential map of the embedded or of the canonical metric, with steps above ``max_norm`` shortened.

    On Grassmann, SO(n) and O(n) the two are the same. On tall matrices the canonical one comes back from
    pi sqrt(3)/2 = 2.72 on at the earliest, and steps are shortened to that in any case. Several times the cost of the
    others; it ends with the polish.

    Raises:
        ValueError: the metric is neither, or ``max_norm`` is not in (0, pi]: beyond, a geodesic comes back.
    """

    metric: Literal["embedded", "canonical"] = "embedded"
    max_norm: float = math.pi
    grassmann_order = math.inf
    rotation_order = math.inf

    def __post_init__(self) -> None:
        if self.metric not in ("embedded", "canonical"):
            raise ValueError(f"metric must be 'embedded' or 'canonical', got {self.metric!r}")
        if not 0.0 < self.max_norm <= math.pi:
            raise ValueError(f"max_norm must be in (0, pi], beyond which a geodesic comes back; got {self.max_norm}")

    def on_grassmann(self) -> Geodesic:
        """Return it with steps up to pi/2."""
        return Geodesic(self.metric, min(self.max_norm, math.pi / 2))

    @property
    def order(self) -> float:  # type: ignore[override]
        """Infinite if this is the embedded metric's geodesic."""
        return math.inf if self.metric == "embedded" else 1

    @property
    def canonical_order(self) -> float:  # type: ignore[override]
        """Infinite if this is the canonical metric's geodesic."""
        return math.inf if self.metric == "canonical" else 1

    def __call__(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the geodesic's point at time 1."""
        canonical = self.metric == "canonical"
        tall = x.shape[-2] > x.shape[-1]
        max_norm = min(self.max_norm, CANONICAL_TURN) if canonical and tall else self.max_norm
        geodesic = canonical_geodesic if canonical else embedded_geodesic
        return geodesic(x, _shortened(v.to(x.dtype), max_norm), max_norm)
