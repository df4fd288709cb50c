"""Physical padding to common buckets, in torch: the reference that virtual padding is measured against.

Every matrix is filled up with zeros to a bucket's common shape, a bucket is stacked and computed at once, the results
are cut. Sums are taken by one fixed tree, halving the tiles' entries and then the tiles: appended zeros only meet the
tree as second summands that change nothing. So the padded results equal, bit by bit, those of the same tree applied to
each matrix by itself, padded no further than its last tile. Everything here is differentiable.

Values of rows and columns are packed as in :mod:`subspace_kernels.reference`. Half precision is summed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from subspace_kernels.launch import TileClass, tile_class
from subspace_kernels.layout import Layout
from subspace_kernels.reference import layout_of


def halving_sum(x: Tensor) -> Tensor:
    """Return the sum over the last dimension: second half added to the first until one entry is left.

    The size is first filled up to a power of two with zeros; how far, does not change a bit of the result.
    """
    size = x.shape[-1]
    x = pad(x, (0, (1 << max(0, size - 1).bit_length()) - size))
    while x.shape[-1] > 1:
        first, second = x.chunk(2, dim=-1)
        x = first + second
    return x[..., 0] + 0.0  # a sum of negative zeros is made positive, as by a further zero


def _to_multiple(x: Tensor, rows: int, columns: int) -> Tensor:
    """Fill up the last two dimensions with zeros to ``rows`` and ``columns``."""
    return pad(x, (0, columns - x.shape[-1], 0, rows - x.shape[-2]))


def _tree_sums(product: Tensor, row_weights: Tensor, column_weights: Tensor, tile: TileClass) -> tuple[Tensor, Tensor]:
    """Return the row and column sums ``(n, d)``, ``(n, p)`` of ``(n, d, p)`` whose sides are multiples of the tile."""
    n, d, p = product.shape
    if product.dtype in (torch.bfloat16, torch.float16):
        product = product.float()
    by_row = (product * column_weights[:, None, :]).reshape(n, d, p // tile.columns, tile.columns)
    by_column = (product * row_weights[:, :, None]).mT.reshape(n, p, d // tile.rows, tile.rows)
    return halving_sum(halving_sum(by_row)), halving_sum(halving_sum(by_column))


def _tiled_shape(d: int, p: int, tile: TileClass) -> tuple[int, int]:
    """Return d and p rounded up to whole tiles, one at least."""
    return max(1, math.ceil(d / tile.rows)) * tile.rows, max(1, math.ceil(p / tile.columns)) * tile.columns


def bucket_shape(d: int, p: int) -> tuple[int, int]:
    """Return the shape that ``d x p`` matrices are padded to: a power of two of tiles on each side."""
    tile = tile_class(d, p)
    rows, columns = _tiled_shape(d, p, tile)
    return (
        tile.rows << (rows // tile.rows - 1).bit_length(),
        tile.columns << (columns // tile.columns - 1).bit_length(),
    )


def _matrices(x: Tensor) -> Tensor:
    """Return ``(..., d, p)`` as ``(n, d, p)``."""
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def _sides(layout: Layout, rows: Tensor | None, columns: Tensor | None, like: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return per group the row values ``(n, d)`` and the column values ``(n, p)``; ``None`` is all ones."""
    dtype = torch.float32 if like.dtype in (torch.bfloat16, torch.float16) else like.dtype
    rows = like.new_ones(layout.rows, dtype=dtype) if rows is None else rows
    columns = like.new_ones(layout.columns, dtype=dtype) if columns is None else columns
    return [
        (row.reshape(count, shape[-2]), column.reshape(count, shape[-1]))
        for row, column, count, shape in zip(
            layout.split_rows(rows), layout.split_columns(columns), layout.matrix_counts, layout.shapes, strict=True
        )
    ]


def _buckets(layout: Layout, tensors: Sequence[Tensor]) -> list[tuple[tuple[int, int], TileClass, list[int]]]:
    """Return the common shape, the tile class and the groups of every bucket."""
    found: dict[tuple[object, ...], tuple[tuple[int, int], TileClass, list[int]]] = {}
    for index, (shape, x) in enumerate(zip(layout.shapes, tensors, strict=True)):
        d, p = shape[-2:]
        common, tile = bucket_shape(d, p), tile_class(d, p)
        found.setdefault((common, tile, x.dtype, x.device), (common, tile, []))[2].append(index)
    return list(found.values())


def _joined(sums: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([rows.reshape(-1) for rows, _ in sums]), torch.cat([columns.reshape(-1) for _, columns in sums])


def cross_tiled(
    a: Sequence[Tensor], b: Sequence[Tensor], u: Tensor | None = None, v: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``reference.cross`` by the fixed tree, group by group, padded to whole tiles only.

    Args:
        a, b: lists, not empty, of ``(..., d, p)``, of equal shapes in pairs.
        u: ``(rows,)`` packed; v: ``(columns,)`` packed; ``None`` is all ones.
    """
    layout = layout_of(a)
    sums = []
    for x, y, (row, column) in zip(a, b, _sides(layout, u, v, a[0]), strict=True):
        d, p = x.shape[-2:]
        tile = tile_class(d, p)
        rows, columns = _tiled_shape(d, p, tile)
        product = _to_multiple(_matrices(x * y), rows, columns)
        by_row, by_column = _tree_sums(product, pad(row, (0, rows - d)), pad(column, (0, columns - p)), tile)
        sums.append((by_row[:, :d], by_column[:, :p]))
    return _joined(sums)


def cross_padded(
    a: Sequence[Tensor], b: Sequence[Tensor], u: Tensor | None = None, v: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``reference.cross`` by the fixed tree, one computation a bucket of physically padded matrices.

    Arguments and results are those of :func:`cross_tiled`, equal to them bit by bit. Padding copies A and B.
    """
    layout = layout_of(a)
    sides = _sides(layout, u, v, a[0])
    sums: list[tuple[Tensor, Tensor]] = [(a[0], a[0])] * len(a)
    for (rows, columns), tile, groups in _buckets(layout, a):
        stacked = [torch.cat([_to_multiple(_matrices(xs[i]), rows, columns) for i in groups]) for xs in (a, b)]
        row = torch.cat([pad(sides[i][0], (0, rows - sides[i][0].shape[-1])) for i in groups])
        column = torch.cat([pad(sides[i][1], (0, columns - sides[i][1].shape[-1])) for i in groups])
        by_row, by_column = _tree_sums(stacked[0] * stacked[1], row, column, tile)
        counts = [layout.matrix_counts[i] for i in groups]
        for i, some_rows, some_columns in zip(
            groups, torch.split(by_row, counts), torch.split(by_column, counts), strict=True
        ):
            d, p = layout.shapes[i][-2:]
            sums[i] = some_rows[:, :d], some_columns[:, :p]
    return _joined(sums)


def _scaled(x: Tensor, a: Tensor, v: Tensor, u: Tensor | None, b: Tensor | None) -> Tensor:
    """Return X * (a v^T [+ u b^T]) of ``(n, d, p)``."""
    scaled = a[:, :, None] * x * v[:, None, :]
    return scaled if u is None or b is None else scaled + u[:, :, None] * x * b[:, None, :]


def rank2_tiled(
    x: Sequence[Tensor], a: Tensor, v: Tensor, u: Tensor | None = None, b: Tensor | None = None
) -> list[Tensor]:
    """Return ``reference.rank2``, group by group; ``a, u`` packed rows, ``v, b`` packed columns."""
    layout = layout_of(x)
    if not len(x):
        return []
    first = _sides(layout, a, v, x[0])
    second = [(None, None)] * len(x) if u is None or b is None else _sides(layout, u, b, x[0])
    return [
        _scaled(_matrices(matrix), *one, *two).reshape(matrix.shape)
        for matrix, one, two in zip(x, first, second, strict=True)
    ]


def rank2_padded(
    x: Sequence[Tensor], a: Tensor, v: Tensor, u: Tensor | None = None, b: Tensor | None = None
) -> list[Tensor]:
    """Return ``reference.rank2``, one computation a bucket of physically padded matrices; copies X.

    Arguments and results are those of :func:`rank2_tiled`, equal to them bit by bit.
    """
    layout = layout_of(x)
    if not len(x):
        return []
    pairs = [_sides(layout, a, v, x[0])] + ([] if u is None or b is None else [_sides(layout, u, b, x[0])])
    results = list(x)
    for (rows, columns), _, groups in _buckets(layout, x):
        factors: list[Tensor | None] = []
        for sides in pairs:
            factors.append(torch.cat([pad(sides[i][0], (0, rows - sides[i][0].shape[-1])) for i in groups]))
            factors.append(torch.cat([pad(sides[i][1], (0, columns - sides[i][1].shape[-1])) for i in groups]))
        left, right, more_left, more_right = (*factors, None, None)[:4]
        assert left is not None
        assert right is not None
        stacked = torch.cat([_to_multiple(_matrices(x[i]), rows, columns) for i in groups])
        scaled = _scaled(stacked, left, right, more_left, more_right)
        counts = [layout.matrix_counts[i] for i in groups]
        for i, part in zip(groups, torch.split(scaled, counts), strict=True):
            d, p = layout.shapes[i][-2:]
            results[i] = part[:, :d, :p].reshape(layout.shapes[i])
    return results
