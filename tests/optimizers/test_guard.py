"""The safeguard: it leaves a calm run alone, takes no spoiled step, and saves a run from an adapter that climbs."""

import math

import pytest
import torch
from making import leaves_of, lively_weights, normal

import subspace_meta as sm
from subspace_meta.adapter.base import BaseAdapter
from subspace_meta.optimizers import guard

F64 = torch.float64


def leading_subspace(batch: int = 0):
    """Return a geometry, a start and a loss: -tr(X^T A X) + b^2, of one run or of a batch of runs."""
    like = {"x": torch.empty(8, 2), "b": torch.empty(3), "scalar": torch.empty(())}
    geometry = sm.Geometry.from_rules(like, {"x": sm.Grassmann()})
    diagonal = torch.arange(8, 0, -1, dtype=F64)

    def loss(params):
        return (
            15.0
            - (params["x"].square() * diagonal[:, None]).sum()
            + params["b"].square().sum()
            + params["scalar"].square()
        )

    if not batch:
        return geometry, geometry.initialize(torch.Generator().manual_seed(0), F64), loss
    stacked = geometry.stacked(batch)
    return stacked, stacked.initialize(torch.Generator().manual_seed(0), F64), loss


def optimizer(geometry, guarded=True, weights=None, preset="base"):
    weights = weights or {name: value.double() for name, value in sm.pretrained().items()}
    return sm.SubspaceOptimizer(geometry, weights, preset, guarded)


def test_a_run_whose_loss_falls_is_left_alone():
    geometry, start, loss = leading_subspace()
    ends = []
    for guarded in (False, True):
        o = optimizer(geometry, guarded)
        params, state = start, o.init(start)
        for _ in range(15):
            grads, value = torch.func.grad_and_value(loss)(params)
            params, state = o.update(grads, state, params, value)
        ends.append(params)
    assert float(state.guard.trust) == 0.0
    assert all(torch.allclose(ends[0][k], ends[1][k], rtol=0, atol=1e-10) for k in start)
    assert float(loss(start)) - float(loss(ends[1])) > 1.0, "nothing was optimized"


class Climbing(BaseAdapter):
    """Every learned direction turned around, and longer."""

    def __call__(self, *args, **kwargs):
        directions, factors, state = super().__call__(*args, **kwargs)
        return directions, [-3.0 * factor for factor in factors], state


def test_it_saves_a_run_from_an_adapter_that_climbs():
    geometry, start, loss = leading_subspace()
    ends = {}
    for guarded in (False, True):
        o = optimizer(geometry, guarded, preset=Climbing())
        params, state = start, o.init(start)
        losses = []
        for _ in range(600):
            grads, value = torch.func.grad_and_value(loss)(params)
            params, state = o.update(grads, state, params, value)
            losses.append(float(value))
        ends[guarded] = params, losses
    zero = torch.zeros(())
    subspace = {
        guarded: 15.0 - float(loss({**params, "b": zero, "scalar": zero})) for guarded, (params, _) in ends.items()
    }
    assert subspace[False] < 5.0, "without the guard this adapter must climb, or the test shows nothing"
    assert subspace[True] > 14.9, "eigenvalues 8 and 7 are the largest: 15 is the best"
    # The vector has no bound: it is stopped, and on its way back.
    losses = ends[True][1]
    assert losses[-1] < losses[300] < losses[20] < 1e-3 * ends[False][1][-1]


def watched(losses):
    """Return the logarithms of the trust along a series of losses."""
    state, trust = guard.initial(torch.zeros(1, dtype=torch.float64)), []
    for loss in losses:
        state = guard.watch(state, torch.as_tensor(loss, dtype=torch.float64), torch.tensor(True))
        trust.append(float(state.trust))
    return trust


def falling(steps):
    """Return noisy losses that fall from 100 to 1: no alarm, and far below the start."""
    return [1 + 99 * math.exp(-t / 50) + 0.1 * (-1) ** t for t in range(steps)]


def test_a_spike_is_seen_at_once_and_the_noise_is_not():
    losses = [*falling(1000), 2.5, 1.1]
    trust = watched(losses)
    assert trust[900:1000] == [0.0] * 100
    # Far too short for the running means to rise beyond the noise: it is the spike that is seen.
    assert trust[1000] == -guard.DISTRUST
    assert trust[1001] > trust[1000]


def test_a_slow_rise_is_seen_long_before_the_start_is_reached():
    climb = [1 + 0.004 * t + 0.1 * (-1) ** t for t in range(400)]
    trust = watched([*falling(1000), *climb])
    assert trust[999] == 0.0
    assert min(trust[1000:]) < -3 * guard.DISTRUST


def test_trust_comes_back_after_a_spike():
    state = guard.initial(torch.zeros((), dtype=F64))
    noise = normal(400, seed=3)
    trusts = []
    for t in range(400):
        value = 1.0 + 0.01 * noise[t] + (5.0 if t == 100 else 0.0)
        state = guard.watch(state, value, torch.tensor(True))
        trusts.append(float(state.trust.exp()))
    assert trusts[99] > 0.9, "noise alone is no alarm"
    assert trusts[100] < 0.3
    assert trusts[399] == 1.0


@pytest.mark.parametrize("spoiled", ["gradient", "loss", "overflow"])
@pytest.mark.parametrize("method", ["update", "update_"])
def test_a_spoiled_step_is_not_taken(spoiled, method):
    geometry, start, loss = leading_subspace()
    o = optimizer(geometry)
    params, state = {k: v.clone() for k, v in start.items()}, o.init(start)
    for t in range(30):
        grads, value = torch.func.grad_and_value(loss)(params)
        before = {k: v.clone() for k, v in params.items()}
        if t == 10:
            if spoiled == "loss":
                value = torch.tensor(torch.nan, dtype=F64)
            else:
                grads["b"][1] = torch.inf if spoiled == "gradient" else 1e200
        if method == "update":
            params, state = o.update(grads, state, params, value)
        else:
            state = o.update_(grads, state, params, value)
        moved = max(float((params[k] - before[k]).abs().max()) for k in params)
        assert moved == 0 if t == 10 else moved > 1e-9
    leaves = leaves_of(state)
    assert all(bool(torch.isfinite(leaf).all()) for leaf in leaves)
    assert float(loss(params)) < float(loss(start))


def test_one_run_of_many_is_guarded_alone():
    geometry, start, loss = leading_subspace(batch=3)
    o = optimizer(geometry, weights=lively_weights())
    ends = []
    for spoil in (False, True):
        params, state = start, o.init(start)
        for t in range(6):
            grads, values = torch.func.vmap(torch.func.grad_and_value(loss))(params)
            if spoil and t == 5:
                grads["x"][1] = torch.nan
                values[1] = torch.nan
            params, state = o.update(grads, state, params, values)
        ends.append(params)
    for k in start:
        assert torch.equal(ends[0][k][::2], ends[1][k][::2]), "the other runs are what they were"
        assert torch.isfinite(ends[1][k]).all()
        assert not torch.allclose(ends[0][k][1], ends[1][k][1])
    assert state.guard.trust[1] < 0 == state.guard.trust[0]


def test_it_goes_through_vmap_and_compile():
    geometry, start, loss = leading_subspace()
    o = optimizer(geometry)

    def step(params, state):
        grads, value = torch.func.grad_and_value(loss)(params)
        return o.update(grads, state, params, value)

    state = o.init(start)
    expected = step(start, state)[0]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(start, state)[0]
    twice = torch.utils._pytree.tree_map(lambda x: torch.stack([x, x]), (start, state))
    mapped = torch.func.vmap(step)(*twice)[0]
    for k in start:
        assert torch.allclose(compiled[k], expected[k], rtol=0, atol=1e-12)
        assert torch.allclose(mapped[k][1], expected[k], rtol=0, atol=1e-12)


def test_it_needs_the_loss():
    geometry, start, loss = leading_subspace()
    o = optimizer(geometry)
    grads = torch.func.grad(loss)(start)
    with pytest.raises(ValueError, match=r"guarded=True watches the loss: give it, update\(grads, state, par"):
        o.update(grads, o.init(start), start)
