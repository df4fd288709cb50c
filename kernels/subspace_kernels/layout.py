"""How the rows and columns of many matrices of any sizes lie end to end in one batch of coordinates.

The network acts on one coordinate at a time, so all rows and all columns of all matrices are one batch of N
coordinates: first the rows of every group, then the columns of every group. Nothing is padded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The shapes ``(..., d, p)`` of the groups, and where their coordinates lie.

    Attributes:
        shapes: of the groups' tensors.
        padded_from: for groups whose matrices were padded with zero rows and columns, their true sizes ``(d, p)``;
            means are then over true rows and columns only, so that padding changes nothing. Empty: nothing is padded.
    """

    shapes: tuple[tuple[int, ...], ...]
    padded_from: tuple[tuple[int, int], ...] = ()

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """The true ``(d, p)`` of each group."""
        return self.padded_from or tuple((shape[-2], shape[-1]) for shape in self.shapes)

    @property
    def matrix_counts(self) -> tuple[int, ...]:
        """Matrices per group."""
        return tuple(math.prod(shape[:-2]) for shape in self.shapes)

    @property
    def matrices(self) -> int:
        """The number of matrices, all batches together."""
        return sum(self.matrix_counts)

    @property
    def entries(self) -> int:
        """The number of entries of all matrices."""
        return sum(map(math.prod, self.shapes))

    @property
    def row_sizes(self) -> tuple[int, ...]:
        """Rows per group, all matrices of its batch together."""
        return tuple(math.prod(shape[:-1]) for shape in self.shapes)

    @property
    def column_sizes(self) -> tuple[int, ...]:
        """Columns per group, all matrices of its batch together."""
        return tuple(math.prod(shape[:-2]) * shape[-1] for shape in self.shapes)

    @property
    def rows(self) -> int:
        """The number of row coordinates."""
        return sum(self.row_sizes)

    @property
    def columns(self) -> int:
        """The number of column coordinates."""
        return sum(self.column_sizes)

    def pack(self, rows: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
        """Join per-group ``(..., d)`` row values and ``(..., p)`` column values into one ``(N,)`` tensor."""
        return torch.cat([value.reshape(-1) for value in (*rows, *columns)])

    def unpack(self, packed: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Invert :meth:`pack`; leading dimensions of ``packed`` ``(..., N)`` are kept in front."""
        return self.split_rows(packed[..., : self.rows]), self.split_columns(packed[..., self.rows :])

    def split_rows(self, rows: Tensor) -> list[Tensor]:
        """Cut packed row values ``(*leading, rows)`` into one ``(*leading, ..., d)`` tensor a group."""
        parts = torch.split(rows, list(self.row_sizes), dim=-1)
        return [part.reshape(*rows.shape[:-1], *shape[:-1]) for part, shape in zip(parts, self.shapes, strict=True)]

    def split_columns(self, columns: Tensor) -> list[Tensor]:
        """Cut packed column values ``(*leading, columns)`` into one ``(*leading, ..., p)`` tensor a group."""
        parts = torch.split(columns, list(self.column_sizes), dim=-1)
        return [
            part.reshape(*columns.shape[:-1], *shape[:-2], shape[-1])
            for part, shape in zip(parts, self.shapes, strict=True)
        ]

    def per_group(self, per_matrix: Tensor) -> list[Tensor]:
        """Cut ``(*leading, B)`` values, one a matrix, into one ``(*leading, ...)`` tensor a group."""
        parts = torch.split(per_matrix, list(self.matrix_counts), dim=-1)
        return [
            part.reshape((*per_matrix.shape[:-1], *shape[:-2])) for part, shape in zip(parts, self.shapes, strict=True)
        ]

    def spread(self, per_matrix: Sequence[Tensor]) -> Tensor:
        """Give every coordinate the value of its matrix: per-group ``(*leading, ...)`` tensors to ``(*leading, N)``.

        ``...`` is the batch of the group; ``leading`` is the same for all groups.
        """
        rows, columns = [], []
        for value, shape in zip(per_matrix, self.shapes, strict=True):
            leading = value.shape[: value.ndim - len(shape) + 2]
            value = value[..., None]
            rows.append(value.expand(*leading, *shape[:-1]).reshape(*leading, -1))
            columns.append(value.expand(*leading, *shape[:-2], shape[-1]).reshape(*leading, -1))
        return torch.cat([*rows, *columns], dim=-1)
