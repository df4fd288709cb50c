"""Exponential of matrices; square root, logarithm, exponential of symmetric ones, differentiable everywhere.

*Exponential.* torch.linalg.matrix_exp (torch 2.13) is off by up to 1e-5 in float32 (1-norm 0.55) and 4e-11 in float64
(1-norm 0.04), so this is another one: Taylor's polynomial for exp - 1 at A / 2^s, then s doublings F <- 2F + F^2, which
keep the error relative to A itself (Higham, "Functions of Matrices", 2008, section 10.7.3 and problem 10.7). The number
of doublings follows from a bound on the norm that the caller knows, not from values.

*Symmetric matrices.* The derivative of an eigenvalue decomposition divides by eigenvalue gaps: NaN at the identity,
where every SPD problem starts. Here the decomposition A = V diag(l) V^T is *constant* (its input is detached) and
gives the value V f(l) V^T alone. The derivatives come from D = V^T (A - A.detach()) V, whose value is 0 and whose
derivative is that of A in the eigenbasis: with f = g^{-1}, g the square or exp, chord Newton steps for
g(f(l) + X) - g(f(l)) = D,

    X <- X + [D - (g(f(l) + X) - g(f(l)))] / Dg(f(l)),     X = 0 at first,

give X the value 0 and, after k steps, the right derivatives up to order k (implicit function theorem); ``STEPS`` = 3
serves the loss, its gradient and the meta-gradient's second derivatives. Dg divides by the divided differences of g
(Daleckii and Krein 1965; Higham 2008, theorem 3.11), which are positive for an increasing g: nothing to divide by zero.
The difference g(. + X) - g(.) is computed as such, from products that contain X, so nothing cancels: every entry of the
derivatives keeps its digits, however far apart the eigenvalues are. The steps are plain tensor operations, so grad,
jvp, vmap and torch.compile need no rule for them.

Eigenvalues enter relative to each other, so f(c A) is as accurate as f(A). A decomposition has an error of eps times
the *largest* eigenvalue: smaller eigenvalues lose digits in proportion, and those below eps times the largest count as
that. Where a factor K of A = K K^T is at hand, a singular value decomposition of K keeps half of the digits lost.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from subspace_meta._tracing import has_values
from subspace_meta.manifolds.base import identity_like

STEPS = 3

# Norm of A / 2^s, where Taylor's polynomial of degree 9 (16) is exact to float32 (float64), two derivatives included.
_TAYLOR_NORM = 0.4

# The same for differences of exponentials, whose Taylor polynomial has degree 6 (10): as many products as doublings.
# Ten doublings serve logarithms that are up to 128 apart; all positive numbers of float32 are within 176.
_DIFFERENCE_DOUBLINGS = 10
_DIFFERENCE_DEGREE = {torch.float32: 6, torch.float64: 10}


def matrix_exponential(a: Tensor, max_norm: float) -> Tensor:
    """Return exp(A) of ``(..., n, n)`` matrices whose norm is at most ``max_norm`` (a number: it fixes the work).

    4 (float64: 6) products and one for each doubling, of which there are log2(max_norm) + 1.3, rounded up. Beyond the
    bound the result loses accuracy, and from about four times the bound it is wrong. The error is eps relative to the
    identity: for symmetric matrices with eigenvalues far below 0 there is :func:`symmetric_exponential`.
    """
    block = 4 if a.dtype == torch.float64 else 3
    doublings = max(0, math.ceil(math.log2(max_norm / _TAYLOR_NORM)))
    powers = [a * 0.5**doublings]
    while len(powers) < block:
        powers.append(powers[-1] @ powers[0])
    # Paterson and Stockmeyer: sum_{k=1..q^2} A^k / k! in blocks of q, Horner's rule in A^q, no constant term.
    total = torch.zeros_like(a)
    for start in range(block * (block - 1), -1, -block):
        if start < block * (block - 1):
            total = powers[-1] @ total
        for index, power in enumerate(powers, start=1):
            total = torch.add(total, power, alpha=1.0 / math.factorial(start + index))
    for _ in range(doublings):
        total = 2.0 * total + total @ total
    return identity_like(a) + total


def _constant_eigen(a: Tensor) -> tuple[Tensor, Tensor]:
    """Return ascending eigenvalues and eigenvectors of the detached symmetric part of ``(..., n, n)`` matrices.

    A matrix that is not finite gives those of the identity, because the decomposition would raise; the caller's
    expressions in ``a`` itself are NaN.
    """
    constant = a.detach()
    constant = 0.5 * (constant + constant.mT)
    finite = torch.isfinite(constant).all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
    values, vectors = torch.linalg.eigh(torch.where(finite, constant, identity_like(constant)))
    return values, vectors


def _positive_eigen(a: Tensor) -> tuple[Tensor, Tensor]:
    """Return :func:`_constant_eigen`'s result, the eigenvalues raised to at least eps times the largest.

    The smallest normal number is the floor of the floor: it keeps divisors positive for a matrix that is 0.
    """
    values, vectors = _constant_eigen(a)
    info = torch.finfo(a.dtype)
    return torch.maximum(values, info.eps * values[..., -1:].clamp(min=info.tiny / info.eps)), vectors


def _difference_in(vectors: Tensor, a: Tensor) -> Tensor:
    """Return D of the module's text."""
    difference = a - a.detach()
    return vectors.mT @ (0.5 * (difference + difference.mT)) @ vectors


def known_zero(difference: Tensor) -> bool:
    """Return whether a ``difference`` of value 0 carries no derivative either: nothing to compute then."""
    if not has_values(difference) or difference.requires_grad:
        return False
    tangent: Tensor | None = torch.autograd.forward_ad.unpack_dual(difference).tangent  # type: ignore[no-untyped-call]
    return tangent is None


def outer_sum(row: Tensor, column: Tensor) -> Tensor:
    """Return r_i + c_j of ``(..., n)`` tensors."""
    return row[..., :, None] + column[..., None, :]


def compose(vectors: Tensor, values: Tensor, difference: Tensor) -> Tensor:
    """Return V (diag(values) + X) V^T, exactly symmetric for a symmetric X."""
    result = vectors @ (torch.diag_embed(values) + difference) @ vectors.mT
    return 0.5 * (result + result.mT)


def symmetric_square_root(a: Tensor) -> Tensor:
    """Return the symmetric positive definite square root of a ``(..., n, n)`` tensor. 20n^3 flops."""
    values, vectors = _positive_eigen(a)
    roots = values.sqrt()
    start = (vectors * roots[..., None, :]) @ vectors.mT
    # The divided difference of the square: (s^2 - t^2) / (s - t) = s + t. And (S + X)^2 - S^2 = SX + XS + X^2.
    divided = outer_sum(roots, roots)
    d = _difference_in(vectors, a)
    x = d / divided
    for _ in range(STEPS - 1):
        x = (d - x @ x) / divided
    # One more step for the value: it removes the rounding errors of the decomposition.
    residual = vectors.mT @ (a.detach() - start @ start) @ vectors
    root = start + vectors @ (x + residual / divided) @ vectors.mT
    return 0.5 * (root + root.mT)


def polar_difference(values: Tensor, d: Tensor) -> Tensor:
    """Return Z: I + Z is the orthogonal polar factor of diag(s) + D, for positive ``(..., n)`` s and D of value 0.

    Z = A + S with skew A and symmetric S: (I + Z)(I + Z)^T = I says S = -Z Z^T / 2, and (diag(s) + D)(I + Z)^T = its
    transpose says that s_i A_ij + A_ij s_j is the skew part, doubled, of D + D Z^T + diag(s) S. 10n^3 flops.
    """
    if known_zero(d):
        return d
    divided = outer_sum(values, values)
    z = (d - d.mT) / divided
    for _ in range(STEPS - 1):
        symmetric = -0.5 * (z @ z.mT)
        rest = d + d @ z.mT + values[..., :, None] * symmetric
        z = symmetric + (rest - rest.mT) / divided
    return z


def _half_ratio(logs: Tensor) -> Tensor:
    """Return sinh(h)/h, h half of the differences of ``(..., n)`` logarithms: exp's divided difference, whitened."""
    half = 0.5 * outer_sum(logs, -logs)
    # Below 0.01 the series is exact to 3e-17.
    near = half.abs() < 0.01
    far = torch.where(near, 1.0, half)
    return torch.where(near, 1.0 + half * half / 6.0 * (1.0 + half * half / 20.0), far.sinh() / far)


def _middle(logs: Tensor) -> Tensor:
    """Return the middle of the range of ``(..., n)`` tensors, of shape ``(..., 1)``."""
    return 0.5 * (logs.amax(dim=-1, keepdim=True) + logs.amin(dim=-1, keepdim=True))


def _exponential_difference(logs: Tensor, x: Tensor) -> Tensor:
    """Return exp(diag(g) + X) - exp(diag(g)), exactly 0 for X = 0, for constants |g| <= 64 (less accurate beyond).

    Horner's rule for T(H + Z) - T(H), then doublings (Y + F)^2 - Y^2 = YF + FY + F^2, Y = exp(H 2^j) the constant.
    """
    if known_zero(x):
        return x
    h = logs * 0.5**_DIFFERENCE_DOUBLINGS
    z = x * 0.5**_DIFFERENCE_DOUBLINGS
    degree = _DIFFERENCE_DEGREE[x.dtype]
    # P_m = I + (H + Z) P_{m+1} / m = diag(p) + F
    p = 1.0 + h / degree
    f = z / degree
    for m in range(degree - 1, 0, -1):
        f = (h[..., :, None] * f + z @ f + z * p[..., None, :]) / m
        p = 1.0 + h * p / m
    for j in range(_DIFFERENCE_DOUBLINGS):
        y = (h * 2.0**j).exp()
        f = outer_sum(y, y) * f + f @ f
    return f


def logarithm_difference(logs: Tensor, c: Tensor) -> Tensor:
    """Return X in log(Y (I + C) Y) = diag(g) + X for Y = exp(diag(g) / 2), and C of value 0, by chord steps."""
    if known_zero(c):
        return c
    # Relative to the middle, so that the size of the matrix does not matter.
    logs = logs - _middle(logs)
    scale = (0.5 * outer_sum(logs, logs)).exp()
    ratio = _half_ratio(logs)
    divided = scale * ratio
    d = scale * c
    x = c / ratio
    for _ in range(STEPS - 1):
        x = x + (d - _exponential_difference(logs, x)) / divided
    return x


def symmetric_logarithm(a: Tensor) -> Tensor:
    """Return the symmetric logarithm of a symmetric positive definite ``(..., n, n)`` tensor. 80n^3 (100n^3) flops."""
    values, vectors = _positive_eigen(a)
    roots, logs = values.sqrt(), values.log()
    d = _difference_in(vectors, a)
    return compose(vectors, logs, logarithm_difference(logs, d / (roots[..., :, None] * roots[..., None, :])))


def symmetric_exponential(a: Tensor) -> Tensor:
    """Return exp(A) of a symmetric ``(..., n, n)`` tensor; small eigenvalues keep their digits. 45n^3 (55n^3) flops.

    Derivatives are accurate for eigenvalues up to 128 apart.
    """
    values, vectors = _constant_eigen(a)
    middle = _middle(values)
    difference = _exponential_difference(values - middle, _difference_in(vectors, a))
    return compose(vectors, values.exp(), middle.exp()[..., None] * difference)
