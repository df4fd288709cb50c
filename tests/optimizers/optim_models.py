"""A small network on its manifolds, and every optimizer as a torch optimizer for it: for the tests of the shell."""

from functools import partial

import pytest
import torch
from making import OPTIMIZERS, ORTHONORMAL_OPTIMIZERS, PARAMETER_FREE_OPTIMIZERS, lively_weights, make_optimizer, normal
from torch.nn import functional

import subspace_meta as sm
from subspace_meta.optim import Riemannian, SubspaceMeta

RULES = {"*.weight": sm.Stiefel()}
# Stacks of equal shapes and other memory layouts are other operations: units in the last place, over a few steps.
ROUNDING = 64 * torch.finfo(torch.float64).eps
INPUTS, LABELS = normal(40, 7, seed=1), torch.arange(40) % 3
optimizers = pytest.mark.parametrize("name", [*OPTIMIZERS, *PARAMETER_FREE_OPTIMIZERS, *ORTHONORMAL_OPTIMIZERS])
learned_and_hand_made = pytest.mark.parametrize("name", ["base", "RAdam"])


def named(name, dtype, geometry, lr):
    return make_optimizer(name, geometry, dtype, lr)


def network(seed=0, dtype=torch.float64):
    """Return a network that starts on its manifolds: two equal matrices, a wide one, biases."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(7, 5),
        torch.nn.Tanh(),
        torch.nn.Linear(5, 7),
        torch.nn.Tanh(),
        torch.nn.Linear(7, 3),
    ).to(dtype)
    for module in model:
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.orthogonal_(module.weight)
    return model


def shell(name, params, rules=RULES, dtype=torch.float64, **settings):
    if name == "base":
        settings.setdefault("weights", lively_weights())
        return SubspaceMeta(params, rules, **settings)
    lr = settings.pop("lr", 1.0 if name == "paper" else 1e-2)
    return Riemannian(params, rules, partial(named, name, dtype), lr, **settings)


def loss_of(model, share=slice(None)):
    dtype = model[0].weight.dtype
    return functional.cross_entropy(model(INPUTS[share].to(dtype)), LABELS[share])


def train(optimizer, model, steps, change_gradients=lambda: None):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        change_gradients()
        optimizer.step(loss=loss)


def without_gradient(parameter):
    return partial(setattr, parameter, "grad", None)


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(left, right, tolerance=0.0):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=tolerance, atol=tolerance, msg=name)
