"""Triton kernels over the tiles of many matrices of any sizes: one launch a bucket, nothing copied, nothing padded.

A *tile* is a fixed block of one matrix; lanes beyond the matrix's edge are masked, so padding is virtual. Every program
handles one tile and finds its matrix through small tables (``launch.py`` makes them):

* ``table``, int64 ``(operands, 2, B)``: for every operand and matrix its address and its row pitch in entries;
* ``records``, int64 ``(B, 6)``: rows d, columns p, where its rows and columns start among the packed coordinates, where
  its row and column partial sums start in ``partials``;
* ``tiles``, int32 ``(T, 3)``: matrix, first row, first column.

``ALIGNED`` is 0, or a number of entries that divides p and every pitch of the bucket and makes at least 16 bytes in
every operand, all of whose addresses are then multiples of 16 bytes.

All arithmetic is in float32, whatever the matrices hold. Offsets are 64 bits wide wherever a pitch enters. Sums go
through partial sums per tile, which ``reduce_partials`` adds in a fixed order: no atomics, equal bits in every run, and
in whatever company a matrix comes. Zero rows or columns appended to a matrix change no bit as long as its tile class
and alignment stay.

Errors: none are checked here; masks keep every access inside the operands if the tables are right.
"""

# Triton has no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """Round float32 ``x`` to the nearest value of ``dtype``, ties to even, and return it as float32."""
    if dtype == tl.bfloat16:
        # Through the bits, because Triton's interpreter truncates where the hardware rounds.
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    elif dtype == tl.float16:
        x = x.to(tl.float16).to(tl.float32)
    return x


@triton.jit
def _pointers(table, matrices, matrix, row, column, OPERAND: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the pointers ``(ROWS, COLUMNS)`` to one tile of one operand; reads two entries of ``table``."""
    address = tl.load(table + 2 * OPERAND * matrices + matrix)
    pitch = tl.load(table + (2 * OPERAND + 1) * matrices + matrix)
    if ALIGNED:
        pitch = tl.multiple_of(pitch, ALIGNED)
    first = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        # What the compiler cannot know without being told, and needs for loads of 16 bytes.
        first = tl.multiple_of(first, 16)
    return first + row.to(tl.int64)[:, None] * pitch + column[None, :]


@triton.jit
def _bounds(tiles, records, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a tile's matrix, its first row and column, and the matrix's d and p."""
    matrix = tl.load(tiles + 3 * tile)
    first_row = tl.multiple_of(tl.load(tiles + 3 * tile + 1), ROWS)
    first_column = tl.multiple_of(tl.load(tiles + 3 * tile + 2), COLUMNS)
    d = tl.load(records + 6 * matrix).to(tl.int32)
    p = tl.load(records + 6 * matrix + 1).to(tl.int32)
    if ALIGNED:
        p = tl.multiple_of(p, ALIGNED)  # so that a vector of lanes is inside or outside as a whole
    return matrix, first_row, first_column, d, p


@triton.jit
def _move(table, matrices, matrix, row, column, weight, x, y, inside, OUT_TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Write Y + weight (X - Y) of one tile, rounded to its type, as the third operand."""
    moved = _rounded(y + tl.load(weight + matrix) * (x - y), OUT_TYPE)
    target = _pointers(table, matrices, matrix, row, column, 2, OUT_TYPE, ALIGNED)
    tl.store(target, moved.to(OUT_TYPE), mask=inside)


@triton.jit
def cross_tiles(
    table,
    records,
    tiles,
    u,
    v,
    weight,
    partials,
    matrices,
    plane,
    A_TYPE: tl.constexpr,
    B_TYPE: tl.constexpr,
    OUT_TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    SAME: tl.constexpr,
    WEIGHTED_U: tl.constexpr,
    WEIGHTED_V: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """Write the partial row sums and partial column sums of A * B of every tile.

    Modes: ``SAME`` (B is A and is not read again); ``WEIGHTED_V`` and ``WEIGHTED_U`` (A_ij B_ij v_j in the row sums,
    A_ij B_ij u_i in the column sums); ``MOMENTS``: A is R, B is M, the third operand M' = M + weight (R - M) is
    written, rounded to its type, and the partial sums are those of R * R, M * M and R * M (planes 0, 1, 2).
    M' may be M: a program reads its tile before it writes it, and no other program touches it.

    Shapes: ``u (rows,)``, ``v (columns,)`` packed; ``weight (matrices,)``; ``partials (1 or 3, plane)``, float32 all.
    Reads every entry of A once (and of B, unless ``SAME``), writes M' once in mode ``MOMENTS``; per tile also
    at most ROWS + COLUMNS weights read and ROWS + COLUMNS partials written (three times as many with ``MOMENTS``).
    """
    tile = tl.program_id(0)
    matrix, first_row, first_column, d, p = _bounds(tiles, records, tile, ROWS, COLUMNS, ALIGNED)
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    row_inside = row < d
    column_inside = column < p
    inside = row_inside[:, None] & column_inside[None, :]
    x = tl.load(_pointers(table, matrices, matrix, row, column, 0, A_TYPE, ALIGNED), mask=inside, other=0.0)
    x = x.to(tl.float32)
    y = x
    if not SAME:
        y = tl.load(_pointers(table, matrices, matrix, row, column, 1, B_TYPE, ALIGNED), mask=inside, other=0.0)
        y = y.to(tl.float32)
    row_sums = partials + tl.load(records + 6 * matrix + 4) + (first_column // COLUMNS).to(tl.int64) * d + row
    column_sums = partials + tl.load(records + 6 * matrix + 5) + (first_row // ROWS).to(tl.int64) * p + column
    if MOMENTS:
        # When M' is written decides how many registers it holds beside R and M: last is best where one load brings
        # several entries, first where each has a pointer of its own.
        if not ALIGNED:
            _move(table, matrices, matrix, row, column, weight, x, y, inside, OUT_TYPE, ALIGNED)
        tl.store(row_sums, tl.sum(x * x, axis=1), mask=row_inside)
        tl.store(column_sums, tl.sum(x * x, axis=0), mask=column_inside)
        tl.store(row_sums + plane, tl.sum(y * y, axis=1), mask=row_inside)
        tl.store(column_sums + plane, tl.sum(y * y, axis=0), mask=column_inside)
        row_sums += 2 * plane
        column_sums += 2 * plane
    product = x * y
    by_row = product
    if WEIGHTED_V:
        packed = v + tl.load(records + 6 * matrix + 3) + column
        by_row = product * tl.load(packed, mask=column_inside, other=0.0)[None, :]
    tl.store(row_sums, tl.sum(by_row, axis=1), mask=row_inside)
    by_column = product
    if WEIGHTED_U:
        packed = u + tl.load(records + 6 * matrix + 2) + row
        by_column = product * tl.load(packed, mask=row_inside, other=0.0)[:, None]
    tl.store(column_sums, tl.sum(by_column, axis=0), mask=column_inside)
    if MOMENTS and ALIGNED:
        _move(table, matrices, matrix, row, column, weight, x, y, inside, OUT_TYPE, ALIGNED)


@triton.jit
def reduce_partials(
    partials, segments, factors, blocks, out, plane, out_plane, TILES: tl.constexpr, BLOCK: tl.constexpr
):
    """Add the partial sums of every coordinate over its tiles, in a fixed order, times the factor of its segment.

    A segment is one side of one matrix: ``length`` coordinates with ``count`` partial sums each, tile after tile.
    The order is: tile t goes to lane t modulo TILES, in sequence; then the lanes are added as a tree.

    Shapes: ``partials (K, plane)``, ``out (K, out_plane)``, ``factors (S,)``, float32; ``segments`` int64 ``(S, 4)``:
    first partial, count, length, first output; ``blocks`` int32 ``(programs, 2)``: segment, first coordinate in it.
    The grid is ``(programs, K)``. Reads every partial sum once, writes every output once.
    """
    segment = tl.load(blocks + 2 * tl.program_id(0))
    index = tl.load(blocks + 2 * tl.program_id(0) + 1) + tl.arange(0, BLOCK)
    statistic = tl.program_id(1).to(tl.int64)
    first = tl.load(segments + 4 * segment)
    count = tl.load(segments + 4 * segment + 1).to(tl.int32)
    length = tl.load(segments + 4 * segment + 2)
    target = tl.load(segments + 4 * segment + 3)
    inside = index < length
    lane = tl.arange(0, TILES)
    source = partials + statistic * plane + first + index[None, :]
    total = tl.zeros((TILES, BLOCK), dtype=tl.float32)
    for start in range(0, count, TILES):
        tile = start + lane
        mask = (tile < count)[:, None] & inside[None, :]
        total += tl.load(source + tile.to(tl.int64)[:, None] * length, mask=mask, other=0.0)
    result = tl.sum(total, axis=0) * tl.load(factors + segment)
    tl.store(out + statistic * out_plane + target + index, result, mask=inside)


@triton.jit
def rank_tiles(
    table,
    records,
    tiles,
    a,
    v,
    u,
    b,
    mix,
    squares,
    matrices,
    first_tile,
    X_TYPE: tl.constexpr,
    M_TYPE: tl.constexpr,
    OUT_TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    SECOND: tl.constexpr,
    MIX: tl.constexpr,
    SQUARES: tl.constexpr,
):
    """Write X * (a v^T [+ u b^T]) of every tile.

    Modes: ``SECOND`` (with u b^T); ``MIX`` (X is replaced by X + mix (M - X), one ``mix`` a matrix); ``SQUARES`` (the
    sum of squares of the tile's result, as written, goes to ``squares[first_tile + tile]``).
    Operands: X, M (only with ``MIX``), result. The result may be X or M: a program reads its tile before it
    writes it, and no other program touches it.

    Shapes: ``a, u (rows,)``, ``v, b (columns,)`` packed; ``mix (B,)``; ``squares (T,)``, float32 all.
    Reads every entry of X (and M) once and at most 2 (ROWS + COLUMNS) factors a tile, writes every result once.
    """
    tile = tl.program_id(0)
    matrix, first_row, first_column, d, p = _bounds(tiles, records, tile, ROWS, COLUMNS, ALIGNED)
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    row_inside = row < d
    column_inside = column < p
    inside = row_inside[:, None] & column_inside[None, :]
    packed_row = tl.load(records + 6 * matrix + 2) + row
    packed_column = tl.load(records + 6 * matrix + 3) + column
    x = tl.load(_pointers(table, matrices, matrix, row, column, 0, X_TYPE, ALIGNED), mask=inside, other=0.0)
    x = x.to(tl.float32)
    if MIX:
        m = tl.load(_pointers(table, matrices, matrix, row, column, 1, M_TYPE, ALIGNED), mask=inside, other=0.0)
        x += tl.load(mix + matrix) * (m.to(tl.float32) - x)
    left = tl.load(a + packed_row, mask=row_inside, other=0.0)
    right = tl.load(v + packed_column, mask=column_inside, other=0.0)
    factor = left[:, None] * right[None, :]
    if SECOND:
        left = tl.load(u + packed_row, mask=row_inside, other=0.0)
        right = tl.load(b + packed_column, mask=column_inside, other=0.0)
        factor += left[:, None] * right[None, :]
    result = _rounded(x * factor, OUT_TYPE)
    LAST: tl.constexpr = 1 + MIX
    target = _pointers(table, matrices, matrix, row, column, LAST, OUT_TYPE, ALIGNED)
    tl.store(target, result.to(OUT_TYPE), mask=inside)
    if SQUARES:
        tl.store(squares + first_tile + tile, tl.sum(tl.sum(result * result, axis=1), axis=0))


@triton.jit
def _sigmoid(x):
    """Return 1 / (1 + exp(-x)); exp(-x) may overflow to infinity, which gives the right 0."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):
    """Return tanh(x) to float32 accuracy, relative near zero too, where the exponentials cancel."""
    small = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - small) / (1.0 + small)
    square = x * x
    series = 62.0 / 2835.0
    series = series * square - 17.0 / 315.0
    series = series * square + 2.0 / 15.0
    series = series * square - 1.0 / 3.0
    near = x + x * square * series
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def _relative(energy, mean, inside, FLOOR: tl.constexpr, TINY: tl.constexpr):
    """Return the relative log energies ``(BLOCK,)`` at two sets of pointers; see ``reference.log_ratio``."""
    numerator = tl.load(energy, mask=inside, other=1.0)
    return 0.5 * tl.log(numerator / (tl.load(mean, mask=inside, other=1.0) + TINY) + FLOOR)


@triton.jit
def _gates(weight, row_of, present, gate, x, enter, forget, candidate, leave):
    """Add one input's contribution to the four gates: outer products of a weight column ``(UNITS,)`` and ``x``."""
    # Asked for by name: newer compilers no longer fuse a product and a sum by themselves.
    x = x[None, :]
    enter = tl.fma(tl.load(weight + row_of, mask=present, other=0.0)[:, None], x, enter)
    forget = tl.fma(tl.load(weight + gate + row_of, mask=present, other=0.0)[:, None], x, forget)
    candidate = tl.fma(tl.load(weight + 2 * gate + row_of, mask=present, other=0.0)[:, None], x, candidate)
    leave = tl.fma(tl.load(weight + 3 * gate + row_of, mask=present, other=0.0)[:, None], x, leave)
    return enter, forget, candidate, leave


@triton.jit
def lstm_cell(
    energies,
    means,
    raw,
    context,
    owner,
    weight,
    bias,
    head_weight,
    head_bias,
    skip,
    hidden,
    cell,
    outputs,
    new_hidden,
    new_cell,
    rows,
    count,
    matrices,
    row_blocks,
    zero,
    H: tl.constexpr,
    E: tl.constexpr,
    Q: tl.constexpr,
    C: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    FLOOR: tl.constexpr,
    TINY: tl.constexpr,
    UNITS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROLLED: tl.constexpr,
):
    """Advance the coordinate network by one step for BLOCK coordinates of one side; see ``reference.lstm_cell``.

    UNITS hidden units at a time: their four gates ``(UNITS, BLOCK)`` stay in registers, and the inputs come one by one
    and enter as outer products, in float32 (a ``tl.dot`` would round to TF32 and spill). Registers do not grow with H;
    each input is read once for every UNITS of the H units, from cache after the first time. OUTPUTS is O rounded up to
    a power of two. ``ROLLED`` adds ``zero``, which is 0, to the loops' ends, so that the compiler cannot unroll them:
    for gfx942 unrolling costs four times the registers, for NVIDIA it saves two thirds.

    ``new_hidden`` must not be ``hidden``, which later units still read. ``new_cell`` may be ``cell``: a lane reads an
    entry just before it writes it.

    Shapes, all float32 and contiguous: ``energies (E, N)``, ``means (E, B)``, ``raw (Q, N)``, ``context (C, B)``,
    ``hidden, cell, new_hidden, new_cell (H, N)``, ``outputs (O, N)``, the weights as in ``reference.Network``;
    ``owner`` int32 ``(N,)``: the matrix of a coordinate. The grid has ``row_blocks`` programs for the rows, then those
    of the columns, so that the side, hence the head, is the same for a whole program.
    Reads 4 (E + Q + 2 H + 1) bytes a coordinate, and weights, means and context from cache; writes 4 (2 H + O).
    """
    program = tl.program_id(0)
    side = (program >= row_blocks).to(tl.int32)  # 0: rows, 1: columns
    first = side * rows
    last = rows + side * (count - rows)
    coordinate = first + (program - side * row_blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = coordinate < last
    inputs: tl.constexpr = E + Q + C + 1 + H
    gate: tl.constexpr = H * inputs
    units, energies_count, contexts = H, E, C
    if ROLLED:
        units, energies_count, contexts = H + zero, E + zero, C + zero
    stride = tl.cast(count, tl.int64)
    matrix = tl.load(owner + coordinate, mask=inside, other=0)
    ones = tl.full((BLOCK,), 1.0, dtype=tl.float32)
    sign = ones * (1.0 - 2.0 * side.to(tl.float32))
    output = tl.arange(0, OUTPUTS)
    total = tl.zeros((OUTPUTS, BLOCK), dtype=tl.float32)
    for start in range(0, units, UNITS):
        unit = start + tl.arange(0, UNITS)
        present = unit < H
        row_of = unit * inputs
        i = tl.zeros((UNITS, BLOCK), dtype=tl.float32)
        f, g, o = i, i, i
        i, f, g, o = _gates(bias, unit, present, H, ones, i, f, g, o)
        for e in range(energies_count):
            relative = _relative(energies + e * stride + coordinate, means + e * matrices + matrix, inside, FLOOR, TINY)
            i, f, g, o = _gates(weight + e, row_of, present, gate, relative, i, f, g, o)
        for q in range(Q):
            value = tl.load(raw + q * stride + coordinate, mask=inside, other=0.0)
            i, f, g, o = _gates(weight + E + q, row_of, present, gate, value, i, f, g, o)
        for c in range(contexts):
            value = tl.load(context + c * matrices + matrix, mask=inside, other=0.0)
            i, f, g, o = _gates(weight + E + Q + c, row_of, present, gate, value, i, f, g, o)
        i, f, g, o = _gates(weight + E + Q + C, row_of, present, gate, sign, i, f, g, o)
        for h in range(units):
            value = tl.load(hidden + h * stride + coordinate, mask=inside, other=0.0)
            i, f, g, o = _gates(weight + E + Q + C + 1 + h, row_of, present, gate, value, i, f, g, o)

        place = unit.to(tl.int64)[:, None] * stride + coordinate[None, :]
        mask = present[:, None] & inside[None, :]
        state = tl.load(cell + place, mask=mask, other=0.0)
        state = _sigmoid(f) * state + _sigmoid(i) * _tanh(g)
        tl.store(new_cell + place, state, mask=mask)
        state = _sigmoid(o) * _tanh(state)
        tl.store(new_hidden + place, state, mask=mask)
        for k in range(O):
            row = tl.load(head_weight + (side * O + k) * H + unit, mask=present, other=0.0)
            part = tl.sum(state * row[:, None], axis=0)
            total += tl.where((output == k)[:, None], part[None, :], 0.0)

    shortcut = tl.zeros((BLOCK,), dtype=tl.float32)
    for e in range(energies_count):
        relative = _relative(energies + e * stride + coordinate, means + e * matrices + matrix, inside, FLOOR, TINY)
        shortcut += tl.load(skip + side * E + e) * relative
    total += tl.load(head_bias + side * O + output, mask=output < O, other=0.0)[:, None]
    total = tl.where((output == 0)[:, None], tl.exp(total + shortcut[None, :]), total)
    target = outputs + output.to(tl.int64)[:, None] * stride + coordinate[None, :]
    tl.store(target, total, mask=(output < O)[:, None] & inside[None, :])
