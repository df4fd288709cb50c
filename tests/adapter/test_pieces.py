"""The pieces of the adapters: packing, statistics, features, the cell, and preset ``paper`` against torch's LSTM."""

import math

import pytest
import torch
from making import adapt_step, lively_weights, normal
from subspace_kernels import Layout
from subspace_kernels.reference import cross_matrix_means, matrix_mean

import subspace_meta as sm
from subspace_meta.adapter.base import CONTEXT_FEATURES, FEATURES, GAUGES, LONGEST, OUTPUTS, BaseAdapter
from subspace_meta.adapter.features import FLOOR, clock, cosine, log_ratio
from subspace_meta.adapter.network import init_lstm, lstm_cell
from subspace_meta.adapter.paper import PaperAdapter

LAYOUT = Layout(((5, 2), (3, 4, 1), (2, 2, 6, 3)))


def test_layout_counts_rows_and_columns():
    assert LAYOUT.row_sizes == (5, 12, 24)
    assert LAYOUT.column_sizes == (2, 3, 12)
    assert (LAYOUT.rows, LAYOUT.columns) == (41, 17)
    assert LAYOUT.sizes == ((5, 2), (4, 1), (6, 3))
    assert Layout(((5, 2),), ((4, 1),)).sizes == ((4, 1),)
    assert hash(LAYOUT) == hash(Layout(LAYOUT.shapes))


def test_pack_and_unpack_are_inverse():
    rows = [normal(*shape[:-1], seed=i) for i, shape in enumerate(LAYOUT.shapes)]
    columns = [normal(*shape[:-2], shape[-1], seed=i + 9) for i, shape in enumerate(LAYOUT.shapes)]
    packed = LAYOUT.pack(rows, columns)
    assert packed.shape == (58,)
    assert torch.equal(packed[5:17], rows[1].flatten())
    unpacked = LAYOUT.unpack(packed)
    assert all(torch.equal(a, b) for a, b in zip((*rows, *columns), (*unpacked[0], *unpacked[1]), strict=True))
    leading = LAYOUT.unpack(torch.stack([packed, 2 * packed]))
    assert torch.equal(leading[0][2], torch.stack([rows[2], 2 * rows[2]]))
    assert torch.equal(leading[1][1], torch.stack([columns[1], 2 * columns[1]]))


def test_spread_gives_every_coordinate_the_value_of_its_matrix():
    values = [torch.tensor(1.0), torch.tensor([2.0, 3.0, 4.0]), torch.tensor([[5.0, 6.0], [7.0, 8.0]])]
    rows, columns = LAYOUT.unpack(LAYOUT.spread(values))
    for value, row, column in zip(values, rows, columns, strict=True):
        assert torch.equal(row, value[..., None].expand_as(row))
        assert torch.equal(column, value[..., None].expand_as(column))
    both = LAYOUT.spread([torch.stack([v, -v]) for v in values])
    assert torch.equal(both, torch.stack([LAYOUT.spread(values), -LAYOUT.spread(values)]))


def test_cross_means_are_diagonals_of_products():
    a, b = normal(3, 5, 2, seed=1), normal(3, 5, 2, seed=2)
    rows, columns = cross_matrix_means(a, b)
    torch.testing.assert_close(rows, (a @ b.mT).diagonal(dim1=-2, dim2=-1) / 2)
    torch.testing.assert_close(columns, (a.mT @ b).diagonal(dim1=-2, dim2=-1) / 5)
    rows, columns = cross_matrix_means(a, b, (4, 1))
    torch.testing.assert_close(rows, (a @ b.mT).diagonal(dim1=-2, dim2=-1))
    torch.testing.assert_close(columns, (a.mT @ b).diagonal(dim1=-2, dim2=-1) / 4)
    assert matrix_mean(torch.tensor([1.0, 3.0, 100.0]), 2) == 2.0


def test_features():
    energy = torch.tensor([4.0, 0.0], dtype=torch.float64)
    ratio = log_ratio(energy, torch.tensor(1.0, dtype=torch.float64))
    assert ratio.tolist() == pytest.approx([math.log(2.0), 0.5 * math.log(FLOOR)], abs=1e-6)
    assert log_ratio(torch.tensor(0.0), torch.tensor(0.0)) == pytest.approx(0.5 * math.log(FLOOR), abs=1e-6)
    assert cosine(torch.tensor(-3.0), torch.tensor(9.0), torch.tensor(1.0)) == pytest.approx(-1.0)
    assert cosine(torch.tensor(0.0), torch.tensor(0.0), torch.tensor(1.0)) == 0.0
    expected = [math.tanh(20 / s - 1) for s in (10, 100, 1000)]
    assert clock(torch.tensor(20.0, dtype=torch.float64)).tolist() == pytest.approx(expected, abs=1e-14)


def test_the_cell_is_that_of_torch():
    weights = {k: v.double() for k, v in init_lstm("cell", 3, 4, torch.Generator().manual_seed(0)).items()}
    peer = torch.nn.LSTMCell(3, 4, dtype=torch.float64)
    with torch.no_grad():
        peer.weight_ih.copy_(weights["cell.weight"][:, :3])
        peer.weight_hh.copy_(weights["cell.weight"][:, 3:])
        peer.bias_ih.copy_(weights["cell.bias"][:, 0])
        peer.bias_hh.zero_()
    x, hidden, cell = normal(3, 7, seed=1), normal(4, 7, seed=2), normal(4, 7, seed=3)
    expected = peer(x.T, (hidden.T, cell.T))
    for ours, theirs in zip(lstm_cell(weights, "cell", x, hidden, cell), expected, strict=True):
        torch.testing.assert_close(ours, theirs.T, atol=1e-14, rtol=0)


def test_the_forget_gate_starts_open():
    bias = init_lstm("cell", 3, 4, None)["cell.bias"][:, 0]
    assert bias.tolist() == [0.0] * 4 + [1.0] * 4 + [0.0] * 8


def count(adapter):
    return sum(math.prod(shape) for shape in adapter.weight_shapes().values())


def test_numbers_of_meta_parameters():
    assert count(PaperAdapter()) == 5242  # the published figure
    skips = 8 + 3 * CONTEXT_FEATURES + GAUGES + 4
    noise = CONTEXT_FEATURES - 1 + 2 * 20 + 1
    assert count(BaseAdapter()) == 4 * 20 * (FEATURES + 20 + 1) + 2 * OUTPUTS * 21 + skips + noise == 3773


@pytest.mark.parametrize("adapter", [BaseAdapter(), BaseAdapter(hidden=7), PaperAdapter(), PaperAdapter(hidden=3)])
def test_initial_weights_have_the_declared_shapes_and_repeat(adapter):
    weights = adapter.init_weights(torch.Generator().manual_seed(3))
    assert {name: tuple(value.shape) for name, value in weights.items()} == adapter.weight_shapes()
    again = adapter.init_weights(torch.Generator().manual_seed(3))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    other = adapter.init_weights(torch.Generator().manual_seed(4))
    assert any(not torch.equal(weights[name], other[name]) for name in weights)


def test_base_starts_as_rasa():
    """With silent heads D = diag(L)^(-1/4) (R + a (M - R)) diag(C)^(-1/4) up to its length: RASA's exponents.

    That is without the share of the orthonormal factor, which starts at a tenth.
    """
    adapter, layout = BaseAdapter(spectral=False), Layout(((6, 3),))
    weights = {k: v.double() for k, v in adapter.init_weights(torch.Generator().manual_seed(0)).items()}
    r = normal(6, 3) * torch.exp(normal(6, 1, seed=1))
    (update,), _ = adapt_step(adapter, weights, adapter.init(layout, [r]), layout, [r])
    rows, columns = cross_matrix_means(r, r)  # at the first step momentum and running means are the gradient's
    direction = rows[:, None] ** -0.25 * r * columns[None] ** -0.25
    cosine_similarity = -(update * direction).sum() / update.norm() / direction.norm()
    assert cosine_similarity == pytest.approx(1.0, abs=1e-5)


def test_the_length_of_base_is_bounded():
    """The update has Frobenius norm eta sqrt(p) with eta < LONGEST: each column moves by less than that on average."""
    adapter, layout = BaseAdapter(), Layout(((9, 4),))
    for seed in range(5):
        weights = lively_weights("base", seed, size=1.0)
        weights["length.bias"] += 10.0 * seed
        r = normal(9, 4, seed=seed) * 1e3
        (update,), _ = adapt_step(adapter, weights, adapter.init(layout, [r]), layout, [r])
        assert 0 < update.norm() < (1 + 1e-6) * LONGEST * 2.0


@pytest.mark.parametrize("step_size", [0.3, 1e3, 1e-3])
@pytest.mark.parametrize("mean_statistics", [False, True])
def test_paper_is_the_published_network(mean_statistics, step_size):
    """Two-layer torch.nn.LSTM over coordinates, linear heads, centring, running maximum: the released computation."""
    adapter, layout = PaperAdapter(step_size=step_size, mean_statistics=mean_statistics), Layout(((5, 3),))
    weights = lively_weights("paper")
    lstm = torch.nn.LSTM(1, 20, num_layers=2, dtype=torch.float64)
    with torch.no_grad():
        for layer in range(2):
            getattr(lstm, f"weight_ih_l{layer}").copy_(weights[f"lstm{layer}.weight"][:, : -adapter.hidden])
            getattr(lstm, f"weight_hh_l{layer}").copy_(weights[f"lstm{layer}.weight"][:, -adapter.hidden :])
            getattr(lstm, f"bias_ih_l{layer}").copy_(weights[f"lstm{layer}.bias"][:, 0])
            getattr(lstm, f"bias_hh_l{layer}").copy_(weights[f"lstm{layer}.hidden_bias"][:, 0])
    state, memory, maxima = adapter.init(layout, [normal(5, 3)]), None, None
    for t in range(4):
        # Rows so different that some features are within their bounds, some above and some below.
        r = 10 ** torch.linspace(-6, 6, 5, dtype=torch.float64)[:, None] * normal(5, 3, seed=t)
        (update,), state = adapt_step(adapter, weights, state, layout, [r])
        s = step_size * r
        statistics = torch.cat([(s @ s.T).diagonal(), (s.T @ s).diagonal()])
        if mean_statistics:
            statistics = torch.cat([statistics[:5] / 3, statistics[5:] / 5])
        output, memory = lstm((statistics.log() / 10).clamp(-1, 1)[None, :, None], memory)
        rows = output[0, :5] @ weights["row_head.weight"][0] + weights["row_head.bias"][0]
        columns = output[0, 5:] @ weights["column_head.weight"][0] + weights["column_head.bias"][0]
        scales = torch.cat([rows - rows.mean() + 1, columns - columns.mean() + 1]).detach()
        maxima = scales if maxima is None else torch.maximum(maxima, scales)
        expected = -maxima[:5, None] * s * maxima[None, 5:]
        torch.testing.assert_close(update, expected, atol=0, rtol=1e-10)


def test_paper_saturates_on_small_gradients():
    """The known weakness: all coordinates get the feature -1, so the update is the gradient times constants."""
    adapter, layout = PaperAdapter(), Layout(((5, 3),))
    r = 1e-6 * normal(5, 3)
    (update,), _ = adapt_step(adapter, lively_weights("paper"), adapter.init(layout, [r]), layout, [r])
    torch.testing.assert_close(update, -1e-2 * r, rtol=1e-9, atol=0)


def test_weights_of_one_preset_are_refused_by_another():
    geometry = sm.Geometry.from_rules({"x": torch.zeros(5, 2)}, {"x": sm.Stiefel()})
    for weights, preset in (("base", "light"), ("light", "base")):
        with pytest.raises(ValueError, match=f"not those of preset '{preset}'.*spectral.bias"):
            sm.SubspaceOptimizer(geometry, sm.pretrained(weights), preset)
