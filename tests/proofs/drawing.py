"""What the tests of statements draw and compare: shapes, points, tangent vectors, made without the library."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from making import normal
from torch import Tensor

seeds = st.integers(0, 10**6)


@st.composite
def tall(draw: st.DrawFn, smallest: int = 1, spare: int = 0) -> tuple[int, int]:
    """Shapes (d, p) with p <= 4 and p + spare <= d <= 8."""
    p = draw(st.integers(smallest, 4))
    return draw(st.integers(p + spare, 8)), p


def dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum())


def close(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def orthonormal(d: int, p: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(d, p, seed=seed))[0]


def tangent(x: Tensor, seed: int) -> Tensor:
    """X A + N with a skew A and X^T N = 0: a tangent vector, made without the library."""
    a, n = normal(x.shape[1], x.shape[1], seed=seed), normal(*x.shape, seed=seed + 1)
    return x @ (a - a.mT) + n - x @ (x.mT @ n)


def step_within(x: Tensor, seed: int, norm: float) -> Tensor:
    """A tangent vector of at most this Frobenius norm."""
    u = tangent(x, seed)
    return u * min(1.0, norm / max(float(u.norm()), 1e-30))


def is_tangent(x: Tensor, v: Tensor) -> None:
    close(x.mT @ v + v.mT @ x, torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype))


def is_orthonormal(x: Tensor, tolerance: float = 1e-11) -> None:
    close(x.mT @ x, torch.eye(x.shape[1], dtype=x.dtype), tolerance)


def canonical(x: Tensor, u: Tensor, v: Tensor) -> float:
    """tr U^T (I - X X^T / 2) V, with the d x d matrix."""
    return dot(u, (torch.eye(x.shape[0], dtype=x.dtype) - 0.5 * x @ x.mT) @ v)


def definite(n: int, seed: int) -> Tensor:
    a = normal(n, 2 * n, seed=seed)
    return a @ a.mT / (2 * n) + 0.05 * torch.eye(n, dtype=torch.float64)


def symmetric(n: int, seed: int) -> Tensor:
    a = normal(n, n, seed=seed)
    return a + a.mT


def permutation(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))
