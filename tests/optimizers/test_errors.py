"""Bad input to an optimizer: the error names what was wrong and what would be right."""

import math

import pytest
import torch

import subspace_meta as sm

MAKERS = [
    lambda geometry: sm.RSGD(geometry, 0.1),
    lambda geometry: sm.RSGD(geometry, 0.1, momentum=0.9),
    lambda geometry: sm.RAdam(geometry, 0.1),
    lambda geometry: sm.RASA(geometry, 0.1),
    lambda geometry: sm.CRMSProp(geometry, 0.1),
    lambda geometry: sm.RDoG(geometry),
    lambda geometry: sm.RAdaGD(geometry),
    lambda geometry: sm.RAdGD(geometry),
    lambda geometry: sm.MatrixLSTM(geometry, sm.MatrixLSTM.init_weights(geometry)),
    lambda geometry: sm.SubspaceOptimizer(geometry, sm.pretrained()),
]


def problem():
    geometry = sm.Geometry.from_rules({"w": torch.empty(6, 2), "b": torch.empty(3)}, {"w": sm.Stiefel()})
    return geometry, geometry.initialize(torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ({"w": torch.ones(6, 2)}, r"gradient names .* missing \['b'\], unknown \[\]"),
        ({"w": torch.ones(6, 2), "B": torch.ones(3)}, r"gradient names .* missing \['b'\], unknown \['B'\]"),
        ({"w": torch.ones(2, 6), "b": torch.ones(3)}, r"gradient 'w' has shape \(2, 6\), the geometry says \(6, 2\)"),
        ({"w": torch.ones(6, 2).int(), "b": torch.ones(3)}, "gradient 'w' has dtype torch.int32"),
    ],
)
def test_gradients_that_do_not_fit(make, grads, message):
    geometry, params = problem()
    optimizer = make(geometry)
    with pytest.raises(ValueError, match=message):
        optimizer.update(grads, optimizer.init(params), params, torch.tensor(1.0))


def orthonormal_problem():
    shapes = {"w": torch.empty(6, 2), "b": torch.empty(3)}
    geometry = sm.Geometry.from_rules(shapes, dict.fromkeys(shapes, sm.Stiefel()))
    return geometry, geometry.initialize(torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "make",
    [
        lambda geometry: sm.Landing(geometry, 0.1),
        lambda geometry: sm.POGO(geometry, 0.1),
        lambda geometry: sm.RSDM(geometry, 0.1, size=2),
        lambda geometry: sm.SPEL(geometry, 0.1),
        lambda geometry: sm.ManifoldMuon(geometry, 0.1),
        lambda geometry: sm.IntrinsicMuon(geometry, 0.1),
    ],
)
def test_gradients_that_do_not_fit_the_orthonormal_methods(make):
    geometry, params = orthonormal_problem()
    optimizer = make(geometry)
    with pytest.raises(ValueError, match=r"gradient 'w' has shape \(2, 6\), the geometry says \(6, 2\)"):
        optimizer.update({"w": torch.ones(2, 6), "b": torch.ones(3)}, optimizer.init(params), params)


HAND_MADE = [sm.RSGD, sm.RAdam, sm.RASA, sm.CRMSProp, sm.Landing, sm.POGO, sm.SPEL, sm.ManifoldMuon, sm.IntrinsicMuon]
HAND_MADE += [sm.RDoG, sm.RAdaGD, sm.RAdGD]


@pytest.mark.parametrize("kind", HAND_MADE)
@pytest.mark.parametrize("lr", [-0.1, math.nan, math.inf])
def test_impossible_learning_rates(kind, lr):
    with pytest.raises(ValueError, match=f"the learning rate must be finite and not negative, got {lr}"):
        kind(orthonormal_problem()[0], lr)


def test_impossible_learning_rates_beside_other_settings():
    geometry, _ = orthonormal_problem()
    with pytest.raises(ValueError, match="the learning rate must be finite and not negative"):
        sm.RSDM(geometry, -0.1, size=2)
    with pytest.raises(ValueError, match="the learning rate must be finite and not negative"):
        sm.MatrixLSTM(geometry, sm.MatrixLSTM.init_weights(geometry), -0.1)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_the_update_raises_nothing_about_values(value):
    """On SPD too, whose retraction decomposes matrices: the bad parameter is lost, the others are not."""
    params = {"s": torch.eye(3), "t": torch.eye(3), "w": torch.eye(6, 2)}
    geometry = sm.Geometry.from_rules(params, {"s": sm.SPD(), "t": sm.SPD(), "w": sm.Stiefel()})
    optimizer = sm.SubspaceOptimizer(geometry, sm.pretrained())
    grads = {name: torch.ones_like(x) for name, x in params.items()}
    expected, _ = optimizer.update(grads, optimizer.init(params), params)
    grads["s"] = torch.full((3, 3), value)
    found, _ = optimizer.update(grads, optimizer.init(params), params)
    for name in ("t", "w"):
        torch.testing.assert_close(found[name], expected[name])
    assert value == 1e30 or not found["s"].isfinite().all()


def test_a_parameter_without_entries():
    with pytest.raises(ValueError, match=r"parameter 'w' of shape \(0, 3\) has no entries"):
        sm.Geometry.from_rules({"w": torch.empty(0, 3)})


def test_a_step_in_place_under_a_transform():
    geometry, params = problem()
    optimizer = sm.SubspaceOptimizer(geometry, sm.pretrained())
    state, grads = optimizer.init(params), {name: torch.ones_like(x)[None] for name, x in params.items()}
    with pytest.raises(ValueError, match=r"update_ writes into the parameters; under a transform .* use update"):
        torch.func.vmap(lambda g: optimizer.update_(g, state, params))(grads)


@pytest.mark.parametrize(
    "make",
    [
        *MAKERS,
        lambda geometry: sm.SubspaceOptimizer(geometry, sm.pretrained(), steps=5),
        lambda geometry: sm.SubspaceOptimizer(geometry, sm.pretrained(), guarded=True),
        lambda geometry: sm.Averaging(sm.RAdam(geometry, 0.1)),
    ],
)
def test_arguments_in_another_order(make):
    geometry, params = problem()
    optimizer = make(geometry)
    state, loss = optimizer.init(params), torch.tensor(1.0)
    grads = {name: torch.ones_like(x) for name, x in params.items()}
    kind = type(state).__name__
    swapped_grads = rf"gradients are a dict, name -> tensor, got {kind}; update takes \(grads, state, params\)"
    swapped_params = rf"parameters are a dict, name -> tensor, got {kind}; update takes"
    for name in ("update", "update_"):
        if update := getattr(optimizer, name, None):
            with pytest.raises(TypeError, match=swapped_grads):
                update(state, grads, params, loss)
            with pytest.raises(TypeError, match=swapped_params):
                update(grads, params, state, loss)
    with pytest.raises(TypeError, match=swapped_params):
        optimizer.init(state)
