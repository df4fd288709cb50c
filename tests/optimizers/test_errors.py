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
        optimizer.update(grads, optimizer.init(params), params)


@pytest.mark.parametrize("kind", [sm.RSGD, sm.RAdam, sm.RASA])
@pytest.mark.parametrize("lr", [-0.1, math.nan, math.inf])
def test_impossible_learning_rates(kind, lr):
    with pytest.raises(ValueError, match=f"the learning rate must be finite and not negative, got {lr}"):
        kind(problem()[0], lr)
