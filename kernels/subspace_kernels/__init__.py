"""Two operations that close the derivatives of subspace adaptation, on lists of matrices of any shapes.

``cross`` takes row and column sums of products, ``rank2`` scales rows and columns; the derivative of each, of any
order, is made of the other. This package knows nothing of ``subspace_meta``.
"""

from subspace_kernels.reference import cross, rank2

__all__ = ["cross", "rank2"]
