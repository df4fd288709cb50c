"""Exponential of matrices, square root and logarithm of symmetric positive definite ones, differentiable everywhere.

*Exponential.* torch.linalg.matrix_exp (torch 2.13) is off by up to 1e-5 in float32 (1-norm 0.55) and 4e-11 in float64
(1-norm 0.04), so this is another one: Taylor's polynomial for exp - 1 at A / 2^s, then s doublings F <- 2F + F^2, which
keep the error relative to A itself (Higham, "Functions of Matrices", 2008, section 10.7.3 and problem 10.7). The number
of doublings follows from a bound on the norm that the caller knows, not from values.

*Square root and logarithm.* The derivative of an eigenvalue decomposition divides by eigenvalue gaps: NaN at the
identity, where every SPD problem starts. Here the decomposition gives a *constant* starting value F_0 alone (its input
is detached), and a few chord Newton steps for the inverse function g (square, exponential),

    F <- F + (Dg(F_0))^{-1} [A - g(F)],

make the result a differentiable function of A. At the solution every step adds one order: after k steps the derivatives
up to order k are exact (implicit function theorem), and ``STEPS`` = 3 serves the loss, its gradient and the
meta-gradient's second derivatives. Dg(F_0)^{-1} divides by the divided differences of g in F_0's eigenbasis (Daleckii
and Krein 1965; Higham 2008, theorem 3.11), which are positive for an increasing g: nothing to divide by zero. The steps
are plain tensor operations, so grad, jvp, vmap and torch.compile need no rule for them, and they also remove the
rounding error of the decomposition.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from subspace_meta.manifolds.base import identity_like, symmetric_part

STEPS = 3

# The logarithm of an eigenvalue ratio that float64 can hold is at most 36.
LOGARITHM_NORM = 64.0

# Norm of A / 2^s, where Taylor's polynomial of degree 9 (16) is exact to float32 (float64), two derivatives included.
_TAYLOR_NORM = 0.4


def matrix_exponential(a: Tensor, max_norm: float) -> Tensor:
    """Return exp(A) of ``(..., n, n)`` matrices whose norm is at most ``max_norm`` (a number: it fixes the work).

    4 (float64: 6) products and one for each doubling, of which there are log2(max_norm) + 1.3, rounded up. Beyond the
    bound the result loses accuracy, and from about four times the bound it is wrong.
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


def _start(a: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, raised to at least eps times the largest, and eigenvectors of the detached ``a``.

    A matrix that is not finite starts at the identity, because the decomposition would raise; the Newton steps, which
    see ``a`` itself, make the result NaN.
    """
    constant = symmetric_part(a.detach())
    finite = torch.isfinite(constant).all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
    values, vectors = torch.linalg.eigh(torch.where(finite, constant, identity_like(constant)))
    eps = torch.finfo(a.dtype).eps
    return torch.maximum(values, eps * values[..., -1:].clamp(min=eps)), vectors


def _solve_in(vectors: Tensor, differences: Tensor, residual: Tensor) -> Tensor:
    """Divide ``residual`` by ``differences`` in the basis ``vectors``."""
    return vectors @ ((vectors.mT @ residual @ vectors) / differences) @ vectors.mT


def symmetric_square_root(a: Tensor) -> Tensor:
    """Return the symmetric positive definite square root of a ``(..., n, n)`` tensor."""
    values, vectors = _start(a)
    roots = values.sqrt()
    # The divided difference of the square: (s^2 - t^2) / (s - t) = s + t.
    differences = roots[..., :, None] + roots[..., None, :]
    root = (vectors * roots[..., None, :]) @ vectors.mT
    for _ in range(STEPS):
        root = root + _solve_in(vectors, differences, a - root @ root)
    return symmetric_part(root)


def symmetric_logarithm(a: Tensor) -> Tensor:
    """Return the symmetric logarithm of a symmetric positive definite ``(..., n, n)`` tensor."""
    values, vectors = _start(a)
    logs = values.log()
    # The divided difference of exp at s, t with h = (s - t)/2: exp((s + t)/2) sinh(h)/h.
    half = 0.5 * (logs[..., :, None] - logs[..., None, :])
    near = half.abs() < 0.01
    far = torch.where(near, 1.0, half)
    ratio = torch.where(near, 1.0 + half * half / 6.0 * (1.0 + half * half / 20.0), far.sinh() / far)
    differences = (0.5 * (logs[..., :, None] + logs[..., None, :])).exp() * ratio
    logarithm = (vectors * logs[..., None, :]) @ vectors.mT
    for _ in range(STEPS):
        logarithm = logarithm + _solve_in(vectors, differences, a - matrix_exponential(logarithm, LOGARITHM_NORM))
    return symmetric_part(logarithm)
