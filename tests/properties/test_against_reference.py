"""The fast path (packed, grouped, batched) takes the steps that the reference takes, formula by formula."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making import MANIFOLDS, largest_difference, lively_weights, normal, start

import subspace_meta as sm
from subspace_meta.adapter.base import BaseAdapter
from subspace_meta.adapter.paper import PaperAdapter
from subspace_meta.reference import reference_step

MATRICES = {**MANIFOLDS, "Euclidean": sm.Euclidean()}
TOLERANCE = 1e-10


@st.composite
def tall_shapes(draw, largest: int = 9) -> tuple[int, int]:
    p = draw(st.integers(1, 5))
    return draw(st.integers(p, largest)), p


def compare(shapes, rules, preset, adapter=None, steps=4, seed=0, budget=None, averaging=False, **settings):
    """Take steps with drawn gradients on all parameters at once, and on each alone by the reference."""
    geometry, params = start(shapes, rules, seed)
    weights = lively_weights(adapter or preset, seed)
    optimizer = sm.SubspaceOptimizer(geometry, weights, adapter or preset, steps=budget, averaging=averaging)
    state = optimizer.init(params)
    expected, states = dict(params), dict.fromkeys(params)
    manifolds = {parameter.name: parameter.manifold for parameter in geometry.parameters}
    for t in range(steps):
        grads = {
            name: normal(*x.shape, seed=97 * t + i + seed) * 10.0 ** (1 - t)
            for i, (name, x) in enumerate(params.items())
        }
        params, state = optimizer.update(grads, state, params)
        for name in params:
            expected[name], states[name] = reference_step(
                weights,
                preset,
                manifolds[name],
                expected[name],
                grads[name],
                states[name],
                budget or 0,
                averaging,
                **settings,
            )
        assert largest_difference(params, expected) < TOLERANCE
        if averaging:
            assert largest_difference(optimizer.averaged(state), {n: states[n].average for n in states}) < TOLERANCE
    return geometry


@pytest.mark.parametrize("manifold", MATRICES)
@pytest.mark.parametrize("preset", ["base", "paper"])
@given(shape=tall_shapes(), seed=st.integers(0, 10**6))
def test_one_matrix(preset, manifold, shape, seed):
    compare({"x": shape}, {"x": MATRICES[manifold]}, preset, seed=seed)


@given(
    shapes=st.lists(tall_shapes(6), min_size=2, max_size=4),
    manifolds=st.lists(st.sampled_from(sorted(MATRICES)), min_size=4, max_size=4),
    preset=st.sampled_from(["base", "paper"]),
    seed=st.integers(0, 10**6),
)
def test_several_matrices_of_several_shapes(shapes, manifolds, preset, seed):
    names = {f"x{i}": shape for i, shape in enumerate(shapes)}
    rules = {f"x{i}": MATRICES[manifold] for i, (_, manifold) in enumerate(zip(shapes, manifolds, strict=False))}
    compare(names, rules, preset, steps=3, seed=seed)


@pytest.mark.parametrize("preset", ["base", "paper"])
def test_equal_shapes_share_a_group(preset):
    shapes = {"a": (6, 2), "b": (5, 3), "c": (6, 2), "d": (6, 2), "e": (5, 3)}
    geometry = compare(shapes, {"*": sm.Stiefel()}, preset)
    assert [group.shape for group in geometry.groups] == [(3, 6, 2), (2, 5, 3)]


def test_other_settings_of_base():
    settings = {"momentum_decay": 0.5, "fast_decay": 0.7, "slow_decay": 0.95, "settling": 3.0}
    compare({"x": (6, 3)}, {"x": sm.Stiefel()}, "base", BaseAdapter(**settings), **settings)


def test_base_without_orthonormal_factor():
    compare({"x": (6, 3)}, {"x": sm.Stiefel()}, "base", BaseAdapter(spectral=False), spectral=False)


@pytest.mark.parametrize("budget", [1, 5, 7, 1000])
def test_base_told_how_many_steps_there_will_be(budget):
    compare({"x": (6, 3), "y": (4, 4)}, {"x": sm.Stiefel()}, "base", steps=7, budget=budget)


@given(shape=tall_shapes(), seed=st.integers(0, 10**6), budget=st.sampled_from([None, 5]))
@pytest.mark.parametrize("manifold", MATRICES)
def test_base_with_averages(manifold, shape, seed, budget):
    compare({"x": shape}, {"x": MATRICES[manifold]}, "base", seed=seed, budget=budget, averaging=True, steps=6)


def test_averages_of_several_matrices():
    shapes = {"a": (6, 2), "b": (5, 3), "c": (6, 2), "d": (4, 4)}
    compare(shapes, {"a": sm.Oblique(), "*": sm.Stiefel()}, "base", averaging=True, steps=6)


@pytest.mark.parametrize("mean_statistics", [False, True])
def test_other_settings_of_paper(mean_statistics):
    settings = {"step_size": 0.05, "mean_statistics": mean_statistics}
    compare({"x": (6, 3)}, {"x": sm.Stiefel()}, "paper", PaperAdapter(**settings), **settings)


def test_zero_gradient():
    geometry, params = start({"x": (5, 2)}, {"x": sm.Stiefel()})
    for preset in ("base", "paper"):
        weights = lively_weights(preset)
        optimizer = sm.SubspaceOptimizer(geometry, weights, preset)
        zero = {"x": torch.zeros(5, 2, dtype=torch.float64)}
        moved, _ = optimizer.update(zero, optimizer.init(params), params)
        expected, _ = reference_step(weights, preset, sm.Stiefel(), params["x"], zero["x"])
        torch.testing.assert_close(moved["x"], expected, atol=1e-14, rtol=0)
        torch.testing.assert_close(moved["x"], params["x"], atol=1e-14, rtol=0)


def test_errors_say_what_is_right():
    x = normal(4, 2)
    with pytest.raises(ValueError, match=r"preset 'fast' is unknown; there are base, paper"):
        reference_step({}, "fast", sm.Stiefel(), x, x)
    with pytest.raises(ValueError, match=r"one matrix \(d, p\), got shape \(2, 4, 2\)"):
        reference_step({}, "base", sm.Stiefel(), normal(2, 4, 2), normal(2, 4, 2))
