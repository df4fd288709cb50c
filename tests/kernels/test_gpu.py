"""The kernels on a GPU: values, bandwidth, and a step beside Adam's. Skipped where there is none."""

import json
import statistics

import pytest
import torch
from subspace_kernels import launch, reference
from subspace_kernels.layout import Layout
from subspace_kernels.reference import Inputs, Network

from subspace_meta.benchmarks.geometry import tall_shapes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
SHAPES = [(5, 7), (130, 140), (2, 3, 30, 300), (20, 200), (500, 3), (64, 128), (257, 64), (1, 1)]


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to("cuda", dtype)


def make_network(layout, energies, outputs, hidden=20):
    n, inputs = layout.rows + layout.columns, energies + 10 + hidden
    network = Network(
        0.3 * normal(4 * hidden, inputs), normal(4 * hidden, 1), 0.3 * normal(2 * outputs, hidden),
        0.3 * normal(2 * outputs, 1), 0.3 * normal(2, energies),
    )  # fmt: skip
    seen = Inputs(
        normal(energies, n).exp(), normal(energies, layout.matrices).exp(), normal(1, n), normal(8, layout.matrices)
    )
    return network, seen, normal(hidden, n), normal(hidden, n, seed=1)


def seconds(call, rounds=30):
    """Return the median time of a call on the GPU."""
    for _ in range(5):
        call()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(1e-3 * start.elapsed_time(end))
    return statistics.median(times)


def graph_seconds(call):
    """Return the median time of a call replayed from a CUDA graph: without the host's part."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return seconds(graph.replay)


def close(found, wanted):
    """Sums over many entries: float32 rounding relative to the largest."""
    scale = wanted.abs().max()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=float(2e-5 * scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values(dtype):
    r, m = ([normal(*shape, seed=seed, dtype=dtype) for shape in SHAPES] for seed in (0, 1))
    layout = reference.layout_of(r)
    wide_r, wide_m = ([x.double() for x in xs] for xs in (r, m))
    u, v = normal(layout.rows), normal(layout.columns)
    launch.launches.clear()
    for found, wanted in zip(
        launch.cross(r, m, u, v), reference.cross(wide_r, wide_m, u.double(), v.double()), strict=True
    ):
        close(found, wanted)
    found, means = launch.moments(r, m, torch.tensor(0.3, device="cuda"), layout)
    wanted, wide_means = reference.moments(wide_r, wide_m, torch.tensor(0.3, device="cuda").double(), layout)
    for one, other in zip(found, wanted, strict=True):
        close(one, other)
    close(means, wide_means)
    scale = normal(layout.rows + layout.columns)
    found, squares = launch.directions(r, [], None, scale, layout)
    wanted, wide_squares = reference.directions(wide_r, [], None, scale.double(), layout)
    for one, other in zip(found, wanted, strict=True):
        close(one, other)
    close(squares, wide_squares)
    again = launch.directions(r, [], None, scale, layout)[1]
    assert torch.equal(again, squares)
    assert launch.launches["cross_tiles"] > 0
    assert launch.launches["rank_tiles"] > 0


def test_company_changes_no_bit():
    r = [normal(*shape) for shape in SHAPES]
    rows, columns = launch.cross(r, r)
    alone = [launch.cross([x], [x]) for x in r]
    assert torch.equal(rows, torch.cat([one for one, _ in alone]))
    assert torch.equal(columns, torch.cat([one for _, one in alone]))


def test_network():
    layout = Layout(tuple(SHAPES))
    network, seen, hidden, cell = make_network(layout, 4, 3)
    wide = (
        Network(*(x.double() for x in network)),
        Inputs(*(x.double() for x in seen)),
        hidden.double(),
        cell.double(),
    )
    found = launch.lstm_cell(network, seen, hidden, cell, layout)
    for one, other in zip(found, reference.lstm_cell(*wide, layout), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)
    kept = cell.clone()
    again = launch.lstm_cell(network, seen, hidden, kept, layout, out=(found[0].clone(), found[1].clone(), kept))
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_bandwidth_and_step():
    r = [normal(*shape) for shape in tall_shapes()]
    layout = reference.layout_of(r)
    network, seen, hidden, cell = make_network(layout, 1, 3)
    out = [torch.empty_like(x) for x in r]
    results = (torch.empty(3, hidden.shape[1], device="cuda"), torch.empty_like(hidden), cell)
    scale = normal(layout.rows + layout.columns)
    entries = sum(x.numel() for x in r)
    source = torch.empty(entries, device="cuda")
    target = torch.empty_like(source)

    def step():
        means = launch.cross_means(r, r, layout)
        outputs, *_ = launch.lstm_cell(network, seen._replace(energies=means[None]), hidden, cell, layout, out=results)
        launch.directions(r, [], None, outputs[0], layout, out=out)

    points = [torch.nn.Parameter(x.clone()) for x in r]
    for point, x in zip(points, r, strict=True):
        point.grad = x
    adam = torch.optim.Adam(points, lr=1e-3, fused=True)
    copy = graph_seconds(lambda: target.copy_(source))
    times = {
        "copy": copy,
        "cross_means": graph_seconds(lambda: launch.cross_means(r, r, layout)),
        "directions": graph_seconds(lambda: launch.directions(r, [], None, scale, layout, out=out)),
        "step": graph_seconds(step),
        "step with the host": seconds(step),
        "Adam fused with the host": seconds(adam.step),
    }
    peak = 8 * entries / copy
    share = {
        "cross_means": 4 * entries / times["cross_means"] / peak,
        "directions": 8 * entries / times["directions"] / peak,
    }
    record = {"card": torch.cuda.get_device_name(), "seconds": times, "share of the copy's bandwidth": share}
    print(json.dumps(record))
    assert min(share.values()) >= 0.85
    assert times["step"] < times["Adam fused with the host"]
