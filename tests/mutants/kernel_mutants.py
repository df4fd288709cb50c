# ruff: noqa: E501
"""Seeded errors in the kernels and their launches: does the test suite see each of them?

Every mutant is one replaced piece of source in ``kernels/subspace_kernels``: a wrong mask, a wrong offset, a dropped
upcast, gates in the wrong order, a missing factor, a kernel where none may run. It is applied in a temporary copy, the
tests of that file run against the copy, and the mutant is killed if one of them fails.

    python tests/mutants/kernel_mutants.py                # all; about twenty minutes on one core
    python tests/mutants/kernel_mutants.py tiles native   # only these files

Prints the survivors and exits with 1 if fewer than 90 % were killed, or if the tests fail without any mutant.
"""

from __future__ import annotations

import sys

from seeding import Mutant, hunt

# The source of each name, and its tests in the order in which they are likely to fail and cheap to run.
FILES = {
    "tiles": ("tiles.py", ("plans", "interpreter")),
    "launch": ("launch.py", ("plans", "interpreter")),
    "native": ("native.cpp", ("native",)),
    "operations": ("operations.py", ("native", "routes")),
}
REQUIRED = 0.9


def mutant(name: str, original: str, mutated: str, kind: str) -> Mutant:
    """Return a mutant of one of ``FILES``."""
    return Mutant(name, f"kernels/subspace_kernels/{FILES[name][0]}", original, mutated, kind)


# One line per mutant reads as a table.
# fmt: off
MUTANTS = (
    # masks
    mutant("tiles", "row_inside = row < d", "row_inside = row <= d", "wrong mask"),
    mutant("tiles", "column_inside = column < p", "column_inside = column < p + 1", "wrong mask"),
    mutant("tiles", "inside = row_inside[:, None] & column_inside[None, :]", "inside = row_inside[:, None] & (column_inside | True)[None, :]", "dropped mask"),
    mutant("tiles", "inside = row_inside[:, None] & column_inside[None, :]", "inside = row_inside[:, None] | column_inside[None, :]", "wrong mask"),
    mutant("tiles", "tl.store(row_sums, tl.sum(by_row, axis=1), mask=row_inside)", "tl.store(row_sums, tl.sum(by_row, axis=1))", "dropped mask"),
    mutant("tiles", "mask = (tile < count)[:, None] & inside[None, :]", "mask = (tile <= count)[:, None] & inside[None, :]", "wrong mask"),
    mutant("tiles", "    inside = coordinate < last\n", "    inside = coordinate < count\n", "rows run into columns"),
    mutant("tiles", "present = unit < H", "present = unit <= H", "wrong mask"),
    mutant("tiles", "mask=(output < O)[:, None] & inside[None, :]", "mask=inside[None, :] & (output >= 0)[:, None]", "dropped mask"),
    # offsets
    mutant("tiles", "2 * OPERAND * matrices + matrix", "2 * OPERAND * matrices", "wrong offset"),
    mutant("tiles", "(2 * OPERAND + 1) * matrices + matrix", "1 * matrices + matrix", "pitch of another operand"),
    mutant("tiles", "row.to(tl.int64)[:, None] * pitch", "(row[:, None] * pitch.to(tl.int32))", "int32 overflow"),
    mutant("tiles", "(first_column // COLUMNS).to(tl.int64) * d + row", "(first_column // COLUMNS).to(tl.int64) * p + row", "wrong offset"),
    mutant("tiles", "(first_row // ROWS).to(tl.int64) * p + column", "(first_row // COLUMNS).to(tl.int64) * p + column", "wrong offset"),
    mutant("tiles", "packed = u + tl.load(records + 6 * matrix + 2) + row", "packed = u + row", "wrong offset"),
    mutant("tiles", "packed_column = tl.load(records + 6 * matrix + 3) + column", "packed_column = tl.load(records + 6 * matrix + 2) + column", "wrong offset"),
    mutant("tiles", "squares + first_tile + tile", "squares + tile", "tiles of two buckets collide"),
    mutant("tiles", "range(0, count, TILES)", "range(0, tl.minimum(count, TILES), TILES)", "later tiles dropped"),
    mutant("tiles", "LAST: tl.constexpr = 1 + MIX", "LAST: tl.constexpr = 1", "result written into M"),
    # arithmetic
    mutant("tiles", "    x = x.to(tl.float32)\n    y = x", "    y = x", "dropped upcast"),
    mutant("tiles", "        y = y.to(tl.float32)\n", "        y = y.to(tl.float16).to(tl.float32)\n", "half precision on the way"),
    mutant("tiles", "(m.to(tl.float32) - x)", "(m.to(tl.float16).to(tl.float32) - x)", "half precision on the way"),
    mutant("tiles", "bits + 0x7FFF + ((bits >> 16) & 1)", "bits", "truncation"),
    mutant("tiles", "bits + 0x7FFF + ((bits >> 16) & 1)", "bits + 0x8000", "ties away from even"),
    mutant("tiles", "_rounded(y + tl.load(weight + matrix) * (x - y), OUT_TYPE)", "_rounded(x + tl.load(weight + matrix) * (y - x), OUT_TYPE)", "weight of the other matrix"),
    mutant("tiles", "_rounded(y + tl.load(weight + matrix) * (x - y), OUT_TYPE)", "y + tl.load(weight + matrix) * (x - y)", "written without rounding"),
    mutant("tiles", "tl.load(weight + matrix)", "tl.load(weight)", "the first matrix's weight for all"),
    mutant("tiles", "tl.store(row_sums + plane, tl.sum(y * y, axis=1), mask=row_inside)", "tl.store(row_sums + plane, tl.sum(x * y, axis=1), mask=row_inside)", "wrong statistic"),
    mutant("tiles", "tl.sum(total, axis=0) * tl.load(factors + segment)", "tl.sum(total, axis=0)", "missing factor"),
    mutant("tiles", "factor += left[:, None] * right[None, :]", "factor = left[:, None] * right[None, :]", "first term dropped"),
    mutant("tiles", "tl.load(mix + matrix)", "tl.load(mix)", "mix of another matrix"),
    # network
    mutant("tiles", "_sigmoid(f) * state + _sigmoid(i) * _tanh(g)", "_sigmoid(i) * state + _sigmoid(f) * _tanh(g)", "wrong gate order"),
    mutant("tiles", "state = _sigmoid(o) * _tanh(state)", "state = _sigmoid(o) * state", "dropped tanh"),
    mutant("tiles", "return tl.where(tl.abs(x) < 0.25, near, ", "return tl.where(tl.abs(x) < 0.0, near, ", "cancellation near zero"),
    mutant("tiles", "head_weight + (side * O + k) * H", "head_weight + k * H", "wrong side's head"),
    mutant("tiles", "head_bias + side * O + output", "head_bias + output", "wrong side's bias"),
    mutant("tiles", "skip + side * E + e", "skip + e", "wrong side's skip"),
    mutant("tiles", "(1.0 - 2.0 * side.to(tl.float32))", "(2.0 * side.to(tl.float32) - 1.0)", "wrong sign"),
    mutant("tiles", "return 0.5 * tl.log(", "return tl.log(", "dropped square root"),
    mutant("tiles", "numerator / (tl.load(mean, mask=inside, other=1.0) + TINY) + FLOOR", "numerator / (tl.load(mean, mask=inside, other=1.0) + TINY)", "no floor"),
    mutant("tiles", "tl.where((output == 0)[:, None], tl.exp", "tl.where((output >= 0)[:, None], tl.exp", "exp on every output"),
    mutant("tiles", "means + e * matrices + matrix", "means + matrix", "mean of another energy"),
    # launches
    mutant("launch", "tuple(_inverse(p) for _, p in sizes) + tuple(_inverse(d) for d, _ in sizes)", "tuple(_inverse(d) for d, _ in sizes) + tuple(_inverse(p) for _, p in sizes)", "factors of the other side"),
    mutant("launch", "column_partial = partial + across * d", "column_partial = partial + down * d", "wrong offset"),
    mutant("launch", "matrix + 1\n", "matrix + 0\n", "wrong offset"),
    mutant("launch", "row, column, matrix = row + d, column + p", "row, column, matrix = row + p, column + d", "rows and columns exchanged"),
    mutant("launch", "layout.rows + column)", "column)", "columns written over rows"),
    mutant("launch", "offset + i * stride for offset", "offset + i for offset", "batch stride ignored"),
    mutant("launch", "first + size * offset for offset", "first + offset for offset", "offset in entries, not bytes"),
    mutant("launch", "return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()", "return x", "strided rows taken as adjacent"),
    mutant("launch", "            target.detach().copy_(result)\n", "            pass\n", "strided result lost"),
    mutant("launch", "same = all(x is y for x, y in zip(a, b, strict=True))", "same = True", "B taken for A"),
    mutant("launch", "    if out[1].data_ptr() == values[-2].data_ptr():", "    if False:", "hidden state in place"),
    mutant("launch", "(3 if modes[\"MOMENTS\"] else 1, plan.partials", "(1, plan.partials", "planes missing"),
    mutant("launch", "tuple(_inverse(p) for _, p in layout.sizes), layout.matrix_counts", "tuple(1.0 for _, p in layout.sizes), layout.matrix_counts", "missing factor"),
    mutant("launch", "buckets.append(Bucket(key, tile, tiles,", "buckets.append(Bucket(key, tile, 0,", "tiles of two buckets collide"),
    mutant("launch", "    row_blocks = math.ceil(layout.rows / CELL_BLOCK)", "    row_blocks = layout.rows // CELL_BLOCK", "last rows dropped"),
    mutant("launch", "if current and held + size > cache_bytes", "if current and held > cache_bytes", "chunks beyond the cache"),
    # CPU
    mutant("native", "for (; j < width; j++) {\n        for (int q", "for (; j + 1 < width; j++) {\n        for (int q", "last column dropped"),
    mutant("native", "for (; i < stop; i++) some(", "for (; i + 1 < stop; i++) some(", "last row dropped"),
    mutant("native", "store(moved + q * moved_pitch + j, y + weight * (x - y));", "store(moved + q * moved_pitch + j, y + weight * (y - x));", "wrong sign"),
    mutant("native", "MOMENTUM ? weight[k] : 0.0f", "MOMENTUM ? weight[0] : 0.0f", "the first matrix's weight for all"),
    mutant("native", "store(moved + q * moved_pitch + j, y + weight * (x - y));", "y += weight * (x - y);\n                store(moved + q * moved_pitch + j, y);", "statistics of the new momentum"),
    mutant("native", "const Vec product[3] = {x * x, y * y, x * y};", "const Vec product[3] = {x * x, x * y, y * y};", "statistics exchanged"),
    mutant("native", "(float)(all[kind * width + j] / height)", "(float)(all[kind * width + j] / width)", "mean over the other side"),
    mutant("native", "+= sum[q] + rest[kind][q];", "+= sum[q];", "tail of a row dropped"),
    mutant("native", "block[j] = 0.0f;", ";", "sums not cleared"),
    mutant("native", "(side ? -row[C] : row[C])", "(side ? row[C] : -row[C])", "wrong sign of the side"),
    mutant("native", "context_value[c * matrices + b]", "context_value[c * matrices]", "context of another matrix"),
    mutant("native", "heads.data() + (size_t)side * H * O", "heads.data()", "wrong side's head"),
    mutant("native", "head_bias + side * O, skip + side * E", "head_bias + side * O, skip", "wrong side's skip"),
    mutant("native", "(k < E + Q ? k : k + C + 1)", "k", "hidden weights taken for those of the context"),
    mutant("native", "const Vec leave = 1.0f + bounded_exp(clamp(-gate[3][v]", "const Vec leave = 1.0f + bounded_exp(clamp(-gate[0][v]", "wrong gate"),
    mutant("native", "(1.0f - squashed) / (leave * (1.0f + squashed))", "1.0f / leave * c", "dropped tanh"),
    mutant("native", "return given < INFINITY ? result : given;", "return result;", "what is not finite becomes finite"),
    mutant("native", "mean[k * matrices + b] + TINY", "mean[b] + TINY", "mean of another energy"),
    mutant("native", "if (o == 0)", "if (o <= 1)", "exp on another output"),
    mutant("native", "const float share = m ? mix[k] : 0.0f;", "const float share = m ? mix[0] : 0.0f;", "mix of another matrix"),
    mutant("native", "squares[k] = (float)(square / width);", "squares[k] = (float)(square / height);", "wrong normalisation"),
    mutant("native", "reinterpret_cast<uintptr_t>(to) % (4 * LANES)) == 0", "reinterpret_cast<uintptr_t>(to) % 4) == 0", "streaming store to an unaligned address"),
    mutant("native", "sum += total(lanes) + rest;", "sum = total(lanes) + rest;", "blocks dropped"),
    mutant("native", "min(BLOCK_COLUMNS, width - j)", "min(BLOCK_COLUMNS - 16, width - j)", "columns between blocks dropped"),
    mutant("native", "from += size[k];", "from += size[0];", "wrong segment"),
    # routes
    mutant("operations", "torch._C._functorch.peek_interpreter_stack() is not None or ", "", "kernels under torch.func"),
    mutant("operations", " or torch.autograd.forward_ad._current_level >= 0", "", "kernels on dual numbers"),
    mutant("operations", "usable = _on_device(tensors) and not torch.is_grad_enabled() and not _transformed()", "usable = _on_device(tensors) and not torch.is_grad_enabled()", "compiled kernels under torch.func"),
    mutant("operations", "usable = _on_device(tensors) and not torch.is_grad_enabled() and", "usable = _on_device(tensors) and", "compiled kernels where derivatives are wanted"),
    mutant("operations", "return \"native\" if not _differentiated(tensors) and native.usable(tensors)", "return \"native\" if native.usable(tensors)", "no derivative"),
    mutant("operations", "of_a = rank2(b, gr, ones_v, ones_u, gc)", "of_a = rank2(a, gr, ones_v, ones_u, gc)", "wrong derivative"),
    mutant("operations", "of_u, of_v = cross(a, b, gr, gc)", "of_v, of_u = cross(a, b, gr, gc)", "wrong derivative"),
    mutant("operations", "of_u, of_b = cross(cotangents, matrices, u, b)", "of_u, of_b = cross(cotangents, matrices, a, v)", "wrong derivative"),
    mutant("operations", "return _launch().moments(r, m, weight, reference.layout_of(r))", "return _launch().moments(m, r, weight, reference.layout_of(r))", "operator's arguments exchanged"),
    mutant("operations", "x.data_ptr() == y.data_ptr() and x.stride() == y.stride() for", "x.shape == y.shape for", "B taken for A"),
    mutant("operations", "and x.stride() == y.stride() for", "for", "a transposed view taken for the matrix"),
    mutant("operations", "tensor.view_as(tensor) if create", "tensor if create", "a way counted twice"),
    mutant("operations", "and torch._C._get_tracing_state() is None", "", "constants in a recorded trace"),
    mutant("operations", "not (tensor.is_neg() or tensor._is_zerotensor())", "True", "lazy signs ignored"),
    mutant("operations", "[value / p for value, (_, p) in row_groups]", "[value / d for value, (d, _) in row_groups]", "mean over the other side"),
)
# fmt: on


if __name__ == "__main__":
    sys.exit(hunt(MUTANTS, lambda name: [f"kernels/test_{test}.py" for test in FILES[name][1]], REQUIRED, sys.argv[1:]))
