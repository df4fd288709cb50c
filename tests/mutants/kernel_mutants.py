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

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
# The source of each name, and its tests in the order in which they are likely to fail and cheap to run; the first failure
# ends the run.
FILES = {
    "tiles": ("tiles.py", ("test_copy.py", "test_plans.py", "test_interpreter.py")),
    "launch": ("launch.py", ("test_copy.py", "test_plans.py", "test_interpreter.py")),
    "native": ("native.cpp", ("test_copy.py", "test_native.py")),
    "operations": ("operations.py", ("test_copy.py", "test_native.py", "test_routes.py")),
}
REQUIRED = 0.9


class Mutant(NamedTuple):
    """One seeded error: in which file, what is replaced by what, and what kind of error that is."""

    file: str
    original: str
    mutated: str
    kind: str


# One line per mutant reads as a table.
# fmt: off
MUTANTS = (
    # masks
    Mutant("tiles", "row_inside = row < d", "row_inside = row <= d", "wrong mask"),
    Mutant("tiles", "column_inside = column < p", "column_inside = column < p + 1", "wrong mask"),
    Mutant("tiles", "inside = row_inside[:, None] & column_inside[None, :]", "inside = row_inside[:, None] & (column_inside | True)[None, :]", "dropped mask"),
    Mutant("tiles", "inside = row_inside[:, None] & column_inside[None, :]", "inside = row_inside[:, None] | column_inside[None, :]", "wrong mask"),
    Mutant("tiles", "tl.store(row_sums, tl.sum(by_row, axis=1), mask=row_inside)", "tl.store(row_sums, tl.sum(by_row, axis=1))", "dropped mask"),
    Mutant("tiles", "mask = (tile < count)[:, None] & inside[None, :]", "mask = (tile <= count)[:, None] & inside[None, :]", "wrong mask"),
    Mutant("tiles", "    inside = coordinate < last\n", "    inside = coordinate < count\n", "rows run into columns"),
    Mutant("tiles", "present = unit < H", "present = unit <= H", "wrong mask"),
    Mutant("tiles", "mask=(output < O)[:, None] & inside[None, :]", "mask=inside[None, :] & (output >= 0)[:, None]", "dropped mask"),
    # offsets
    Mutant("tiles", "2 * OPERAND * matrices + matrix", "2 * OPERAND * matrices", "wrong offset"),
    Mutant("tiles", "(2 * OPERAND + 1) * matrices + matrix", "1 * matrices + matrix", "pitch of another operand"),
    Mutant("tiles", "row.to(tl.int64)[:, None] * pitch", "(row[:, None] * pitch.to(tl.int32))", "int32 overflow"),
    Mutant("tiles", "(first_column // COLUMNS).to(tl.int64) * d + row", "(first_column // COLUMNS).to(tl.int64) * p + row", "wrong offset"),
    Mutant("tiles", "(first_row // ROWS).to(tl.int64) * p + column", "(first_row // COLUMNS).to(tl.int64) * p + column", "wrong offset"),
    Mutant("tiles", "packed = u + tl.load(records + 6 * matrix + 2) + row", "packed = u + row", "wrong offset"),
    Mutant("tiles", "packed_column = tl.load(records + 6 * matrix + 3) + column", "packed_column = tl.load(records + 6 * matrix + 2) + column", "wrong offset"),
    Mutant("tiles", "squares + first_tile + tile", "squares + tile", "tiles of two buckets collide"),
    Mutant("tiles", "range(0, count, TILES)", "range(0, tl.minimum(count, TILES), TILES)", "later tiles dropped"),
    Mutant("tiles", "LAST: tl.constexpr = 1 + MIX", "LAST: tl.constexpr = 1", "result written into M"),
    # arithmetic
    Mutant("tiles", "    x = x.to(tl.float32)\n    y = x", "    y = x", "dropped upcast"),
    Mutant("tiles", "        y = y.to(tl.float32)\n", "        y = y.to(tl.float16).to(tl.float32)\n", "half precision on the way"),
    Mutant("tiles", "(m.to(tl.float32) - x)", "(m.to(tl.float16).to(tl.float32) - x)", "half precision on the way"),
    Mutant("tiles", "bits + 0x7FFF + ((bits >> 16) & 1)", "bits", "truncation"),
    Mutant("tiles", "bits + 0x7FFF + ((bits >> 16) & 1)", "bits + 0x8000", "ties away from even"),
    Mutant("tiles", "_rounded(y + tl.load(weight) * (x - y), OUT_TYPE)", "_rounded(x + tl.load(weight) * (y - x), OUT_TYPE)", "weight of the other matrix"),
    Mutant("tiles", "_rounded(y + tl.load(weight) * (x - y), OUT_TYPE)", "y + tl.load(weight) * (x - y)", "statistics not of what is stored"),
    Mutant("tiles", "tl.store(row_sums + plane, tl.sum(y * y, axis=1), mask=row_inside)", "tl.store(row_sums + plane, tl.sum(x * y, axis=1), mask=row_inside)", "wrong statistic"),
    Mutant("tiles", "tl.sum(total, axis=0) * tl.load(factors + segment)", "tl.sum(total, axis=0)", "missing factor"),
    Mutant("tiles", "factor += left[:, None] * right[None, :]", "factor = left[:, None] * right[None, :]", "first term dropped"),
    Mutant("tiles", "tl.load(mix + matrix)", "tl.load(mix)", "mix of another matrix"),
    # network
    Mutant("tiles", "_sigmoid(f) * state + _sigmoid(i) * _tanh(g)", "_sigmoid(i) * state + _sigmoid(f) * _tanh(g)", "wrong gate order"),
    Mutant("tiles", "state = _sigmoid(o) * _tanh(state)", "state = _sigmoid(o) * state", "dropped tanh"),
    Mutant("tiles", "return tl.where(tl.abs(x) < 0.25, near, ", "return tl.where(tl.abs(x) < 0.0, near, ", "cancellation near zero"),
    Mutant("tiles", "head_weight + (side * O + k) * H", "head_weight + k * H", "wrong side's head"),
    Mutant("tiles", "head_bias + side * O + output", "head_bias + output", "wrong side's bias"),
    Mutant("tiles", "skip + side * E + e", "skip + e", "wrong side's skip"),
    Mutant("tiles", "(1.0 - 2.0 * side.to(tl.float32))", "(2.0 * side.to(tl.float32) - 1.0)", "wrong sign"),
    Mutant("tiles", "return 0.5 * tl.log(", "return tl.log(", "dropped square root"),
    Mutant("tiles", "numerator / (tl.load(mean, mask=inside, other=1.0) + TINY) + FLOOR", "numerator / (tl.load(mean, mask=inside, other=1.0) + TINY)", "no floor"),
    Mutant("tiles", "tl.where((output == 0)[:, None], tl.exp", "tl.where((output >= 0)[:, None], tl.exp", "exp on every output"),
    Mutant("tiles", "means + e * matrices + matrix", "means + matrix", "mean of another energy"),
    # launches
    Mutant("launch", "tuple(_inverse(p) for _, p in sizes) + tuple(_inverse(d) for d, _ in sizes)", "tuple(_inverse(d) for d, _ in sizes) + tuple(_inverse(p) for _, p in sizes)", "factors of the other side"),
    Mutant("launch", "column_partial = partial + across * d", "column_partial = partial + down * d", "wrong offset"),
    Mutant("launch", "matrix + 1\n", "matrix + 0\n", "wrong offset"),
    Mutant("launch", "row, column, matrix = row + d, column + p", "row, column, matrix = row + p, column + d", "rows and columns exchanged"),
    Mutant("launch", "layout.rows + column)", "column)", "columns written over rows"),
    Mutant("launch", "offset + i * stride for offset", "offset + i for offset", "batch stride ignored"),
    Mutant("launch", "first + size * offset for offset", "first + offset for offset", "offset in entries, not bytes"),
    Mutant("launch", "return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()", "return x", "strided rows taken as adjacent"),
    Mutant("launch", "            target.detach().copy_(result)\n", "            pass\n", "strided result lost"),
    Mutant("launch", "same = all(x is y for x, y in zip(a, b, strict=True))", "same = True", "B taken for A"),
    Mutant("launch", "    if out[1].data_ptr() == values[-2].data_ptr():", "    if False:", "hidden state in place"),
    Mutant("launch", "(3 if modes[\"MOMENTS\"] else 1, plan.partials", "(1, plan.partials", "planes missing"),
    Mutant("launch", "tuple(_inverse(p) for _, p in layout.sizes), layout.matrix_counts", "tuple(1.0 for _, p in layout.sizes), layout.matrix_counts", "missing factor"),
    Mutant("launch", "buckets.append(Bucket(key, tile, tiles,", "buckets.append(Bucket(key, tile, 0,", "tiles of two buckets collide"),
    Mutant("launch", "    row_blocks = math.ceil(layout.rows / CELL_BLOCK)", "    row_blocks = layout.rows // CELL_BLOCK", "last rows dropped"),
    Mutant("launch", "if current and held + size > cache_bytes", "if current and held > cache_bytes", "chunks beyond the cache"),
    # CPU
    Mutant("native", "for (; j < width; j++) {\n        for (int q", "for (; j + 1 < width; j++) {\n        for (int q", "last column dropped"),
    Mutant("native", "for (; i < height; i++)\n            statistics_of<1", "for (; i + 1 < height; i++)\n            statistics_of<1", "last row dropped"),
    Mutant("native", "y += weight * (x - y);\n                store", "y += weight * (y - x);\n                store", "wrong sign"),
    Mutant("native", "const Vec product[3] = {x * x, y * y, x * y};", "const Vec product[3] = {x * x, x * y, y * y};", "statistics exchanged"),
    Mutant("native", "columns[k][kind * stride + j] /= height;", "columns[k][kind * stride + j] /= width;", "mean over the other side"),
    Mutant("native", "+ rest[kind][q]) / width;", ") / width;", "tail of a row dropped"),
    Mutant("native", "std::fill_n(columns[k] + kind * stride, width, 0.0f);", ";", "sums not cleared"),
    Mutant("native", "(side ? -row[C] : row[C])", "(side ? row[C] : -row[C])", "wrong sign of the side"),
    Mutant("native", "context_value[c * matrices + b]", "context_value[c * matrices]", "context of another matrix"),
    Mutant("native", "heads.data() + (size_t)side * H * O", "heads.data()", "wrong side's head"),
    Mutant("native", "head_bias + side * O, skip + side * E", "head_bias + side * O, skip", "wrong side's skip"),
    Mutant("native", "(k < E + Q ? k : k + C + 1)", "k", "hidden weights taken for those of the context"),
    Mutant("native", "const Vec leave = 1.0f + bounded_exp(clamp(-gate[3][v]", "const Vec leave = 1.0f + bounded_exp(clamp(-gate[0][v]", "wrong gate"),
    Mutant("native", "(1.0f - squashed) / (leave * (1.0f + squashed))", "1.0f / leave * c", "dropped tanh"),
    Mutant("native", "return given < INFINITY ? result : given;", "return result;", "what is not finite becomes finite"),
    Mutant("native", "mean[k * matrices + b] + TINY", "mean[b] + TINY", "mean of another energy"),
    Mutant("native", "if (o == 0)", "if (o <= 1)", "exp on another output"),
    Mutant("native", "const float share = m ? mix[k] : 0.0f;", "const float share = m ? mix[0] : 0.0f;", "mix of another matrix"),
    Mutant("native", "squares[k] = (float)(square / width);", "squares[k] = (float)(square / height);", "wrong normalisation"),
    Mutant("native", "reinterpret_cast<uintptr_t>(to) % (4 * LANES)) == 0", "reinterpret_cast<uintptr_t>(to) % 4) == 0", "streaming store to an unaligned address"),
    Mutant("native", "from += size[k];", "from += size[0];", "wrong segment"),
    # routes
    Mutant("operations", "torch._C._functorch.maybe_current_level() is not None or ", "", "kernels under torch.func"),
    Mutant("operations", " or torch.autograd.forward_ad._current_level >= 0", "", "kernels on dual numbers"),
    Mutant("operations", "usable = _on_device(tensors) and not torch.is_grad_enabled() and not _transformed()", "usable = _on_device(tensors) and not torch.is_grad_enabled()", "compiled kernels under torch.func"),
    Mutant("operations", "usable = _on_device(tensors) and not torch.is_grad_enabled() and", "usable = _on_device(tensors) and", "compiled kernels where derivatives are wanted"),
    Mutant("operations", "return \"native\" if not _differentiated(tensors) and native.usable(tensors)", "return \"native\" if native.usable(tensors)", "no derivative"),
    Mutant("operations", "of_a = rank2(b, gr, ones_v, ones_u, gc)", "of_a = rank2(a, gr, ones_v, ones_u, gc)", "wrong derivative"),
    Mutant("operations", "of_u, of_v = cross(a, b, gr, gc)", "of_v, of_u = cross(a, b, gr, gc)", "wrong derivative"),
    Mutant("operations", "of_u, of_b = cross(cotangents, matrices, u, b)", "of_u, of_b = cross(cotangents, matrices, a, v)", "wrong derivative"),
    Mutant("operations", "return _launch().moments(r, m, weight, reference.layout_of(r))", "return _launch().moments(m, r, weight, reference.layout_of(r))", "operator's arguments exchanged"),
    Mutant("operations", "return a if all(x.data_ptr() == y.data_ptr() for", "return a if all(x.shape == y.shape for", "B taken for A"),
    Mutant("operations", "[value / p for value, (_, p) in row_groups]", "[value / d for value, (d, _) in row_groups]", "mean over the other side"),
)
# fmt: on


def run_tests(folder: Path, file: str) -> bool:
    """Run the tests of ``file`` in ``folder``; True if they pass."""
    path = os.pathsep.join([str(folder), str(folder / "kernels")])
    environment = dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1", XDG_CACHE_HOME=str(folder / "cache"))
    tests = [str(folder / "tests" / "kernels" / name) for name in FILES[file][1]]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if finished.returncode not in (0, 1, 2) and finished.returncode >= 0:  # below zero: a signal, the kernel crashed
        raise RuntimeError(finished.stdout + finished.stderr)
    return finished.returncode == 0


def prepare(folder: Path) -> None:
    """Copy both packages and the kernels' tests."""
    ignore = shutil.ignore_patterns("__pycache__")
    for part in ("kernels", "subspace_meta", "tests/kernels"):
        shutil.copytree(ROOT / part, folder / part, ignore=ignore)
    for name in ("conftest.py", "making.py"):
        shutil.copy(ROOT / "tests" / name, folder / "tests")
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "tests" / "kernels" / "test_copy.py").write_text(
        "import subspace_kernels\n\n\ndef test_the_copy_is_what_runs():\n"
        f"    assert subspace_kernels.__file__.startswith({str(folder)!r})\n"
    )


def main(files: list[str]) -> int:
    """Run all mutants of ``files`` (all files if empty); return the exit code."""
    mutants = [mutant for mutant in MUTANTS if not files or mutant.file in files]
    survivors = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for file in dict.fromkeys(mutant.file for mutant in mutants):
            if not run_tests(folder, file):
                print(f"the tests of {file} fail without any mutant")
                return 1
        for number, mutant in enumerate(mutants, start=1):
            path = folder / "kernels" / "subspace_kernels" / FILES[mutant.file][0]
            source = path.read_text()
            if mutant.original not in source:
                print(f"{mutant.file}: {mutant.original!r} is no longer in the source; renew this mutant")
                return 1
            path.write_text(source.replace(mutant.original, mutant.mutated))
            start = time.monotonic()
            killed = not run_tests(folder, mutant.file)
            path.write_text(source)
            status = "killed  " if killed else "SURVIVED"
            print(
                f"{number:3d}/{len(mutants)} {status} {mutant.file}: {mutant.kind} [{time.monotonic() - start:.0f} s]",
                flush=True,
            )
            if not killed:
                survivors.append(mutant)
    rate = 1.0 - len(survivors) / max(1, len(mutants))
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} killed ({100 * rate:.1f} %)")
    for mutant in survivors:
        print(f"survivor in {mutant.file}: {mutant.original!r} -> {mutant.mutated!r} ({mutant.kind})")
    return 0 if mutants and rate >= REQUIRED else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
