"""The operations in plain torch: what every kernel is compared with, and what runs where no kernel does.

Matrices come as a list of tensors ``(..., d, p)`` of any shapes, a batch of equal shape each; values of their rows and
columns come packed, as :class:`~subspace_kernels.layout.Layout` says: N coordinates, rows first, of B matrices.
Everything here works under ``torch.func`` transforms and ``torch.compile(fullgraph=True)``, to any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from subspace_kernels.layout import Layout

FLOOR = 1e-6  # an energy a million times below its matrix's mean tells the network no more than that
TINY = 1e-30  # keeps 0/0 finite


def log_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return log(sqrt(numerator / denominator)) of two energies, bounded below by log(sqrt(FLOOR))."""
    return 0.5 * torch.log(numerator / (denominator + TINY) + FLOOR)


def at_least_single(x: Tensor) -> Tensor:
    """Return ``x`` in float32 if its type is shorter: sums are never taken in a short type."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def cross_matrix(a: Tensor, b: Tensor, u: Tensor | None = None, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return rows_i = sum_j A_ij B_ij v_j and columns_j = sum_i A_ij B_ij u_i of one tensor.

    Args:
        a, b: ``(..., d, p)``.
        u: ``(..., d)``; ``None`` is all ones.
        v: ``(..., p)``; ``None`` is all ones.

    Returns:
        ``(..., d)`` and ``(..., p)``.
    """
    product = at_least_single(a) * at_least_single(b)
    rows = product.sum(dim=-1) if v is None else (product @ v[..., None])[..., 0]
    columns = product.sum(dim=-2) if u is None else (u[..., None, :] @ product)[..., 0, :]
    return rows, columns


def rank2_matrix(x: Tensor, a: Tensor, v: Tensor, u: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """Return X * (a v^T + u b^T), entry by entry: diag(a) X diag(v) + diag(u) X diag(b), of one tensor.

    Args:
        x: ``(..., d, p)``.
        a, u: ``(..., d)``.
        v, b: ``(..., p)``; without ``u`` and ``b`` the second term is absent.
    """
    scaled = a[..., :, None] * x * v[..., None, :]
    if u is None or b is None:
        return scaled
    return scaled + u[..., :, None] * x * b[..., None, :]


def cross_matrix_means(a: Tensor, b: Tensor, size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """Return the row means and the column means of A * B of one tensor.

    Args:
        a, b: ``(..., d, p)``.
        size: the true ``(d, p)`` if the matrices are padded with zeros.

    Returns:
        ``(..., d)`` = diag(A B^T)/p and ``(..., p)`` = diag(A^T B)/d. With A = B these are the row and column
        statistics of the subspace adaptation paper (arXiv 2501.15235), as means, so that they do not depend on size.
        Only diagonals are formed, never d x d or p x p products: one pass over A and B.
    """
    d, p = size or a.shape[-2:]
    rows, columns = cross_matrix(a, b)
    return rows / p, columns / d


def layout_of(tensors: Sequence[Tensor]) -> Layout:
    """Return the layout of a list of tensors."""
    return Layout(tuple(tuple(tensor.shape) for tensor in tensors))


def _sides(layout: Layout, rows: Tensor | None, columns: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    """Cut packed row and column values into groups; ``None`` gives ``None`` for every group."""
    groups = len(layout.shapes)
    return (
        [None] * groups if rows is None else layout.split_rows(rows),  # type: ignore[list-item]
        [None] * groups if columns is None else layout.split_columns(columns),  # type: ignore[list-item]
    )


def cross(
    a: Sequence[Tensor], b: Sequence[Tensor], u: Tensor | None = None, v: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the packed row sums and the packed column sums of A * B, weighted by v and u; see ``cross_matrix``.

    Args:
        a, b: lists of ``(..., d, p)``, of equal shapes in pairs.
        u: ``(rows,)`` packed; v: ``(columns,)`` packed; ``None`` is all ones.
    """
    if not a:
        return torch.zeros(0), torch.zeros(0)
    layout = layout_of(a)
    us, vs = _sides(layout, u, v)
    sums = [cross_matrix(*group) for group in zip(a, b, us, vs, strict=True)]
    return (
        torch.cat([rows.reshape(-1) for rows, _ in sums]),
        torch.cat([columns.reshape(-1) for _, columns in sums]),
    )


def rank2(x: Sequence[Tensor], a: Tensor, v: Tensor, u: Tensor | None = None, b: Tensor | None = None) -> list[Tensor]:
    """Return X * (a v^T + u b^T) of every matrix; ``a, u`` packed rows, ``v, b`` packed columns."""
    if not x:
        return []
    layout = layout_of(x)
    rows, columns = _sides(layout, a, v)
    more_rows, more_columns = _sides(layout, u, b)
    return [rank2_matrix(*group) for group in zip(x, rows, columns, more_rows, more_columns, strict=True)]


def cross_means(a: Sequence[Tensor], b: Sequence[Tensor], layout: Layout) -> Tensor:
    """Return the row means and the column means of A * B, packed ``(N,)``; see ``cross_matrix_means``."""
    if not a:
        return torch.zeros(0)
    means = [cross_matrix_means(*group) for group in zip(a, b, layout.sizes, strict=True)]
    return layout.pack(*zip(*means, strict=True))


def moments(
    r: Sequence[Tensor],
    m: Sequence[Tensor],
    weight: Tensor,
    layout: Layout,
    means: Callable[[Sequence[Tensor], Sequence[Tensor], Layout], Tensor] = cross_means,
) -> tuple[list[Tensor], Tensor]:
    """Return M' = M + weight (R - M), and the packed means of R * R, M * M and R * M, ``(3, N)``.

    ``weight`` is one number, or one for each matrix, ``(B,)``. The means with M' follow from these as sums; those with
    M would follow from its only as differences, which cancel.
    """
    weights = layout.per_group(weight.expand(layout.matrices))
    momentum = [old + w[..., None, None] * (new - old) for old, new, w in zip(m, r, weights, strict=True)]
    pairs = ((r, r), (m, m), (r, m))
    return momentum, torch.stack([means(a, b, layout) for a, b in pairs])


def matrix_mean(values: Tensor, count: int) -> Tensor:
    """Return the mean over the last dimension of its first ``count`` entries; the others are padding."""
    return values[..., :count].mean(dim=-1)


def row_means(rows: Tensor, layout: Layout) -> Tensor:
    """Return the mean over the rows of every matrix: ``(k, rows)`` to ``(k, B)``."""
    groups = zip(layout.split_rows(rows), layout.sizes, strict=True)
    return torch.cat([matrix_mean(value, d).reshape(len(rows), -1) for value, (d, _) in groups], dim=-1)


def column_means(columns: Tensor, layout: Layout) -> Tensor:
    """Return the mean over the columns of every matrix: ``(k, columns)`` to ``(k, B)``."""
    groups = zip(layout.split_columns(columns), layout.sizes, strict=True)
    return torch.cat([matrix_mean(value, p).reshape(len(columns), -1) for value, (_, p) in groups], dim=-1)


def directions(
    r: Sequence[Tensor],
    m: Sequence[Tensor],
    mix: Tensor | None,
    scale: Tensor,
    layout: Layout,
    scaling: Callable[[Sequence[Tensor], Tensor, Tensor], list[Tensor]] = rank2,
) -> tuple[list[Tensor], Tensor]:
    """Return D = diag(l) (R + mix (M - R)) diag(k) of every matrix, and the mean squared length of its columns.

    Args:
        r, m: lists of ``(..., d, p)``; ``m`` is empty and ``mix`` is ``None`` without momentum.
        mix: ``(B,)``.
        scale: ``(N,)``, l on rows and k on columns.

    Returns:
        The directions, and sum D^2 / p, ``(B,)``.
    """
    if mix is None:
        mixed = list(r)
    else:
        mixes = layout.per_group(mix)
        mixed = [torch.lerp(a, b, part[..., None, None]) for a, b, part in zip(r, m, mixes, strict=True)]
    scaled = scaling(mixed, scale[: layout.rows], scale[layout.rows :])
    squares = [d.square().sum(dim=(-2, -1)).reshape(-1) / p for d, (_, p) in zip(scaled, layout.sizes, strict=True)]
    return scaled, torch.cat(squares)


def lstm(weight: Tensor, bias: Tensor, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Advance an LSTM layer by one step (Hochreiter and Schmidhuber 1997, with forget gate), coordinates last.

    Args:
        weight: ``(4H, F + H)``, for features and hidden units side by side; gates in the order input, forget,
            candidate, output.
        bias: ``(4H, 1)``.
        x: ``(F, N)``.
        hidden, cell: ``(H, N)``.

    Returns:
        The new ``hidden`` and ``cell``.
    """
    gates = weight @ torch.cat([x, hidden]) + bias
    enter, forget, candidate, leave = gates.chunk(4, dim=0)
    cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(candidate)
    return torch.sigmoid(leave) * torch.tanh(cell), cell


class Network(NamedTuple):
    """The weights of the coordinate network; F = E + Q + C + 1 features, H hidden units, O outputs."""

    weight: Tensor  # (4H, F + H)
    bias: Tensor  # (4H, 1)
    head_weight: Tensor  # (2 O, H): O outputs of rows, then O outputs of columns
    head_bias: Tensor  # (2 O, 1)
    skip: Tensor  # (2, E): from the relative energies straight to the first output, for rows and for columns


class Inputs(NamedTuple):
    """What the coordinate network sees, besides its state."""

    energies: Tensor  # (E, N): enter relative to their matrix, as log_ratio
    means: Tensor  # (E, B): the mean of each energy over its matrix
    raw: Tensor  # (Q, N): enter as they are
    context: Tensor  # (C, B): the same for every coordinate of a matrix


def lstm_cell(
    network: Network, inputs: Inputs, hidden: Tensor, cell: Tensor, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """Advance the coordinate network by one step: features, LSTM, heads, scale.

    The features of a coordinate are its E relative log energies, Q raw ones, the C of its matrix, and +1 on a row, -1
    on a column, in this order.

    Returns:
        Outputs ``(O, N)``, the first one (the scale) after adding the skip and taking exp; and the new ``hidden`` and
        ``cell`` ``(H, N)``. 8 H (F + H) flops a coordinate.
    """
    spread = layout.spread(layout.per_group(torch.cat([inputs.means, inputs.context])))
    count = len(inputs.energies)
    relative = log_ratio(inputs.energies, spread[:count])
    side = torch.ones_like(inputs.energies[0])
    side = torch.cat([side[: layout.rows], -side[layout.rows :]])
    features = torch.cat([relative, inputs.raw, spread[count:], side[None]])
    hidden, cell = lstm(network.weight, network.bias, features, hidden, cell)
    # One small product for both sides costs less than two: each takes its half of the outputs.
    both = network.head_weight @ hidden + network.head_bias
    outputs = len(both) // 2
    skipped = [
        (network.skip[i][:, None] * part).sum(dim=0)
        for i, part in enumerate((relative[:, : layout.rows], relative[:, layout.rows :]))
    ]
    output = torch.cat([both[:outputs, : layout.rows], both[outputs:, layout.rows :]], dim=-1)
    scale = torch.exp(output[0] + torch.cat(skipped))
    return torch.cat([scale[None], output[1:]]), hidden, cell
