"""Every optimizer stays on its manifold: any shape, any scale of the gradient, no gradient, gradients of low rank."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making import MANIFOLDS, OPTIMIZERS, make_optimizer, normal, start

import subspace_meta as sm

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@st.composite
def tall_shapes(draw) -> tuple[int, int]:
    p = draw(st.integers(1, 6))
    return draw(st.integers(p, 24)), p


def gradient(kind: str, shape: tuple[int, int], seed: int) -> torch.Tensor:
    """Return a float64 gradient of unit scale."""
    d, p = shape
    if kind == "zero":
        return torch.zeros(shape, dtype=torch.float64)
    if kind == "rank one":
        return normal(d, 1, seed=seed) @ normal(1, p, seed=seed + 1)
    if kind == "one entry":
        sparse = torch.zeros(shape, dtype=torch.float64)
        sparse[seed % d, seed % p] = 1.0
        return sparse
    if kind == "uneven":  # entries over eight decades
        return normal(d, p, seed=seed) * 10.0 ** (4 * normal(d, p, seed=seed + 1).clamp(-2, 2))
    return normal(d, p, seed=seed)


@pytest.mark.parametrize("manifold", MANIFOLDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
@given(
    shape=tall_shapes(),
    exponent=st.integers(-12, 12),
    kind=st.sampled_from(["full", "zero", "rank one", "one entry", "uneven"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 10**6),
)
def test_the_update_stays_on_the_manifold(name, manifold, shape, exponent, kind, dtype, seed):
    geometry, params = start({"x": shape}, {"x": MANIFOLDS[manifold]}, seed + 1000, dtype)
    optimizer = make_optimizer(name, geometry, dtype, lr=0.1, seed=seed)
    state = optimizer.init(params)
    for t in range(4):
        grads = {"x": (gradient(kind, shape, seed + t) * 10.0**exponent).to(dtype)}
        moved, state = optimizer.update(grads, state, params)
        assert torch.isfinite(moved["x"]).all()
        assert geometry.violation(moved)["x"] <= TOLERANCE[dtype]
        if kind == "zero":
            assert (moved["x"] - params["x"]).abs().max() <= TOLERANCE[dtype]
        params = moved


@pytest.mark.parametrize("manifold", MANIFOLDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("shape", [(24, 6), (3, 3), (5, 1), (1, 1)])
def test_a_gradient_normal_to_the_manifold(name, manifold, shape):
    """Its Riemannian part is nothing but rounding errors, which point anywhere, however large they are."""
    for dtype, tolerance in TOLERANCE.items():
        for exponent in (-12, 0, 6, 9, 12):
            geometry, params = start({"x": shape}, {"x": MANIFOLDS[manifold]}, 7, dtype)
            optimizer = make_optimizer(name, geometry, dtype, lr=0.1)
            state = optimizer.init(params)
            for t in range(3):
                symmetric = normal(shape[1], shape[1], seed=t, dtype=dtype)
                grads = {"x": params["x"] @ (symmetric + symmetric.mT) * 10.0**exponent}
                params, state = optimizer.update(grads, state, params)
                assert geometry.violation(params)["x"] <= tolerance


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("exponent", [-12, 0, 12])
def test_the_scale_may_jump_between_steps(name, exponent):
    geometry, params = start({"x": (12, 3)}, {"x": sm.Stiefel()}, dtype=torch.float32)
    optimizer = make_optimizer(name, geometry, torch.float32, lr=0.1)
    state = optimizer.init(params)
    for t in range(6):
        scale = 10.0 ** (exponent * (-1) ** t)
        params, state = optimizer.update({"x": normal(12, 3, seed=t, dtype=torch.float32) * scale}, state, params)
        assert geometry.violation(params)["x"] <= 1e-5


@given(shape=tall_shapes(), seed=st.integers(0, 10**6))
@settings(max_examples=8)
def test_the_momentum_stays_tangent(shape, seed):
    for manifold in MANIFOLDS.values():
        geometry, params = start({"x": shape}, {"x": manifold}, seed)
        for name in ("base", "RSGD momentum", "RAdam"):
            optimizer = make_optimizer(name, geometry, seed=seed)
            state, x = optimizer.init(params), params
            for t in range(3):
                x, state = optimizer.update({"x": normal(*shape, seed=seed + t)}, state, x)
            (momentum,) = state.momentum
            assert momentum.abs().max() > 1e-3 or shape[0] == shape[1]
            torch.testing.assert_close(manifold.project(x["x"], momentum), momentum, atol=1e-12, rtol=0)


@given(shape=tall_shapes(), batch=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_the_same_weights_serve_every_shape(shape, batch, seed):
    """The shipped weights lower the loss of a problem of any size, alone or in a batch; no size is told to them."""
    d, p = shape
    weights = sm.pretrained()
    geometry, params = start({"x": (batch, d, p)}, {"x": sm.Stiefel()}, seed, torch.float32)
    optimizer = sm.SubspaceOptimizer(geometry, weights)
    spectrum = torch.linspace(1.0, 3.0, d)[:, None]

    def loss(params):
        return (params["x"].square() * spectrum).sum()

    first, state = loss(params), optimizer.init(params)
    for _ in range(10):
        grads = torch.func.grad(loss)(params)
        params, state = optimizer.update(grads, state, params)
    assert geometry.violation(params)["x"] <= 1e-5
    lowest = batch * spectrum[:p].sum()
    assert loss(params) - lowest <= 0.5 * (first - lowest) + 1e-4


@given(exponent=st.integers(-6, 6), shape=tall_shapes(), seed=st.integers(0, 10**6))
def test_a_factor_of_the_loss_changes_nothing(exponent, shape, seed):
    for manifold in (*MANIFOLDS.values(), sm.Euclidean()):
        geometry, begin = start({"x": shape, "b": (3,)}, {"x": manifold}, seed)
        optimizer = make_optimizer("base", geometry, seed=seed)
        target = {"x": normal(*shape, seed=seed + 1), "b": normal(3, seed=seed + 2)}

        def trajectory(factor, optimizer=optimizer, begin=begin, target=target):
            def loss(params):
                return factor * sum(((params[k] - target[k]) ** 2).sum() for k in params)

            params, state = begin, optimizer.init(begin)
            for _ in range(8):
                params, state = optimizer.update(torch.func.grad(loss)(params), state, params)
            return torch.cat([value.flatten() for value in params.values()])

        torch.testing.assert_close(trajectory(10.0**exponent), trajectory(1.0), atol=1e-9, rtol=0)


def test_a_factor_of_the_loss_changes_nothing_in_float32():
    geometry, begin = start({"x": (20, 4)}, {"x": sm.Stiefel()}, dtype=torch.float32)
    optimizer = make_optimizer("base", geometry, torch.float32)

    def trajectory(factor):
        params, state = begin, optimizer.init(begin)
        for t in range(20):
            grads = {"x": factor * (normal(20, 4, seed=t, dtype=torch.float32) + 3 * params["x"].flip(0))}
            params, state = optimizer.update(grads, state, params)
        return params["x"]

    for exponent in (-20, -7, 9, 20):  # powers of two are exact, so nothing but the guards against 0/0 differs
        torch.testing.assert_close(trajectory(2.0**exponent), trajectory(1.0), atol=1e-6, rtol=0)
