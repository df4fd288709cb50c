"""Which implementation runs: kernels where nothing is differentiated or traced, the torch reference elsewhere.

``docs/kernels.md`` has the table. The reference is what the compiler fuses, and what has derivatives of every order. A
kernel is never called on a tensor that a transform has wrapped: measured, a custom operator with a registered
derivative raises under ``torch.func.grad`` and is silently wrong under ``jvp``.

Derivatives of the kernels: those of ``cross`` and ``rank2`` are each other, so any order of eager autograd runs them;
that of ``lstm_cell`` recomputes the reference (its forward keeps nothing but its inputs).
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from subspace_kernels import native, reference
from subspace_kernels.layout import Layout
from subspace_kernels.reference import Inputs, Network

is_compiling = torch.compiler.is_compiling if hasattr(torch.compiler, "is_compiling") else torch._dynamo.is_compiling

# Lets CPU tensors take the way of CUDA tensors; meant for TRITON_INTERPRET=1, with which the kernels run without a GPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("SUBSPACE_KERNELS_INTERPRET") == "1"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _launch() -> ModuleType:
    """Return the module with the launchers; Triton is imported only when a kernel runs."""
    from subspace_kernels import launch

    return launch


def _transformed() -> bool:
    """Return whether a ``torch.func`` transform or a forward-mode derivative is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


# What torch.compiler.assume_constant_result sets, without importing the compiler: a trace asks once, while the levels
# of its own transforms are there, and is guarded by the levels outside.
_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _on_device(tensors: Sequence[Tensor]) -> bool:
    """Return whether Triton's kernels can work on these tensors; float64 is not among their types."""
    if any(tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16) for tensor in tensors):
        return False
    types = {tensor.device.type for tensor in tensors}
    return (types == {"cuda"} and _has_triton()) or (INTERPRETED and types == {"cpu"})


def _differentiated(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _plain(tensors: Sequence[Tensor]) -> bool:
    """Return whether these are tensors with values in memory as they are: no trace, transform, mode, dual number,
    subclass, lazy sign or lazy zero."""
    return (
        not is_compiling()
        and not _transformed()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None  # torch.jit.trace
        and all(
            type(tensor) in (Tensor, torch.nn.Parameter) and not (tensor.is_neg() or tensor._is_zerotensor())
            for tensor in tensors
        )
    )


def _route(*lists: Sequence[Tensor | None]) -> str:
    """Return which implementation works on these tensors: reference, native, device, autograd or compiled."""
    tensors = [tensor for some in lists for tensor in some if tensor is not None]
    if not tensors:
        return "reference"
    if is_compiling():
        usable = _on_device(tensors) and not torch.is_grad_enabled() and not _transformed()
        return "compiled" if usable else "reference"
    if not _plain(tensors):
        return "reference"
    if _on_device(tensors):
        return "autograd" if _differentiated(tensors) else "device"
    return "native" if not _differentiated(tensors) and native.usable(tensors) else "reference"


class _Cross(torch.autograd.Function):
    """``cross`` on a device, with the derivative of proofs/statements/kernels.md."""

    @staticmethod
    def forward(ctx: Any, count: int, u: Tensor | None, v: Tensor | None, *matrices: Tensor) -> tuple[Tensor, Tensor]:
        ctx.count = count
        ctx.save_for_backward(u, v, *matrices)
        return _launch().cross(matrices[:count], matrices[count:], u, v)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        u, v, *matrices = ctx.saved_tensors
        a, b = matrices[: ctx.count], matrices[ctx.count :]
        gr, gc = cotangents
        ones_u, ones_v = torch.ones_like(gr) if u is None else u, torch.ones_like(gc) if v is None else v
        need = ctx.needs_input_grad
        of_a = rank2(b, gr, ones_v, ones_u, gc) if any(need[3 : 3 + ctx.count]) else [None] * ctx.count
        of_b = rank2(a, gr, ones_v, ones_u, gc) if any(need[3 + ctx.count :]) else [None] * ctx.count
        of_u, of_v = cross(a, b, gr, gc) if need[1] or need[2] else (None, None)
        return None, of_u if need[1] else None, of_v if need[2] else None, *of_a, *of_b


class _Rank2(torch.autograd.Function):
    """``rank2`` on a device, with the derivative of proofs/statements/kernels.md."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, v: Tensor, u: Tensor | None, b: Tensor | None, *matrices: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(a, v, u, b, *matrices)
        return tuple(_launch().rank2(matrices, a, v, u, b))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        a, v, u, b, *matrices = ctx.saved_tensors
        need = ctx.needs_input_grad
        of_a, of_v = cross(cotangents, matrices, a, v) if need[0] or need[1] else (None, None)
        of_u, of_b = cross(cotangents, matrices, u, b) if need[2] or need[3] else (None, None)
        of_matrices = rank2(cotangents, a, v, u, b) if any(need[4:]) else [None] * len(matrices)
        return of_a, of_v, of_u, of_b, *of_matrices


def _outputs(network: Network) -> int:
    return len(network.head_bias) // 2


def _parts(tensors: Sequence[Tensor]) -> tuple[Network, Inputs, Tensor, Tensor]:
    """Sort network, inputs, hidden and cell that came as one list."""
    return Network(*tensors[:5]), Inputs(*tensors[5:9]), tensors[9], tensors[10]


class _LstmCell(torch.autograd.Function):
    """``lstm_cell`` on a device; its derivative recomputes the reference."""

    @staticmethod
    def forward(ctx: Any, layout: Layout, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.layout = layout
        ctx.save_for_backward(*tensors)
        return _launch().lstm_cell(*_parts(tensors), layout)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        create = torch.is_grad_enabled()
        with torch.enable_grad():
            # Views: where one input depends on another, a derivative counts the way through this operation only.
            inputs = [tensor.view_as(tensor) if create else tensor.detach().requires_grad_() for tensor in tensors]
            outputs = reference.lstm_cell(*_parts(inputs), ctx.layout)
            wanted = [tensor for tensor in inputs if tensor.requires_grad]
            found = iter(torch.autograd.grad(outputs, wanted, cotangents, create_graph=create, allow_unused=True))
        return None, *(next(found) if tensor.requires_grad else None for tensor in inputs)


def _applied(function: Any, *arguments: Any) -> Any:
    """Apply an autograd.Function, whose ``apply`` has no types."""
    return function.apply(*arguments)


def cross(
    a: Sequence[Tensor], b: Sequence[Tensor], u: Tensor | None = None, v: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return packed row sums and column sums of A * B, weighted by v and u; see ``reference.cross``."""
    route = _route(a, b, (u, v))
    if route == "device":
        return _launch().cross(a, b, u, v)
    if route == "autograd":
        return _applied(_Cross, len(a), u, v, *a, *b)
    if route == "compiled":
        sums = torch.ops.subspace_kernels.cross_sums(list(a), list(b), u, v)
        rows = reference.layout_of(a).rows
        return sums[:rows], sums[rows:]
    return reference.cross(a, b, u, v)


def rank2(x: Sequence[Tensor], a: Tensor, v: Tensor, u: Tensor | None = None, b: Tensor | None = None) -> list[Tensor]:
    """Return X * (a v^T + u b^T) of every matrix; see ``reference.rank2``."""
    route = _route(x, (a, v, u, b))
    if route == "device":
        return _launch().rank2(x, a, v, u, b)
    if route == "autograd":
        return list(_applied(_Rank2, a, v, u, b, *x))
    if route == "compiled":
        return torch.ops.subspace_kernels.rank2(list(x), a, v, u, b)
    return reference.rank2(x, a, v, u, b)


def cross_means(a: Sequence[Tensor], b: Sequence[Tensor], layout: Layout) -> Tensor:
    """Return the packed row and column means of A * B; see ``reference.cross_means``."""
    route = "reference" if layout.padded_from else _route(a, b)
    if route == "native" and all(x is y for x, y in zip(a, b, strict=True)):
        return native.energy_means(a, layout)
    if route == "device":
        return _launch().cross_means(a, b, layout)
    if route == "autograd":
        return _means_of_sums(*cross(a, b), layout)
    if route == "compiled":
        return torch.ops.subspace_kernels.cross_means(list(a), list(b))
    return reference.cross_means(a, b, layout)


def _means_of_sums(rows: Tensor, columns: Tensor, layout: Layout) -> Tensor:
    row_groups = zip(layout.split_rows(rows), layout.sizes, strict=True)
    column_groups = zip(layout.split_columns(columns), layout.sizes, strict=True)
    return layout.pack([value / p for value, (_, p) in row_groups], [value / d for value, (d, _) in column_groups])


def moments(
    r: Sequence[Tensor], m: Sequence[Tensor], weight: Tensor, layout: Layout, in_place: bool = False
) -> tuple[list[Tensor], Tensor]:
    """Return the new momentum and the means of R * R, M * M and R * M; see ``reference.moments``.

    With ``in_place`` the new momentum may be written over ``m``, which is then of no use.
    """
    route = "reference" if layout.padded_from else _route(r, m, (weight,))
    if route == "native":
        return native.moments(r, m, weight, layout, in_place)
    if route == "device":
        return _launch().moments(r, m, weight, layout, m if in_place else None)
    if route == "compiled":
        return torch.ops.subspace_kernels.moments(list(r), list(m), weight)
    return reference.moments(r, m, weight, layout, cross_means if route == "autograd" else reference.cross_means)


@functools.lru_cache(maxsize=64)
def _lengths(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(sizes, device=device)


def _segment_means(values: Tensor, counts: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Return means over neighbouring segments on a device: ``(k, n)`` to ``(k, segments)``."""
    lengths = tuple(size for count, size in zip(counts, sizes, strict=True) for _ in range(count))
    data = values.mT.contiguous()
    return torch.segment_reduce(data, "mean", lengths=_lengths(lengths, values.device), axis=0).mT


def row_means(rows: Tensor, layout: Layout) -> Tensor:
    """Return the means over the rows of every matrix; see ``reference.row_means``."""
    route = "reference" if layout.padded_from else _route((rows,))
    if route == "native":
        return native.row_means(rows, layout)
    if route == "device":
        return _segment_means(rows, layout.matrix_counts, [d for d, _ in layout.sizes])
    return reference.row_means(rows, layout)


def column_means(columns: Tensor, layout: Layout) -> Tensor:
    """Return the means over the columns of every matrix; see ``reference.column_means``."""
    route = "reference" if layout.padded_from else _route((columns,))
    if route == "native":
        return native.column_means(columns, layout)
    if route == "device":
        return _segment_means(columns, layout.matrix_counts, [p for _, p in layout.sizes])
    return reference.column_means(columns, layout)


def lstm_cell(
    network: Network, inputs: Inputs, hidden: Tensor, cell: Tensor, layout: Layout, in_place: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Advance the coordinate network by one step; see ``reference.lstm_cell``.

    With ``in_place`` the new state may be written over ``hidden`` and ``cell``, which are then of no use.
    """
    route = _route(network, inputs, (hidden, cell))
    if route == "native":
        return native.lstm_cell(network, inputs, hidden, cell, layout, in_place)
    if route == "device":
        # The new hidden units must not be written over the old ones, which other units still read; cells may be.
        out = (
            (hidden.new_empty(_outputs(network), hidden.shape[1]), torch.empty_like(hidden), cell) if in_place else None
        )
        return _launch().lstm_cell(network, inputs, hidden, cell, layout, out)
    if route == "autograd":
        return _applied(_LstmCell, layout, *network, *inputs, hidden, cell)
    if route == "compiled":
        shapes = [number for shape in layout.shapes for number in (len(shape), *shape)]
        return torch.ops.subspace_kernels.lstm_cell(list(network), list(inputs), hidden, cell, shapes)
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
    route = "reference" if layout.padded_from else _route(r, m, (mix, scale))
    if route == "native":
        return native.directions(r, m, mix, scale, layout, out)
    if route == "device":
        return _launch().directions(r, m, mix, scale, layout, out)
    if route == "compiled":
        return torch.ops.subspace_kernels.directions(list(r), list(m), mix, scale)
    return reference.directions(r, m, mix, scale, layout, rank2 if route == "autograd" else reference.rank2)


# The operators of compiled steps. They have no derivative and no batching rule: `_route` keeps them from both. No two
# of an operator's results may share memory, so that of `cross` is one tensor.

_LIBRARY: Any = torch.library.Library("subspace_kernels", "DEF")  # type: ignore[no-untyped-call]


def _layout_from(shapes: Sequence[int]) -> Layout:
    """Invert the flattening of ``lstm_cell``: the number of dimensions, then the sizes, of each group."""
    found, rest = [], list(shapes)
    while rest:
        found.append(tuple(rest[1 : 1 + rest[0]]))
        rest = rest[1 + rest[0] :]
    return Layout(tuple(found))


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return ``a`` if ``b`` holds the same tensors: an operator's arguments lose their identity."""
    pairs = zip(a, b, strict=True)
    return a if all(x.data_ptr() == y.data_ptr() and x.stride() == y.stride() for x, y in pairs) else b


def _coordinates(tensors: Sequence[Tensor]) -> tuple[int, int]:
    layout = reference.layout_of(tensors)
    return layout.rows, layout.columns


def _cross_sums(a: Sequence[Tensor], b: Sequence[Tensor], u: Tensor | None, v: Tensor | None) -> Tensor:
    return _launch().cross_sums(a, _same(a, b), u, v)


def _cross_sums_shapes(a: Sequence[Tensor], b: Sequence[Tensor], u: Tensor | None, v: Tensor | None) -> Tensor:
    return _cross_means_shapes(a, b)


def _cross_means(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return _launch().cross_means(a, _same(a, b), reference.layout_of(a))


def _cross_means_shapes(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return a[0].new_empty(sum(_coordinates(a)), dtype=torch.float32)


def _rank2(x: Sequence[Tensor], a: Tensor, v: Tensor, u: Tensor | None, b: Tensor | None) -> list[Tensor]:
    return _launch().rank2(x, a, v, u, b)


def _rank2_shapes(x: Sequence[Tensor], a: Tensor, v: Tensor, u: Tensor | None, b: Tensor | None) -> list[Tensor]:
    return [part.new_empty(part.shape, dtype=torch.float32) for part in x]


def _moments(r: Sequence[Tensor], m: Sequence[Tensor], weight: Tensor) -> tuple[list[Tensor], Tensor]:
    return _launch().moments(r, m, weight, reference.layout_of(r))


def _moments_shapes(r: Sequence[Tensor], m: Sequence[Tensor], weight: Tensor) -> tuple[list[Tensor], Tensor]:
    return [torch.empty_like(part) for part in m], r[0].new_empty(3, sum(_coordinates(r)), dtype=torch.float32)


def _directions(
    r: Sequence[Tensor], m: Sequence[Tensor], mix: Tensor | None, scale: Tensor
) -> tuple[list[Tensor], Tensor]:
    return _launch().directions(r, m, mix, scale, reference.layout_of(r))


def _directions_shapes(
    r: Sequence[Tensor], m: Sequence[Tensor], mix: Tensor | None, scale: Tensor
) -> tuple[list[Tensor], Tensor]:
    count = sum(math.prod(part.shape[:-2]) for part in r)
    return [part.new_empty(part.shape, dtype=torch.float32) for part in r], scale.new_empty(count)


def _lstm_cell(
    network: Sequence[Tensor], inputs: Sequence[Tensor], hidden: Tensor, cell: Tensor, shapes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return _launch().lstm_cell(Network(*network), Inputs(*inputs), hidden, cell, _layout_from(shapes))


def _lstm_cell_shapes(
    network: Sequence[Tensor], inputs: Sequence[Tensor], hidden: Tensor, cell: Tensor, shapes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(_outputs(Network(*network)), hidden.shape[1]),
        torch.empty_like(hidden),
        torch.empty_like(cell),
    )


def _define(schema: str, kernel: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, kernel, key)
    _LIBRARY.impl(name, shapes, "Meta")


_define("cross_sums(Tensor[] a, Tensor[] b, Tensor? u, Tensor? v) -> Tensor", _cross_sums, _cross_sums_shapes)
_define("cross_means(Tensor[] a, Tensor[] b) -> Tensor", _cross_means, _cross_means_shapes)
_define("rank2(Tensor[] x, Tensor a, Tensor v, Tensor? u, Tensor? b) -> Tensor[]", _rank2, _rank2_shapes)
_define("moments(Tensor[] r, Tensor[] m, Tensor weight) -> (Tensor[], Tensor)", _moments, _moments_shapes)
_define(
    "directions(Tensor[] r, Tensor[] m, Tensor? mix, Tensor scale) -> (Tensor[], Tensor)",
    _directions,
    _directions_shapes,
)
_define(
    "lstm_cell(Tensor[] network, Tensor[] inputs, Tensor hidden, Tensor cell, int[] shapes)"
    " -> (Tensor, Tensor, Tensor)",
    _lstm_cell,
    _lstm_cell_shapes,
)
