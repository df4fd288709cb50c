"""The matrix LSTM of Gao et al.: its count of parameters, three steps by loops, meta-gradients, errors."""

import math

import pytest
import torch
from making import largest_difference, lively_matrix_weights, normal, start
from torch.func import grad

import subspace_meta as sm
from subspace_meta.optimizers.matrix_lstm import WIDTH

SHAPES = {"a": (6, 2), "b": (4, 3), "c": (6, 2), "w": (3, 5)}
RULES = {"a": sm.Stiefel(sm.PolarNewtonSchulz()), "b": sm.Grassmann(), "c": sm.Stiefel()}


@pytest.mark.parametrize(
    ("shape", "count"), [((1024, 38), 75_499_521), ((20, 3), 77_089), ((5, 5), 28_499), ((7, 1), 10_883)]
)
def test_the_count_of_parameters(shape, count):
    geometry = sm.Geometry.from_rules({"x": torch.empty(shape, device="meta")}, {"x": sm.Stiefel()})
    d, p = shape
    formula = 34 * d**2 + 1024 * d * p + 2049
    assert sum(math.prod(s) for s in sm.MatrixLSTM.weight_shapes(geometry).values()) == formula == count


def test_one_set_of_weights_per_distinct_shape():
    geometry, _ = start(SHAPES, RULES)
    shapes = sm.MatrixLSTM.weight_shapes(geometry)
    assert {name.split(".")[0] for name in shapes} == {"6x2", "4x3", "3x5"}
    assert shapes.keys() == sm.MatrixLSTM.init_weights(geometry).keys()


def sigmoid(a):
    return 1 / (1 + torch.exp(-a))


def network(weights, name, x, memory):
    """Two layers and the last matrix; ``memory`` is [(hidden, cell), (hidden, cell)]."""
    kept = []
    for layer, (hidden, cell) in enumerate(memory):
        w, v = weights[f"{name}.layer{layer}.input"], weights[f"{name}.layer{layer}.hidden"]
        enter, forget, candidate, leave = (w[k] @ x + v[k] @ hidden for k in range(4))
        cell = sigmoid(forget) * cell + sigmoid(enter) * torch.tanh(candidate)
        x = sigmoid(leave) * torch.tanh(cell)
        kept.append((x, cell))
    return weights[f"{name}.output"] @ x, kept


def retracted(x, v, manifold):
    if isinstance(manifold, sm.Euclidean):
        return x + v
    if isinstance(manifold, sm.Stiefel) and manifold == sm.Stiefel():
        q, r = torch.linalg.qr(x + v)
        return q * torch.sign(torch.diag(r))
    u, _, vh = torch.linalg.svd(x + v, full_matrices=False)
    return u @ vh


def riemannian(x, g, manifold):
    if isinstance(manifold, sm.Euclidean):
        return g
    inner = x.T @ g
    return g - x @ (inner if isinstance(manifold, sm.Grassmann) else (inner + inner.T) / 2)


def reference(x, gradients, manifold, weights, lr):
    d, p = x.shape
    name = f"{d}x{p}"
    memory = [(torch.zeros_like(x), torch.zeros_like(x)) for _ in range(2)]
    for g in gradients:
        direction, kept0 = network(weights, f"{name}.direction", g, memory)
        features, kept1 = network(weights, f"{name}.length", g, memory)
        flat = torch.stack([features[i, j] for i in range(d) for j in range(p)]).clamp(min=0)
        first = (weights[f"{name}.dense0.weight"] @ flat + weights[f"{name}.dense0.bias"]).clamp(min=0)
        length = float(weights[f"{name}.dense1.weight"] @ first + weights[f"{name}.dense1.bias"])
        x = retracted(x, -lr * length * riemannian(x, g + direction, manifold), manifold)
        memory = [
            tuple(a * b / torch.linalg.matrix_norm(a * b) for a, b in zip(one, two, strict=True))
            for one, two in zip(kept0, kept1, strict=True)
        ]
    return x


def test_three_steps():
    geometry, begin = start(SHAPES, RULES, seed=100)
    weights = lively_matrix_weights(geometry)
    optimizer = sm.MatrixLSTM(geometry, weights, lr=0.05)
    history = [{k: normal(*x.shape, seed=10 * t + i) for i, (k, x) in enumerate(begin.items())} for t in range(3)]
    params, state = begin, optimizer.init(begin)
    for grads in history:
        params, state = optimizer.update(grads, state, params)
    for name in params:
        manifold = RULES.get(name, sm.Euclidean())
        expected = reference(begin[name], [grads[name] for grads in history], manifold, weights, 0.05)
        torch.testing.assert_close(params[name], expected, atol=1e-12, rtol=0)


def test_it_starts_as_gradient_descent():
    geometry, begin = start(SHAPES, RULES, seed=100)
    weights = {k: v.double() for k, v in sm.MatrixLSTM.init_weights(geometry).items()}
    learned, descent = sm.MatrixLSTM(geometry, weights, lr=0.05), sm.RSGD(geometry, 0.05)
    ours, state, theirs, nothing = begin, learned.init(begin), begin, descent.init(begin)
    for t in range(3):
        grads = {k: normal(*x.shape, seed=10 * t + i) for i, (k, x) in enumerate(begin.items())}
        ours, state = learned.update(grads, state, ours)
        theirs, nothing = descent.update(grads, nothing, theirs)
    assert largest_difference(ours, theirs) < 1e-14
    for name, value in weights.items():
        if "layer" in name:
            assert (value @ value.mT - torch.eye(value.shape[-1])).abs().max() < 1e-5


def test_meta_gradients_through_three_steps():
    geometry, begin = start({"x": (5, 2), "w": (3, 2)}, {"x": sm.Stiefel()}, seed=100)
    weights = lively_matrix_weights(geometry)
    target = {k: normal(*x.shape, seed=50 + i) for i, (k, x) in enumerate(begin.items())}

    def loss(params):
        return sum((params[k] - target[k]).square().sum() for k in params)

    def outer(weights):
        optimizer = sm.MatrixLSTM(geometry, weights, lr=0.02)
        params, state = begin, optimizer.init(begin)
        for _ in range(3):
            params, state = optimizer.update(grad(loss)(params), state, params)
        return loss(params)

    exact = grad(outer)(weights)
    assert all(torch.isfinite(value).all() for value in exact.values())
    assert all(value.abs().max() > 0 for value in exact.values()), "every meta-parameter matters"
    h = 1e-6
    for seed, prefix in enumerate(("", "5x2.direction", "5x2.length", "3x2.dense")):
        direction = {
            k: normal(*v.shape, seed=seed + i) if k.startswith(prefix) else torch.zeros_like(v)
            for i, (k, v) in enumerate(weights.items())
        }
        ends = [float(outer({k: v + s * h * direction[k] for k, v in weights.items()})) for s in (1, -1)]
        along = sum(float((exact[k] * direction[k]).sum()) for k in weights)
        assert along == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-5, abs=1e-8)


def test_wrong_weights_are_refused():
    geometry, params = start({"x": (6, 2)}, {"x": sm.Stiefel()})
    weights = sm.MatrixLSTM.init_weights(geometry)
    with pytest.raises(ValueError, match=r"not those of MatrixLSTM: missing \['6x2.dense0.bias'.*\], unknown \['y'\]"):
        sm.MatrixLSTM(geometry, {"y": torch.zeros(1)})
    name = "6x2.dense0.weight"
    with pytest.raises(ValueError, match=rf"has shape \(2, 3\); MatrixLSTM for this geometry needs .{WIDTH}, 12"):
        sm.MatrixLSTM(geometry, {**weights, name: torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"parameter 'x' has dtype torch.float64, the weights have torch.float32"):
        sm.MatrixLSTM(geometry, weights).init(params)
