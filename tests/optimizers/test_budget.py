"""A run of known length: what the optimizer is told, how long it holds, and how it is changed on the way."""

import math

import pytest
import torch
from making import lively_weights, normal

import subspace_meta as sm
from subspace_meta.adapter.features import budget
from subspace_meta.optimizers.subspace import SubspaceOptimizer

GEOMETRY = sm.Geometry.from_rules({"x": torch.zeros(6, 2), "b": torch.zeros(3, 1)}, {"x": sm.Stiefel()})
START = GEOMETRY.project({"x": normal(6, 2, seed=1), "b": normal(3, 1, seed=2)})


def run(params, state, times, **settings):
    optimizer = SubspaceOptimizer(GEOMETRY, lively_weights(), **settings)
    state = optimizer.init(params) if state is None else state
    for t in times:
        grads = {name: normal(*x.shape, seed=10 * t + i) for i, (name, x) in enumerate(params.items())}
        params, state = optimizer.update(grads, state, params)
    return params, state


def assert_same(a, b):
    assert all(torch.equal(a[name], b[name]) for name in a)


def apart(a, b):
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize(
    ("step", "steps", "features", "left"),
    [
        (0, 0, (0, 0, 0, 0), 1),
        (7, 0, (0, 0, 0, 0), 1),
        (0, 100, (1, 0, 0, 0), 1),
        (75, 100, (1, 0.75, math.log(0.25) / 4, 0), 0.25),
        (999, 1000, (1, 0.999, math.log(1e-3) / 4, 0.5), 1e-3),
        (5000, 1000, (1, 0.999, math.log(1e-3) / 4, 0.5), 1e-3),
    ],
)
def test_what_the_network_sees(step, steps, features, left):
    found, log_left = budget(torch.tensor(step).double(), torch.tensor(steps).double())
    torch.testing.assert_close(found, torch.tensor(features).double())
    torch.testing.assert_close(log_left.exp(), torch.tensor(left).double())


def test_it_makes_a_difference_and_none_where_there_is_none():
    untold, _ = run(START, None, range(8))
    assert_same(untold, run(START, None, range(8), steps=None)[0])
    told, state = run(START, None, range(8), steps=8)
    assert apart(untold, told) > 1e-4
    assert state.budget == 8
    assert apart(told, run(START, None, range(8), steps=torch.tensor(8))[0]) == 0


def test_a_run_goes_on_exactly_and_may_be_made_longer():
    whole, _ = run(START, None, range(8), steps=8)
    half = run(START, None, range(4), steps=8)
    assert_same(run(*half, range(4, 8), steps=8)[0], whole)
    assert_same(run(*half, range(4, 8))[0], whole)  # the state knows it
    longer, state = run(*half, range(4, 8), steps=20)
    assert state.budget == 20
    assert apart(longer, whole) > 1e-5
    # All that a step takes from the budget is the number now: it is as if the state had always had it.
    assert_same(run(half[0], half[1]._replace(budget=torch.tensor(20.0).double()), range(4, 8))[0], longer)


def test_the_budget_goes_through_compile_and_guard():
    optimizer = SubspaceOptimizer(GEOMETRY, lively_weights(), guarded=True, steps=5)
    state = optimizer.init(START)
    grads = {name: normal(*x.shape, seed=3) for name, x in START.items()}

    def step(params, state):
        return optimizer.update(grads, state, params, torch.tensor(1.0).double())

    expected, after = step(START, state)
    compiled, _ = torch.compile(step, fullgraph=True, backend="aot_eager")(START, state)
    assert after.adapter.budget == 5
    assert apart(expected, compiled) < 1e-12


@pytest.mark.parametrize("steps", [0, -3, 2.5, True, "100", torch.ones(2)])
def test_what_is_no_number_of_steps(steps):
    with pytest.raises(ValueError, match="steps must be a positive integer, a scalar tensor or None, got"):
        SubspaceOptimizer(GEOMETRY, lively_weights(), steps=steps)


def test_the_preset_paper_has_no_use_for_it():
    with pytest.raises(ValueError, match="preset 'paper' plans for no number of steps; leave steps away"):
        SubspaceOptimizer(GEOMETRY, lively_weights("paper"), "paper", steps=10)


LIGHT = sm.PRESETS["light"]


def blind():
    """Return weights of ``light`` as if they had been trained before the number of steps was a feature."""
    weights = {name: value.clone() for name, value in sm.pretrained("light").items()}
    weights["lstm.weight"][:, 16:20] = 0.0
    weights["length.gauge"][5] = 0.0
    for name in ("length.skip", "rate.skip", "noise.skip"):
        weights[name][11:15] = 0.0
    return weights


BLIND = {name: value.double() for name, value in blind().items()}


@pytest.mark.parametrize(
    ("name", "place", "seen"),
    [
        *[("lstm.weight", (3, column), True) for column in range(16, 20)],
        *[("lstm.weight", (3, column), False) for column in (15, 20)],
        *[(name, (place,), True) for name in ("length.skip", "rate.skip") for place in range(11, 15)],
        ("length.skip", (10,), False),
        ("length.gauge", (5,), True),
        ("length.gauge", (4,), False),
        ("length.bias", (), False),
    ],
)
def test_which_weights_look_at_it(name, place, seen):
    weights = {key: value.clone() for key, value in BLIND.items()}
    weights[name][place] += 0.5
    assert LIGHT.sees_budget(weights) is seen
    ends = []
    for steps in (None, 8):
        optimizer = SubspaceOptimizer(GEOMETRY, weights, "light", steps=steps)
        params, state = START, optimizer.init(START)
        for t in range(6):
            grads = {key: normal(*x.shape, seed=10 * t + i) for i, (key, x) in enumerate(params.items())}
            params, state = optimizer.update(grads, state, params)
        ends.append(params)
    assert (apart(*ends) > 0) is seen


def test_weights_that_do_not_look_at_it_are_said_by_the_torch_optimizer(recwarn):
    rules, model = {"0.weight": sm.Stiefel()}, network()
    torch.nn.init.orthogonal_(model[0].weight)
    for settings in (
        {"preset": "light", "weights": blind()},
        {"steps": 50},
        {"weights": lively_weights(), "steps": 50},
    ):
        sm.optim.SubspaceMeta(model, rules, **settings)
    assert not recwarn
    with pytest.warns(
        UserWarning, match="these weights were not trained with a number of steps .* no effect"
    ) as warned:
        sm.optim.SubspaceMeta(model, rules, preset="light", weights=blind(), steps=50)
    assert [w.filename for w in warned] == [__file__]
    weights = {key: value.clone() for key, value in sm.pretrained().items()}
    for name, zeros in (
        ("lstm.weight", (slice(None), slice(16, 20))),
        ("length.gauge", 5),
        ("length.skip", slice(11, 15)),
    ):
        weights[name][zeros] = 0.0
    weights["rate.skip"][11:15] = weights["noise.skip"][11:] = 0.0
    assert sm.PRESETS["base"].sees_budget(weights)  # by the decay
    weights["decay.skip"][11:15] = 0.0
    assert not sm.PRESETS["base"].sees_budget(weights)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).double()


def train(model, optimizer, count, seed=0):
    for t in range(count):
        optimizer.zero_grad()
        model(normal(7, 5, seed=seed + t)).square().mean().backward()
        optimizer.step()


def test_as_a_torch_optimizer_it_is_an_option_that_may_change(tmp_path):
    rules = {"0.weight": sm.Stiefel()}
    ends = {}
    for name, first, then in (("short", 6, 6), ("longer", 6, 12), ("long", 12, 12)):
        model = network()
        with pytest.warns(sm.optim.ProjectionWarning):
            optimizer = sm.optim.SubspaceMeta(model, rules, steps=first, weights=lively_weights())
        train(model, optimizer, 3)
        for group in optimizer.param_groups[:1]:
            group["steps"] = then
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        train(model, optimizer, 3, seed=3)
        ends[name] = model[0].weight.detach().clone()
        assert optimizer.state[model[0].weight]["budget"] == then
    assert (ends["short"] - ends["longer"]).abs().max() > 1e-6
    assert (ends["long"] - ends["longer"]).abs().max() > 1e-6
    optimizer.param_groups[0]["steps"] = 0
    with pytest.raises(ValueError, match="steps must be a positive integer"):
        train(model, optimizer, 1)
