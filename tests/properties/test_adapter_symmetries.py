"""What the adapter does not see: the order, the number and the padding of rows and columns, and its neighbours."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making import MANIFOLDS, adapt_step, lively_weights, make_optimizer, normal, start
from subspace_kernels.layout import Layout

import subspace_meta as sm
from subspace_meta.adapter.paper import PaperAdapter
from subspace_meta.optimizers.subspace import PRESETS

STEPS = 3
TOLERANCE = 1e-11

sizes = st.tuples(st.integers(1, 8), st.integers(1, 6))
seeds = st.integers(0, 10**6)
presets = pytest.mark.parametrize("preset", ["base", "paper"])


def adapt(adapter, weights, per_step, padded_from=()):
    """Feed gradients, a list of groups per step, to the adapter; return the list of updates of each step."""
    layout = Layout(tuple(tuple(r.shape) for r in per_step[0]), padded_from)
    state = adapter.init(layout, per_step[0])
    results = []
    for gradients in per_step:
        updates, state = adapt_step(adapter, weights, state, layout, gradients)
        results.append(updates)
    return results


def gradients_of(size, seed):
    # Rows and columns of different scale, so that the coordinates do not look alike.
    d, p = size
    scale = torch.exp(normal(d, 1, seed=seed + 50) + normal(1, p, seed=seed + 51))
    return [scale * normal(d, p, seed=seed + t) for t in range(STEPS)]


def close(a, b):
    torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=TOLERANCE)


@presets
@given(size=sizes, seed=seeds)
def test_permutations_of_rows_and_columns(preset, size, seed):
    adapter, weights = PRESETS[preset], lively_weights(preset, seed)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(n, generator=generator) for n in size)
    plain = gradients_of(size, seed)
    updates = adapt(adapter, weights, [[r] for r in plain])
    permuted = adapt(adapter, weights, [[r[rows][:, columns]] for r in plain])
    for (a,), (b,) in zip(updates, permuted, strict=True):
        close(a[rows][:, columns], b)


@given(size=sizes, times=st.tuples(st.integers(1, 4), st.integers(1, 4)), seed=seeds)
def test_duplication_in_base(size, times, seed):
    """The direction is the same on every copy; the update's factor 1/sqrt(d) sees the number of rows."""
    weights = lively_weights("base", seed)
    plain = gradients_of(size, seed)
    updates = adapt(PRESETS["base"], weights, [[r] for r in plain])
    duplicated = adapt(PRESETS["base"], weights, [[r.repeat(times)] for r in plain])
    for (a,), (b,) in zip(updates, duplicated, strict=True):
        close(a.repeat(times), b * times[0] ** 0.5)


@given(size=sizes, times=st.tuples(st.integers(1, 4), st.integers(1, 4)), seed=seeds)
def test_duplication_in_paper_with_means(size, times, seed):
    adapter, weights = PaperAdapter(mean_statistics=True), lively_weights("paper", seed)
    plain = gradients_of(size, seed)
    updates = adapt(adapter, weights, [[r] for r in plain])
    duplicated = adapt(adapter, weights, [[r.repeat(times)] for r in plain])
    for (a,), (b,) in zip(updates, duplicated, strict=True):
        close(a.repeat(times), b)


@presets
@given(size=sizes, extra=st.tuples(st.integers(0, 4), st.integers(0, 4)), seed=seeds)
def test_masked_padding(preset, size, extra, seed):
    d, p = size
    weights = lively_weights(preset, seed)
    plain, other = gradients_of(size, seed), gradients_of((5, 2), seed + 1)

    def padded(r):
        return torch.nn.functional.pad(r, (0, extra[1], 0, extra[0]))

    updates = adapt(PRESETS[preset], weights, [[r, o] for r, o in zip(plain, other, strict=True)])
    masked = adapt(
        PRESETS[preset], weights, [[padded(r), o] for r, o in zip(plain, other, strict=True)], (size, (5, 2))
    )
    for (a, a_other), (b, b_other) in zip(updates, masked, strict=True):
        close(b[:d, :p], a)
        close(b, padded(a))
        close(b_other, a_other)


def test_padding_that_is_not_masked_is_seen():
    plain = gradients_of((5, 3), 0)
    weights = lively_weights("base")
    weights["length.bias"] += 3.0  # long steps, so that a difference shows
    padded = [torch.nn.functional.pad(r, (0, 2, 0, 3)) for r in plain]
    (a,), (b,) = adapt(PRESETS["base"], weights, [[plain[0]]])[0], adapt(PRESETS["base"], weights, [[padded[0]]])[0]
    assert (a - b[:5, :3]).abs().max() > 1e-3


@presets
@given(shapes=st.lists(sizes, min_size=1, max_size=4), copies=st.integers(1, 3), seed=seeds)
def test_neighbours_change_nothing(preset, shapes, copies, seed):
    """A matrix alone gets the update that it gets packed beside others, or stacked in a batch."""
    weights = lively_weights(preset, seed)
    singles = [gradients_of(size, seed + 100 * i) for i, size in enumerate(shapes)]
    stacks = [torch.stack([normal(*shapes[0], seed=seed + 7 * t + c) for c in range(copies)]) for t in range(STEPS)]
    together = adapt(
        PRESETS[preset], weights, [[stacks[t], *(gradients[t] for gradients in singles)] for t in range(STEPS)]
    )
    for i, gradients in enumerate(singles):
        for (a,), b in zip(adapt(PRESETS[preset], weights, [[r] for r in gradients]), together, strict=True):
            close(a, b[i + 1])
    for c in range(copies):
        for (a,), b in zip(adapt(PRESETS[preset], weights, [[s[c]] for s in stacks]), together, strict=True):
            close(a, b[0][c])


def run(manifold, name, x, gradients, longer=0.0):
    geometry = sm.Geometry.from_rules({"x": x}, {"x": manifold})
    optimizer = make_optimizer(name, geometry)
    if longer:
        optimizer.weights["length.bias"] += longer
    params, state = {"x": x}, optimizer.init({"x": x})
    for g in gradients:
        params, state = optimizer.update({"x": g}, state, params)
    return params["x"]


@pytest.mark.parametrize("name", ["base", "paper", "RSGD momentum", "RAdam", "RASA-LR"])
@given(seed=seeds)
def test_the_whole_update_follows_permutations(name, seed):
    """Of rows with every retraction, of columns with the polar one; the QR factor depends on the columns' order."""
    d, p = 7, 3
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(d, generator=generator), torch.randperm(p, generator=generator)
    gradients = gradients_of((d, p), seed)
    for key, manifold in MANIFOLDS.items():
        keep = slice(None) if "QR" in key else columns
        _, params = start({"x": (d, p)}, {"x": manifold}, seed + 100)
        moved = run(manifold, name, params["x"], gradients)
        permuted = run(manifold, name, params["x"][rows][:, keep], [g[rows][:, keep] for g in gradients])
        torch.testing.assert_close(permuted, moved[rows][:, keep], atol=1e-10, rtol=0)


def test_qr_does_not_follow_permutations_of_columns():
    _, params = start({"x": (7, 3)}, {"x": sm.Stiefel()}, 100)
    order = torch.tensor([2, 0, 1])
    gradients = gradients_of((7, 3), 0)
    moved = run(sm.Stiefel(), "base", params["x"], gradients, longer=5.0)
    permuted = run(sm.Stiefel(), "base", params["x"][:, order], [g[:, order] for g in gradients], longer=5.0)
    assert (permuted - moved[:, order]).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["RSGD momentum", "RAdam"])
@given(seed=seeds)
def test_on_grassmann_the_basis_does_not_matter(name, seed):
    _, params = start({"x": (8, 3)}, {"x": sm.Grassmann()}, seed + 100)
    turn = sm.Stiefel().random_point((3, 3), torch.Generator().manual_seed(seed + 1), torch.float64)
    gradients = [normal(8, 3, seed=seed + t) for t in range(STEPS)]
    moved = run(sm.Grassmann(), name, params["x"], gradients)
    turned = run(sm.Grassmann(), name, params["x"] @ turn, [g @ turn for g in gradients])
    torch.testing.assert_close(turned, moved @ turn, atol=1e-10, rtol=0)
