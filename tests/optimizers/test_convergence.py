"""Every hand-made optimizer finds the leading subspace of a covariance, at a learning rate that suits it."""

import pytest
import torch
from making import normal, start
from torch.func import grad

import subspace_meta as sm

D, P, STEPS = 20, 3, 300


def decaying(lr, t):
    return lr / (1 + t / 10)


def constant(lr, t):
    return lr


def untrained(geometry, lr):
    weights = sm.MatrixLSTM.init_weights(geometry, torch.Generator().manual_seed(0))
    return sm.MatrixLSTM(geometry, {name: value.double() for name, value in weights.items()}, lr)


CASES = {
    "MatrixLSTM": (untrained, constant, 0.1),
    "RSGD": (lambda g, lr: sm.RSGD(g, lr), constant, 0.1),
    "heavy ball": (lambda g, lr: sm.RSGD(g, lr, momentum=0.9), constant, 0.02),
    "Nesterov": (lambda g, lr: sm.RSGD(g, lr, momentum=0.9, nesterov=True), constant, 0.02),
    "RAdam": (lambda g, lr: sm.RAdam(g, lr), constant, 0.1),
    "RAMSGrad": (lambda g, lr: sm.RAdam(g, lr, amsgrad=True), constant, 0.1),
    "RASA-LR": (lambda g, lr: sm.RASA(g, lr), constant, 0.02),
    "CRMSProp": (lambda g, lr: sm.CRMSProp(g, lr), decaying, 0.05),
    "Landing": (lambda g, lr: sm.Landing(g, lr), constant, 0.2),
    "Landing, any rate": (lambda g, lr: sm.Landing(g, lr), constant, 1e3),
    "POGO": (lambda g, lr: sm.POGO(g, lr), constant, 0.2),
    "POGO momentum": (lambda g, lr: sm.POGO(g, lr, momentum=0.9), constant, 0.02),
    "RSDM permutation": (lambda g, lr: sm.RSDM(g, lr, size=10), constant, 0.2),
    "RSDM orthogonal": (lambda g, lr: sm.RSDM(g, lr, size=10, sampling="orthogonal"), constant, 0.2),
    "SPEL": (lambda g, lr: sm.SPEL(g, lr), decaying, 0.1),
}


@pytest.mark.parametrize("name", CASES)
def test_pca(name):
    make, schedule, lr = CASES[name]
    geometry, params = start({"x": (D, P)}, {"x": sm.Stiefel()}, seed=1)
    basis, _ = torch.linalg.qr(normal(D, D, seed=3))
    spectrum = torch.tensor([3.0, 2.5, 2.0] + [1.0] * (D - P), dtype=torch.float64)
    covariance = basis @ torch.diag(spectrum) @ basis.T

    def loss(params):
        return -(params["x"] * (covariance @ params["x"])).sum()

    best = -torch.linalg.eigvalsh(covariance)[-P:].sum()
    first = float((loss(params) - best) / best.abs())
    state = make(geometry, lr).init(params)
    for t in range(STEPS):
        params, state = make(geometry, schedule(lr, t)).update(grad(loss)(params), state, params)
    gap = float((loss(geometry.project(params)) - best) / best.abs())
    assert first > 0.3
    assert gap < 1e-3, gap
