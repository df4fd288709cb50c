"""Every kernel in Triton's interpreter, against float64 references, on small lists of awkward matrices.

    TRITON_INTERPRET=1 python tests/kernels/interpreter_job.py [names of checks]

Operands lie inside arenas filled with NaN: a lane that reads beyond its matrix makes the result NaN, one that writes
beyond it leaves a number where NaN was. Stops at the first check that fails. Run by ``test_interpreter.py`` in a
process of its own, because Triton looks at the variable when it is imported.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
import time

os.environ["TRITON_INTERPRET"] = "1"

import hypothesis
import torch
from hypothesis import strategies as st
from subspace_kernels import launch, reference
from subspace_kernels.layout import Layout
from subspace_kernels.reference import Inputs, Network, layout_of
from torch import Tensor

torch.set_num_threads(1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF_UNIT = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
KINDS = ("plain", "shifted", "pitched", "transposed")
hypothesis.settings.register_profile(
    "job",
    deadline=None,
    database=None,
    derandomize=True,
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),  # no shrinking: minutes here
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("job")

# Sides around the edges of the three tile classes and of the classes themselves.
SIDES = st.sampled_from([1, 2, 5, 16, 17, 23, 24, 25, 47, 48, 64, 65, 128, 129, 130, 257])
SHAPES = st.one_of(st.tuples(SIDES, SIDES), st.tuples(st.integers(1, 3), st.sampled_from([1, 4, 17]), SIDES))
MATRICES = st.lists(st.tuples(SHAPES, st.sampled_from(KINDS), st.sampled_from(DTYPES)), min_size=1, max_size=3)
EDGES = [
    ((64, 128), "plain", torch.float32),
    ((65, 132), "plain", torch.bfloat16),
    ((2, 20, 300), "pitched", DTYPES[0]),
]
EDGES += [((1, 7), "shifted", DTYPES[0]), ((300, 1), "plain", DTYPES[2]), ((130, 50), "transposed", DTYPES[1])]


class Arenas:
    """Makes operands inside buffers full of NaN, and checks afterwards that the buffers are as they were."""

    def __init__(self, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)
        self.kept: list[tuple[Tensor, Tensor]] = []

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, kind: str = "plain") -> Tensor:
        return self.place(torch.randn(shape, generator=self.generator), dtype, kind)

    def place(self, values: Tensor, dtype: torch.dtype = torch.float32, kind: str = "plain") -> Tensor:
        if kind == "transposed":
            return self.place(values.mT, dtype).mT
        *batch, d, p = (1, *values.shape) if values.ndim < 2 else values.shape
        pitch = p + (8 if kind == "pitched" else 0)
        start = 64 + (1 if kind == "shifted" else 0)
        count = math.prod(batch) * d
        buffer = torch.full((start + count * pitch + 4096,), torch.nan, dtype=dtype)
        view = buffer.as_strided((*batch, d, p), self._strides(batch, d, pitch), start)
        view.copy_(values.reshape(view.shape))
        self.kept.append((buffer, view))
        return view.reshape(values.shape) if values.ndim < 2 else view

    @staticmethod
    def _strides(batch: list[int], d: int, pitch: int) -> tuple[int, ...]:
        strides, step = [pitch, 1], d * pitch
        for size in reversed(batch):
            strides.insert(0, step)
            step *= size
        return tuple(strides)

    def check(self) -> None:
        """Assert that nothing around the operands was overwritten."""
        for buffer, view in self.kept:
            inside = torch.zeros(len(buffer), dtype=torch.bool)
            inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
            assert bool(buffer[~inside].isnan().all()), "written outside of a matrix"


def close(found: Tensor, wanted: Tensor, scale: Tensor) -> None:
    """Assert |found - wanted| <= rounding of sums, of size ``scale``, and of the result's type."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    bound = 3e-6 * scale.abs() + 1.001 * HALF_UNIT[found.dtype] * wanted.abs() + 1e-30
    if found.dtype == torch.float16:
        bound = bound + 2.0**-25  # below the normal numbers
    difference = (found.double() - wanted).abs()
    assert bool((difference <= bound).all()), f"off by {float((difference / bound).max())} times the bound"


def wide(tensors: list[Tensor]) -> list[Tensor]:
    return [x.double() for x in tensors]


def absolute(tensors: list[Tensor]) -> list[Tensor]:
    return [x.double().abs() for x in tensors]


def operands(arenas: Arenas, matrices: list, lists: int) -> list[list[Tensor]]:
    """Return lists of equal shapes; the kinds and types of the second and third are turned by one place."""
    found = []
    for turn in range(lists):
        turned = matrices[turn:] + matrices[:turn]
        found.append(
            [
                arenas.normal(*shape, dtype=dtype, kind=kind)
                for (shape, _, _), (_, kind, dtype) in zip(matrices, (turned + matrices)[: len(matrices)], strict=True)
            ]
        )
    return found


def mixed(r: list[Tensor], m: list[Tensor], mix: Tensor, layout: Layout) -> list[Tensor]:
    parts = torch.split(mix.double(), list(layout.matrix_counts))
    return [
        a + part.reshape((*a.shape[:-2], 1, 1)) * (b - a) for a, b, part in zip(wide(r), wide(m), parts, strict=True)
    ]


def examples(most: int):
    """Return a decorator that runs a check on the edges and on drawn lists."""

    def decorate(check):
        drawn = hypothesis.settings(max_examples=most)(hypothesis.given(MATRICES)(lambda matrices: check(matrices)))

        def run() -> None:
            check(EDGES)
            drawn()

        run.__name__ = check.__name__
        return run

    return decorate


# --- Checks -----------------------------------------------------------------------------------------------------------


@examples(6)
def check_cross(matrices: list) -> None:
    arenas = Arenas()
    a, b = operands(arenas, matrices, 2)
    layout = layout_of(a)
    u, v = arenas.normal(layout.rows), arenas.normal(layout.columns)
    for pair, weights in (((a, b), (u, v)), ((a, a), ()), ((a, b), (u, None)), ((a, b), (None, v))):
        found = launch.cross(*pair, *weights)
        wanted = reference.cross(*map(wide, pair), *(w if w is None else w.double() for w in weights))
        scale = reference.cross(*map(absolute, pair), *(w if w is None else w.double().abs() for w in weights))
        for triple in zip(found, wanted, scale, strict=True):
            assert triple[0].dtype == torch.float32
            close(*triple)
    arenas.check()


@examples(3)
def check_means(matrices: list) -> None:
    arenas = Arenas(1)
    a, b = operands(arenas, matrices, 2)
    layout = layout_of(a)
    scale = reference.cross_means(absolute(a), absolute(b), layout)
    close(launch.cross_means(a, b, layout), reference.cross_means(wide(a), wide(b), layout), scale)
    sizes = tuple((max(1, d - 1), max(1, p - 2)) for d, p in layout.sizes)
    smaller = Layout(layout.shapes, sizes)
    scale = reference.cross_means(absolute(a), absolute(a), smaller)
    close(launch.cross_means(a, a, smaller), reference.cross_means(wide(a), wide(a), smaller), scale)


@examples(5)
def check_rank2(matrices: list) -> None:
    arenas = Arenas(2)
    x, out = operands(arenas, matrices, 2)
    layout = layout_of(x)
    a, v, u, b = (arenas.normal(n) for n in (layout.rows, layout.columns) * 2)
    for factors in ((a, v), (a, v, u, b)):
        wanted = reference.rank2(wide(x), *(f.double() for f in factors))
        scale = reference.rank2(absolute(x), *(f.double().abs() for f in factors))
        for result in (launch.rank2(x, *factors), launch.rank2(x, *factors, out=out)):
            for triple in zip(result, wanted, scale, strict=True):
                close(*triple)
        assert all(one.data_ptr() == other.data_ptr() for one, other in zip(result, out, strict=True))
    arenas.check()


@examples(5)
def check_directions(matrices: list) -> None:
    arenas = Arenas(3)
    r, m, out = operands(arenas, matrices, 3)
    layout = layout_of(r)
    scale, mix = arenas.normal(layout.rows + layout.columns), arenas.normal(layout.matrices)
    for momentum, part in (([], None), (m, mix)):
        held = wide(r) if part is None else mixed(r, m, part, layout)
        size = (
            [x.double().abs() for x in r]
            if part is None
            else [x + y for x, y in zip(absolute(r), [5 * z for z in absolute(m)], strict=True)]
        )
        size = [5 * x for x in size]
        wanted = reference.directions(held, [], None, scale.double(), layout)
        bounds = reference.directions(size, [], None, scale.double().abs(), layout)[0]
        for target in (None, out):
            found, squares = launch.directions(r, momentum, part, scale, layout, out=target)
            for triple in zip(found, wanted[0], bounds, strict=True):
                close(*triple)
            exact = torch.cat(
                [
                    x.double().square().sum(dim=(-2, -1)).reshape(-1) / p
                    for x, (_, p) in zip(found, layout.sizes, strict=True)
                ]
            )
            close(squares, exact, exact)
    arenas.check()


@examples(4)
def check_moments(matrices: list) -> None:
    arenas = Arenas(4)
    r, m, out = operands(arenas, matrices, 3)
    layout = layout_of(r)
    weight = torch.linspace(0.1, 0.9, layout.matrices)  # one for each matrix
    wanted = reference.moments(wide(r), wide(m), weight.double(), layout)[0]
    size = [x + y for x, y in zip(absolute(r), absolute(m), strict=True)]
    before = [x.clone() for x in m]
    for target in (None, out, m):
        found, means = launch.moments(r, m, weight, layout, out=target)
        for triple in zip(found, wanted, size, strict=True):
            close(*triple)
        for index, (a, b) in enumerate(((r, r), (before, before), (r, before))):
            scale = reference.cross_means(absolute(a), absolute(b), layout)
            close(means[index], reference.cross_means(wide(a), wide(b), layout), scale)
    assert all(x is y for x, y in zip(found, m, strict=True))
    arenas.check()


def network(arenas: Arenas, sizes: tuple[int, ...], layout: Layout) -> tuple[Network, Inputs, Tensor, Tensor]:
    units, energies, raw, context, outputs = sizes
    inputs, count = energies + raw + context + 1 + units, layout.rows + layout.columns
    shapes = ((4 * units, inputs), (4 * units, 1), (2 * outputs, units), (2 * outputs, 1), (2, energies))
    net = Network(*(arenas.place(0.4 * torch.randn(shape, generator=arenas.generator)) for shape in shapes))
    size = arenas.place(torch.randn(energies, count, generator=arenas.generator).mul(3).exp())
    size[0, :: max(1, count // 3)] = 0.0
    means = arenas.place(torch.randn(energies, layout.matrices, generator=arenas.generator).exp())
    means[0, 0] = 0.0  # a matrix of zeros
    size[0, : layout.shapes[0][-2]] = 0.0
    size[0, layout.rows : layout.rows + layout.shapes[0][-1]] = 0.0
    seen = Inputs(size, means, arenas.normal(raw, count), arenas.normal(context, layout.matrices))
    return net, seen, arenas.normal(units, count), 3 * arenas.normal(units, count)


def check_lstm() -> None:
    shapes = ((3, 5), (2, 4, 70), (61, 1), (2, 1, 2, 3))
    for sizes, some in (((20, 4, 1, 8, 3), shapes), ((1, 1, 1, 1, 1), shapes[:1]), ((9, 2, 3, 1, 2), shapes[1:2])):
        arenas, layout = Arenas(5), Layout(some)
        net, seen, hidden, cell = network(arenas, sizes, layout)
        narrow = (net, seen, hidden, cell)
        wanted = reference.lstm_cell(
            Network(*wide(list(net))), Inputs(*wide(list(seen))), hidden.double(), cell.double(), layout
        )
        found = launch.lstm_cell(*narrow, layout)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=2e-6)
        out = tuple(arenas.normal(*x.shape) for x in found)
        again = launch.lstm_cell(*narrow, layout, out=out)
        assert all(torch.equal(x, y) and y is z for x, y, z in zip(found, again, out, strict=True))
        kept = arenas.place(cell)
        again = launch.lstm_cell(net, seen, hidden, kept, layout, out=(out[0], out[1], kept))
        assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
        arenas.check()
    launch.CELL_ROLLED = not launch.CELL_ROLLED  # the variant for the other maker's GPUs
    again = launch.lstm_cell(*narrow, layout)
    launch.CELL_ROLLED = not launch.CELL_ROLLED
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
    small = Network(net.weight * 0, net.bias * 0, *net[2:])  # tanh near zero, relatively
    small.bias[2 * sizes[0] : 3 * sizes[0]] = 1e-5
    found = launch.lstm_cell(small, seen, hidden, cell * 0, layout)[2]
    torch.testing.assert_close(found, torch.full_like(found, 0.5e-5), rtol=1e-5, atol=0.0)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(
        one.contiguous().view(torch.int32), other.contiguous().view(torch.int32)
    )


def check_company_changes_no_bit() -> None:
    arenas = Arenas(6)
    shapes = [(5, 300), (130, 129), (300, 3), (2, 4, 20), (70, 50), (130, 129)]
    a, b = ([arenas.normal(*shape) for shape in shapes] for _ in range(2))
    layout = layout_of(a)
    u, v, scale = (arenas.normal(n) for n in (layout.rows, layout.columns, layout.rows + layout.columns))
    together = [
        *launch.cross(a, b, u, v), *layout_parts(launch.cross_means(a, a, layout), layout),
        launch.directions(a, [], None, scale, layout)[1],
    ]  # fmt: skip
    us, vs, rows, columns = layout.split_rows(u), layout.split_columns(v), *layout.unpack(scale)
    alone: list[list[Tensor]] = [[] for _ in together]
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        one = layout_of([x])
        results = [
            *launch.cross([x], [y], us[i].reshape(-1), vs[i].reshape(-1)),
            *layout_parts(launch.cross_means([x], [x], one), one),
            launch.directions([x], [], None, one.pack([rows[i]], [columns[i]]), one)[1],
        ]
        for part, result in zip(alone, results, strict=True):
            part.append(result)
    for part, result in zip(alone, together, strict=True):
        assert same_bits(torch.cat(part), result)
    again = launch.cross(a, b, u, v)
    assert all(same_bits(x, y) for x, y in zip(again, together, strict=False)), "not deterministic"


def layout_parts(packed: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    return packed[: layout.rows], packed[layout.rows :]


def check_zero_padding_changes_no_bit() -> None:
    arenas = Arenas(7)
    for (d, p), (rows, columns) in (((70, 130), (64 * 3, 128 * 3)), ((5, 270), (23, 600)), ((270, 5), (2000, 47))):
        a, b, u, v = arenas.normal(d, p), arenas.normal(d, p), arenas.normal(d), arenas.normal(p)
        big_a, big_b = (arenas.place(torch.zeros(rows, columns)) for _ in range(2))
        big_u, big_v = arenas.normal(rows), arenas.normal(columns)
        for big, small in ((big_a[:d, :p], a), (big_b[:d, :p], b), (big_u[:d], u), (big_v[:p], v)):
            big.copy_(small)
        for one, other in zip(launch.cross([a], [b], u, v), launch.cross([big_a], [big_b], big_u, big_v), strict=True):
            assert same_bits(one, other[: len(one)])
            assert not bool(other[len(one) :].any())
        layout, padded = Layout(((d, p),)), Layout(((rows, columns),), ((d, p),))
        one, other = launch.cross_means([a], [a], layout), launch.cross_means([big_a], [big_a], padded)
        assert same_bits(one, torch.cat([other[:d], other[rows : rows + p]]))
        one = launch.directions([a], [], None, torch.cat([u, v]), layout)
        other = launch.directions([big_a], [], None, torch.cat([big_u, big_v]), padded)
        assert same_bits(one[1], other[1])
        assert same_bits(one[0][0], other[0][0][:d, :p])


def check_many_tiles() -> None:
    arenas = Arenas(12)  # more tiles on a side than reduce_partials takes at once
    r = [arenas.normal(1, 256 * launch.REDUCE_TILES + 300), arenas.normal(256 * launch.REDUCE_TILES + 300, 1)]
    layout = layout_of(r)
    wanted = reference.cross_means(wide(r), wide(r), layout)
    close(launch.cross_means(r, r, layout), wanted, wanted)
    scale = torch.ones(layout.rows + layout.columns)
    wanted = reference.directions(wide(r), [], None, scale.double(), layout)[1]
    close(launch.directions(r, [], None, scale, layout)[1], wanted, wanted)


def check_offsets_beyond_32_bits() -> None:
    pitch = 2**30 + 8  # in entries: row 2 starts beyond 2**31 of them
    memory = mmap.mmap(-1, 4 * (3 * pitch), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # not reserved
    far = torch.frombuffer(memory, dtype=torch.float32).as_strided((3, 5), (pitch, 1))  # touches three pages
    near = torch.arange(1.0, 16.0).reshape(3, 5)
    far.copy_(near)
    for one, other in zip(launch.cross([far], [far]), launch.cross([near], [near]), strict=True):
        assert same_bits(one, other)
    batch = torch.frombuffer(memory, dtype=torch.float32).as_strided((3, 1, 5), (pitch, 1, 1))
    assert torch.equal(launch.cross([batch], [batch])[0], near.square().sum(dim=1))
    a, v = torch.tensor([1.0, 2.0, 3.0]), torch.ones(5)
    (result,) = launch.rank2([far], a, v, out=[far])
    assert result is far
    assert torch.equal(far, a[:, None] * near)
    # And pitches so large that not even addresses without memory exist: the tables hold them unchanged.
    table = launch._address_table([[torch.empty(1).as_strided((1, 2, 0), (7, 2**33, 1))]], torch.device("cpu"))
    assert int(table[-1]) == 2**33


def check_in_place() -> None:
    arenas = Arenas(8)
    shapes = [(70, 130), (4, 20), (300, 2)]
    r, m = ([arenas.normal(*shape) for shape in shapes] for _ in range(2))
    layout, scale = layout_of(r), arenas.normal(sum(sum(shape) for shape in shapes))
    mix, weight = arenas.normal(3), torch.tensor(0.7)
    fresh = [x.clone() for x in m]
    pure, means = launch.moments(r, m, weight, layout)
    assert all(torch.equal(x, y) for x, y in zip(m, fresh, strict=True)), "pure call changed M"
    assert same_bits(launch.moments(r, m, weight, layout, out=m)[1], means)
    assert all(torch.equal(x, y) for x, y in zip(m, pure, strict=True))
    wanted, squares = launch.directions(r, m, mix, scale, layout)
    copies = [x.clone() for x in r]
    found, other = launch.directions(copies, m, mix, scale, layout, out=copies)
    assert same_bits(squares, other)
    assert all(x is z and torch.equal(x, y) for x, y, z in zip(found, wanted, copies, strict=True))
    arenas.check()


def check_rounding() -> None:
    hard = [1 + 2**-8, 1 + 3 * 2**-8, 0.0, -0.0, 3e38, math.inf, -math.inf, math.nan]
    values = torch.cat([torch.randn(4000, generator=torch.Generator().manual_seed(9)), torch.tensor(hard)])
    values = torch.cat([values, torch.zeros(-len(values) % 256)]).reshape(-1, 16)
    a, v = torch.ones(len(values)), torch.ones(16)
    for dtype in (torch.bfloat16, torch.float16):
        (found,) = launch.rank2([values], a, v, out=[torch.empty_like(values, dtype=dtype)])
        torch.testing.assert_close(found, values.to(dtype), rtol=0, atol=0, equal_nan=True)


def check_launches() -> None:
    arenas = Arenas(10)
    shapes = [(70, 64), (70, 128), (4, 300), (300, 4), (2, 64, 64)]
    r, m = ([arenas.normal(*shape) for shape in shapes] for _ in range(2))
    layout = layout_of(r)
    for momentum in (False, True):
        launch.launches.clear()
        if momentum:
            new, _ = launch.moments(r, m, torch.tensor(0.5), layout)
            mix = arenas.normal(layout.matrices)
        else:
            new, mix, _ = [], None, launch.cross_means(r, r, layout)
        launch.directions(r, new, mix, arenas.normal(layout.rows + layout.columns), layout)
        assert launch.launches == {"cross_tiles": 3, "rank_tiles": 3, "reduce_partials": 2}, launch.launches
        counted = launch.launch_count(layout, momentum)
        assert counted == launch.launches.total() + 1, "traffic counts other launches"


def check_empty_and_errors() -> None:
    nothing = Layout(())
    assert [len(x) for x in launch.cross([], [])] == [0, 0]
    assert launch.rank2([], torch.empty(0), torch.empty(0)) == []
    assert launch.cross_means([], [], nothing).shape == (0,)
    assert launch.moments([], [], torch.tensor(0.5), nothing)[1].shape == (3, 0)
    assert launch.directions([], [], None, torch.empty(0), nothing)[1].shape == (0,)
    hollow = [torch.ones(0, 3), torch.ones(2, 0), torch.ones(0, 2, 2), torch.ones(1, 2)]
    rows, columns = launch.cross(hollow, hollow)
    assert rows.tolist() == [0, 0, 2]
    assert columns.tolist() == [0, 0, 0, 1, 1]
    x = [torch.ones(2, 3)]
    refused = (
        (ValueError, lambda: launch.cross(x, [torch.ones(3, 2)])),
        (ValueError, lambda: launch.cross(x, x, torch.ones(3), torch.ones(3))),
        (ValueError, lambda: launch.rank2([torch.ones(3)], torch.ones(1), torch.ones(3))),
        (ValueError, lambda: launch.cross_means(x, x, Layout(((3, 2),)))),
        (ValueError, lambda: launch.cross(x, x, torch.ones(2, device="meta"))),
        (TypeError, lambda: launch.cross([x[0].double()], [x[0].double()])),
    )
    arenas, layout = Arenas(11), Layout(((2, 3),))
    state = network(arenas, (2, 1, 1, 1, 1), layout)
    out = (torch.empty(1, 5), state[2], torch.empty(2, 5))
    refused += ((ValueError, lambda: launch.lstm_cell(*state, layout, out=out)),)
    refused += ((ValueError, lambda: launch.lstm_cell(*state, Layout(((3, 3),)))),)
    for kind, call in refused:
        try:
            call()
        except kind:
            continue
        raise AssertionError(f"no {kind.__name__}")


CHECKS = (
    check_empty_and_errors,
    check_in_place,
    check_many_tiles,
    check_offsets_beyond_32_bits,
    check_launches,
    check_rounding,
    check_zero_padding_changes_no_bit,
    check_lstm,
    check_company_changes_no_bit,
    check_rank2,
    check_cross,
    check_means,
    check_directions,
    check_moments,
)


def main(names: list[str]) -> None:
    """Run the checks of these names, all without any."""
    for check in CHECKS:
        if not names or check.__name__ in names:
            start = time.monotonic()
            check()
            print(f"{check.__name__} passed in {time.monotonic() - start:.1f} s", flush=True)
    assert set(launch.launches) <= {"cross_tiles", "rank_tiles", "reduce_partials", "lstm_cell"}
    print(f"launches {dict(launch.launches)}")


if __name__ == "__main__":
    main(sys.argv[1:])
