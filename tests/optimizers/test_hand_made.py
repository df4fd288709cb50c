"""Three steps of the hand-made optimizers against references written independently, matrix by matrix, in float64."""

import pytest
import torch
from making import normal, start

import subspace_meta as sm

TOLERANCE = 1e-12
SHAPES = {"a": (6, 2), "b": (4, 3), "c": (6, 2)}


def orthonormal(y, manifold):
    """Retract by the textbook: the Q of a QR with positive diagonal, or the polar factor."""
    if isinstance(manifold.retraction, sm.PolarNewtonSchulz):
        values, vectors = torch.linalg.eigh(y.T @ y)
        return y @ vectors @ torch.diag(values**-0.5) @ vectors.T
    q, r = torch.linalg.qr(y)
    return q @ torch.diag(torch.sign(torch.diag(r)))


def tangent(x, v, manifold):
    inner = x.T @ v
    return v - x @ (inner if isinstance(manifold, sm.Grassmann) else (inner + inner.T) / 2)


def rsgd(x, gradients, manifold, lr, momentum):
    buffer = torch.zeros_like(x)
    for g in gradients:
        buffer = momentum * buffer + tangent(x, g, manifold)
        x = orthonormal(x - lr * buffer, manifold)
        buffer = tangent(x, buffer, manifold)
    return x


def radam(x, gradients, manifold, lr, beta1=0.9, beta2=0.999, eps=1e-8):
    first, second = torch.zeros_like(x), 0.0
    for t, g in enumerate(gradients, start=1):
        r = tangent(x, g, manifold)
        first = beta1 * first + (1 - beta1) * r
        second = beta2 * second + (1 - beta2) * float((r * r).mean())
        corrected = first / (1 - beta1**t)
        x = orthonormal(x - lr * corrected / ((second / (1 - beta2**t)) ** 0.5 + eps), manifold)
        first = tangent(x, first, manifold)
    return x


def rasa(x, gradients, manifold, lr, variant, decay, beta=0.99, eps=1e-8):
    d, p = x.shape
    left, right = torch.zeros(d, dtype=x.dtype), torch.zeros(p, dtype=x.dtype)
    left_top, right_top = torch.full_like(left, eps), torch.full_like(right, eps)
    for t, g in enumerate(gradients, start=1):
        r = tangent(x, g, manifold)
        left = beta * left + (1 - beta) * torch.diag(r @ r.T) / p
        right = beta * right + (1 - beta) * torch.diag(r.T @ r) / d
        left_top, right_top = torch.maximum(left_top, left), torch.maximum(right_top, right)
        direction = {
            "L": torch.diag(left_top**-0.5) @ r,
            "R": r @ torch.diag(right_top**-0.5),
            "LR": torch.diag(left_top**-0.25) @ r @ torch.diag(right_top**-0.25),
        }[variant]
        step = lr / t**0.5 if decay else lr
        x = orthonormal(x - step * tangent(x, direction, manifold), manifold)
    return x


CASES = {
    "RSGD": (lambda g: sm.RSGD(g, 0.05), lambda *a: rsgd(*a, 0.05, 0.0)),
    "RSGD momentum": (lambda g: sm.RSGD(g, 0.05, momentum=0.8), lambda *a: rsgd(*a, 0.05, 0.8)),
    "RAdam": (lambda g: sm.RAdam(g, 0.02), lambda *a: radam(*a, 0.02)),
    "RAdam settings": (
        lambda g: sm.RAdam(g, 0.02, betas=(0.7, 0.9), eps=0.5),
        lambda *a: radam(*a, 0.02, 0.7, 0.9, 0.5),
    ),
    "RASA-L": (lambda g: sm.RASA(g, 0.02, variant="L"), lambda *a: rasa(*a, 0.02, "L", False)),
    "RASA-R": (lambda g: sm.RASA(g, 0.02, variant="R"), lambda *a: rasa(*a, 0.02, "R", False)),
    "RASA-LR": (lambda g: sm.RASA(g, 0.02), lambda *a: rasa(*a, 0.02, "LR", False)),
    "RASA settings": (
        lambda g: sm.RASA(g, 0.02, beta=0.5, decay=True, eps=0.3),
        lambda *a: rasa(*a, 0.02, "LR", True, 0.5, 0.3),
    ),
}


@pytest.mark.parametrize("manifold", [sm.Stiefel(), sm.Stiefel(sm.PolarNewtonSchulz()), sm.Grassmann()], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_three_steps(case, manifold):
    make, reference = CASES[case]
    geometry, begin = start(SHAPES, {"*": manifold}, seed=100)
    optimizer = make(geometry)
    # The first gradient is the largest, so that running maxima differ from running means.
    history = [
        {name: normal(*x.shape, seed=10 * t + i) / (1 + 2 * t) for i, (name, x) in enumerate(begin.items())}
        for t in range(3)
    ]
    params, state = begin, optimizer.init(begin)
    for grads in history:
        params, state = optimizer.update(grads, state, params)
    for name in params:
        expected = reference(begin[name], [grads[name] for grads in history], manifold)
        torch.testing.assert_close(params[name], expected, atol=TOLERANCE, rtol=0)


def test_on_flat_space_radam_is_adam_with_a_shared_denominator():
    params = {"w": normal(1, 1)}
    optimizer = sm.RAdam(sm.Geometry.from_rules(params), lr=0.1)
    ours, state = params, optimizer.init(params)
    theirs = params["w"].clone().requires_grad_()
    adam = torch.optim.Adam([theirs], lr=0.1)
    for t in range(5):
        g = normal(1, 1, seed=t + 1)
        ours, state = optimizer.update({"w": g}, state, ours)
        theirs.grad = g.clone()
        adam.step()
    torch.testing.assert_close(ours["w"], theirs.detach(), atol=TOLERANCE, rtol=0)


def test_on_flat_space_rsgd_is_sgd():
    params = {"w": normal(3, 2), "b": normal(2)}
    optimizer = sm.RSGD(sm.Geometry.from_rules(params), lr=0.1, momentum=0.9)
    ours, state = params, optimizer.init(params)
    theirs = {name: value.clone().requires_grad_() for name, value in params.items()}
    sgd = torch.optim.SGD(theirs.values(), lr=0.1, momentum=0.9)
    for t in range(5):
        grads = {name: normal(*value.shape, seed=t + 1) for name, value in params.items()}
        ours, state = optimizer.update(grads, state, ours)
        for name, value in theirs.items():
            value.grad = grads[name].clone()
        sgd.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name].detach(), atol=TOLERANCE, rtol=0)


def test_settings_that_cannot_be():
    geometry, _ = start({"x": (4, 2)}, {})
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got 1.0"):
        sm.RSGD(geometry, 0.1, momentum=1.0)
    with pytest.raises(ValueError, match=r"betas must be in \[0, 1\), got \(0.9, 1.0\)"):
        sm.RAdam(geometry, 0.1, betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="variant must be 'L', 'R' or 'LR', got 'RL'"):
        sm.RASA(geometry, 0.1, variant="RL")
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\), got -0.1"):
        sm.RASA(geometry, 0.1, beta=-0.1)
