"""Three steps of the hand-made optimizers against references written independently, matrix by matrix, in float64."""

import pytest
import torch
from making import largest_difference, make_optimizer, normal, start

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


def rsgd(x, gradients, manifold, lr, momentum, nesterov=False):
    buffer = torch.zeros_like(x)
    for g in gradients:
        r = tangent(x, g, manifold)
        buffer = momentum * buffer + r
        x = orthonormal(x - lr * (r + momentum * buffer if nesterov else buffer), manifold)
        buffer = tangent(x, buffer, manifold)
    return x


def radam(x, gradients, manifold, lr, beta1=0.9, beta2=0.999, eps=1e-8, amsgrad=False):
    first, second, largest = torch.zeros_like(x), 0.0, 0.0
    for t, g in enumerate(gradients, start=1):
        r = tangent(x, g, manifold)
        first = beta1 * first + (1 - beta1) * r
        second = beta2 * second + (1 - beta2) * float((r * r).mean())
        largest = max(largest, second) if amsgrad else second
        corrected = first / (1 - beta1**t)
        x = orthonormal(x - lr * corrected / ((largest / (1 - beta2**t)) ** 0.5 + eps), manifold)
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


def rmsprop(x, gradients, manifold, lr, beta=0.9, eps=1e-8):
    second = torch.zeros_like(x)
    for g in gradients:
        r = tangent(x, g, manifold)
        direction = torch.zeros_like(x)
        for i in range(x.shape[0]):
            for j in range(x.shape[1]):
                second[i, j] = beta * second[i, j] + (1 - beta) * r[i, j] ** 2
                direction[i, j] = r[i, j] / (float(second[i, j]) ** 0.5 + eps)
        x = orthonormal(x - lr * tangent(x, direction, manifold), manifold)
    return x


CASES = {
    "RSGD": (lambda g: sm.RSGD(g, 0.05), lambda *a: rsgd(*a, 0.05, 0.0)),
    "RSGD momentum": (lambda g: sm.RSGD(g, 0.05, momentum=0.8), lambda *a: rsgd(*a, 0.05, 0.8)),
    "RSGD Nesterov": (
        lambda g: sm.RSGD(g, 0.05, momentum=0.8, nesterov=True),
        lambda *a: rsgd(*a, 0.05, 0.8, nesterov=True),
    ),
    "RAdam": (lambda g: sm.RAdam(g, 0.02), lambda *a: radam(*a, 0.02)),
    # A short memory, so that the maximum is not the newest mean.
    "RAMSGrad": (
        lambda g: sm.RAdam(g, 0.02, betas=(0.9, 0.3), amsgrad=True),
        lambda *a: radam(*a, 0.02, 0.9, 0.3, amsgrad=True),
    ),
    "CRMSProp": (lambda g: sm.CRMSProp(g, 0.02), lambda *a: rmsprop(*a, 0.02)),
    "CRMSProp settings": (lambda g: sm.CRMSProp(g, 0.02, 0.5, 0.3), lambda *a: rmsprop(*a, 0.02, 0.5, 0.3)),
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


@pytest.mark.parametrize("amsgrad", [False, True])
def test_on_flat_space_radam_is_adam_with_a_shared_denominator(amsgrad):
    params = {"w": normal(1, 1)}
    optimizer = sm.RAdam(sm.Geometry.from_rules(params), lr=0.1, amsgrad=amsgrad)
    ours, state = params, optimizer.init(params)
    theirs = params["w"].clone().requires_grad_()
    adam = torch.optim.Adam([theirs], lr=0.1, amsgrad=amsgrad)
    for t in range(5):
        g = normal(1, 1, seed=t + 1) / (1 + 10 * t)
        ours, state = optimizer.update({"w": g}, state, ours)
        theirs.grad = g.clone()
        adam.step()
    torch.testing.assert_close(ours["w"], theirs.detach(), atol=TOLERANCE, rtol=0)


PEERS = {
    "heavy ball": (
        lambda g: sm.RSGD(g, 0.1, momentum=0.9),
        lambda values: torch.optim.SGD(values, lr=0.1, momentum=0.9),
    ),
    "Nesterov": (
        lambda g: sm.RSGD(g, 0.1, momentum=0.9, nesterov=True),
        lambda values: torch.optim.SGD(values, lr=0.1, momentum=0.9, nesterov=True),
    ),
    "RMSProp": (
        lambda g: sm.CRMSProp(g, 0.1, beta=0.8),
        lambda values: torch.optim.RMSprop(values, lr=0.1, alpha=0.8),
    ),
}


@pytest.mark.parametrize("name", PEERS)
def test_on_flat_space_it_is_what_torch_has(name):
    params = {"w": normal(3, 2), "b": normal(2)}
    make, make_peer = PEERS[name]
    optimizer = make(sm.Geometry.from_rules(params))
    ours, state = params, optimizer.init(params)
    theirs = {name: value.clone().requires_grad_() for name, value in params.items()}
    peer = make_peer(theirs.values())
    for t in range(5):
        grads = {name: normal(*value.shape, seed=t + 1) for name, value in params.items()}
        ours, state = optimizer.update(grads, state, ours)
        for name, value in theirs.items():
            value.grad = grads[name].clone()
        peer.step()
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
    with pytest.raises(ValueError, match="nesterov needs a momentum above 0"):
        sm.RSGD(geometry, 0.1, nesterov=True)
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\), got 1.0"):
        sm.CRMSProp(geometry, 0.1, beta=1.0)


EVERYWHERE = {
    "x": ((6, 3), sm.Stiefel()),
    "canonical": ((6, 3), sm.StiefelCanonical()),
    "subspace": ((6, 3), sm.Grassmann()),
    "rotation": ((4, 4), sm.Rotations()),
    "orthogonal": ((4, 4), sm.Orthogonal()),
    "spd": ((4, 4), sm.SPD()),
    "sphere": ((6, 1), sm.Sphere()),
    "oblique": ((6, 3), sm.Oblique()),
    "blocks": ((6, 3), sm.Product((sm.Stiefel(), sm.Oblique()), (2, 1), axis=-1)),
    "flat": ((5, 7), sm.Euclidean()),
}


@pytest.mark.parametrize("name", ["RSGD Nesterov", "RAMSGrad", "CRMSProp", "MatrixLSTM"])
def test_every_manifold(name):
    """One step after the other lowers the distance to a point of the manifold, and stays there."""
    rules = {key: manifold for key, (_, manifold) in EVERYWHERE.items()}
    geometry, params = start({key: shape for key, (shape, _) in EVERYWHERE.items()}, rules, seed=100)
    target = geometry.initialize(torch.Generator().manual_seed(101), torch.float64)
    optimizer = make_optimizer(name, geometry, lr=0.01)
    if name == "MatrixLSTM":
        weights = {k: v.double() for k, v in sm.MatrixLSTM.init_weights(geometry).items()}
        optimizer = sm.MatrixLSTM(geometry, weights, lr=0.05)

    def losses(params):
        return {key: (x - target[key]).square().sum() for key, x in params.items()}

    first, state = losses(params), optimizer.init(params)
    for _ in range(30):
        grads = torch.func.grad(lambda params: sum(losses(params).values()))(params)
        params, state = optimizer.update(grads, state, params)
    assert max(geometry.violation(params).values()) <= 1e-12
    last = losses(params)
    assert all(last[key] < first[key] for key in params), {key: (first[key], last[key]) for key in params}


@pytest.mark.parametrize("name", ["RSGD Nesterov", "RAMSGrad", "CRMSProp"])
def test_permutations_of_rows_and_columns(name):
    rows, columns = torch.tensor([3, 0, 5, 1, 4, 2]), torch.tensor([2, 0, 1])
    for manifold in (sm.Euclidean(), sm.Stiefel(sm.PolarNewtonSchulz())):
        geometry, begin = start({"x": (6, 3)}, {"x": manifold}, seed=100)
        optimizer = make_optimizer(name, geometry, lr=0.05)
        ends = []
        for permute in (lambda a: a, lambda a: a[rows][:, columns]):
            params = {"x": permute(begin["x"])}
            state = optimizer.init(params)
            for t in range(3):
                params, state = optimizer.update({"x": permute(normal(6, 3, seed=t))}, state, params)
            ends.append(params["x"])
        torch.testing.assert_close(ends[1], ends[0][rows][:, columns], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["RSGD Nesterov", "RAMSGrad"])
def test_an_orthogonal_left_factor(name):
    geometry, begin = start({"x": (6, 3)}, {"x": sm.Stiefel()}, seed=100)
    turn = sm.Stiefel().random_point((6, 6), torch.Generator().manual_seed(1), torch.float64)
    optimizer = make_optimizer(name, geometry, lr=0.05)
    ends = []
    for q in (torch.eye(6, dtype=torch.float64), turn):
        params = {"x": q @ begin["x"]}
        state = optimizer.init(params)
        for t in range(3):
            params, state = optimizer.update({"x": q @ normal(6, 3, seed=t)}, state, params)
        ends.append(params["x"])
    torch.testing.assert_close(ends[1], turn @ ends[0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "make", [lambda g: sm.RAdam(g, 0.05, eps=0.0, amsgrad=True), lambda g: sm.CRMSProp(g, 0.05, eps=0.0)]
)
def test_without_eps_a_factor_of_the_loss_changes_nothing(make):
    geometry, begin = start({"x": (6, 3), "w": (3, 2)}, {"x": sm.Stiefel()}, seed=100)
    ends = []
    for factor in (1.0, 1e-6, 1e6):
        optimizer = make(geometry)
        params, state = begin, optimizer.init(begin)
        for t in range(3):
            grads = {name: factor * normal(*x.shape, seed=t + i) for i, (name, x) in enumerate(params.items())}
            params, state = optimizer.update(grads, state, params)
        ends.append(params)
    assert largest_difference(ends[0], ends[1]) < 1e-12
    assert largest_difference(ends[0], ends[2]) < 1e-12
