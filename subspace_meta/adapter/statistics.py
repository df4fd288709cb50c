"""Row and column statistics of matrices: only diagonals are ever formed, never d x d or p x p products."""

from __future__ import annotations

from torch import Tensor


def cross_means(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row means and the column means of A * B, entry by entry.

    Args:
        a, b: ``(..., d, p)``.

    Returns:
        ``(..., d)`` = diag(A B^T)/p and ``(..., p)`` = diag(A^T B)/d. With A = B these are the row and column
        statistics of the subspace adaptation paper (arXiv 2501.15235), as means, so that they do not depend on size.
        Cost: one pass over A and B.
    """
    product = a * b
    return product.mean(dim=-1), product.mean(dim=-2)
