"""Plans, traffic and chunks: what the launches do, without launching."""

import itertools
import math

import pytest
import torch
from subspace_kernels import launch, reference
from subspace_kernels.layout import Layout

from subspace_meta.benchmarks.geometry import tall_shapes


def resnet50():
    """The 53 convolutions as tall matrices."""
    return Layout(tuple(tall_shapes()))


TRANSFORMER = Layout((((768, 768),) * 4 + ((3072, 768), (768, 3072))) * 12)
MIXED = Layout(((5, 300), (2, 3, 130, 200), (300, 7), (1, 1), (64, 128), (0, 4), (3, 0), (23, 47), (24, 48)))


def moved(layout, momentum, dtype=torch.float32):
    return sum(part.read + part.written for part in launch.traffic(layout, momentum, dtype))


def test_traffic_is_close_to_three_passes():
    layout = resnet50()
    assert len(layout.shapes) == 53
    assert sum(math.prod(shape) for shape in layout.shapes) == 23454912
    assert moved(layout, False) <= 1.05 * launch.minimum_bytes(layout, False)
    assert moved(layout, True) <= 1.05 * launch.minimum_bytes(layout, True)
    assert moved(TRANSFORMER, False) <= 1.05 * launch.minimum_bytes(TRANSFORMER, False)
    assert launch.minimum_bytes(layout, False, hidden=0) == 3 * 4 * 23454912
    assert launch.minimum_bytes(layout, True, hidden=0) == 6 * 4 * 23454912


def test_launches_a_step():
    for layout, buckets in ((resnet50(), 1), (TRANSFORMER, 1), (MIXED, 4)):
        parts = launch.traffic(layout, False)
        assert sum(part.kernel == "rank_tiles" for part in parts) == buckets
        assert launch.launch_count(layout, False) == launch.launch_count(layout, True) == 2 * buckets + 3


def test_traffic_of_one_matrix_by_hand():
    d, p, hidden = 65, 130, 2  # 2 x 2 tiles; 130 entries are no multiple of 16 bytes
    cross, sums, rank, squares, cell = launch.traffic(Layout(((d, p),)), False, torch.bfloat16, hidden)
    edges = 2 * d + 2 * p
    assert (cross.read, cross.written) == (2 * d * p + 4 * 12 + 48 + 16, 4 * edges)
    assert (sums.read, sums.written) == (4 * edges + 2 * 36 + 3 * 8, 4 * (d + p))
    assert (rank.read, rank.written) == (2 * d * p + 4 * 12 + 48 + 32 + 4 * edges, 4 * d * p + 4 * 4)
    assert (squares.read, squares.written) == (4 * 4 + 36 + 8, 4)
    assert (cell.read, cell.written) == (4 * (d + p) * (1 + 1 + 1 + 4), 4 * (d + p) * (4 + 5))


@pytest.mark.parametrize("layout", [MIXED, Layout(())])
def test_tiles_cover_every_entry_once(layout):
    keys = tuple(launch.Key((torch.float32,), i % 2) for i in range(len(layout.shapes)))
    plan = launch.make_plan(layout.shapes, keys)
    covered = [torch.zeros(int(d), int(p)) for d, p in plan.records[:, :2]]
    count = 0
    for bucket in plan.buckets:
        assert bucket.first_tile == count
        count += len(bucket.tiles)
        for matrix, row, column in bucket.tiles.tolist():
            d, p = covered[matrix].shape
            assert launch.tile_class(d, p) == bucket.tile
            covered[matrix][row : row + bucket.tile.rows, column : column + bucket.tile.columns] += 1
    assert count == plan.tiles
    assert all(bool((x == 1).all()) for x in covered)
    reads = torch.zeros(plan.partials)
    outputs = torch.zeros(plan.coordinates)
    for segment, start in plan.blocks.tolist():
        first, tiles, length, target = plan.segments[segment].tolist()
        end = min(length, start + launch.REDUCE_BLOCK)
        outputs[target + start : target + end] += 1
        for tile in range(tiles):
            reads[first + tile * length + start : first + tile * length + end] += 1
    assert bool((reads == 1).all())
    assert bool((outputs == 1).all())
    assert sum(plan.square_segments[:, 1].tolist()) == plan.tiles


def test_chunks():
    layout = resnet50()
    limit = 25_000_000
    cut = launch.chunks(layout, limit)
    assert list(itertools.chain(*cut)) == list(range(53))
    sizes = [sum(4 * math.prod(layout.shapes[i]) for i in groups) for groups in cut]
    assert max(sizes) <= limit
    assert all(one + other > limit / 2 for one, other in itertools.pairwise(sizes))
    whole = launch.chunked(layout, 10**12)
    assert (whole.chunks, whole.launches) == (1, 5)
    assert whole.bytes == moved(layout, False) - 4 * 23454912
    parts = launch.chunked(layout, limit)
    assert parts.launches == 5 * len(cut)
    assert parts.bytes < 0.75 * moved(layout, False)
    assert launch.chunked(layout, 1).bytes == pytest.approx(moved(layout, False), rel=1e-3)
    assert launch.chunks(Layout(()), limit) == []
    padded = Layout(((4, 4), (8, 8)), ((3, 3), (7, 7)))
    assert launch.sub_layout(padded, [1]) == Layout(((8, 8),), ((7, 7),))


def test_chunks_share_one_plan_of_computation():
    """The reference, chunk by chunk, is the reference of the whole."""
    generator = torch.Generator().manual_seed(0)
    r = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in MIXED.shapes[:5]]
    layout = reference.layout_of(r)
    rows, columns = layout.unpack(reference.cross_means(r, r, layout))
    for groups in launch.chunks(layout, 10**5):
        part = launch.sub_layout(layout, groups)
        some = [r[i] for i in groups]
        packed = part.pack([rows[i] for i in groups], [columns[i] for i in groups])
        assert torch.equal(reference.cross_means(some, some, part), packed)


def test_the_cpu_is_refused_outside_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="GPU"):
        launch.cross([torch.ones(2, 3)], [torch.ones(2, 3)])
