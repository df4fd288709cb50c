"""The operations of subspace adaptation on lists of matrices of any shapes, with their kernels.

``cross`` takes row and column sums of products, ``rank2`` scales rows and columns; the derivative of each, of any
order, is made of the other. The stages of a learned step are built on them. This package knows nothing of
``subspace_meta``.
"""

from subspace_kernels.layout import Layout
from subspace_kernels.operations import (
    column_means,
    cross,
    cross_means,
    directions,
    lstm_cell,
    moments,
    rank2,
    row_means,
)
from subspace_kernels.reference import Inputs, Network

__all__ = [
    "Inputs",
    "Layout",
    "Network",
    "column_means",
    "cross",
    "cross_means",
    "directions",
    "lstm_cell",
    "moments",
    "rank2",
    "row_means",
]
