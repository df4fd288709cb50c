"""Launches of the Triton kernels on lists of matrices: plans, tables, wrappers, and how many bytes they move.

The wrappers have the semantics of ``reference``, without derivatives: they take what carries no gradient. Matrices are
float32, bfloat16 or float16; sums and states are float32, and so are results, unless ``out`` says otherwise.

A *bucket* is what one launch serves: all matrices of one device, of equal element types, alike in whether 16-byte loads
are possible (address, row pitch and row length multiples of 16 bytes in every operand), and of one tile class. Its
*plan* (tables of tiles and offsets) depends on shapes, types and alignment only and is cached, also on the device; what
changes from step to step is one int64 table of addresses and row pitches, copied when it differs from earlier ones.

Rows may have any pitch, up to 2**33 entries and beyond; only entries of one row must be adjacent. A tensor that is
transposed or strided along its rows is copied to a contiguous one first (and an ``out`` like that is filled by a copy).

**Whole step in cache.** The gradient is read twice, for the statistics and for the scaling, with the network between.
If a step is run chunk after chunk, each chunk small enough for the last-level cache, the second read costs no memory
traffic: ``chunks`` cuts a layout, ``sub_layout`` gives the chunk's own layout (the state then lives per chunk), and
``chunked`` says what it saves and how many launches it costs. Example, ResNet-50 in float32 without momentum and a
cache of 50 MB, half of it usable: 316 to 222 MB, 5 to 25 launches. At 3.35 TB/s the bytes are worth 28 us; twenty more
launches cost more than that from Python, and about as much inside a CUDA graph. So it is a choice, not the default.
"""

from __future__ import annotations

import collections
import functools
import importlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from subspace_kernels.layout import Layout
from subspace_kernels.reference import FLOOR, TINY, Inputs, Network, layout_of

launches: collections.Counter[str] = collections.Counter()
"""How often each kernel was launched in this process, by its name."""

REDUCE_BLOCK = 128  # coordinates a program of reduce_partials
REDUCE_TILES = 32  # partial sums of a coordinate that it reads at once
ELEMENT_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class TileClass(NamedTuple):
    """Rows and columns of a tile."""

    rows: int
    columns: int

    def warps(self, aligned: int) -> int:
        """Return the warps of a program: 32 entries a thread where loads are vectors, 16 where each needs an address
        and a mask of its own, so that all stays in registers."""
        return self.rows * self.columns // (1024 if aligned else 512)


LARGE, WIDE, TALL = TileClass(64, 128), TileClass(16, 256), TileClass(256, 16)


def tile_class(d: int, p: int) -> TileClass:
    """Return the tile class of ``d x p`` matrices: 16 x 256 for few rows, 256 x 16 for few columns, else 64 x 128."""
    if d < 24 and d <= p:
        return WIDE
    return TALL if p < 48 else LARGE


class Key(NamedTuple):
    """What, besides its shape, decides in which bucket a group goes."""

    dtypes: tuple[torch.dtype, ...]  # of the operands
    aligned: int  # 0: no 16-byte loads; else the entries that divide p and all pitches


class Bucket(NamedTuple):
    """Tiles that one launch serves."""

    key: Key
    tile: TileClass
    first_tile: int  # tiles of the buckets before
    tiles: Tensor  # int32 (T, 3): matrix, first row, first column


@dataclass(frozen=True, eq=False)
class Plan:
    """Tables for lists of matrices of given shapes and keys; see ``tiles`` for what their entries mean."""

    buckets: tuple[Bucket, ...]
    records: Tensor  # int64 (B, 6)
    segments: Tensor  # int64 (2 B, 4): row sums of every matrix, then column sums
    blocks: Tensor  # int32 (programs, 2)
    square_segments: Tensor  # int64 (B, 4)
    square_blocks: Tensor  # int32 (B, 2)
    partials: int  # partial sums a statistic
    tiles: int
    coordinates: int

    def to(self, device: torch.device) -> Plan:
        """Return the same plan with its tables on ``device``."""
        return replace(
            self,
            buckets=tuple(bucket._replace(tiles=bucket.tiles.to(device)) for bucket in self.buckets),
            records=self.records.to(device),
            segments=self.segments.to(device),
            blocks=self.blocks.to(device),
            square_segments=self.square_segments.to(device),
            square_blocks=self.square_blocks.to(device),
        )


def _table(rows: Sequence[Sequence[int]], width: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor(rows, dtype=dtype).reshape(-1, width)


@functools.lru_cache(maxsize=256)
def make_plan(shapes: tuple[tuple[int, ...], ...], keys: tuple[Key, ...]) -> Plan:
    """Return the plan, on the CPU, of groups of ``shapes`` ``(..., d, p)`` with ``keys``; cached."""
    layout = Layout(shapes)
    by_bucket: dict[tuple[Key, TileClass], list[tuple[int, int, int]]] = {}
    tile_counts, kinds, records, row_segments, column_segments = [], [], [], [], []
    row = column = partial = matrix = 0
    for shape, key, count in zip(shapes, keys, layout.matrix_counts, strict=True):
        d, p = shape[-2:]
        tile = tile_class(d, p)
        down, across = math.ceil(d / tile.rows), math.ceil(p / tile.columns)
        for _ in range(count):
            column_partial = partial + across * d
            records.append((d, p, row, column, partial, column_partial))
            row_segments.append((partial, across, d, row))
            column_segments.append((column_partial, down, p, layout.rows + column))
            by_bucket.setdefault((key, tile), []).extend(
                (matrix, i * tile.rows, j * tile.columns) for i in range(down) for j in range(across)
            )
            kinds.append((key, tile))
            tile_counts.append(down * across)
            partial = column_partial + down * p
            row, column, matrix = row + d, column + p, matrix + 1
    buckets, next_square, tiles = [], {}, 0
    for (key, tile), entries in by_bucket.items():
        if entries:
            buckets.append(Bucket(key, tile, tiles, _table(entries, 3, torch.int32)))
        next_square[key, tile] = tiles
        tiles += len(entries)
    square_segments = []
    for index, (kind, size) in enumerate(zip(kinds, tile_counts, strict=True)):
        square_segments.append((next_square[kind], size, 1, index))
        next_square[kind] += size
    segments = row_segments + column_segments
    blocks = [(i, start) for i, entry in enumerate(segments) for start in range(0, entry[2], REDUCE_BLOCK)]
    return Plan(
        tuple(buckets),
        _table(records, 6, torch.int64),
        _table(segments, 4, torch.int64),
        _table(blocks, 2, torch.int32),
        _table(square_segments, 4, torch.int64),
        _table([(i, 0) for i in range(matrix)], 2, torch.int32),
        partial,
        tiles,
        row + column,
    )


@functools.lru_cache(maxsize=256)
def _plan_on(shapes: tuple[tuple[int, ...], ...], keys: tuple[Key, ...], device: torch.device) -> Plan:
    return make_plan(shapes, keys).to(device)


@functools.lru_cache(maxsize=256)
def _per_matrix_on(values: tuple[float, ...], counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Return ``values``, one a group, repeated for every matrix, once or several times over: float32."""
    groups = len(counts)
    return torch.tensor(
        [value for i, value in enumerate(values) for _ in range(counts[i % groups])], dtype=torch.float32, device=device
    )


def _inverse(size: int) -> float:
    return 1.0 / size if size else math.inf  # the mean of nothing is 0 * inf: not a number, as in torch


def _mean_factors(layout: Layout, device: torch.device) -> Tensor:
    """Return 1/p for the row sums of every matrix, then 1/d for its column sums: ``(2 B,)``."""
    sizes = layout.sizes
    values = tuple(_inverse(p) for _, p in sizes) + tuple(_inverse(d) for d, _ in sizes)
    return _per_matrix_on(values, layout.matrix_counts, device)


@functools.lru_cache(maxsize=256)
def _owners_on(shapes: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Return the matrix of every coordinate: int32 ``(N,)``."""
    layout = Layout(shapes)
    matrices = torch.arange(layout.matrices, dtype=torch.int32)
    sides = [
        torch.tensor([s[axis] for s, n in zip(shapes, layout.matrix_counts, strict=True) for _ in range(n)]).long()
        for axis in (-2, -1)
    ]
    return torch.cat([matrices.repeat_interleave(sizes) for sizes in sides]).to(device)


# --- Operands ---------------------------------------------------------------------------------------------------------


def _adjacent(x: Tensor) -> Tensor:
    """Return ``x``, or a contiguous copy if the entries of a row are not adjacent."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


@functools.lru_cache(maxsize=1024)
def _batch_offsets(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Return where, in entries, each matrix of a batch starts."""
    offsets = [0]
    for size, stride in zip(shape, strides, strict=True):
        offsets = [offset + i * stride for offset in offsets for i in range(size)]
    return tuple(offsets)


def _alignment(operands: Sequence[Tensor]) -> int:
    """Return how many entries divide p and all pitches if 16-byte loads are possible in all operands, else 0."""
    vector = 16 // min(x.element_size() for x in operands)
    shape = operands[0].shape
    if shape[-1] % vector:
        return 0
    for x in operands:
        strides = [x.stride(i) for i in range(x.ndim - 1) if shape[i] > 1]
        if x.data_ptr() % 16 or any(stride % vector for stride in strides):
            return 0
    return vector


_tables: collections.OrderedDict[tuple[object, ...], Tensor] = collections.OrderedDict()
_captured: list[Tensor] = []  # graphs read these at every replay


def _address_table(operands: Sequence[Sequence[Tensor]], device: torch.device) -> Tensor:
    """Return addresses and row pitches: int64 ``(operands, 2, B)`` on ``device``.

    Gradients mostly keep their addresses from step to step, so recent tables are kept, by value. A table is made on
    the stream that uses it, so that no other stream reads it too early.
    """
    values: list[int] = []
    for tensors in operands:
        pitches: list[int] = []
        for x in tensors:
            offsets = _batch_offsets(tuple(x.shape[:-2]), x.stride()[:-2])
            size, first = x.element_size(), x.data_ptr()
            values += [first + size * offset for offset in offsets]
            # A single row needs no pitch, and torch may report anything for it.
            pitches += [x.stride(-2) if x.shape[-2] > 1 else 0] * len(offsets)
        values += pitches
    on_gpu = device.type == "cuda"
    capturing = on_gpu and torch.cuda.is_current_stream_capturing()
    key = (tuple(values), device, torch.cuda.current_stream(device).cuda_stream if on_gpu else 0)
    if key in _tables:
        if capturing:
            _captured.append(_tables[key])
        _tables.move_to_end(key)
        return _tables[key]
    if capturing:
        raise RuntimeError("run the step once on the capturing stream, with the same tensors, before the capture")
    table = torch.tensor(values, dtype=torch.int64)
    _tables[key] = table.pin_memory().to(device, non_blocking=True) if on_gpu else table
    if len(_tables) > 64:
        _tables.popitem(last=False)
    return _tables[key]


def _check(operands: Sequence[Sequence[Tensor]]) -> torch.device:
    """Return the device of all operands; raise if they cannot go to the kernels."""
    first = operands[0]
    devices = {x.device for tensors in operands for x in tensors}
    if len(devices) > 1:
        raise ValueError(f"all matrices must be on one device, not on {sorted(map(str, devices))}")
    for tensors in operands:
        if [x.shape for x in tensors] != [x.shape for x in first]:
            raise ValueError("the lists must hold tensors of equal shapes")
        for x in tensors:
            if x.ndim < 2:
                raise ValueError(f"matrices (..., d, p) expected, not a tensor of shape {tuple(x.shape)}")
            if x.dtype not in ELEMENT_TYPES:
                raise TypeError(f"float32, bfloat16 or float16 expected, not {x.dtype}")
    device = devices.pop()
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("the kernels need a GPU; on the CPU they only run with TRITON_INTERPRET=1")
    return device


def _packed(values: Tensor | None, size: int, what: str, device: torch.device) -> Tensor | None:
    """Return packed values as contiguous float32; check their number and device."""
    if values is None:
        return None
    if values.device != device:
        raise ValueError(f"{what} must be on {device} like the matrices, not on {values.device}")
    if values.numel() != size:
        raise ValueError(f"{size} values expected for {what}, not {values.numel()}")
    return values.detach().to(torch.float32).contiguous().view(-1)


def _target(out: Sequence[Tensor] | None, like: Sequence[Tensor]) -> list[Tensor]:
    """Return ``out``, or new contiguous float32 tensors."""
    if out is None:
        return [torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in like]
    return list(out)


@functools.lru_cache(maxsize=1)
def _kernels() -> Any:
    """Return the module of the kernels, imported at the first launch: plans and traffic need no Triton."""
    return importlib.import_module("subspace_kernels.tiles")


def _run(name: str, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any) -> None:
    launches[name] += 1
    options["enable_fp_fusion"] = True  # the default is about to change; statistics and network want the fused sums
    kernel = getattr(_kernels(), name)[grid]
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel(*arguments, **options)
    else:
        kernel(*arguments, **options)


def _element(dtype: torch.dtype) -> Any:
    return getattr(importlib.import_module("triton.language"), ELEMENT_TYPES[dtype])


class _Operands(NamedTuple):
    """Lists of matrices, ready for launches over their tiles."""

    lists: list[list[Tensor]]  # entries of a row adjacent
    plan: Plan
    table: Tensor
    device: torch.device


def _prepare(operands: Sequence[Sequence[Tensor]], layout: Layout) -> _Operands:
    """Check the lists, copy what is not adjacent, and make the tables."""
    device = _check(operands)
    lists = [[_adjacent(x.detach()) for x in tensors] for tensors in operands]
    shapes = tuple(tuple(x.shape) for x in lists[0])
    if shapes != layout.shapes:
        raise ValueError(f"the layout is of {layout.shapes}, the matrices are of {shapes}")
    keys = tuple(Key(tuple(x.dtype for x in group), _alignment(group)) for group in zip(*lists, strict=True))
    return _Operands(lists, _plan_on(shapes, keys, device), _address_table(lists, device), device)


def _run_tiles(name: str, ready: _Operands, arguments: Callable[[Bucket], tuple[Any, ...]], **modes: bool) -> None:
    """Launch a kernel once a bucket; ``arguments`` are what follows the three tables."""
    for bucket in ready.plan.buckets:
        types = [_element(dtype) for dtype in bucket.key.dtypes]
        if len(types) == 2 and name == "rank_tiles":
            types.insert(1, types[0])  # no M
        types += [types[-1]] * (3 - len(types))
        constants = (*types, *bucket.tile, bucket.key.aligned)
        tables = (ready.table, ready.plan.records, bucket.tiles)
        options = {**modes, "num_warps": bucket.tile.warps(bucket.key.aligned)}
        _run(name, (len(bucket.tiles),), ready.device, *tables, *arguments(bucket), *constants, **options)


def _copy_back(out: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """Fill those of ``out`` whose rows are not adjacent, so that the kernel wrote a copy."""
    for target, result in zip(out, results, strict=True):
        if target.data_ptr() != result.data_ptr():
            target.detach().copy_(result)


def _reduce(partials: Tensor, segments: Tensor, factors: Tensor, blocks: Tensor, outputs: int) -> Tensor:
    """Add partial sums ``(K, plane)`` per coordinate, times the factor of its segment: ``(K, outputs)``."""
    kinds, plane = partials.shape
    out = torch.empty(kinds, outputs, dtype=torch.float32, device=partials.device)
    if len(blocks):
        arguments = (partials, segments, factors, blocks, out, plane, outputs, REDUCE_TILES, REDUCE_BLOCK)
        _run("reduce_partials", (len(blocks), kinds), partials.device, *arguments)
    return out


# --- Operations -------------------------------------------------------------------------------------------------------


def _sums(ready: _Operands, factors: Tensor, u: Any = None, v: Any = None, weight: Any = None, **modes: bool) -> Tensor:
    """Return the packed sums of all kinds, times the factors: ``(1, N)``, or ``(3, N)`` in mode ``MOMENTS``."""
    plan, coordinates = ready.plan, ready.plan.coordinates
    partials = torch.empty(3 if modes["MOMENTS"] else 1, plan.partials, dtype=torch.float32, device=ready.device)
    given = tuple(partials if x is None else x for x in (u, v, weight))  # what a mode does not read needs an address
    arguments = (*given, partials, len(plan.records), plan.partials)
    modes |= {"WEIGHTED_U": u is not None, "WEIGHTED_V": v is not None}
    _run_tiles("cross_tiles", ready, lambda bucket: arguments, **modes)
    return _reduce(partials, plan.segments, factors, plan.blocks, coordinates)


def _pair(a: Sequence[Tensor], b: Sequence[Tensor], layout: Layout) -> tuple[_Operands, bool]:
    """Return one or two operands, and whether it is one: then it is read once."""
    same = all(x is y for x, y in zip(a, b, strict=True))
    return _prepare([a] if same else [a, b], layout), same


def cross(
    a: Sequence[Tensor], b: Sequence[Tensor], u: Tensor | None = None, v: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the packed row sums and column sums of A * B, weighted by v and u; see ``reference.cross``.

    Args:
        a, b: lists of ``(..., d, p)``, of equal shapes in pairs; where ``b`` holds the very tensors of ``a``, they are
            read once.
        u: ``(rows,)`` packed; v: ``(columns,)`` packed; ``None`` is all ones.

    Returns:
        ``(rows,)`` and ``(columns,)``, float32. Empty lists give empty tensors.

    Raises:
        ValueError: shapes or devices differ, or ``u`` or ``v`` has the wrong size.
        TypeError: entries are not float32, bfloat16 or float16.
        RuntimeError: CPU tensors outside Triton's interpreter.
    """
    sums = cross_sums(a, b, u, v)
    rows = layout_of(a).rows
    return sums[:rows], sums[rows:]


def cross_sums(a: Sequence[Tensor], b: Sequence[Tensor], u: Tensor | None = None, v: Tensor | None = None) -> Tensor:
    """Return what :func:`cross` returns as one tensor: ``(N,)``, the rows first."""
    if not len(a):
        return torch.empty(0)
    layout = layout_of(a)
    ready, same = _pair(a, b, layout)
    u, v = _packed(u, layout.rows, "u", ready.device), _packed(v, layout.columns, "v", ready.device)
    ones = _per_matrix_on((1.0,) * 2 * len(a), layout.matrix_counts, ready.device)
    return _sums(ready, ones, u, v, SAME=same, MOMENTS=False)[0]


def cross_means(a: Sequence[Tensor], b: Sequence[Tensor], layout: Layout) -> Tensor:
    """Return the packed row means and column means of A * B: ``(N,)``; see ``reference.cross_means``.

    Reads A once, and B once unless it is A. Raises what :func:`cross` raises.
    """
    if not len(a):
        return torch.empty(0)
    ready, same = _pair(a, b, layout)
    return _sums(ready, _mean_factors(layout, ready.device), SAME=same, MOMENTS=False)[0]


def moments(
    r: Sequence[Tensor], m: Sequence[Tensor], weight: Tensor, layout: Layout, out: Sequence[Tensor] | None = None
) -> tuple[list[Tensor], Tensor]:
    """Return M' = M + weight (R - M), and the packed means of R * R, M * M and R * M, ``(3, N)``, in one pass.

    Args:
        r, m: lists of ``(..., d, p)``.
        weight: one number on the device, or one for each matrix, ``(B,)``; it is not read by the host.
        layout: of the lists.
        out: where M' goes, in its own types; may be ``m`` itself. Without it: new float32 tensors.

    Reads R and M once, writes M' once. Raises what :func:`cross` raises.
    """
    if not len(r):
        return [], torch.empty(3, 0, device=weight.device)
    new = _target(out, r)
    ready = _prepare([r, m, new], layout)
    each = weight.to(ready.device).expand(layout.matrices)
    at = _packed(each, layout.matrices, "weight", ready.device)
    means = _sums(ready, _mean_factors(layout, ready.device), weight=at, SAME=False, MOMENTS=True)
    _copy_back(new, ready.lists[2])
    return new, means


def _ranked(ready: _Operands, factors: Sequence[Tensor | None], mix: Tensor | None, squares: bool) -> Tensor:
    """Launch ``rank_tiles``; return the sums of squares a tile if asked for."""
    plan, used = ready.plan, factors[0]
    partials = torch.empty(plan.tiles if squares else 0, dtype=torch.float32, device=ready.device)
    # What a mode does not read needs some address too.
    given = [used if x is None else x for x in (*factors, mix, partials if squares else None)]
    modes = {"SECOND": factors[2] is not None, "MIX": mix is not None, "SQUARES": squares}
    _run_tiles("rank_tiles", ready, lambda bucket: (*given, len(plan.records), bucket.first_tile), **modes)
    return partials


def rank2(
    x: Sequence[Tensor],
    a: Tensor,
    v: Tensor,
    u: Tensor | None = None,
    b: Tensor | None = None,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Return X * (a v^T + u b^T) of every matrix; see ``reference.rank2``.

    Args:
        x: list of ``(..., d, p)``.
        a, u: ``(rows,)`` packed; v, b: ``(columns,)`` packed; without ``u`` or ``b`` the second term is absent.
        out: where the results go, in their own types; may be ``x``. Without it: new float32 tensors.

    Reads X once, writes the result once. Raises what :func:`cross` raises.
    """
    if not len(x):
        return []
    layout, results = layout_of(x), _target(out, x)
    if u is None or b is None:
        u = b = None
    ready = _prepare([x, results], layout)
    rows, columns = layout.rows, layout.columns
    named = ((a, rows, "a"), (v, columns, "v"), (u, rows, "u"), (b, columns, "b"))
    factors = [_packed(*entry, ready.device) for entry in named]
    _ranked(ready, factors, None, False)
    _copy_back(results, ready.lists[1])
    return results


def directions(
    r: Sequence[Tensor],
    m: Sequence[Tensor],
    mix: Tensor | None,
    scale: Tensor,
    layout: Layout,
    out: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Return D = diag(l) (R + mix (M - R)) diag(k) of every matrix, and sum D^2 / p, ``(B,)``.

    Args:
        r, m: lists of ``(..., d, p)``; ``m`` is empty and ``mix`` is ``None`` without momentum.
        mix: ``(B,)``.
        scale: ``(N,)``, l on rows and k on columns.
        layout: of the lists.
        out: where D goes, in its own types; may be ``r`` or ``m``. Without it: new float32 tensors.

    Reads R (and M) once, writes D once. Raises what :func:`cross` raises.
    """
    if not len(r):
        return [], torch.empty(0, device=scale.device)
    results = _target(out, r)
    ready = _prepare([r, results] if mix is None else [r, m, results], layout)
    packed = _packed(scale, layout.rows + layout.columns, "scale", ready.device)
    assert packed is not None
    factors = [packed[: layout.rows], packed[layout.rows :], None, None]
    mixes = _packed(mix, layout.matrices, "mix", ready.device)
    partials = _ranked(ready, factors, mixes, True)
    _copy_back(results, ready.lists[-1])
    inverse = _per_matrix_on(tuple(_inverse(p) for _, p in layout.sizes), layout.matrix_counts, ready.device)
    plan = ready.plan
    squares = _reduce(partials[None], plan.square_segments, inverse, plan.square_blocks, layout.matrices)
    return results, squares[0]


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


CELL_UNITS, CELL_BLOCK, CELL_WARPS = 8, 128, 4  # units at a time, coordinates and warps of a program of lstm_cell
CELL_ROLLED = torch.version.hip is not None  # whether its loops must be kept from being unrolled


def lstm_cell(
    network: Network,
    inputs: Inputs,
    hidden: Tensor,
    cell: Tensor,
    layout: Layout,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Advance the coordinate network by one step in one launch; see ``reference.lstm_cell``.

    Args:
        network, inputs: as in ``reference``; any number of energies, raw inputs, contexts, hidden units, outputs >= 1.
        hidden, cell: ``(H, N)``.
        layout: of the matrices whose coordinates these are.
        out: contiguous float32 ``(O, N)``, ``(H, N)``, ``(H, N)`` for the results. The new cell may be ``cell``; the
            new hidden state must not be ``hidden``, which the kernel still reads while it writes.

    Reads and writes each input, state and output once: 4 (E + Q + 4 H + 1 + O) bytes a coordinate.

    Raises:
        ValueError: shapes do not fit, ``out`` is not contiguous float32, or new hidden state in place.
        RuntimeError: CPU tensors outside Triton's interpreter.
    """
    device = hidden.device
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("the kernels need a GPU; on the CPU they only run with TRITON_INTERPRET=1")
    units, count = hidden.shape
    energies, raws, contexts = len(inputs.energies), len(inputs.raw), len(inputs.context)
    outputs = len(network.head_weight) // 2
    features, matrices = energies + raws + contexts + 1, layout.matrices
    expected = (
        (network.weight, (4 * units, features + units)),
        (network.bias, (4 * units, 1)),
        (network.head_weight, (2 * outputs, units)),
        (network.head_bias, (2 * outputs, 1)),
        (network.skip, (2, energies)),
        (inputs.energies, (energies, count)),
        (inputs.means, (energies, matrices)),
        (inputs.raw, (raws, count)),
        (inputs.context, (contexts, matrices)),
        (hidden, (units, count)),
        (cell, (units, count)),
    )
    if count != layout.rows + layout.columns or any(tuple(x.shape) != shape for x, shape in expected):
        shapes = [(tuple(x.shape), shape) for x, shape in expected if tuple(x.shape) != shape]
        raise ValueError(f"shapes do not fit {layout.rows + layout.columns} coordinates (given, expected): {shapes}")
    values = [x.detach().to(torch.float32).contiguous() for x, _ in expected]
    if out is None:
        out = (values[-1].new_empty(outputs, count), torch.empty_like(values[-1]), torch.empty_like(values[-1]))
    for x, shape in zip(out, ((outputs, count), (units, count), (units, count)), strict=True):
        if tuple(x.shape) != shape or x.dtype != torch.float32 or not x.is_contiguous():
            raise ValueError(f"contiguous float32 {shape} expected in out, not {x.dtype} {tuple(x.shape)}")
    if count == 0:
        return out
    if out[1].data_ptr() == values[-2].data_ptr():
        raise ValueError("the new hidden state cannot take the place of the old one")
    row_blocks = math.ceil(layout.rows / CELL_BLOCK)
    grid = (row_blocks + math.ceil(layout.columns / CELL_BLOCK),)
    net, seen, state = values[:5], values[5:9], values[9:]
    tensors = (*seen, _owners_on(layout.shapes, device), *net, *state, *(x.detach() for x in out))
    numbers = (layout.rows, count, matrices, row_blocks, 0)
    sizes = (units, energies, raws, contexts, outputs)
    constants = (*sizes, FLOOR, TINY, CELL_UNITS, _power_of_two(outputs), CELL_BLOCK, CELL_ROLLED)
    _run("lstm_cell", grid, device, *tensors, *numbers, *constants, num_warps=CELL_WARPS)
    return out


# --- Traffic ----------------------------------------------------------------------------------------------------------

RECORD, TILE, SEGMENT, BLOCK_ENTRY, ADDRESS = 48, 12, 32, 8, 16  # bytes of the tables' entries
ENERGIES, RAWS, CONTEXTS, OUTPUTS = (1, 4), (1, 1), 15, 5  # of the network (without momentum, with), for the model


class Traffic(NamedTuple):
    """Bytes that one kernel moves between memory and chip in one step, for one bucket (``None``: for all at once)."""

    kernel: str
    bucket: Key | None
    tile: TileClass | None
    launches: int
    read: int
    written: int


def _contiguous_plan(layout: Layout, dtypes: Sequence[torch.dtype]) -> Plan:
    """Return the plan of contiguous operands of these types that start at multiples of 16 bytes."""
    vector = 16 // min(dtype.itemsize for dtype in dtypes)
    keys = tuple(Key(tuple(dtypes), 0 if shape[-1] % vector else vector) for shape in layout.shapes)
    return make_plan(layout.shapes, keys)


def _bucket_sizes(plan: Plan, bucket: Bucket) -> tuple[int, int, int, int]:
    """Return a bucket's entries, partial sums, tiles and matrices; masked lanes count as nothing."""
    tiles = bucket.tiles.long()
    matrices, tile = tiles[:, 0], bucket.tile
    rows = (plan.records[matrices, 0] - tiles[:, 1]).clamp(max=tile.rows)
    columns = (plan.records[matrices, 1] - tiles[:, 2]).clamp(max=tile.columns)
    return int((rows * columns).sum()), int((rows + columns).sum()), len(tiles), len(set(matrices.tolist()))


def traffic(layout: Layout, momentum: bool, dtype: torch.dtype = torch.float32, hidden: int = 20) -> list[Traffic]:
    """Return what every kernel moves in one step, from the plan: statistics, network, directions.

    Args:
        layout: of the matrices, which are taken to be contiguous and to start at multiples of 16 bytes.
        momentum: whether M is kept (float32).
        dtype: of the gradients; directions are float32.
        hidden: units of the network.

    Counted: matrices, partial sums, tables, statistics, network inputs, state and outputs, each once a kernel that
    touches it. Masked lanes move nothing. Weights and values of a matrix come from cache and are not counted.
    """
    full, n = torch.float32, layout.rows + layout.columns
    kinds = 3 if momentum else 1
    first = _contiguous_plan(layout, (dtype, full, full) if momentum else (dtype,))
    second = _contiguous_plan(layout, (dtype, full, full) if momentum else (dtype, full))
    found = []
    for plan, name in ((first, "cross_tiles"), (second, "rank_tiles")):
        for bucket in plan.buckets:
            entries, edges, tiles, matrices = _bucket_sizes(plan, bucket)
            read = (
                entries * (dtype.itemsize + 4 * momentum)
                + TILE * tiles
                + matrices * (RECORD + ADDRESS * len(bucket.key.dtypes))
            )
            if name == "cross_tiles":
                written = 4 * kinds * edges + 4 * entries * momentum
            else:
                read, written = read + 4 * edges, 4 * entries + 4 * tiles
            found.append(Traffic(name, bucket.key, bucket.tile, 1, read, written))
        partials = kinds * plan.partials if name == "cross_tiles" else plan.tiles
        outputs = kinds * n if name == "cross_tiles" else layout.matrices
        segments, blocks = (2 * layout.matrices, len(plan.blocks)) if name == "cross_tiles" else (layout.matrices,) * 2
        read = 4 * partials + (SEGMENT + 4) * segments + BLOCK_ENTRY * blocks
        found.append(Traffic("reduce_partials", None, None, 1, read, 4 * outputs))
    energies, raws = ENERGIES[momentum], RAWS[momentum]
    read = 4 * n * (energies + raws + 1 + 2 * hidden)
    found.append(Traffic("lstm_cell", None, None, 1, read, 4 * n * (2 * hidden + OUTPUTS)))
    return found


def minimum_bytes(layout: Layout, momentum: bool, dtype: torch.dtype = torch.float32, hidden: int = 20) -> int:
    """Return the bytes of a step in three passes: G read twice, D written once (with momentum R, M read and M' written,
    then R, M' read and D written), and the state (hidden and cell) read and written once."""
    n = layout.rows + layout.columns
    matrices = 2 * dtype.itemsize + 4 + (12 if momentum else 0)
    return layout.entries * matrices + 16 * hidden * n


def launch_count(layout: Layout, momentum: bool, dtype: torch.dtype = torch.float32) -> int:
    """Return the launches of a step: one a bucket for the statistics, one a bucket for the directions, and three."""
    return sum(part.launches for part in traffic(layout, momentum, dtype))


def sub_layout(layout: Layout, groups: Sequence[int]) -> Layout:
    """Return the layout of some of the groups."""
    padded = tuple(layout.padded_from[i] for i in groups) if layout.padded_from else ()
    return Layout(tuple(layout.shapes[i] for i in groups), padded)


def chunks(
    layout: Layout, cache_bytes: int, momentum: bool = False, dtype: torch.dtype = torch.float32
) -> list[tuple[int, ...]]:
    """Cut the groups, in order, into runs whose matrices (R, and M with momentum) fit into ``cache_bytes`` together.

    A group that does not fit by itself is a chunk of its own. To use it, keep one state a chunk, and run
    ``cross_means`` or ``moments``, ``lstm_cell`` and ``directions`` on the chunk's lists with ``sub_layout``, chunk
    after chunk: results do not change by a bit, because sums do not depend on a matrix's company.
    """
    entry = dtype.itemsize + 4 * momentum
    found: list[tuple[int, ...]] = []
    current: list[int] = []
    held = 0
    for index, shape in enumerate(layout.shapes):
        size = math.prod(shape) * entry
        if current and held + size > cache_bytes:
            found.append(tuple(current))
            current, held = [], 0
        current.append(index)
        held += size
    return [*found, tuple(current)] if current else found


class Chunked(NamedTuple):
    """A step run chunk after chunk."""

    chunks: int
    launches: int
    bytes: int  # between memory and chip, if what fits into the cache is found there the second time


def chunked(
    layout: Layout, cache_bytes: int, momentum: bool = False, dtype: torch.dtype = torch.float32, hidden: int = 20
) -> Chunked:
    """Return launches and bytes of a step over ``chunks``: the second read of what fits into the cache is free."""
    total = count = 0
    cut = chunks(layout, cache_bytes, momentum, dtype)
    for groups in cut:
        part = sub_layout(layout, groups)
        moved = traffic(part, momentum, dtype, hidden)
        total += sum(entry.read + entry.written for entry in moved)
        count += sum(entry.launches for entry in moved)
        size = part.entries * (dtype.itemsize + 4 * momentum)
        if size <= cache_bytes:
            total -= size
    return Chunked(len(cut), count, total)
