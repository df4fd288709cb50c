"""Averages of iterates that the learned optimizer hands out: their weights, where they are, and in models."""

import copy
import itertools

import optim_models
import pytest
import torch
from making import largest_difference, lively_weights, normal, start
from torch.func import grad

import subspace_meta as sm

EVERY = {
    "Stiefel": (sm.Stiefel(), (6, 4)),
    "Stiefel, Newton-Schulz": (sm.Stiefel(retraction=sm.PolarNewtonSchulz()), (6, 4)),
    "Stiefel, canonical": (sm.StiefelCanonical(), (6, 4)),
    "Grassmann": (sm.Grassmann(), (6, 2)),
    "Orthogonal": (sm.Orthogonal(), (5, 5)),
    "Rotations": (sm.Rotations(), (5, 5)),
    "Oblique": (sm.Oblique(), (5, 5)),
    "Sphere": (sm.Sphere(), (6, 4)),
    "SPD": (sm.SPD(), (4, 4)),
    "Product": (sm.Product((sm.Stiefel(), sm.SPD()), (5, 4)), (9, 4)),
}
SHAPES = {"x": (7, 3), "y": (6, 3), "z": (4, 4), "b": (3, 1)}
RULES = {"x": sm.Stiefel(), "y": sm.Oblique(), "z": sm.SPD()}


def weights_with_noise(bias: float, preset: str = "base") -> dict:
    """Return weights to which everything is noise (a large bias), or nothing (a small one)."""
    weights = lively_weights(preset)
    weights["noise.skip"].zero_()
    weights["noise.hidden"].zero_()
    return {**weights, "noise.bias": torch.full_like(weights["noise.bias"], bias)}


def run(optimizer, params, state=None, times=range(8)):
    """Return the points after each step, and the states."""
    state = optimizer.init(params) if state is None else state
    points, states = [], []
    for t in times:
        grads = {name: normal(*x.shape, seed=10 * t + i) for i, (name, x) in enumerate(params.items())}
        params, state = optimizer.update(grads, state, params, torch.tensor(1.0).double())
        points.append(params)
        states.append(state)
    return points, states


@pytest.mark.parametrize("preset", ["base", "light"])
@pytest.mark.parametrize("guarded", [False, True])
def test_without_noise_they_are_the_iterates(preset, guarded):
    geometry, params = start(SHAPES, RULES)
    weights = weights_with_noise(-9.0, preset)
    optimizer = sm.SubspaceOptimizer(geometry, weights, preset, guarded, averaging=True)
    points, states = run(optimizer, params)
    for point, state in zip(points, states, strict=True):
        assert largest_difference(point, optimizer.averaged(state)) < 1e-12
    plain, _ = run(sm.SubspaceOptimizer(geometry, weights, preset, guarded), params)
    assert largest_difference(points[-1], plain[-1]) < 1e-12


def test_where_all_is_noise_they_are_those_of_polynomial_decay():
    """On flat space exactly; on manifolds the mean of near points is their extrinsic one to third order."""
    geometry, params = start(SHAPES, RULES)
    weights = weights_with_noise(9.0)
    weights["length.bias"] = weights["length.bias"] - 1.0
    optimizer = sm.SubspaceOptimizer(geometry, weights, averaging=True)
    points, states = run(optimizer, params, times=range(12))
    means = {name: x.clone() for name, x in params.items()}
    for t, point in enumerate(points, start=1):
        means = {name: mean + 4 / (t + 3) * (point[name] - mean) for name, mean in means.items()}
    averaged = optimizer.averaged(states[-1])
    apart = {name: float((averaged[name] - points[-1][name]).abs().max()) for name in averaged}
    torch.testing.assert_close(averaged["b"], means["b"], rtol=1e-12, atol=1e-12)
    for parameter in geometry.parameters:
        name = parameter.name
        nearest = parameter.manifold.nearest(means[name])
        assert float((averaged[name] - nearest).abs().max()) < 0.02 * apart[name]
        assert apart[name] > 1e-5


@pytest.mark.parametrize("name", EVERY)
def test_they_are_points_of_the_manifold_however_far_the_iterates_move(name):
    manifold, shape = EVERY[name]
    weights = weights_with_noise(9.0)
    weights["length.bias"] = weights["length.bias"] + 6.0
    geometry, params = start({"x": shape}, {"x": manifold})
    optimizer = sm.SubspaceOptimizer(geometry, weights, averaging=True)
    points, states = run(optimizer, params, times=range(40))
    averaged = optimizer.averaged(states[-1])
    assert largest_difference(averaged, points[-1]) > 1e-3
    geometry.check_feasible(averaged)


def test_on_definite_matrices_they_do_not_grow_away():
    """A retraction along the difference to a larger matrix leads beyond it; repeated, without end."""
    geometry, params = start({"x": (4, 4)}, {"x": sm.SPD()})
    optimizer = sm.SubspaceOptimizer(geometry, weights_with_noise(9.0), averaging=True)
    state = optimizer.init(params)
    state = state._replace(average=tuple(1.5 * x for x in state.average), step=torch.tensor(200.0).double())
    zero = {"x": torch.zeros(4, 4).double()}
    sizes = []
    for _ in range(100):
        params, state = optimizer.update(zero, state, params)
        sizes.append(float(optimizer.averaged(state)["x"].norm() / params["x"].norm()))
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(sizes))
    assert 1.0 <= sizes[-1] < 1.5 ** ((200 / 300) ** 3)  # 4/t of what is left goes in each step


def test_compiled_in_place_and_differentiated():
    geometry, params = start(SHAPES, RULES)
    weights = lively_weights()
    optimizer = sm.SubspaceOptimizer(geometry, weights, averaging=True)
    points, states = run(optimizer, params, times=range(3))
    grads = {name: normal(*x.shape, seed=100 + i) for i, (name, x) in enumerate(params.items())}

    def handed_out(weights, state, params):
        optimizer = sm.SubspaceOptimizer(geometry, weights, averaging=True)
        return optimizer.averaged(optimizer.update(grads, state, params)[1])

    expected = handed_out(weights, states[-1], points[-1])
    compiled = torch.compile(handed_out, fullgraph=True, backend="aot_eager")(weights, states[-1], points[-1])
    assert largest_difference(expected, compiled) < 1e-12

    def loss(weights):
        return sum(value.square().sum() for name, value in handed_out(weights, states[-1], points[-1]).items())

    derivative = grad(loss)(weights)
    direction = {name: normal(*value.shape, seed=i) for i, (name, value) in enumerate(weights.items())}
    step = 1e-6
    ends = [loss({name: value + sign * step * direction[name] for name, value in weights.items()}) for sign in (1, -1)]
    slope = sum(float((derivative[name] * direction[name]).sum()) for name in weights)
    assert float(ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=1e-6)
    assert derivative["noise.bias"] != 0

    mine = {name: value.clone() for name, value in points[-1].items()}
    copied = torch.utils._pytree.tree_map(torch.clone, states[-1])
    state = optimizer.update_(grads, copied, mine)
    assert largest_difference(optimizer.averaged(state), expected) < 1e-12


def test_without_averages_there_are_none():
    geometry, params = start(SHAPES, RULES)
    optimizer = sm.SubspaceOptimizer(geometry, lively_weights())
    with pytest.raises(ValueError, match="no average in this state: make the optimizer with averaging=True, and init"):
        optimizer.averaged(optimizer.init(params))
    with pytest.raises(ValueError, match=r"preset 'paper' makes no averages; sm.Averaging\(optimizer\) does"):
        sm.SubspaceOptimizer(geometry, lively_weights("paper"), "paper", averaging=True)


# --- As a torch optimizer ---


def trained(steps=6, **settings):
    model = optim_models.network()
    settings = {"averaging": True, "weights": weights_with_noise(9.0), **settings}
    optimizer = optim_models.shell("base", model, **settings)
    optim_models.train(optimizer, model, steps)
    return model, optimizer


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_model_holds_them_for_a_while():
    model, optimizer = trained()
    iterates = values(model)
    with optimizer.averaged():
        inside = values(model)
        with pytest.raises(ValueError, match="the averages are in the model already"), optimizer.averaged():
            pass
        with pytest.raises(ValueError, match=r"not where steps go on: leave averaged\(\) first"):
            optimizer.step()
        state = optimizer.state_dict()
    assert all(torch.equal(value, iterates[name]) for name, value in values(model).items())
    for name, p in model.named_parameters():
        if name.endswith("weight"):
            torch.testing.assert_close(inside[name], optimizer.state[p]["average"], rtol=0, atol=0)
            assert (inside[name] - iterates[name]).abs().max() > 1e-4
        else:
            assert torch.equal(inside[name], iterates[name])
    optim_models.train(optimizer, model, 2)  # nothing was moved by others
    other, again = trained(0)
    other.load_state_dict(iterates)
    again.load_state_dict(state)
    optim_models.train(again, other, 2)
    assert all(torch.equal(value, values(model)[name]) for name, value in values(other).items())


def test_an_error_inside_leaves_the_iterates():
    model, optimizer = trained()
    iterates = values(model)
    with pytest.raises(KeyError), optimizer.averaged():
        raise KeyError
    assert all(torch.equal(value, iterates[name]) for name, value in values(model).items())
    optimizer.step()


def test_before_the_first_step_they_are_the_parameters():
    model, optimizer = trained(0)
    iterates = values(model)
    with optimizer.averaged():
        assert all(torch.equal(value, iterates[name]) for name, value in values(model).items())


def test_averaging_is_chosen_at_construction():
    model, optimizer = trained(1, averaging=False)
    with (
        pytest.raises(ValueError, match="there are no averages: make the optimizer with averaging=True"),
        optimizer.averaged(),
    ):
        pass
    optimizer.param_groups[0]["averaging"] = True
    with pytest.raises(ValueError, match="averaging=True needs a state that was not kept so far"):
        optim_models.train(optimizer, model, 1)


def test_copies_hold_their_own():
    model, optimizer = trained()
    other = copy.deepcopy((model, optimizer))
    with other[1].averaged():
        assert optimizer._iterates is None
        optimizer.step()


def test_weights_that_know_nothing_of_noise_are_said(recwarn):
    model = optim_models.network()
    sm.optim.SubspaceMeta(model, optim_models.RULES, weights=lively_weights(), averaging=True)
    assert not recwarn
    with pytest.warns(UserWarning, match="not trained with averages, and hand out the iterates") as warned:
        sm.optim.SubspaceMeta(model, optim_models.RULES, weights=weights_with_noise(-1.0), averaging=True)
    assert [w.filename for w in warned] == [__file__]
