"""Square root and logarithm of symmetric positive definite matrices, with finite derivatives at equal eigenvalues.

The derivative of an eigenvalue decomposition divides by eigenvalue gaps: NaN at the identity, where every SPD problem
starts. Here the decomposition gives a *constant* starting value F_0 alone (its input is detached), and a few chord
Newton steps for the inverse function g (square, exponential),

    F <- F + (Dg(F_0))^{-1} [A - g(F)],

make the result a differentiable function of A. At the solution every step adds one order: after k steps the derivatives
up to order k are exact (implicit function theorem), and ``STEPS`` = 3 serves the loss, its gradient and the
meta-gradient's second derivatives. Dg(F_0)^{-1} divides by the divided differences of g in F_0's eigenbasis (Daleckii
and Krein 1965; Higham, "Functions of Matrices", 2008, theorem 3.11), which are positive for an increasing g: nothing to
divide by zero. The steps are plain tensor operations, so grad, jvp, vmap and torch.compile need no rule for them, and
they also remove the rounding error of the decomposition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subspace_meta.manifolds.base import symmetric_part

STEPS = 3


def _start(a: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, raised to at least eps times the largest, and eigenvectors of the detached ``a``."""
    values, vectors = torch.linalg.eigh(symmetric_part(a.detach()))
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
        logarithm = logarithm + _solve_in(vectors, differences, a - torch.linalg.matrix_exp(logarithm))
    return symmetric_part(logarithm)
