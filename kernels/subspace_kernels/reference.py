"""The operations in plain torch, one matrix (or a batch of equal shape) at a time."""

from __future__ import annotations

from torch import Tensor


def cross(a: Tensor, b: Tensor, u: Tensor | None = None, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return rows_i = sum_j A_ij B_ij v_j and columns_j = sum_i A_ij B_ij u_i.

    Args:
        a, b: ``(..., d, p)``.
        u: ``(..., d)``; ``None`` is all ones.
        v: ``(..., p)``; ``None`` is all ones.

    Returns:
        ``(..., d)`` and ``(..., p)``.
    """
    product = a * b
    rows = product.sum(dim=-1) if v is None else (product @ v[..., None])[..., 0]
    columns = product.sum(dim=-2) if u is None else (u[..., None, :] @ product)[..., 0, :]
    return rows, columns


def rank2(x: Tensor, a: Tensor, v: Tensor, u: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """Return X * (a v^T + u b^T), entry by entry: diag(a) X diag(v) + diag(u) X diag(b).

    Args:
        x: ``(..., d, p)``.
        a, u: ``(..., d)``.
        v, b: ``(..., p)``; without ``u`` and ``b`` the second term is absent.
    """
    scaled = a[..., :, None] * x * v[..., None, :]
    if u is None or b is None:
        return scaled
    return scaled + u[..., :, None] * x * b[..., None, :]
