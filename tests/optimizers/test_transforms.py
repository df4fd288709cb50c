"""Updates are pure functions: unchanged inputs, every torch.func transform, every accepted type."""

import dataclasses

import pytest
import torch
from making import (
    OPTIMIZERS,
    ORTHONORMAL_OPTIMIZERS,
    PARAMETER_FREE_OPTIMIZERS,
    largest_difference,
    leaves_of,
    lively_weights,
    make_optimizer,
    normal,
    start,
)
from torch.func import grad, jvp, vmap
from torch.utils import _pytree as pytree

import subspace_meta as sm

SHAPES = {"a": (6, 2), "b": (6, 2), "c": (5, 3), "bias": (4,)}
RULES = {"a": sm.Stiefel(), "b": sm.Stiefel(), "c": sm.Grassmann()}

ALL = (*OPTIMIZERS, *PARAMETER_FREE_OPTIMIZERS, *ORTHONORMAL_OPTIMIZERS)
# They take the distance from the start for a constant, but it follows from the gradients of earlier steps.
FROZEN_DISTANCE = ("RDoG", "RDoWG", "NRDoG")
LOSS = torch.tensor(1.0, dtype=torch.float64)

optimizers = pytest.mark.parametrize("name", ALL)


def rules_for(name):
    return dict.fromkeys(SHAPES, sm.Stiefel()) if name in ORTHONORMAL_OPTIMIZERS else RULES


def gradients(params, seed=0):
    return {k: normal(*v.shape, seed=seed + 31 * i).to(v.dtype) for i, (k, v) in enumerate(params.items())}


def dtypes(tree):
    """Return the dtypes of all numbers but counters."""
    return {value.dtype for value in leaves_of(tree)} - {torch.int64}


def prepared(name, dtype=torch.float64, steps=2):
    """Return an optimizer, parameters and a state that is not the initial one."""
    geometry, params = start(SHAPES, rules_for(name), seed=100, dtype=dtype)
    optimizer = make_optimizer(name, geometry, dtype)
    state = optimizer.init(params)
    for t in range(steps):
        params, state = optimizer.update(gradients(params, t), state, params, LOSS)
    return optimizer, params, state


@optimizers
def test_inputs_are_unchanged(name):
    optimizer, params, state = prepared(name)
    grads = gradients(params, 5)
    inputs = (grads, state, params, getattr(optimizer, "weights", {}))
    before = pytree.tree_map(torch.clone, inputs)
    results = optimizer.update(grads, state, params, LOSS)
    for a, b in zip(leaves_of(before), leaves_of(inputs), strict=True):
        assert torch.equal(a, b)
    assert largest_difference(optimizer.update(grads, state, params, LOSS)[0], results[0]) == 0.0


@optimizers
def test_types_are_kept(name):
    for dtype in (torch.float32, torch.float64):
        optimizer, params, state = prepared(name, dtype, steps=1)
        moved, state2 = optimizer.update(gradients(params), state, params, LOSS)
        assert dtypes((moved, state2)) == {dtype}
        for a, b in zip(leaves_of(state), leaves_of(state2), strict=True):
            assert a.shape == b.shape


@optimizers
def test_float32_follows_float64(name):
    singles, doubles = prepared(name, torch.float32, 3)[1], prepared(name, torch.float64, 3)[1]
    assert largest_difference(singles, doubles) < 1e-4


@optimizers
def test_short_gradients_are_accepted(name):
    for short in (torch.bfloat16, torch.float16):
        optimizer, params, state = prepared(name, torch.float32)
        grads = {k: v.to(short) for k, v in gradients(params).items()}
        moved, state2 = optimizer.update(grads, state, params, LOSS)
        same, _ = optimizer.update({k: v.float() for k, v in grads.items()}, state, params, LOSS)
        assert largest_difference(moved, same) == 0.0
        assert dtypes((moved, state2)) == {torch.float32}


@optimizers
def test_vmap_is_a_loop(name):
    tasks = 3
    optimizer = make_optimizer(name, start(SHAPES, rules_for(name))[0])
    starts = [start(SHAPES, rules_for(name), seed=100 + i)[1] for i in range(tasks)]
    params = {k: torch.stack([s[k] for s in starts]) for k in SHAPES}
    grads = {k: normal(tasks, *v.shape[1:], seed=i) for i, (k, v) in enumerate(params.items())}

    def two_steps(params, grads):
        params, state = optimizer.update(grads, optimizer.init(params), params, LOSS)
        return optimizer.update(grads, state, params, LOSS)[0]

    together = vmap(two_steps)(params, grads)
    for i in range(tasks):
        alone = two_steps(starts[i], {k: v[i] for k, v in grads.items()})
        assert largest_difference({k: v[i] for k, v in together.items()}, alone) < 1e-12


def scalar_of(optimizer, params, state):
    """Return a scalar function of the gradients: a smooth function of the parameters two steps later."""

    def function(grads):
        p, s = optimizer.update(grads, state, params, LOSS)
        p, _ = optimizer.update({k: torch.sin(v) for k, v in grads.items()}, s, p, LOSS)
        return sum((torch.cos(v) * normal(*v.shape, seed=77)).sum() for v in p.values())

    return function


@optimizers
def test_reverse_and_forward_derivatives_and_differences_agree(name):
    optimizer, params, state = prepared(name)
    function = scalar_of(optimizer, params, state)
    grads, direction = gradients(params, 5), gradients(params, 6)
    reverse = sum((v * direction[k]).sum() for k, v in grad(function)(grads).items())
    forward = jvp(function, (grads,), (direction,))[1]
    assert reverse == pytest.approx(float(forward), rel=1e-10)
    if name in FROZEN_DISTANCE:
        return
    h = 1e-6
    ends = [float(function({k: v + s * h * direction[k] for k, v in grads.items()})) for s in (1, -1)]
    assert float(reverse) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("preset", ["base", "paper"])
def test_gradient_with_respect_to_the_weights(preset):
    geometry, params = start(SHAPES, RULES, seed=100)
    weights = lively_weights(preset)

    def function(weights):
        optimizer = sm.SubspaceOptimizer(geometry, weights, preset)
        p, s = optimizer.update(gradients(params, 1), optimizer.init(params), params)
        p, _ = optimizer.update(gradients(params, 2), s, p)
        return sum((v * normal(*v.shape, seed=7)).sum() for v in p.values())

    exact = grad(function)(weights)
    for seed in range(2):
        direction = {k: normal(*v.shape, seed=seed + 5) for k, v in weights.items()}
        h = 1e-6
        ends = [float(function({k: v + s * h * direction[k] for k, v in weights.items()})) for s in (1, -1)]
        along = sum(float((exact[k] * direction[k]).sum()) for k in weights)
        assert along == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6, abs=1e-8)
    silent = {k for k, v in exact.items() if not v.abs().max() > 1e-12}
    # The published preset centres its outputs, so a bias there is without effect; no other meta-parameter is.
    assert silent == ({"row_head.bias", "column_head.bias"} if preset == "paper" else set())


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("base", "paper")])
def test_the_learning_rate_may_be_a_tensor(name):
    geometry, params = start(SHAPES, rules_for(name), seed=100)
    grads = gradients(params)

    made = make_optimizer(name, geometry)

    def moved(lr):
        optimizer = dataclasses.replace(made, lr=lr)
        return optimizer.update(grads, optimizer.init(params), params, LOSS)[0]

    rate = torch.tensor(0.03, dtype=torch.float64)
    assert largest_difference(moved(rate), moved(0.03)) < 1e-15

    def scalar(lr):
        return sum((value * normal(*value.shape, seed=3)).sum() for value in moved(lr).values())

    slope = grad(scalar)(rate)
    h = 1e-6
    ends = [float(scalar(0.03 + s * h)) for s in (1, -1)]
    assert float(slope) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6)
    rates = torch.tensor([0.01, 0.03], dtype=torch.float64)
    assert torch.allclose(vmap(moved)(rates)["c"][1], moved(0.03)["c"], atol=1e-14)


def test_second_derivatives_at_a_zero_gradient_are_finite():
    """Meta-gradients of a task that starts at its optimum must not be NaN."""
    for dtype in (torch.float32, torch.float64):
        geometry, params = start({"x": (6, 2)}, {"x": sm.Stiefel()}, dtype=dtype)
        for name in ALL:
            optimizer = make_optimizer(name, geometry, dtype)

            def function(g, optimizer=optimizer, params=params):
                moved, state = optimizer.update({"x": g}, optimizer.init(params), params, LOSS)
                return optimizer.update({"x": g}, state, moved, LOSS)[0]["x"].sum()

            result = grad(function)(torch.zeros_like(params["x"]))
            assert torch.isfinite(result).all(), name


def test_an_infeasible_start_is_refused():
    for name in ALL:
        geometry, params = start({"x": (6, 2)}, {"x": sm.Stiefel()})
        optimizer = make_optimizer(name, geometry)
        with pytest.raises(ValueError, match=r"parameter 'x' is not on Stiefel: .*geometry.project"):
            optimizer.init({"x": params["x"] * 1.1})
        with pytest.raises(ValueError, match=r"parameter 'x' has shape \(5, 2\), the geometry says \(6, 2\)"):
            optimizer.init({"x": params["x"][:5]})


def test_wrong_weights_are_refused():
    geometry, _ = start({"x": (6, 2)}, {})
    weights = lively_weights("base")
    with pytest.raises(ValueError, match=r"not those of preset 'paper': missing \['column_head.*unknown \["):
        sm.SubspaceOptimizer(geometry, {k: v for k, v in weights.items() if "head" not in k}, "paper")
    with pytest.raises(ValueError, match=r"'lstm.bias' has shape \(4, 1\); preset 'base' .* 20 needs \(80, 1\)"):
        sm.SubspaceOptimizer(geometry, {**weights, "lstm.bias": torch.zeros(4, 1)})
    with pytest.raises(ValueError, match="preset 'large' is unknown; there are base, light, paper"):
        sm.SubspaceOptimizer(geometry, weights, "large")


@pytest.mark.parametrize("preset", ["base", "paper"])
def test_parameters_and_weights_have_one_type(preset):
    geometry, params = start({"a": (6, 2), "b": (6, 2)}, {})
    optimizer = sm.SubspaceOptimizer(geometry, lively_weights(preset, dtype=torch.float32), preset)
    optimizer.init({name: value.float() for name, value in params.items()})
    message = r"parameter 'b' has dtype torch.float64, the weights have torch.float32; bring them to one"
    with pytest.raises(ValueError, match=message):
        optimizer.init({"a": params["a"].float(), "b": params["b"]})
    with pytest.raises(ValueError, match=r"parameter 'b' has dtype torch.float64"):
        vmap(optimizer.init)({"a": params["a"].float()[None], "b": params["b"][None]})


@optimizers
def test_numbers_that_are_not_finite_propagate(name):
    optimizer, params, state = prepared(name)
    grads = gradients(params)
    grads["c"] = grads["c"] * float("nan")
    moved, _ = optimizer.update(grads, state, params, LOSS)
    if name == "RSDM permutation":  # moves three of five rows
        assert moved["c"].isnan().all(dim=1).sum() == 3
    else:
        assert moved["c"].isnan().all()
    if name in FROZEN_DISTANCE:
        assert all(moved[k].isnan().all() for k in moved), "the gradients' common norm is in every step"
        return
    assert all(torch.isfinite(moved[k]).all() for k in ("a", "b", "bias")), "a NaN stays in its own matrix"
