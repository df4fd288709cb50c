"""Manifold Muon, intrinsic Muon, and POGO's base optimizers: references by the textbook, violations, convergence.

The references are written matrix by matrix in float64, with singular value decompositions where the library iterates.
"""

import dataclasses
import functools
import math

import pytest
import torch
from making import largest_difference, normal, start

import subspace_meta as sm
from subspace_meta.optimizers.pogo import QUINTIC, quintic_sign

SHAPES = {"a": (6, 2), "b": (4, 3), "c": (6, 2), "square": (4, 4)}


def polar(y):
    """U V^T over the singular values that are not zero."""
    u, s, vh = torch.linalg.svd(y, full_matrices=False)
    return u @ torch.diag((s > 1e-10 * s.max()).double()) @ vh


def power(a, exponent):
    values, vectors = torch.linalg.eigh(a)
    return vectors @ torch.diag(values**exponent) @ vectors.T


def skew(a):
    return (a - a.T) / 2


def sym(a):
    return (a + a.T) / 2


def averaged(gradients, decay):
    mean, means = torch.zeros_like(gradients[0]), []
    for g in gradients:
        mean = decay * mean + (1 - decay) * g
        means.append(mean)
    return means


def manifold_muon(x, gradients, lr=0.1, momentum=0.0, iterations=100, alpha=0.1, relative=True):
    for g in averaged(gradients, momentum):
        if relative:
            tangent = g - x @ sym(x.T @ g)
            g = g / math.sqrt(float((torch.linalg.svdvals(tangent) ** 2).mean()))
        dual = -(x.T @ g + g.T @ x) / 4
        for k in range(iterations):
            direction = polar(g + 2 * x @ dual)
            dual = dual - alpha * (1 - k / iterations) * (x.T @ direction + direction.T @ x)
        x = polar(x - lr * direction)
    return x


def intrinsic_muon(x, gradients, lr, manifold, momentum=0.0):
    for g in averaged(gradients, momentum):
        if isinstance(manifold, sm.SPD):
            root = power(x, 0.5)
            values, vectors = torch.linalg.eigh(root @ sym(g) @ root)
            x = root @ vectors @ torch.diag((-lr * values.sign()).exp()) @ vectors.T @ root
            continue
        direction = polar(g - x @ (x.T @ g)) if x.shape[0] > x.shape[1] else 0 * x
        if not isinstance(manifold, sm.Grassmann):
            direction = direction + x @ polar(skew(x.T @ g))
        x = polar(x - lr * direction)
    return x


def pogo(x, gradients, lr, base, momentum=0.0, betas=(0.9, 0.999), eps=1e-8, steps=3):
    first, second, buffer = torch.zeros_like(x), 0.0, torch.zeros_like(x)
    for t, g in enumerate(gradients, start=1):
        if base == "vector_adam":
            first = betas[0] * first + (1 - betas[0]) * g
            second = betas[1] * second + (1 - betas[1]) * float((g * g).sum())
            g = first / (1 - betas[0] ** t) / (math.sqrt(second / (1 - betas[1] ** t)) + eps)
        else:
            buffer = g = momentum * buffer + g
        if base == "muon":
            u, s, vh = torch.linalg.svd(g, full_matrices=False)
            s = s / (g.norm() + 1e-7)
            for _ in range(steps):
                s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
            g = u @ torch.diag(s) @ vh
        a = x - lr * skew(g @ x.T) @ x
        x = a + 0.5 * a @ (torch.eye(x.shape[1], dtype=x.dtype) - a.T @ a)
    return x


CASES = {
    "manifold Muon": (lambda g: sm.ManifoldMuon(g, steps=24), manifold_muon),
    "manifold Muon, published scale": (
        lambda g: sm.ManifoldMuon(g, alpha=0.01, relative=False, steps=24),
        functools.partial(manifold_muon, alpha=0.01, relative=False),
    ),
    "manifold Muon settings": (
        lambda g: sm.ManifoldMuon(g, 0.3, momentum=0.6, iterations=7, alpha=0.03, steps=24),
        functools.partial(manifold_muon, lr=0.3, momentum=0.6, iterations=7, alpha=0.03),
    ),
    "intrinsic Muon": (
        lambda g: sm.IntrinsicMuon(g, 0.2, steps=24),
        functools.partial(intrinsic_muon, lr=0.2, manifold=None),
    ),
    "intrinsic Muon settings": (
        lambda g: sm.IntrinsicMuon(g, 0.1, momentum=0.6, steps=24),
        functools.partial(intrinsic_muon, lr=0.1, manifold=None, momentum=0.6),
    ),
    "POGO VectorAdam": (
        lambda g: sm.POGO(g, 0.05, base="vector_adam"),
        functools.partial(pogo, lr=0.05, base="vector_adam"),
    ),
    "POGO VectorAdam settings": (
        lambda g: sm.POGO(g, 0.05, base="vector_adam", betas=(0.5, 0.7), eps=0.3),
        functools.partial(pogo, lr=0.05, base="vector_adam", betas=(0.5, 0.7), eps=0.3),
    ),
    "POGO Muon": (lambda g: sm.POGO(g, 0.05, base="muon"), functools.partial(pogo, lr=0.05, base="muon")),
    "POGO Muon settings": (
        lambda g: sm.POGO(g, 0.05, momentum=0.7, base="muon", muon_steps=5),
        functools.partial(pogo, lr=0.05, base="muon", momentum=0.7, steps=5),
    ),
}


@pytest.mark.parametrize("manifold", [sm.Stiefel(), sm.StiefelCanonical()], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_three_steps(case, manifold):
    make, reference = CASES[case]
    geometry, begin = start(SHAPES, {"square": sm.Orthogonal(), "*": manifold}, seed=100)
    optimizer = make(geometry)
    # A normal part, which no direction may follow, beside the random one.
    history = [
        {k: normal(*x.shape, seed=10 * t + i) / (1 + 2 * t) + x for i, (k, x) in enumerate(begin.items())}
        for t in range(3)
    ]
    params, state = begin, optimizer.init(begin)
    for grads in history:
        params, state = optimizer.update(grads, state, params)
    for name in params:
        expected = reference(begin[name], [grads[name] for grads in history])
        torch.testing.assert_close(params[name], expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
@pytest.mark.parametrize("manifold", [sm.Grassmann(), sm.SPD()], ids=str)
def test_intrinsic_muon_elsewhere(manifold, momentum):
    shape = (7, 3) if isinstance(manifold, sm.Grassmann) else (4, 4)
    geometry, params = start({"x": shape}, {"x": manifold}, seed=100)
    begin, history = params["x"], [normal(*shape, seed=t) for t in range(3)]
    optimizer = sm.IntrinsicMuon(geometry, 0.2, momentum=momentum, steps=24)
    state = optimizer.init(params)
    for g in history:
        params, state = optimizer.update({"x": g}, state, params)
    expected = intrinsic_muon(begin, history, 0.2, manifold, momentum)
    torch.testing.assert_close(params["x"], expected, atol=1e-10, rtol=0)


def test_published_settings():
    geometry, _ = start({"x": (5, 2)}, {"x": sm.Stiefel()})
    muon = sm.ManifoldMuon(geometry)
    assert (muon.lr, muon.momentum, muon.iterations) == (0.1, 0.0, 100)
    pogo = sm.POGO(geometry, 0.1)
    assert (pogo.base, pogo.momentum, pogo.betas, pogo.eps, pogo.muon_steps) == ("sgd", 0.0, (0.9, 0.999), 1e-8, 3)
    assert QUINTIC == (3.4445, -4.7750, 2.0315)
    assert sm.IntrinsicMuon(geometry, 0.1).momentum == 0.0


def error(x, direction):
    h = x.mT @ direction
    return float((h + h.mT).square().mean().sqrt())


def test_with_one_iteration_manifold_muon_is_spel():
    geometry, begin = start({"x": (7, 3)}, {"x": sm.Stiefel()}, seed=1)
    grads = {"x": normal(7, 3)}
    muon, spel = sm.ManifoldMuon(geometry, 0.1, iterations=1), sm.SPEL(geometry, 0.1, momentum=0.0)
    moved, expected = (o.update(grads, o.init(begin), begin)[0] for o in (muon, spel))
    assert largest_difference(moved, expected) < 1e-13


def test_the_dual_ascent_finds_the_steepest_tangent():
    """Tangent, of spectral norm 1, and steeper than other such tangents, SPEL's projected one among them."""
    geometry, params = start({"x": (40, 8)}, {"x": sm.Stiefel()}, seed=1)
    x = params["x"]
    for g in (normal(40, 8), 1e-4 * normal(40, 8) + x @ sym(normal(8, 8)), 1e4 * normal(40, 8)):
        steepest = sm.ManifoldMuon(geometry, steps=24).direction(x, g)
        assert error(x, steepest) < 1e-6
        assert float(torch.linalg.svdvals(steepest).max()) == pytest.approx(1.0, abs=1e-10)
        spel = sm.ManifoldMuon(geometry, iterations=1, steps=24).direction(x, g)
        assert error(x, spel) > 1e-2
        others = [sm.Stiefel().project(x, spel)]
        others += [sm.Stiefel().random_tangent(x, torch.Generator().manual_seed(i)) for i in range(20)]
        for other in others:
            other = other / torch.linalg.svdvals(other).max()
            assert float((g * (steepest - other)).sum()) > 0
            mixed = steepest + 1e-3 * other
            mixed = mixed / torch.linalg.svdvals(mixed).max()
            assert float((g * (steepest - mixed)).sum()) > 0
    # At the published scale and step the tangent space is missed where the tangent part is small or large.
    published = sm.ManifoldMuon(geometry, alpha=0.01, relative=False)
    assert error(x, published.direction(x, 1e4 * normal(40, 8))) > 1e-2


@pytest.mark.parametrize("name", ["ManifoldMuon", "IntrinsicMuon"])
def test_the_scale_of_the_loss_does_not_matter(name):
    geometry, begin = start({"x": (7, 3)}, {"x": sm.Stiefel()}, seed=100)
    ends = []
    for factor in (1.0, 1e-30, 1e30):
        optimizer = getattr(sm, name)(geometry, 0.1)
        params, state = begin, optimizer.init(begin)
        for t in range(3):
            params, state = optimizer.update({"x": factor * normal(7, 3, seed=t)}, state, params)
        ends.append(params)
    assert max(largest_difference(ends[0], other) for other in ends[1:]) < 1e-10


def test_intrinsic_muon_follows_congruences_and_changes_of_basis():
    """X -> A X A^T on SPD, whose metric is invariant to it; X -> X Q on Grassmann, where that is the same point."""
    geometry, params = start({"x": (4, 4)}, {"x": sm.SPD()}, seed=1)
    optimizer = sm.IntrinsicMuon(geometry, 0.3, steps=24)
    a, g = normal(4, 4, seed=9), normal(4, 4, seed=2)
    plain = optimizer.update({"x": g}, optimizer.init(params), params)[0]["x"]
    other = {"x": sym(a @ params["x"] @ a.T)}
    inverse = torch.linalg.inv(a)
    turned = optimizer.update({"x": inverse.T @ g @ inverse}, optimizer.init(other), other)[0]["x"]
    torch.testing.assert_close(turned, a @ plain @ a.T, atol=1e-9, rtol=1e-9)
    # A step multiplies by e^lr and e^-lr in eigendirections.
    values = torch.linalg.eigvals(torch.linalg.solve(params["x"], plain)).real
    torch.testing.assert_close(values.log().abs(), torch.full((4,), 0.3, dtype=torch.float64), atol=1e-10, rtol=0)

    geometry, params = start({"x": (7, 3)}, {"x": sm.Grassmann()}, seed=1)
    optimizer = sm.IntrinsicMuon(geometry, 0.3)
    q = sm.Orthogonal().random_point((3, 3), torch.Generator().manual_seed(3), torch.float64)
    g = normal(7, 3)
    plain = optimizer.update({"x": g}, optimizer.init(params), params)[0]["x"]
    other = {"x": params["x"] @ q}
    turned = optimizer.update({"x": g @ q}, optimizer.init(other), other)[0]["x"]
    torch.testing.assert_close(turned, plain @ q, atol=1e-11, rtol=0)


def test_the_rough_polar_factor_of_muon():
    """Five iterations leave singular values in 0.65 to 1.25 (measured, from 0.01 of the norm on); three do not."""
    values = torch.logspace(-2, 0, 12, dtype=torch.float64)
    left, right = (
        sm.Stiefel().random_point((n, 12), torch.Generator().manual_seed(n), torch.float64) for n in (20, 12)
    )
    y = left * values @ right.T
    five, three = (torch.linalg.svdvals(quintic_sign(y, steps)) for steps in (5, 3))
    assert five.min() > 0.65
    assert five.max() < 1.25
    assert three.min() < 0.5
    assert quintic_sign(torch.zeros(3, 2), 5).abs().max() == 0


# Bounds of the largest entry of |X^T X - I| over 30 steps of random gradients, in float32 and float64; measured beside.
VIOLATIONS = {
    "manifold Muon": (lambda g, lr: sm.ManifoldMuon(g, lr, iterations=10), 1e-6, 2e-15),  # 4.1e-7, 6.7e-16
    "intrinsic Muon": (lambda g, lr: sm.IntrinsicMuon(g, lr), 1e-6, 2e-15),  # 4.1e-7, 1.1e-15
    "SPEL": (lambda g, lr: sm.SPEL(g, lr), 1e-6, 2e-15),  # 4.2e-7, 7.8e-16
    # Not on the manifold by design; bounded by ``epsilon`` = 0.01.
    "POGO VectorAdam": (lambda g, lr: sm.POGO(g, lr, base="vector_adam"), 1e-5, 1e-5),  # 4.6e-6, 4.5e-6
    "POGO Muon": (lambda g, lr: sm.POGO(g, lr, base="muon"), 1e-4, 1e-4),  # 4.3e-5, 4.3e-5
}


@pytest.mark.parametrize("name", VIOLATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_measured_violations(name, dtype):
    make, single, double = VIOLATIONS[name]
    largest = 0.0
    for shape in ((24, 6), (64, 32), (16, 16), (40, 1)):
        geometry, params = start({"x": shape}, {"x": sm.Stiefel()}, seed=1, dtype=dtype)
        optimizer = make(geometry, 0.1)
        state = optimizer.init(params)
        for t in range(30):
            params, state = optimizer.update({"x": normal(*shape, seed=t, dtype=dtype)}, state, params)
            largest = max(largest, geometry.violation(params)["x"])
    assert largest <= (single if dtype == torch.float32 else double)


def test_intrinsic_muon_stays_positive():
    geometry, params = start({"x": (5, 5)}, {"x": sm.SPD()}, seed=1, dtype=torch.float32)
    optimizer = sm.IntrinsicMuon(geometry, 0.3)
    state = optimizer.init(params)
    for t in range(100):
        params, state = optimizer.update({"x": normal(5, 5, seed=t, dtype=torch.float32)}, state, params)
        assert geometry.violation(params)["x"] == 0.0
        assert torch.linalg.eigvalsh(params["x"].double()).min() > 0


def pca(name):
    d, p = 20, 3
    basis, _ = torch.linalg.qr(normal(d, d, seed=3))
    spectrum = torch.tensor([3.0, 2.5, 2.0] + [1.0] * (d - p), dtype=torch.float64)
    covariance = basis @ torch.diag(spectrum) @ basis.T
    manifold = sm.Grassmann() if "Grassmann" in name else sm.Stiefel()
    return (d, p), manifold, lambda x: -2 * covariance @ x, lambda x: -(x * (covariance @ x)).sum(), -7.5


def decaying(t):
    return 1 / (1 + t / 10)


def constant(t):
    return 1


# Directions of fixed length need rates that decay; POGO's bases bound the Euclidean gradient, whose tangent part falls.
CONVERGENCE = {
    "manifold Muon": (lambda g: sm.ManifoldMuon(g, 0.1, iterations=20), decaying),
    "manifold Muon momentum": (lambda g: sm.ManifoldMuon(g, 0.1, momentum=0.9, iterations=20), decaying),
    "intrinsic Muon": (lambda g: sm.IntrinsicMuon(g, 0.1), decaying),
    "intrinsic Muon momentum": (lambda g: sm.IntrinsicMuon(g, 0.1, momentum=0.9), decaying),
    "intrinsic Muon on Grassmann": (lambda g: sm.IntrinsicMuon(g, 0.1), decaying),
    "POGO VectorAdam": (lambda g: sm.POGO(g, 0.3, base="vector_adam"), constant),
    "POGO Muon": (lambda g: sm.POGO(g, 0.3, base="muon"), constant),
}


@pytest.mark.parametrize("name", CONVERGENCE)
def test_pca(name):
    """Relative excess below 1e-3 after 300 steps."""
    make, schedule = CONVERGENCE[name]
    shape, manifold, gradient, loss, best = pca(name)
    geometry, params = start({"x": shape}, {"x": manifold}, seed=1)
    optimizer = make(geometry)
    state = optimizer.init(params)
    assert (loss(params["x"]) - best) / 7.5 > 0.3
    for t in range(300):
        scheduled = dataclasses.replace(optimizer, lr=optimizer.lr * schedule(t))
        params, state = scheduled.update({"x": gradient(params["x"])}, state, params)
    excess = float(loss(geometry.project(params)["x"]) - best) / 7.5
    assert excess < 1e-3


def test_intrinsic_muon_finds_a_mean_of_covariances():
    count, n = 10, 4
    basis, _ = torch.linalg.qr(normal(n, n, seed=3))
    logs = normal(count, n, seed=4)
    points = basis @ torch.diag_embed(logs.exp()) @ basis.T
    mean = basis @ torch.diag(logs.mean(0).exp()) @ basis.T
    geometry, params = start({"x": (n, n)}, {"x": sm.SPD()}, seed=1)
    optimizer = sm.IntrinsicMuon(geometry, 0.2)
    state = optimizer.init(params)

    def loss(p):
        return sm.SPD().distance(p["x"].expand(count, n, n), points).square().mean()

    assert sm.SPD().distance(params["x"], mean) > 0.5
    for t in range(200):
        scheduled = dataclasses.replace(optimizer, lr=0.2 / (1 + t / 10))
        params, state = scheduled.update(torch.func.grad(loss)(params), state, params)
    assert sm.SPD().distance(params["x"], mean) < 0.05


def test_settings_that_cannot_be():
    geometry, _ = start({"x": (4, 2)}, {"x": sm.Stiefel()})
    with pytest.raises(ValueError, match="the learning rate of manifold Muon must be below 1"):
        sm.ManifoldMuon(geometry, 1.0)
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        sm.ManifoldMuon(geometry, iterations=0)
    with pytest.raises(ValueError, match="alpha must be positive"):
        sm.ManifoldMuon(geometry, alpha=0.0)
    for make in (sm.ManifoldMuon, sm.IntrinsicMuon):
        with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
            make(geometry, 0.1, steps=0)
        with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got 1.0"):
            make(geometry, 0.1, momentum=1.0)
    with pytest.raises(ValueError, match="base must be 'sgd', 'vector_adam' or 'muon', got 'adam'"):
        sm.POGO(geometry, 0.1, base="adam")
    with pytest.raises(ValueError, match=r"the momentum of base 'vector_adam' is betas\[0\]; got momentum=0.5"):
        sm.POGO(geometry, 0.1, momentum=0.5, base="vector_adam")
    with pytest.raises(ValueError, match=r"betas must be in \[0, 1\), got \(0.9, 1.0\)"):
        sm.POGO(geometry, 0.1, base="vector_adam", betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="muon_steps must be at least 1, got 0"):
        sm.POGO(geometry, 0.1, base="muon", muon_steps=0)


@pytest.mark.parametrize("manifold", [sm.Euclidean(), sm.Oblique(), sm.Sphere()], ids=str)
def test_intrinsic_muon_refuses_other_manifolds(manifold):
    geometry, _ = start({"x": (6, 2), "s": (3, 3), "y": (3, 3)}, {"x": sm.Grassmann(), "s": sm.SPD(), "y": manifold})
    message = f"intrinsic Muon is defined on .*Grassmann, SPD; parameter 'y' is on {manifold.name}"
    with pytest.raises(ValueError, match=message):
        sm.IntrinsicMuon(geometry, 0.1)
