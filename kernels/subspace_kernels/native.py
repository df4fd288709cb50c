"""The CPU path: native.cpp, compiled once on this machine by its C++ compiler and called through ctypes.

Used for float32 tensors that need no derivative. Where no compiler is found (``CXX``, ``g++`` or ``clang++``), or with
``SUBSPACE_KERNELS_NATIVE=0``, the torch reference runs instead: the same result, two to three times slower. The library
is kept in ``$XDG_CACHE_HOME/subspace-kernels`` (``~/.cache``), named by a hash of its source, its flags and the
processor; it is written under another name and renamed, so that several processes may build it at once.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from subspace_kernels.layout import Layout
from subspace_kernels.reference import Inputs, Network

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-signed-zeros", "-ffp-contract=fast")
OPTIONAL_FLAGS = ("-fopenmp",)  # without it: one thread
CACHES = 16 * 2**20  # bytes of output beyond which it is written past the caches


def _processor() -> str:
    """Return what ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    except OSError:
        return platform.processor() or platform.machine()


def _build() -> Path:
    """Return the compiled library, compiling it if it is not in the cache.

    Raises:
        RuntimeError: there is no compiler, or it failed; the message holds what it said.
    """
    chosen = os.environ.get("CXX", "").strip()
    compiler = chosen or next((name for name in ("g++", "clang++") if shutil.which(name)), None)
    if compiler is None:
        raise RuntimeError("no C++ compiler found (set CXX, or install g++ or clang++)")
    key = "\n".join((SOURCE.read_text(), " ".join((*FLAGS, *OPTIONAL_FLAGS)), compiler, _processor()))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "subspace-kernels"
    library = folder / f"native-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "native.so"
        said = ""
        for extra in (OPTIONAL_FLAGS, ()):
            command = [*shlex.split(compiler), *FLAGS, *extra, "-shared", "-fPIC", str(SOURCE), "-o", str(made)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=False)
            except OSError as error:
                raise RuntimeError(f"{compiler} could not be run: {error}") from error
            if done.returncode == 0:
                made.replace(library)
                return library
            said = done.stderr
    raise RuntimeError(f"{compiler} failed: {said.strip()[-500:]}")


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled library, or ``None`` (with one warning) where it cannot be had."""
    if os.environ.get("SUBSPACE_KERNELS_NATIVE") == "0":
        return None
    try:
        path = _build()
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # damaged: once more
            path.unlink()
            return ctypes.CDLL(str(_build()))
    except (RuntimeError, OSError) as error:
        warnings.warn(f"the CPU kernels run as plain torch, which is slower: {error}", RuntimeWarning, stacklevel=2)
        return None


def usable(tensors: Sequence[Tensor]) -> bool:
    """Return whether the native path can work on these tensors (float32 on the CPU) and is there."""
    fits = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
    return fits and library() is not None


class Plan:
    """What a layout means to native.cpp: sizes and offsets of every matrix, in the order of the layout.

    Attributes:
        group: which tensor each of the B matrices is in; place: which matrix of its batch it is.
        d, p: their sizes.
        row, column: bytes from the start of packed rows and of packed columns to each matrix's own.
        segments: sizes of the row segments, then of the column segments.
    """

    def __init__(self, layout: Layout) -> None:
        counts = np.array(layout.matrix_counts, dtype=np.int64)
        sizes = np.array([shape[-2:] for shape in layout.shapes], dtype=np.int64).reshape(-1, 2)
        self.group = np.repeat(np.arange(len(counts)), counts)
        self.place = np.concatenate([np.arange(count) for count in counts]) if len(counts) else counts
        self.d, self.p = (np.ascontiguousarray(size) for size in sizes[self.group].T)
        self.row = 4 * (np.cumsum(self.d) - self.d)
        self.column = 4 * (np.cumsum(self.p) - self.p)
        self.segments = np.concatenate([self.d, self.p])

    @property
    def count(self) -> int:
        """The number of matrices."""
        return len(self.d)

    def addresses(self, tensors: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """Return address and row stride of every matrix of ``tensors``, whose inner stride is 1."""
        base = np.array([tensor.data_ptr() for tensor in tensors], dtype=np.int64)
        pitch = np.array([tensor.stride(-2) for tensor in tensors], dtype=np.int64)
        batch = np.array([tensor.stride(-3) if tensor.ndim > 2 else 0 for tensor in tensors], dtype=np.int64)
        return base[self.group] + 4 * batch[self.group] * self.place, pitch[self.group]


plan_of = functools.lru_cache(maxsize=256)(Plan)


def readable(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors with inner stride 1 and at most one batch dimension, copied only where they are not so."""
    fitting = []
    for tensor in tensors:
        if tensor.ndim > 3:
            tensor = tensor.flatten(0, -3)
        fitting.append(tensor if _rows_adjacent(tensor) else tensor.contiguous())
    return fitting


def _array(values: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(values.ctypes.data)


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _new(*shape: int) -> Tensor:
    """Return an uninitialised tensor; type and device are said, because the user may have changed the defaults."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _check(what: str, tensors: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> None:
    """Raise ``ValueError`` unless these are float32 tensors on the CPU of these shapes: pointers forgive nothing."""
    if len(tensors) != len(shapes):
        raise ValueError(f"{what}: {len(tensors)} tensors given, the layout has {len(shapes)} groups")
    for tensor, shape in zip(tensors, shapes, strict=True):
        if tensor.shape != torch.Size(shape) or tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise ValueError(
                f"{what}: shape {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device} given, "
                f"{tuple(shape)}, torch.float32 on cpu expected"
            )


def _written_to(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that these were written, so that a graph that has saved them raises instead of being wrong."""
    increment = getattr(torch.autograd.graph, "increment_version", None)
    if increment is not None:
        for tensor in tensors:
            if not tensor.is_inference():
                increment(tensor)


def _call(name: str, *arguments: object) -> None:
    """Call a C function: tensors and arrays as their address, whole numbers as int64, the last one as threads."""
    loaded = library()
    assert loaded is not None
    passed: list[object] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            passed.append(_pointer(argument))
        elif isinstance(argument, np.ndarray):
            passed.append(_array(argument))
        elif isinstance(argument, int):
            passed.append(ctypes.c_int64(argument))
        else:
            passed.append(argument)
    getattr(loaded, name)(*passed)


def _threads(entries: int) -> ctypes.c_int:
    """Return how many threads are worth their start for this many entries."""
    return ctypes.c_int(torch.get_num_threads() if entries > 2**17 else 1)


def energy_means(r: Sequence[Tensor], layout: Layout) -> Tensor:
    """Return the packed row and column means of R * R, ``(N,)``."""
    plan = plan_of(layout)
    _check("matrices", r, layout.shapes)
    r = readable(r)
    means = _new(layout.rows + layout.columns)
    address, pitch = plan.addresses(r)
    rows, columns = means.data_ptr() + plan.row, means.data_ptr() + 4 * layout.rows + plan.column
    threads = _threads(layout.entries)
    _call("subspace_energy_means", plan.count, address, pitch, plan.d, plan.p, rows, columns, threads)
    return means


def moments(
    r: Sequence[Tensor], m: Sequence[Tensor], weight: Tensor, layout: Layout, in_place: bool
) -> tuple[list[Tensor], Tensor]:
    """Return the new momentum (written over ``m`` where ``in_place``) and three packed means ``(3, N)``."""
    plan = plan_of(layout)
    _check("gradients", r, layout.shapes)
    _check("momentum", m, layout.shapes)
    moved = _written(m) if in_place else [_new(*x.shape) for x in m]
    r, m, to = readable(r), readable(m), readable(moved)
    coordinates = layout.rows + layout.columns
    means = _new(3, coordinates)
    rows, columns = means.data_ptr() + plan.row, means.data_ptr() + 4 * layout.rows + plan.column
    pairs = [array for tensors in (r, m, to) for array in plan.addresses(tensors)]
    threads = _threads(layout.entries)
    each = weight.to(torch.float32).expand(plan.count).contiguous()
    _call("subspace_moments", plan.count, *pairs, plan.d, plan.p, each, rows, columns, coordinates, threads)
    if in_place:
        _written_to(moved)
    return moved, means


def row_means(rows: Tensor, layout: Layout) -> Tensor:
    """Return the means over the rows of every matrix, ``(k, rows)`` to ``(k, B)``."""
    _check("values of rows", [rows], [(len(rows), layout.rows)])
    return _segment_means(rows, plan_of(layout).d)


def column_means(columns: Tensor, layout: Layout) -> Tensor:
    """Return the means over the columns of every matrix, ``(k, columns)`` to ``(k, B)``."""
    _check("values of columns", [columns], [(len(columns), layout.columns)])
    return _segment_means(columns, plan_of(layout).p)


def _segment_means(values: Tensor, sizes: np.ndarray) -> Tensor:
    values = values if values.stride(-1) == 1 else values.contiguous()
    means = _new(len(values), len(sizes))
    _call("subspace_segment_means", len(sizes), sizes, values, len(values), values.stride(0), means)
    return means


def lstm_cell(
    network: Network, inputs: Inputs, hidden: Tensor, cell: Tensor, layout: Layout, in_place: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Advance the coordinate network; the new state is written over the old one if ``in_place``."""
    plan = plan_of(layout)
    network = Network(*(weight.contiguous() for weight in network))
    inputs = Inputs(*(value.contiguous() for value in inputs))
    units, coordinates = network.head_weight.shape[1], layout.rows + layout.columns
    outputs = len(network.head_bias) // 2
    energies, raw, context = (len(value) for value in (inputs.energies, inputs.raw, inputs.context))
    fan_in = energies + raw + context + 1 + units
    _check(
        "weights of the network",
        network,
        ((4 * units, fan_in), (4 * units, 1), (2 * outputs, units), (2 * outputs, 1), (2, energies)),
    )
    matrices = layout.matrices
    _check(
        "inputs of the network",
        inputs,
        ((energies, coordinates), (energies, matrices), (raw, coordinates), (context, matrices)),
    )
    _check("state of the network", (hidden, cell), [(units, coordinates)] * 2)
    in_place = in_place and hidden.is_contiguous() and cell.is_contiguous()
    new = (hidden, cell) if in_place else (_new(*hidden.shape), _new(*cell.shape))
    output = _new(outputs, coordinates)
    sizes = (energies, raw, context, units, outputs)
    threads = _threads(4 * units * coordinates)
    old = (hidden.contiguous(), cell.contiguous())
    _call("subspace_lstm_cell", plan.count, plan.segments, *sizes, *inputs, *network, *old, output, *new, threads)
    if in_place:
        _written_to(new)
    return output, *new


def directions(
    r: Sequence[Tensor],
    m: Sequence[Tensor],
    mix: Tensor | None,
    scale: Tensor,
    layout: Layout,
    out: Sequence[Tensor] | None,
) -> tuple[list[Tensor], Tensor]:
    """Return the scaled directions (written into ``out`` if given) and their mean squared column lengths ``(B,)``."""
    plan = plan_of(layout)
    _check("gradients", r, layout.shapes)
    if mix is not None:
        _check("momentum", m, layout.shapes)
        _check("mix", [mix], [(layout.matrices,)])
    _check("scale", [scale], [(layout.rows + layout.columns,)])
    if out is not None:
        _check("out", out, layout.shapes)
    made = [_new(*x.shape) for x in r] if out is None else _written(out)
    r, m, to = readable(r), readable(m), readable(made)
    read = {x.data_ptr() for x in (*r, *m)}
    past_caches = 4 * layout.entries > CACHES and not any(x.data_ptr() in read for x in to)
    nothing = ctypes.c_void_p(None)
    momentum: tuple[object, object] = (nothing, nothing) if mix is None else plan.addresses(m)
    scale = scale.contiguous()
    rows, columns = scale.data_ptr() + plan.row, scale.data_ptr() + 4 * layout.rows + plan.column
    squares = _new(layout.matrices)
    _call(
        "subspace_directions",
        plan.count,
        *plan.addresses(r),
        *momentum,
        nothing if mix is None else mix.contiguous(),
        plan.d,
        plan.p,
        rows,
        columns,
        *plan.addresses(to),
        squares,
        ctypes.c_int(past_caches),
        _threads(layout.entries),
    )
    if out is not None:
        _written_to(made)
    return made, squares


def _written(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors themselves where native.cpp can write them in place, new ones elsewhere."""
    return [x if _rows_adjacent(x) else _new(*x.shape) for x in tensors]


def _rows_adjacent(tensor: Tensor) -> bool:
    """Return whether entries of a row are neighbours, and matrices of a batch equally far apart."""
    return (tensor.stride(-1) == 1 or tensor.shape[-1] == 1) and (tensor.ndim <= 3 or tensor.is_contiguous())
