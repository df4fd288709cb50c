"""Row and column statistics of matrices: only diagonals are ever formed, never d x d or p x p products."""

from __future__ import annotations

from subspace_kernels import cross
from torch import Tensor


def cross_means(a: Tensor, b: Tensor, size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """Return the row means and the column means of A * B, entry by entry.

    Args:
        a, b: ``(..., d, p)``.
        size: the true ``(d, p)`` if the matrices are padded with zeros.

    Returns:
        ``(..., d)`` = diag(A B^T)/p and ``(..., p)`` = diag(A^T B)/d. With A = B these are the row and column
        statistics of the subspace adaptation paper (arXiv 2501.15235), as means, so that they do not depend on size.
        Cost: one pass over A and B.
    """
    d, p = size or a.shape[-2:]
    rows, columns = cross(a, b)
    return rows / p, columns / d


def matrix_mean(values: Tensor, count: int) -> Tensor:
    """Return the mean over the last dimension of its first ``count`` entries; the others are padding."""
    return values[..., :count].mean(dim=-1)
