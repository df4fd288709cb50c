"""Averages of iterates: the weights of the formula, a point of the manifold, and what they are for: noise."""

import pytest
import torch
from torch.func import grad, vmap

import subspace_meta as sm
from subspace_meta.optimizers import Averaging

MANIFOLDS = [(sm.Stiefel(), (7, 3)), (sm.Grassmann(), (7, 3)), (sm.Sphere(), (6, 1)), (sm.SPD(), (4, 4))]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(manifold, shape, seed=0):
    geometry = sm.Geometry.from_rules({"x": torch.empty(shape)}, {"x": manifold})
    params = {"x": manifold.random_point(shape, seeded(seed), torch.float64)}
    target = manifold.random_point(shape, seeded(seed + 1), torch.float64)
    return geometry, params, lambda p: 0.5 * (p["x"] - target).square().sum()


def run(optimizer, params, loss, steps):
    """Return the iterates, the last state, and the state after each step."""
    state, iterates, states = optimizer.init(params), [], []
    for _ in range(steps):
        params, state = optimizer.update(grad(loss)(params), state, params)
        iterates.append(params["x"])
        states.append(state)
    return iterates, states


@pytest.mark.parametrize(("manifold", "shape"), MANIFOLDS)
@pytest.mark.parametrize("power", [0.0, 3.0])
def test_the_weights_are_those_of_the_formula(manifold, shape, power):
    """With eta = 0 the mean of all iterates; otherwise weights prod (1 - w_s) w_t, which are t^3 roughly."""
    geometry, params, loss = problem(manifold, shape)
    method = sm.RSGD(geometry, 0.2)
    iterates, states = run(Averaging(method, power), params, loss, 12)
    assert all(torch.equal(x, y) for x, y in zip(iterates, run(method, params, loss, 12)[0], strict=True))
    weights = torch.ones(12, dtype=torch.float64)
    for t in range(1, 12):
        share = (power + 1) / (t + 1 + power)
        weights[:t] *= 1 - share
        weights[t] = share
    assert float(weights.sum()) == pytest.approx(1.0)
    assert bool((weights[1:] >= weights[:-1] - 1e-12).all()), "later iterates count no less"
    mean = torch.einsum("t,tij->ij", weights, torch.stack(iterates))
    torch.testing.assert_close(states[-1].mean[0], mean, rtol=1e-12, atol=1e-12)
    averaged = Averaging(method, power).averaged(states[-1])
    torch.testing.assert_close(averaged["x"], manifold.nearest(mean), rtol=1e-12, atol=1e-12)
    assert float(geometry.violation(averaged)["x"]) < 1e-12


def test_noise_is_averaged_out():
    """With a rate that stays, the last iterate stops at the noise; the average goes on for longer."""
    geometry, params, loss = problem(sm.Stiefel(), (12, 3))
    optimizer = Averaging(sm.RSGD(geometry, 0.1))
    state, generator = optimizer.init(params), seeded(5)
    optimum = sm.Stiefel().nearest(grad(loss)(params)["x"] - params["x"])  # minus the target
    best = float(loss({"x": -optimum}))
    for _ in range(400):
        noise = {"x": torch.randn(12, 3, generator=generator, dtype=torch.float64)}
        grads = {"x": grad(loss)(params)["x"] + noise["x"]}
        params, state = optimizer.update(grads, state, params)
    last, averaged = float(loss(params)) - best, float(loss(optimizer.averaged(state))) - best
    assert 0.0 < averaged < 0.3 * last


def test_tasks_side_by_side():
    geometry, _, loss = problem(sm.Stiefel(), (7, 3))
    optimizer = Averaging(sm.RAdam(geometry, 0.1))
    starts = torch.stack([sm.Stiefel().random_point((7, 3), seeded(s), torch.float64) for s in range(3)])

    def two_steps(x):
        params = {"x": x}
        state = optimizer.init(params)
        for _ in range(2):
            params, state = optimizer.update(grad(loss)(params), state, params)
        return optimizer.averaged(state)["x"]

    alone = torch.stack([two_steps(x) for x in starts])
    torch.testing.assert_close(vmap(two_steps)(starts), alone, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("manifold", "shape"), MANIFOLDS)
def test_a_run_that_is_not_finite_spoils_itself_alone(manifold, shape):
    geometry, params, _ = problem(manifold, shape)
    optimizer = Averaging(sm.RSGD(geometry, 0.1))
    state = optimizer.init(params)
    means = torch.stack([params["x"][None], torch.full_like(params["x"], torch.nan)[None]])
    found = vmap(lambda mean: optimizer.averaged(state._replace(mean=(mean,)))["x"])(means[:, 0])
    torch.testing.assert_close(found[0], manifold.nearest(params["x"]), rtol=1e-10, atol=1e-12)
    assert found[1].isnan().all()


def test_a_negative_power_is_refused():
    geometry, _, _ = problem(sm.Stiefel(), (7, 3))
    with pytest.raises(ValueError, match="power must be at least 0, got -1"):
        Averaging(sm.RSGD(geometry, 0.1), -1.0)


def test_it_is_traced_whole():
    geometry, params, loss = problem(sm.Stiefel(), (7, 3))
    optimizer = Averaging(sm.RAdam(geometry, 0.1))
    state = optimizer.init(params)
    step = torch.compile(optimizer.update, fullgraph=True, backend="eager")
    expected = optimizer.update(grad(loss)(params), state, params)
    found = step(grad(loss)(params), state, params)
    torch.testing.assert_close(found[1].mean, expected[1].mean, rtol=1e-9, atol=1e-12)


def test_a_torch_optimizer_needs_a_rate_of_its_own():
    model = torch.nn.Linear(3, 5, bias=False)
    with pytest.raises(ValueError, match=r"Averaging has no option 'lr'.*AveragedModel"):
        sm.optim.Riemannian(model, {"weight": sm.Stiefel()}, lambda g, lr: Averaging(sm.RAdam(g, lr)), 0.1)
