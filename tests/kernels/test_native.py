"""The compiled CPU path against the torch reference in float64, on lists of matrices of any shapes."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making import normal
from subspace_kernels import Inputs, Layout, Network, native, operations, reference

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C++ compiler on this machine")
pytestmark = needs_compiler

# Sizes around the 8 rows, 16 lanes and 64 coordinates that the code works on at once.
sizes = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 33, 63, 64, 65, 80, 130]))
shapes = st.lists(
    st.one_of(st.tuples(sizes, sizes), st.tuples(st.integers(1, 3), sizes, sizes), st.just((2, 2, 5, 3))), max_size=5
)
seeds = st.integers(0, 10**6)
UNITS, ENERGIES, RAW, CONTEXT, OUTPUTS = 5, 3, 2, 4, 3


def single(*shape, seed):
    return normal(*shape, seed=seed, dtype=torch.float32)


def close(ours, expected, tolerance=2e-6):
    for a, b in zip(ours, expected, strict=True):
        assert a.shape == b.shape
        if b.numel():
            torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * max(1.0, float(b.abs().max())))


def doubles(tensors):
    return [tensor.double() for tensor in tensors]


def network(seed):
    fan_in = ENERGIES + RAW + CONTEXT + 1 + UNITS
    shapes = ((4 * UNITS, fan_in), (4 * UNITS, 1), (2 * OUTPUTS, UNITS), (2 * OUTPUTS, 1), (2, ENERGIES))
    return Network(*(0.5 * single(*shape, seed=seed + i) for i, shape in enumerate(shapes)))


def coordinate_inputs(layout, seed):
    coordinates = layout.rows + layout.columns
    energies = single(ENERGIES, coordinates, seed=seed).square() * 10 ** single(ENERGIES, 1, seed=seed + 9)
    means = reference.row_means(energies[:, : layout.rows], layout)
    raw, context = single(RAW, coordinates, seed=seed + 1), single(CONTEXT, layout.matrices, seed=seed + 2)
    state = [single(UNITS, coordinates, seed=seed + 3), single(UNITS, coordinates, seed=seed + 4)]
    return Inputs(energies, means, raw, context), state


@given(shapes=shapes.filter(bool), seed=seeds, each=st.booleans())
def test_statistics(shapes, seed, each):
    layout = Layout(tuple(shapes))
    r, m = ([single(*shape, seed=seed + 7 * i + k) for i, shape in enumerate(shapes)] for k in range(2))
    close([native.energy_means(r, layout)], [reference.cross_means(doubles(r), doubles(r), layout)])
    weight = torch.sigmoid(single(layout.matrices, seed=seed)) if each else torch.tensor(0.3)  # one a matrix, or one
    momentum, means = native.moments(r, m, weight, layout, False)
    expected = reference.moments(doubles(r), doubles(m), weight.double(), layout)
    close([*momentum, means], [*expected[0], expected[1]])
    kept = [x.clone() for x in m]
    again, same = native.moments(r, kept, weight, layout, True)
    assert all(x is y for x, y in zip(again, kept, strict=True))
    assert torch.equal(same, means)
    assert all(torch.equal(x, y) for x, y in zip(again, momentum, strict=True))


@given(shapes=shapes.filter(bool), seed=seeds, with_momentum=st.booleans())
def test_directions(shapes, seed, with_momentum):
    layout = Layout(tuple(shapes))
    r, m = ([single(*shape, seed=seed + 7 * i + k) for i, shape in enumerate(shapes)] for k in range(2))
    mix = torch.sigmoid(single(layout.matrices, seed=seed)) if with_momentum else None
    m = m if with_momentum else []
    scale = torch.exp(single(layout.rows + layout.columns, seed=seed + 3))
    ours, squares = native.directions(r, m, mix, scale, layout, None)
    wide = doubles(r), doubles(m), None if mix is None else mix.double(), scale.double(), layout
    expected = reference.directions(*wide)
    close([*ours, squares], [*expected[0], expected[1]])
    over = [x.clone() for x in r]
    written, again = native.directions(over, m, mix, scale, layout, over)
    assert all(x is y and torch.equal(x, z) for x, y, z in zip(written, over, ours, strict=True))
    assert torch.equal(again, squares)


@given(shapes=shapes.filter(bool), seed=seeds)
def test_the_network(shapes, seed):
    layout = Layout(tuple(shapes))
    weights = network(seed)
    inputs, state = coordinate_inputs(layout, seed)
    ours = native.lstm_cell(weights, inputs, *state, layout, False)
    wide = Network(*doubles(weights)), Inputs(*doubles(inputs)), *doubles(state), layout
    close(ours, reference.lstm_cell(*wide))
    kept = [value.clone() for value in state]
    again = native.lstm_cell(weights, inputs, *kept, layout, True)
    assert again[1] is kept[0]
    assert again[2] is kept[1]
    assert all(torch.equal(a, b) for a, b in zip(again, ours, strict=True))


@given(shapes=shapes.filter(bool), seed=seeds)
def test_means_over_matrices(shapes, seed):
    layout = Layout(tuple(shapes))
    values = single(3, layout.rows + layout.columns, seed=seed)
    rows, columns = values[1:, : layout.rows], values[1:, layout.rows :]
    close([native.row_means(rows, layout)], [reference.row_means(rows.double(), layout)])
    close([native.column_means(columns, layout)], [reference.column_means(columns.double(), layout)])


@given(shapes=shapes.filter(lambda some: len(some) > 1), seed=seeds)
def test_a_matrix_does_not_see_its_neighbours(shapes, seed):
    """The list together is bit for bit each of its tensors alone."""
    together = [single(*shape, seed=seed + i) for i, shape in enumerate(shapes)]
    layout = Layout(tuple(shapes))
    rows, columns = layout.unpack(native.energy_means(together, layout))
    inputs, state = coordinate_inputs(layout, seed)
    parts = [layout.unpack(value) for value in (*inputs[0:1], inputs[2], *state)]
    output = layout.unpack(native.lstm_cell(network(seed), inputs, *state, layout, False)[0])
    means, context = layout.per_group(inputs.means), layout.per_group(inputs.context)
    for i, x in enumerate(together):
        own = Layout((shapes[i],))
        assert torch.equal(own.pack([rows[i]], [columns[i]]), native.energy_means([x], own))

        def alone(part, i=i):
            return torch.cat([side[i].reshape(len(side[i]), -1) for side in part], dim=-1)

        energies, raw, hidden, cell = (alone(part) for part in parts)
        one = Inputs(energies, means[i].reshape(ENERGIES, -1), raw, context[i].reshape(CONTEXT, -1))
        assert torch.equal(native.lstm_cell(network(seed), one, hidden, cell, own, False)[0], alone(output))


@given(d=sizes, p=sizes, seed=seeds)
def test_strides_alignment_and_what_lies_around(d, p, seed):
    """Views with a row pitch, transposed ones and unaligned ones; what lies around is neither read nor written."""
    plain, layout = single(d, p, seed=seed), Layout(((d, p),))
    scale = torch.exp(single(d + p, seed=seed + 1))
    means = native.energy_means([plain], layout)
    (direction,), _ = native.directions([plain], [], None, scale, layout, None)
    for offset in (0, 1, 3):
        arena = torch.full((d + 2, p + 5), torch.nan)
        inside = arena[1 : d + 1, offset + 1 : offset + 1 + p]
        inside.copy_(plain)
        assert torch.equal(native.energy_means([inside], layout), means)
        (written,), _ = native.directions([inside], [], None, scale, layout, [inside])
        assert torch.equal(written, direction)
        assert torch.equal(inside, direction)
        assert int(torch.isnan(arena).sum()) == arena.numel() - d * p
    transposed = plain.T.contiguous().T
    assert torch.equal(native.energy_means([transposed], layout), means)
    (elsewhere,), _ = native.directions([plain], [], None, scale, layout, [transposed])  # may be written, need not
    assert torch.equal(elsewhere, direction)


def test_large_matrices_on_several_threads_and_past_the_caches():
    shapes = ((1500, 1040), (7, 3), (2000, 1700), (3, 64, 65))
    layout = Layout(shapes)
    r = [single(*shape, seed=i) for i, shape in enumerate(shapes)]
    scale = torch.exp(0.1 * single(layout.rows + layout.columns, seed=9))
    assert 4 * layout.entries > native.CACHES
    before, results = torch.get_num_threads(), []
    inputs, state = coordinate_inputs(layout, 3)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made, squares = native.directions(r, [], None, scale, layout, None)
            cell = native.lstm_cell(network(1), inputs, *state, layout, False)
            results.append([native.energy_means(r, layout), *made, squares, *cell])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    expected = reference.directions(doubles(r), [], None, scale.double(), layout)
    close(results[0][1:6], [*expected[0], expected[1]])
    close(results[0][:1], [reference.cross_means(doubles(r), doubles(r), layout)])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_what_is_not_finite_stays_in_its_matrix_and_does_not_vanish(value):
    shapes = ((20, 9), (33, 18))
    layout = Layout(shapes)
    inputs, state = coordinate_inputs(layout, 0)
    energies = inputs.energies.clone()
    energies[0, 4] = value
    means = reference.row_means(energies[:, : layout.rows], layout)
    changed = inputs._replace(energies=energies, means=means)
    output, hidden, cell = native.lstm_cell(network(0), changed, *state, layout, False)
    untouched = native.lstm_cell(network(0), inputs, *state, layout, False)
    expected = reference.lstm_cell(Network(*doubles(network(0))), Inputs(*doubles(changed)), *doubles(state), layout)
    spared = torch.cat([torch.arange(20, 53), torch.arange(53 + 9, 53 + 27)])
    for ours, theirs, plain in zip((output, hidden, cell), expected, untouched, strict=True):
        assert torch.equal(ours[:, spared], plain[:, spared])
        assert torch.equal(ours.isfinite(), theirs.isfinite())
    if value != value:
        assert not output[:, 4].isfinite().any()


def test_extreme_gates_saturate_as_in_torch():
    layout = Layout(((40, 30),))
    inputs, state = coordinate_inputs(layout, 0)
    weights = network(0)
    for size in (30.0, 1000.0):
        loud = weights._replace(weight=size * weights.weight, bias=size * weights.bias)
        ours = native.lstm_cell(loud, inputs, *state, layout, False)
        wide = Network(*doubles(loud)), Inputs(*doubles(inputs)), *doubles(state), layout
        expected = reference.lstm_cell(*wide)
        # A gate of 1000 moves by 1e-4 in float32; where it saturates that does not show.
        close(ours[1:], expected[1:], tolerance=3e-5)


def test_an_empty_list_and_other_types_take_the_reference():
    assert operations.cross_means([], [], Layout(())).shape == (0,)
    assert [value.shape for value in operations.cross([], [])] == [(0,), (0,)]
    assert operations.rank2([], torch.zeros(0), torch.zeros(0)) == []
    assert not native.usable([torch.zeros(2, 2, dtype=torch.float64)])
    assert not native.usable([torch.zeros(2, 2, device="meta")])
    assert native.usable([torch.zeros(2, 2)])


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
def test_defaults_of_the_user_do_not_matter(default):
    r, layout = [single(20, 33, seed=1)], Layout(((20, 33),))
    inputs, state = coordinate_inputs(layout, 1)
    scale, weight = torch.exp(single(53, seed=2)), torch.tensor(0.3)
    weights = network(1)

    def everything():
        made, squares = native.directions(r, [], None, scale, layout, None)
        momentum, means = native.moments(r, r, weight, layout, False)
        cell = native.lstm_cell(weights, inputs, *state, layout, False)
        means_of_rows = native.row_means(scale[None, :20], layout)
        return [native.energy_means(r, layout), *made, squares, *momentum, means, *cell, means_of_rows]

    expected = everything()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        with torch.device("meta"):
            found = everything()
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_does_not_fit_is_refused_before_a_pointer_is_followed():
    r, layout = [single(6, 4, seed=1)], Layout(((6, 4),))
    scale = torch.ones(10)
    inputs, state = coordinate_inputs(layout, 1)
    wrong = Layout(((6, 400),))
    refused = {
        "matrices": lambda: operations.cross_means(r, r, wrong),
        "momentum": lambda: operations.moments(r, [single(6, 5, seed=1)], torch.tensor(0.5), layout),
        "gradients: 1 tensors given, the layout has 2 groups": lambda: operations.moments(
            r, r, torch.tensor(0.5), Layout(((6, 4), (2, 2)))
        ),
        "scale": lambda: operations.directions(r, [], None, scale[:4], layout),
        "mix": lambda: operations.directions(r, r, torch.ones(3), scale, layout),
        r"out: shape \(2, 4\)": lambda: operations.directions(r, [], None, scale, layout, [torch.zeros(2, 4)]),
        "out: .*float64": lambda: operations.directions(r, [], None, scale, layout, [r[0].double()]),
        "state of the network": lambda: operations.lstm_cell(network(1), inputs, *(x[:, 1:] for x in state), layout),
        "weights of the network": lambda: operations.lstm_cell(
            network(1)._replace(skip=torch.ones(2, 9)), inputs, *state, layout
        ),
        "inputs of the network": lambda: operations.lstm_cell(
            network(1), inputs._replace(context=torch.ones(CONTEXT, 7)), *state, layout
        ),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_lazy_signs_zeros_and_recorded_traces_take_the_reference():
    layout, scale = Layout(((6, 1),)), torch.ones(7)
    imaginary = torch.complex(torch.zeros(6, 1), single(6, 1, seed=1)).conj().imag
    assert imaginary.is_neg()
    (made,), _ = operations.directions([imaginary], [], None, scale, layout)
    torch.testing.assert_close(made, imaginary.clone())
    zero = torch._efficientzerotensor((6, 1))
    assert operations.cross_means([zero], [zero], layout).tolist() == [0.0] * 7
    x = single(6, 1, seed=2)

    def means(y):
        return operations.cross_means([y], [y], layout)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated, but people have it
        traced = torch.jit.trace(means, (x,), check_trace=False)
    torch.testing.assert_close(traced(2 * x), means(2 * x))


@pytest.mark.parametrize("shape", [(3_000_000, 1), (1, 3_000_000), (200_000, 20)])
def test_long_sums_keep_their_accuracy(shape):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    layout = Layout((shape,))
    expected = reference.cross_means([x.double()], [x.double()], layout)
    torch.testing.assert_close(native.energy_means([x], layout).double(), expected, rtol=1e-6, atol=0)
    _, means = native.moments([x], [x.clone()], torch.tensor(0.5), layout, True)
    torch.testing.assert_close(means[2].double(), expected, rtol=1e-6, atol=0)
    ones = torch.ones(1, layout.rows)
    assert native.row_means(ones, layout).item() == 1.0
    _, squares = native.directions([x], [], None, torch.ones(sum(shape)), layout, None)
    torch.testing.assert_close(squares.double(), (x.double().square().sum() / shape[1])[None], rtol=1e-6, atol=0)


@pytest.mark.skipif(not hasattr(torch.autograd.graph, "increment_version"), reason="this torch cannot be told")
def test_a_graph_that_saved_what_is_written_over_raises():
    layout = Layout(((6, 4),))
    inputs, (hidden, cell) = coordinate_inputs(layout, 1)
    factor = torch.ones(1, requires_grad=True)
    loss = (factor * hidden).square().sum()
    native.lstm_cell(network(1), inputs, hidden, cell, layout, True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_damaged_library_is_built_anew(tmp_path):
    code = "from subspace_kernels import native; print(native.library() is not None)"
    environment = dict(os.environ, XDG_CACHE_HOME=str(tmp_path), PYTHONPATH=":".join(sys.path))
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True
        )
        assert done.stdout == "True\n", done.stderr
        (library,) = (tmp_path / "subspace-kernels").glob("*.so")
        library.write_bytes(b"not a library")


def test_without_a_compiler_the_reference_runs_and_says_so(tmp_path):
    code = (
        "import torch, warnings, subspace_kernels as sk\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    r = [torch.ones(3, 2)]\n"
        "    first, second = (sk.cross_means(r, r, sk.Layout(((3, 2),))) for _ in range(2))\n"
        "print([str(w.message) for w in said], first.tolist())\n"
    )
    environment = {"CXX": str(tmp_path / "no-such-compiler"), "XDG_CACHE_HOME": str(tmp_path), "PATH": "/nowhere"}
    environment["PYTHONPATH"] = ":".join(sys.path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count("plain torch, which is slower") == 1, done.stdout + done.stderr
    assert "no-such-compiler could not be run" in done.stdout
    assert "[1.0, 1.0, 1.0, 1.0, 1.0]" in done.stdout


def test_the_step_takes_the_native_way_only_where_it_may(monkeypatch):
    """Eager float32 without derivative goes to native.cpp; everything else to the reference, with the same values."""
    calls = []
    genuine = native.energy_means
    monkeypatch.setattr(native, "energy_means", lambda *a: (calls.append(1), genuine(*a))[1])
    r, layout = [single(6, 4, seed=1)], Layout(((6, 4),))

    def means(x):
        matrices = [x]
        return operations.cross_means(matrices, matrices, layout)

    expected = genuine(r, layout)
    assert torch.equal(means(r[0]), expected)
    assert len(calls) == 1
    with torch.no_grad():
        assert torch.equal(means(r[0].clone().requires_grad_()), expected)
    assert len(calls) == 2
    tangent = torch.ones_like(r[0])
    elsewhere = {
        "autograd": lambda: means(r[0].clone().requires_grad_()).detach(),
        "vmap": lambda: torch.func.vmap(means)(r[0][None])[0],
        "jvp": lambda: torch.func.jvp(means, (r[0],), (tangent,))[0],
        "grad": lambda: torch.func.vjp(means, r[0])[0],
        "float64": lambda: means(r[0].double()).float(),
        "compiled": lambda: torch.compile(means, backend="eager", fullgraph=True)(r[0]),
    }
    for name, value in elsewhere.items():
        torch.testing.assert_close(value(), expected, msg=name)
        assert len(calls) == 2, name
    with torch.autograd.forward_ad.dual_level():
        dual = means(torch.autograd.forward_ad.make_dual(r[0], tangent))
        assert torch.autograd.forward_ad.unpack_dual(dual).tangent is not None
    assert len(calls) == 2
