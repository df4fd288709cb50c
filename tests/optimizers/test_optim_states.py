"""The state of each parameter in torch's layout: cut out of the functional one, put together again, saved by torch."""

import io

import pytest
import torch
from making import OPTIMIZERS, ORTHONORMAL_OPTIMIZERS, PARAMETER_FREE_OPTIMIZERS, make_optimizer, normal, start
from optim_models import ROUNDING, RULES, assert_equal, learned_and_hand_made, loss_of, network, shell, train, values
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import subspace_meta as sm
from subspace_meta.optim import states

SHAPES = {
    "a": (5, 3),  # two equal ones make a stack
    "b": (7, 4),
    "c": (5, 3),
    "wide": (3, 6),
    "filters": (3, 2, 2, 2),  # a convolution
    "heads": (2, 5, 3),  # a batch in one parameter
}


def run(optimizer, params, state, steps, seed=0):
    for step in range(steps):
        grads = {name: normal(*value.shape, seed=seed + step) for name, value in params.items()}
        params, state = optimizer.update(
            grads, state, params, torch.tensor(1.0 / (step + seed + 1), dtype=torch.float64)
        )
    return params, state


@pytest.mark.parametrize("name", [*OPTIMIZERS, *PARAMETER_FREE_OPTIMIZERS, *ORTHONORMAL_OPTIMIZERS])
def test_a_state_is_cut_into_parameters_and_put_together_bit_for_bit(name):
    geometry, params = start(SHAPES, {"*": sm.Stiefel()})
    optimizer = make_optimizer(name, geometry)
    params, state = run(optimizer, params, optimizer.init(params), 3)
    parts = states.split(state, geometry)
    assert parts.keys() == SHAPES.keys()
    for key, part in parts.items():
        assert "momentum" not in part or part["momentum"].shape == SHAPES[key]
    copied = {n: {key: tensor.clone() for key, tensor in part.items()} for n, part in parts.items()}
    again = states.join(copied, optimizer.init(params), geometry)
    ahead, _ = run(optimizer, params, state, 3, seed=7)
    resumed, _ = run(optimizer, params, again, 3, seed=7)
    assert all(torch.equal(ahead[key], resumed[key]) for key in ahead)


@pytest.mark.parametrize("name", ["base", "RASA-LR", "RAdam", "MatrixLSTM"])
def test_each_parameter_has_what_it_would_have_alone(name):
    geometry, params = start(SHAPES, {"*": sm.Stiefel()})
    if name == "MatrixLSTM":
        geometry, params = start({"a": (5, 3), "c": (5, 3)}, {"*": sm.Stiefel()})
    optimizer = make_optimizer(name, geometry)
    _, state = run(optimizer, params, optimizer.init(params), 3)
    parts = states.split(state, geometry)
    for key, value in params.items():
        own = sm.Geometry.from_rules({key: value}, {key: sm.Stiefel()})
        alone = make_optimizer(name, own)
        _, its = run(alone, {key: value}, alone.init({key: value}), 3)
        expected = states.split(its, own)[key]
        assert parts[key].keys() == expected.keys()
        for field, tensor in expected.items():
            torch.testing.assert_close(parts[key][field], tensor, rtol=1e-12, atol=1e-12, msg=f"{key} {field}")


def test_a_field_of_unknown_layout_is_named():
    geometry, params = start({"a": (5, 3)}, {"*": sm.Stiefel()})
    optimizer = make_optimizer("base", geometry)
    state = optimizer.init(params)._replace(fast=torch.zeros(5))
    with pytest.raises(ValueError, match=r"'fast' of the state, of shape \(5,\)"):
        states.split(state, geometry)


@learned_and_hand_made
def test_the_state_of_a_parameter_can_be_read_and_changed(name):
    model = network()
    optimizer = shell(name, model)
    assert not optimizer.state
    train(optimizer, model, 2)
    state = optimizer.state
    assert set(state) == set(model.parameters())
    momentum = state[model[2].weight]["momentum"]
    assert momentum.shape == model[2].weight.shape
    assert momentum.abs().max() > 0
    momentum.zero_()  # a view
    assert optimizer.state[model[2].weight]["momentum"].abs().max() == 0
    assert optimizer.state[model[0].weight]["momentum"].abs().max() > 0
    kept = dict(optimizer.state)
    optimizer.state = {}
    assert not optimizer.state
    optimizer.state = kept
    assert set(optimizer.state) == set(model.parameters())


@learned_and_hand_made
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_torch_distributed_checkpoint_saves_and_loads(name, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = network()
    optimizer = shell(name, model)
    train(optimizer, model, 3)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    if not flat:
        assert saved["state"].keys() == dict(model.named_parameters()).keys()
        assert saved["state"]["2.weight"]["momentum"].shape == (7, 5)
    file = io.BytesIO()
    torch.save((saved, model.state_dict()), file)
    train(optimizer, model, 3)

    file.seek(0)
    saved, weights = torch.load(file, weights_only=True)
    again = network(seed=3)
    loaded = shell(name, again)
    again.load_state_dict(weights)
    set_optimizer_state_dict(again, loaded, saved, options=options)
    assert_equal(values(again), {key: value for key, value in weights.items()})  # torch starts a state by a step
    train(loaded, again, 3)
    assert_equal(values(again), values(model), ROUNDING)


def test_torch_distributed_checkpoint_of_a_fresh_optimizer_changes_nothing():
    model = network()
    before = values(model)
    optimizer = shell("base", model, guarded=True)
    fresh = get_optimizer_state_dict(model, optimizer)
    assert_equal(values(model), before)
    assert float(fresh["state"]["0.weight"]["adapter.step"]) == 0.0
    optimizer = shell("RSGD", model)  # nothing is kept for the matrices
    train(optimizer, model, 1)
    saved = get_optimizer_state_dict(model, optimizer)
    set_optimizer_state_dict(model, optimizer, saved)
    train(optimizer, model, 1)


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel], ids=["compiled", "replicated"])
@learned_and_hand_made
def test_states_of_wrapped_models_load_into_the_plain_one_and_back(name, wrap):
    model = network()
    wrapped = wrap(model)
    assert next(iter(dict(wrapped.named_parameters()))) != "0.weight"
    optimizer = shell(name, wrapped, {"0.weight": sm.Stiefel(), "[24].weight": sm.Stiefel()})
    train(optimizer, model, 2)
    other = network(seed=4)
    plain = shell(name, other)
    other.load_state_dict(model.state_dict())
    plain.load_state_dict(optimizer.state_dict())
    train(plain, other, 2)
    train(optimizer, model, 2)
    assert_equal(values(other), values(model))
    optimizer.load_state_dict(plain.state_dict())
    # Names given by hand keep their prefix, and count without it.
    third = network(seed=5)
    prefixed = [(f"module._orig_mod.{key}", p) for key, p in third.named_parameters()]
    by_hand = shell(name, prefixed, RULES)
    by_hand.load_state_dict(plain.state_dict())
    assert loss_of(third).isfinite()
