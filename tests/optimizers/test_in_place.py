"""``update_``: the pure update's numbers, in the caller's own tensors."""

import pytest
import torch
from making import leaves_of, lively_weights, normal, start
from subspace_kernels import native

import subspace_meta as sm

SHAPES = {"a": (40, 17), "b": (6, 2), "c": (6, 2), "s": (3, 3), "w": (7, 30), "k": (9, 4), "bias": (4,)}
RULES = {"a": sm.Stiefel(), "[bc]": sm.Grassmann(), "s": sm.SPD(), "w": sm.Stiefel(), "k": sm.StiefelCanonical()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("preset", ["base", "light", "paper"])
def test_the_step_in_place_is_the_pure_step(preset, dtype):
    geometry, params = start(SHAPES, RULES, seed=3, dtype=dtype)
    adapter = sm.PRESETS["paper" if preset == "paper" else "base"]
    if preset == "light":
        adapter = type(adapter)(momentum_decay=0.0)
    optimizer = sm.SubspaceOptimizer(geometry, lively_weights(adapter, dtype=dtype), adapter)
    state, own = optimizer.init(params), {name: value.clone() for name, value in params.items()}
    own_state = optimizer.init(own)
    addresses = {name: value.data_ptr() for name, value in own.items()}
    for t in range(4):
        grads = {name: normal(*value.shape, seed=t).to(dtype) for name, value in params.items()}
        kept = {name: value.clone() for name, value in grads.items()}
        params, state = optimizer.update(grads, state, params)
        own_state = optimizer.update_(grads, own_state, own)
        assert all(torch.equal(grads[name], kept[name]) for name in grads)
        for mine, expected in zip(leaves_of((own, own_state)), leaves_of((params, state)), strict=True):
            assert torch.equal(mine, expected)
    assert addresses == {name: value.data_ptr() for name, value in own.items()}
    assert max(geometry.violation(own).values()) < (1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.skipif(native.library() is None, reason="the reference makes new tensors")
def test_the_network_state_stays_where_it_is():
    geometry, params = start({"x": (40, 5)}, {"x": sm.Stiefel()}, dtype=torch.float32)
    optimizer = sm.SubspaceOptimizer(geometry, lively_weights(dtype=torch.float32))
    state = optimizer.init(params)
    address = state.hidden.data_ptr()
    state = optimizer.update_({"x": normal(40, 5, dtype=torch.float32)}, state, params)
    assert state.hidden.data_ptr() == address


def test_parameters_that_need_gradients_are_written():
    parameter = torch.nn.Parameter(torch.linalg.qr(normal(8, 3, dtype=torch.float32))[0])
    geometry = sm.Geometry.from_rules({"x": parameter}, {"x": sm.Stiefel()})
    optimizer = sm.SubspaceOptimizer(geometry, sm.pretrained())
    before = parameter.detach().clone()
    optimizer.update_({"x": normal(8, 3, dtype=torch.float32)}, optimizer.init({"x": parameter}), {"x": parameter})
    assert parameter.requires_grad
    assert not torch.equal(parameter.detach(), before)
