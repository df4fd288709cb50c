"""Which implementation runs: kernels where nothing is differentiated or traced, the torch reference elsewhere.

| tensors | eager, no derivative | eager autograd | compiled, no derivative | transforms; compiled derivative |
|---|---|---|---|---|
| CPU, float32 | native.cpp | reference | reference | reference |
| CUDA or ROCm with Triton | Triton | Triton, forward and backward | Triton | reference |
| others | reference | reference | reference | reference |

Transforms: those of ``torch.func``, and forward mode. The reference is what the compiler fuses, and what has derivatives of every order. A kernel is never called on a tensor
that a transform has wrapped: a custom operator with a registered derivative would be silently wrong under ``jvp``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subspace_kernels import native, reference
from subspace_kernels.layout import Layout
from subspace_kernels.reference import Inputs, Network

is_compiling = torch.compiler.is_compiling if hasattr(torch.compiler, "is_compiling") else torch._dynamo.is_compiling


def _plain(tensors: Sequence[Tensor]) -> bool:
    """Return whether these are tensors with values of their own: no trace, transform, mode, dual number or subclass."""
    return (
        not is_compiling()
        and torch._C._functorch.maybe_current_level() is None
        and torch.autograd.forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0
        and all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)
    )


def _differentiated(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _native(*lists: Sequence[Tensor]) -> bool:
    """Return whether native.cpp computes on these tensors."""
    tensors = [tensor for some in lists for tensor in some]
    return _plain(tensors) and not _differentiated(tensors) and native.usable(tensors)


def cross_means(a: Sequence[Tensor], b: Sequence[Tensor], layout: Layout) -> Tensor:
    """Return the packed row and column means of A * B; see ``reference.cross_means``."""
    if a is b and not layout.padded_from and _native(a):
        return native.energy_means(a, layout)
    return reference.cross_means(a, b, layout)


def moments(
    r: Sequence[Tensor], m: Sequence[Tensor], weight: Tensor, layout: Layout, in_place: bool = False
) -> tuple[list[Tensor], Tensor]:
    """Return the new momentum and the means of R * R, M' * M' and R * M'; see ``reference.moments``.

    With ``in_place`` the new momentum may be written over ``m``, which is then of no use.
    """
    if not layout.padded_from and _native(r, m, (weight,)):
        return native.moments(r, m, weight, layout, in_place)
    return reference.moments(r, m, weight, layout)


def row_means(rows: Tensor, layout: Layout) -> Tensor:
    """Return the means over the rows of every matrix; see ``reference.row_means``."""
    return (native if not layout.padded_from and _native((rows,)) else reference).row_means(rows, layout)


def column_means(columns: Tensor, layout: Layout) -> Tensor:
    """Return the means over the columns of every matrix; see ``reference.column_means``."""
    return (native if not layout.padded_from and _native((columns,)) else reference).column_means(columns, layout)


def lstm_cell(
    network: Network, inputs: Inputs, hidden: Tensor, cell: Tensor, layout: Layout, in_place: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Advance the coordinate network by one step; see ``reference.lstm_cell``.

    With ``in_place`` the new state may be written over ``hidden`` and ``cell``, which are then of no use.
    """
    if _native(network, inputs, (hidden, cell)):
        return native.lstm_cell(network, inputs, hidden, cell, layout, in_place)
    return reference.lstm_cell(network, inputs, hidden, cell, layout)


def directions(
    r: Sequence[Tensor],
    m: Sequence[Tensor],
    mix: Tensor | None,
    scale: Tensor,
    layout: Layout,
    out: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Return the scaled directions and their mean squared column lengths; see ``reference.directions``.

    With ``out`` (tensors like ``r``, which may be ``r`` or ``m`` themselves) the directions may be written there.
    """
    if not layout.padded_from and _native(r, m, (scale,) if mix is None else (scale, mix)):
        return native.directions(r, m, mix, scale, layout, out)
    return reference.directions(r, m, mix, scale, layout)
