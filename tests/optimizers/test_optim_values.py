"""A step is taken by all parameters or by none, from points on their manifolds, to finite ones."""

import copy
import warnings

import pytest
import torch
from making import normal
from optim_models import RULES, assert_equal, learned_and_hand_made, loss_of, network, optimizers, shell, train, values

import subspace_meta as sm
from subspace_meta.optim import ProjectionWarning, Riemannian, SubspaceMeta

# A factor of the loss; the largest and smallest are near the ends of float32. Powers of two, about 1e-30 to 1e30, round
# nothing: a difference would be one of method.
SCALES = [2.0**exponent for exponent in (-100, -67, -33, 33, 67, 100)]
ON = {
    "Stiefel": (sm.Stiefel(), (8, 3)),
    "Stiefel, polar": (sm.Stiefel(sm.PolarNewtonSchulz()), (8, 3)),
    "StiefelCanonical": (sm.StiefelCanonical(), (8, 3)),
    "Grassmann": (sm.Grassmann(), (8, 3)),
    "Rotations": (sm.Rotations(), (4, 4)),
    "Orthogonal": (sm.Orthogonal(), (4, 4)),
    "Sphere": (sm.Sphere(), (8, 3)),
    "Oblique": (sm.Oblique(), (8, 3)),
    "SPD": (sm.SPD(), (4, 4)),
}


class Linear(torch.nn.Module):
    """One parameter on a manifold, and a loss that is linear in it, but for a curvature."""

    def __init__(self, manifold, shape):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.x = torch.nn.Parameter(manifold.random_point(shape, generator, torch.float32))
        self.target = manifold.random_point(shape, generator, torch.float32)

    def forward(self):
        return (self.x - self.target).square().sum()


def run(make, manifold, shape, scale, steps=15):
    """Return the parameter and the losses of a run with a scaled loss."""
    model = Linear(manifold, shape)
    optimizer = make(model, {"x": manifold})
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model()
        losses.append(float(loss.detach()))
        loss.backward()
        model.x.grad *= scale
        optimizer.step()
    return model.x.detach(), losses, optimizer


@pytest.mark.parametrize("preset", ["base", "light"])
@pytest.mark.parametrize("on", ON)
def test_the_learned_optimizer_does_not_see_the_scale_of_the_loss(preset, on):
    def make(model, rules):
        return SubspaceMeta(model, rules, preset=preset)

    manifold, shape = ON[on]
    plain, losses, _ = run(make, manifold, shape, 1.0)
    assert losses[-1] < 0.9 * losses[0]
    for scale in SCALES:
        scaled, _, optimizer = run(make, manifold, shape, scale)
        torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-5, msg=f"{scale:.0e}")
        assert all(torch.isfinite(t).all() for part in optimizer.state.values() for t in part.values())
        # A power of two for each, so that nothing is rounded, and none where squares are in range.
        unit = float(optimizer.state[next(iter(optimizer.state))]["unit"])
        assert (unit == 1.0) == (scale == 1.0)
        assert torch.tensor(unit).frexp().mantissa == 0.5


# Those that keep or compare squares, and those that do not; what is defined on orthonormal columns only.
UNTUNED = [sm.RDoG, sm.RAdaGD, sm.RAdGD]  # some see such a gradient as infinite curvature, and take a finite step
SQUARES = [sm.RAdam, sm.RASA, sm.CRMSProp]
NO_SQUARES = [sm.RSGD, sm.SPEL, sm.Landing, sm.POGO, sm.ManifoldMuon, sm.IntrinsicMuon]
ORTHONORMAL_ONLY = (sm.SPEL, sm.Landing, sm.POGO, sm.ManifoldMuon, sm.IntrinsicMuon)
HAND_MADE = SQUARES + NO_SQUARES + UNTUNED


@pytest.mark.parametrize("kind", HAND_MADE, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("scale", SCALES)
def test_no_scale_poisons_a_hand_made_optimizer(kind, scale):
    for name, (manifold, shape) in ON.items():
        if kind in ORTHONORMAL_ONLY and not name.startswith(("Stiefel", "Rotations", "Orthogonal")):
            continue
        model = Linear(manifold, shape)
        settings = {"lr": 1.0, "non_finite": "skip"} if kind in UNTUNED else {"lr": 1e-2}
        optimizer = Riemannian(model, {"x": manifold}, kind, **settings)
        refuses = scale > 2.0**60 and kind in SQUARES
        for step in range(6):
            optimizer.zero_grad()
            loss = model()
            loss.backward()
            before = model.x.detach().clone()
            if step == 2:
                model.x.grad *= scale
            if step == 2 and refuses:
                with pytest.raises(ValueError, match="'x' would not be finite"):
                    optimizer.step(loss=loss)
                assert torch.equal(model.x, before)
            else:
                optimizer.step(loss=loss)
            assert torch.isfinite(model.x).all()
            assert all(torch.isfinite(t).all() for part in optimizer.state.values() for t in part.values())
        if kind in UNTUNED or (kind in (sm.RASA, sm.CRMSProp) and scale == 2.0**33):
            continue  # by their formulas they move no more for long after a gradient so large
        last = model.x.detach().clone()
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
        assert not torch.equal(model.x, last), f"{name}: it moves on"


@pytest.mark.parametrize("preset", ["base", "light"])
def test_a_gradient_that_would_overflow_is_refused_and_forgotten(preset):
    model = network(dtype=torch.float32)
    optimizer = SubspaceMeta(model, RULES, preset=preset)
    train(optimizer, model, 2)
    before, state = values(model), copy.deepcopy(optimizer.state_dict())

    def spoil():
        model[2].weight.grad[1, 1] = 1e20

    with pytest.raises(ValueError, match=r"step of '2\.weight' would not be finite.*1\.0e\+20.*nothing was changed"):
        train(optimizer, model, 1, spoil)
    assert_equal(values(model), before)
    kept = optimizer.state_dict()
    for number, part in state["state"].items():
        assert all(torch.equal(kept["state"][number][key], value) for key, value in part.items())
    train(optimizer, model, 2)

    skipping = SubspaceMeta(other := network(dtype=torch.float32), RULES, preset=preset, non_finite="skip")
    train(skipping, other, 2)
    for value in (1e20, torch.nan):
        train(skipping, other, 1, lambda value=value: other[2].weight.grad[1, 1].fill_(value))
    assert skipping.skipped == 2
    train(skipping, other, 2)
    assert skipping.skipped == 2
    assert_equal(values(other), values(model))
    with pytest.raises(ValueError, match="'raise' or 'skip'"):
        SubspaceMeta(network(), RULES, non_finite="ignore")


@learned_and_hand_made
def test_gradients_of_the_other_parameters_are_looked_at_too(name):
    model = network()
    optimizer = shell(name, model)
    train(optimizer, model, 1)
    before = values(model)
    with pytest.raises(ValueError, match=r"gradients of '2\.bias' are not finite; nothing was changed"):
        train(optimizer, model, 1, lambda: model[2].bias.grad.fill_(torch.inf))
    assert_equal(values(model), before)


def test_the_guard_holds_the_other_parameters_back_too():
    model = network()
    optimizer = shell("base", model, guarded=True)
    train(optimizer, model, 2)
    before = values(model)
    loss_of(model).backward()
    optimizer.step(loss=torch.tensor(torch.nan))
    assert_equal(values(model), before, 1e-12)
    train(optimizer, model, 1)
    assert not torch.equal(model[0].bias, before["0.bias"])


@learned_and_hand_made
def test_an_error_of_the_other_optimizer_comes_before_anything_is_changed(name):
    model = network()
    optimizer = shell(name, model)
    train(optimizer, model, 1)
    before = values(model)
    loss_of(model).backward()
    model[0].bias.grad = model[0].bias.grad.to_sparse()
    state = optimizer.state_dict()["state"]
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert_equal(values(model), before)
    kept = optimizer.state_dict()["state"]
    assert all(torch.equal(kept[0][key], value) for key, value in state[0].items())


# --- Weights that somebody else has moved ---

RETRACTIONS = [sm.CholeskyQR(), sm.HouseholderQR(), sm.PolarNewtonSchulz(), sm.Cayley(), sm.Geodesic()]
BY_HAND = {
    "in place": lambda p, value: p.data.copy_(value),
    "loaded": lambda p, value: torch.nn.ParameterList([p]).load_state_dict({"0": value}),
    "another tensor": lambda p, value: setattr(p, "data", value.clone()),
}


@pytest.mark.parametrize("how", BY_HAND)
@pytest.mark.parametrize("retraction", RETRACTIONS, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("kind", [sm.RSGD, sm.RAdam])
def test_weights_that_left_their_manifold_are_brought_back_with_a_warning(kind, retraction, how):
    manifold = sm.Rotations(retraction)
    x = torch.nn.Parameter(manifold.random_point((5, 5), torch.Generator().manual_seed(0), torch.float32))
    settings = {"momentum": 0.9} if kind is sm.RSGD else {}
    optimizer = Riemannian([("x", x)], {"x": manifold}, kind, lr=1e-2, **settings)

    def step():
        x.grad = normal(5, 5, seed=1, dtype=torch.float32)
        optimizer.step()

    for _ in range(3):
        step()
    rotation = x.detach().clone()
    BY_HAND[how](x, 1.5 * rotation)
    with pytest.warns(ProjectionWarning, match=r"x .largest violation 1\.[23]") as caught:
        step()
    assert caught[0].filename == __file__
    optimizer.check(1e-5)
    assert (x - rotation).norm() < 0.5
    # A point of the manifold itself is taken as it is, and the momentum made tangent there.
    BY_HAND[how](x, manifold.random_point((5, 5), torch.Generator().manual_seed(3), torch.float32))
    for _ in range(20):
        step()
    optimizer.check(1e-5)


@learned_and_hand_made
def test_where_they_are_not_to_be_moved_they_are_refused(name):
    model = network()
    optimizer = shell(name, model, project=False)
    train(optimizer, model, 2)
    with torch.no_grad():
        model[2].weight.lerp_(network(seed=8)[2].weight, 0.5)
    before = values(model)
    loss_of(model).backward()
    with pytest.raises(ValueError, match=r"'2\.weight' is not on Stiefel: constraint violation"):
        optimizer.step()
    assert_equal(values(model), before)


@learned_and_hand_made
def test_spoiled_weights_are_named_and_not_their_gradients(name):
    model = network()
    optimizer = shell(name, model)
    train(optimizer, model, 2)
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    loss_of(model).backward()
    with pytest.raises(ValueError, match=r"the parameters '2\.weight' are not finite, nor are gradients; nothing was"):
        optimizer.step()


@pytest.mark.parametrize("name", ["RAdam", "RSGD momentum"])
def test_averaged_weights_can_be_trained_on(name):
    model = network()
    optimizer = shell(name, model)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(4):
        train(optimizer, model, 30)
        averaged.update_parameters(model)
    for p, mean in zip(model.parameters(), averaged.module.parameters(), strict=True):
        p.data.copy_(mean)
    assert sm.Stiefel().violation(model[2].weight.detach()) > 1e-3
    with pytest.warns(ProjectionWarning):
        train(optimizer, model, 1)
    optimizer.check(1e-10)


@optimizers
def test_steps_of_its_own_are_no_surprise(name):
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = shell(name, model)
        train(optimizer, model, 5)
        again = shell(name, other := network())
        other.load_state_dict(model.state_dict())
        again.load_state_dict(optimizer.state_dict())
        train(again, other, 2)
