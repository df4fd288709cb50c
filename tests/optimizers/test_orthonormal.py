"""Landing, POGO, RSDM and SPEL, which need orthonormal columns: references by the textbook, symmetries, feasibility.

The references are written matrix by matrix in float64, with d x d matrices and decompositions where the library has
none.
"""

import functools
import itertools
import math

import pytest
import torch
from making import (
    INFEASIBLE_OPTIMIZERS,
    ORTHONORMAL_OPTIMIZERS,
    largest_difference,
    make_optimizer,
    normal,
    start,
)

import subspace_meta as sm
from subspace_meta.optimizers.rsdm import hashed, random_frames, random_rows
from subspace_meta.optimizers.spel import matrix_sign

TOLERANCE = 1e-12
SHAPES = {"a": (6, 2), "b": (4, 3), "c": (6, 2), "square": (4, 4)}
# Where each parameter is: the number of its group and its place there.
PLACES = {"a": (0, 0), "c": (0, 1), "b": (1, 0), "square": (2, 0)}


def skew(a):
    return (a - a.T) / 2


def norm(a):
    return float(sum(entry**2 for row in a.tolist() for entry in row)) ** 0.5


def landing(x, gradients, lr, attraction=1.0, epsilon=0.5, place=None):
    identity = torch.eye(x.shape[1], dtype=x.dtype)
    for g in gradients:
        excess = x.T @ x - identity
        field = skew(g @ x.T) @ x + attraction * x @ excess
        delta, size = norm(excess), norm(field)
        pull = attraction * delta * (1 - delta)
        safe = (pull + math.sqrt(pull**2 + size**2 * (epsilon - delta))) / size**2
        x = x - min(lr, safe, 1 / (2 * attraction)) * field
    return x


def bound_by_traces(a):
    eigenvalues = torch.linalg.eigvalsh(a)
    p = len(eigenvalues)
    mean = float(eigenvalues.sum()) / p
    variance = float(((eigenvalues - mean) ** 2).sum()) / p
    return abs(mean) + math.sqrt((p - 1) * variance)


def pogo(x, gradients, lr, momentum=0.0, epsilon=0.01, place=None):
    identity = torch.eye(x.shape[1], dtype=x.dtype)
    buffer = torch.zeros_like(x)
    for g in gradients:
        buffer = momentum * buffer + g
        step = lr * skew(buffer @ x.T) @ x
        room = math.sqrt(epsilon) - bound_by_traces(x.T @ x - identity)
        squared = bound_by_traces(step.T @ step)
        a = x - min(1.0, math.sqrt(room / squared)) * step
        x = a + 0.5 * a @ (identity - a.T @ a)
    return x


def mixed_bits(*values):
    """The counter-based generator, in Python's integers."""
    bits = 0
    for value in values:
        bits = (bits + value) % 2**32
        bits = ((bits ^ (bits >> 16)) * 0x21F0AAAD) % 2**32
        bits = ((bits ^ (bits >> 15)) * 0xD35A2D97) % 2**32
        bits ^= bits >> 15
    return bits


def rsdm(x, gradients, lr, size, sampling, seed=0, place=(0, 0)):
    group, member = place
    d = x.shape[0]
    identity = torch.eye(size, dtype=x.dtype)
    for t, g in enumerate(gradients):
        key = (seed, t, group)
        if sampling == "permutation":
            order = sorted(range(d), key=lambda row, key=key: mixed_bits(*key, member * d + row))
            frame = torch.eye(d, dtype=x.dtype)[order[:size]]
        else:
            entries = []
            for k in range(d * size):
                u, v = ((mixed_bits(*key, half, member * d * size + k) + 0.5) / 2**32 for half in (0, 1))
                entries.append(math.sqrt(-2 * math.log(u)) * math.cos(2 * math.pi * v))
            q, r = torch.linalg.qr(torch.tensor(entries, dtype=x.dtype).reshape(d, size))
            frame = (q * torch.sign(torch.diag(r))).T
        q, r = torch.linalg.qr(identity - lr * skew(frame @ g @ x.T @ frame.T))
        turn = q * torch.sign(torch.diag(r))
        whole = torch.eye(d, dtype=x.dtype) + frame.T @ (turn - identity) @ frame
        x = whole @ x
    return x


def polar(y):
    u, _, vh = torch.linalg.svd(y, full_matrices=False)
    return u @ vh


def spel(x, gradients, lr, momentum, place=None):
    mean = torch.zeros_like(x)
    for g in gradients:
        mean = momentum * mean + (1 - momentum) * g
        inner = x.T @ mean
        x = polar(x - lr * polar(mean - x @ (inner + inner.T) / 2))
    return x


CASES = {
    "Landing": (lambda g: sm.Landing(g, 0.1), functools.partial(landing, lr=0.1)),
    "Landing, short by safety": (
        lambda g: sm.Landing(g, 10.0, attraction=0.7, epsilon=0.05),
        functools.partial(landing, lr=10.0, attraction=0.7, epsilon=0.05),
    ),
    "Landing, short by attraction": (
        lambda g: sm.Landing(g, 1.0, attraction=50.0, epsilon=0.05),
        functools.partial(landing, lr=1.0, attraction=50.0, epsilon=0.05),
    ),
    "POGO": (lambda g: sm.POGO(g, 0.02), functools.partial(pogo, lr=0.02)),
    "POGO, short by safety": (
        lambda g: sm.POGO(g, 1.0, momentum=0.8, epsilon=0.1),
        functools.partial(pogo, lr=1.0, momentum=0.8, epsilon=0.1),
    ),
    "RSDM permutation": (
        lambda g: sm.RSDM(g, 0.3, size=3),
        functools.partial(rsdm, lr=0.3, size=3, sampling="permutation"),
    ),
    "RSDM orthogonal": (
        lambda g: sm.RSDM(g, 0.3, size=2, sampling="orthogonal", seed=12345),
        functools.partial(rsdm, lr=0.3, size=2, sampling="orthogonal", seed=12345),
    ),
    "SPEL": (lambda g: sm.SPEL(g, 0.1), functools.partial(spel, lr=0.1, momentum=0.9)),
    "SPEL without momentum": (
        lambda g: sm.SPEL(g, 0.3, momentum=0.0, steps=16),
        functools.partial(spel, lr=0.3, momentum=0.0),
    ),
}


@pytest.mark.parametrize("manifold", [sm.Stiefel(), sm.StiefelCanonical()], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_three_steps(case, manifold):
    make, reference = CASES[case]
    geometry, begin = start(SHAPES, {"square": sm.Orthogonal(), "*": manifold}, seed=100)
    optimizer = make(geometry)
    history = [
        {name: normal(*x.shape, seed=10 * t + i) / (1 + 2 * t) for i, (name, x) in enumerate(begin.items())}
        for t in range(3)
    ]
    params, state = begin, optimizer.init(begin)
    for grads in history:
        params, state = optimizer.update(grads, state, params)
    for name in params:
        expected = reference(begin[name], [grads[name] for grads in history], place=PLACES[name])
        torch.testing.assert_close(params[name], expected, atol=TOLERANCE, rtol=0)


def end(optimizer, begin, change, steps=3):
    """Return where ``optimizer`` goes when ``change`` is applied to the start and to all gradients."""
    params = {"x": change(begin["x"])}
    state = optimizer.init(params)
    for t in range(steps):
        params, state = optimizer.update({"x": change(normal(*begin["x"].shape, seed=t))}, state, params)
    return params["x"]


@pytest.mark.parametrize("name", ORTHONORMAL_OPTIMIZERS)
def test_orthogonal_factors_and_permutations(name):
    """All follow orthogonal factors on the right; on the left too, but for the random choices of RSDM."""
    for shape in ((7, 3), (4, 4)):
        geometry, begin = start({"x": shape}, {"x": sm.Stiefel()}, seed=100)
        optimizer = make_optimizer(name, geometry, lr=0.1)
        plain = end(optimizer, begin, lambda x: x)
        generator = torch.Generator().manual_seed(1)
        left, right = (sm.Stiefel().random_point((n, n), generator, torch.float64) for n in shape)
        order = torch.randperm(shape[1], generator=generator)
        turned = end(optimizer, begin, lambda x, right=right: x @ right)
        torch.testing.assert_close(turned, plain @ right, atol=1e-11, rtol=0)
        permuted = end(optimizer, begin, lambda x, order=order: x[:, order])
        torch.testing.assert_close(permuted, plain[:, order], atol=1e-11, rtol=0)
        turned = end(optimizer, begin, lambda x, left=left: left @ x)
        if "RSDM" in name:
            assert (turned - left @ plain).abs().max() > 1e-3
        else:
            torch.testing.assert_close(turned, left @ plain, atol=1e-11, rtol=0)


def test_the_scale_of_the_loss_does_not_matter_to_spel():
    geometry, begin = start({"x": (7, 3)}, {"x": sm.Stiefel()}, seed=100)
    ends = []
    for factor in (1.0, 1e-30, 1e30):
        optimizer = sm.SPEL(geometry, 0.1)
        params, state = begin, optimizer.init(begin)
        for t in range(3):
            params, state = optimizer.update({"x": factor * normal(7, 3, seed=t)}, state, params)
        ends.append(params)
    assert max(largest_difference(ends[0], other) for other in ends[1:]) < 1e-12


@pytest.mark.parametrize("name", INFEASIBLE_OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_distance_stays_below_epsilon(name, dtype):
    """Over 300 steps with random gradients and rates that are far too large, and it is not always far below."""
    shapes = {"x": (3, 12, 4), "square": (5, 5), "column": (6, 1)}
    geometry, begin = start(shapes, {"square": sm.Rotations(), "*": sm.Stiefel()}, seed=1, dtype=dtype)
    for lr in (3.0, 1e3):
        optimizer = make_optimizer(name, geometry, lr=lr)
        params, state = begin, optimizer.init(begin)
        largest = dict.fromkeys(shapes, 0.0)
        for t in range(300):
            grads = {k: normal(*x.shape, seed=10 * t + i, dtype=dtype) for i, (k, x) in enumerate(begin.items())}
            params, state = optimizer.update(grads, state, params)
            violation = geometry.violation(params)
            for k, distance in optimizer.distance(params).items():
                assert distance.shape == begin[k].shape[:-2]
                assert distance.max() <= optimizer.epsilon * (1 + 20 * torch.finfo(dtype).eps)
                assert violation[k] <= distance.max() + 1e-6
                largest[k] = max(largest[k], float(distance.max()))
        assert min(largest.values()) > optimizer.epsilon / 10
        assert torch.linalg.det(params["square"]) > 0


@pytest.mark.parametrize("name", INFEASIBLE_OPTIMIZERS)
def test_the_infeasible_methods_land(name):
    """Without a gradient to follow, the distance goes to rounding errors."""
    geometry, params = start({"x": (12, 4)}, {"x": sm.Stiefel()}, seed=1)
    optimizer = make_optimizer(name, geometry, lr=0.3)
    state = optimizer.init(params)
    params = {"x": params["x"] * 1.001}
    for _ in range(60):
        params, state = optimizer.update({"x": torch.zeros(12, 4, dtype=torch.float64)}, state, params)
    assert optimizer.distance(params)["x"] < 1e-14


def test_landing_comes_closer_from_beyond_epsilon():
    geometry, params = start({"x": (12, 4)}, {"x": sm.Stiefel()}, seed=1)
    optimizer = sm.Landing(geometry, 0.1, epsilon=1e-3)
    state = optimizer.init(params)
    params = {"x": params["x"] * 1.1}
    distances = [float(optimizer.distance(params)["x"])]
    for t in range(300):
        params, state = optimizer.update({"x": normal(12, 4, seed=t)}, state, params)
        distances.append(float(optimizer.distance(params)["x"]))
    assert all(after < before for before, after in itertools.pairwise(distances))
    assert distances[0] > 0.4
    assert distances[-1] < 0.03


def test_pogo_leaves_by_a_fourth_power():
    geometry, params = start({"x": (12, 4)}, {"x": sm.Stiefel()}, seed=1)
    distances = []
    for lr in (0.04, 0.02):
        optimizer = sm.POGO(geometry, lr, epsilon=0.5)
        moved, _ = optimizer.update({"x": normal(12, 4)}, optimizer.init(params), params)
        distances.append(float(optimizer.distance(moved)["x"]))
    assert distances[0] / distances[1] == pytest.approx(16.0, rel=0.02)


@pytest.mark.parametrize("name", [name for name in ORTHONORMAL_OPTIMIZERS if name not in INFEASIBLE_OPTIMIZERS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_feasible_methods_stay_on_the_manifold(name, dtype):
    for shape in ((24, 6), (3, 3), (5, 4)):
        for exponent in (-12, 0, 12):
            geometry, params = start({"x": shape}, {"x": sm.Stiefel()}, dtype=dtype)
            optimizer = make_optimizer(name, geometry, lr=0.5)
            state = optimizer.init(params)
            for t in range(20):
                grads = {"x": normal(*shape, seed=t, dtype=dtype) * 10.0**exponent}
                params, state = optimizer.update(grads, state, params)
            assert geometry.violation(params)["x"] <= (1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("name", ORTHONORMAL_OPTIMIZERS)
def test_compiled_equals_eager(name):
    shapes = {"a": (6, 2), "b": (6, 2), "c": (5, 3)}
    geometry, params = start(shapes, {"*": sm.Stiefel()}, seed=100)
    optimizer = make_optimizer(name, geometry, lr=0.1)
    grads = {k: normal(*x.shape, seed=i) for i, (k, x) in enumerate(params.items())}
    params, state = optimizer.update(grads, optimizer.init(params), params)
    torch._dynamo.reset()
    compiled = torch.compile(optimizer.update, fullgraph=True, backend="eager")
    assert largest_difference(compiled(grads, state, params)[0], optimizer.update(grads, state, params)[0]) < 1e-14


@pytest.mark.slow
@pytest.mark.parametrize("name", ORTHONORMAL_OPTIMIZERS)
def test_compiled_by_inductor_equals_eager(name):
    geometry, begin = start({"a": (6, 2), "b": (6, 2), "c": (5, 3)}, {"*": sm.Stiefel()}, 100, torch.float32)
    optimizer = make_optimizer(name, geometry, lr=0.05)
    torch._dynamo.reset()
    ends = []
    for update in (optimizer.update, torch.compile(optimizer.update, fullgraph=True)):
        params, state = begin, optimizer.init(begin)
        for t in range(20):
            grads = {
                k: normal(*x.shape, seed=10 * t + i, dtype=torch.float32) for i, (k, x) in enumerate(begin.items())
            }
            params, state = update(grads, state, params)
        ends.append(params)
    # The skew and the normal block at "c" have rank 2: msign amplifies what rounding leaves in the third direction.
    assert largest_difference(*ends) <= (1e-4 if "intrinsic" in name else 1e-5)


def test_it_may_be_made_inside_the_compiled_function():
    geometry, params = start({"x": (6, 3)}, {"x": sm.Stiefel()}, seed=100)
    grads = {"x": normal(6, 3)}
    for name in ORTHONORMAL_OPTIMIZERS:

        def step(params, lr, name=name):
            kinds = {"Landing": sm.Landing, "POGO": sm.POGO, "SPEL": sm.SPEL, "intrinsic": sm.IntrinsicMuon}
            kind = kinds.get(name.split()[0])
            if name.startswith("manifold"):
                optimizer = sm.ManifoldMuon(geometry, lr, iterations=3)
            else:
                optimizer = kind(geometry, lr) if kind else sm.RSDM(geometry, lr, size=3)
            return optimizer.update(grads, optimizer.init(params), params)[0]

        torch._dynamo.reset()
        rate = torch.tensor(0.1, dtype=torch.float64)
        compiled = torch.compile(step, fullgraph=True, backend="eager")
        assert largest_difference(compiled(params, rate), step(params, rate)) < 1e-14


def test_the_matrix_sign():
    values = torch.tensor([3.0, 1.0, 1e-2, 0.0], dtype=torch.float64)
    left, right = (sm.Stiefel().random_point((n, 4), torch.Generator().manual_seed(n), torch.float64) for n in (7, 4))
    sign = matrix_sign(left * values @ right.T, 18)
    expected = left * torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64) @ right.T
    torch.testing.assert_close(sign, expected, atol=1e-10, rtol=0)
    assert matrix_sign(torch.zeros(3, 2), 5).abs().max() == 0


def test_the_random_choices():
    """Uniform to what chance allows, different for each matrix, step and seed, and the same when asked again."""
    seed = torch.tensor(3)
    bits = hashed(seed, torch.arange(100_000)).double() / 2**32
    assert bits.mean() == pytest.approx(0.5, abs=4 / math.sqrt(12 * 100_000))
    assert bits.var() == pytest.approx(1 / 12, rel=0.02)
    assert len(set(hashed(torch.tensor([[0], [1]]), torch.arange(1000)).flatten().tolist())) == 2000
    rows = random_rows(6000, 5, 2, seed, 0)
    assert (rows[:, 0] != rows[:, 1]).all()
    pairs = torch.bincount(rows[:, 0] * 5 + rows[:, 1], minlength=25).reshape(5, 5)
    expected = 6000 / 20
    statistic = sum(float((pairs[i, j] - expected) ** 2 / expected) for i in range(5) for j in range(5) if i != j)
    assert statistic < 50  # chi squared with 19 degrees of freedom: p = 1e-4
    frames = random_frames(2000, 5, 2, torch.float64, seed, 0)
    projectors = frames @ frames.mT
    torch.testing.assert_close(projectors.mean(0), 0.4 * torch.eye(5, dtype=torch.float64), atol=0.03, rtol=0)
    assert torch.equal(frames, random_frames(2000, 5, 2, torch.float64, seed, 0))
    assert (frames - random_frames(2000, 5, 2, torch.float64, seed, 1)).abs().max() > 0.1
    assert (frames[1:] - frames[:-1]).abs().amax(dim=(1, 2)).min() > 1e-3


def test_seeds_make_tasks_of_a_vmap_different():
    geometry, params = start({"x": (9, 3)}, {"x": sm.Stiefel()}, seed=100)
    optimizer = sm.RSDM(geometry, 0.3, size=3)
    state = optimizer.init(params)
    grads = {"x": normal(9, 3)}

    def moved(seed):
        return optimizer.update(grads, state._replace(seed=seed), params)[0]["x"]

    together = torch.func.vmap(moved)(torch.arange(4))
    for seed in range(4):
        # A batched product rounds otherwise than a single one; another draw of rows would be far away.
        by_state = moved(torch.tensor(seed))
        torch.testing.assert_close(together[seed], by_state, rtol=0, atol=64 * torch.finfo(torch.float64).eps)
        alone = sm.RSDM(geometry, 0.3, size=3, seed=seed)
        assert torch.equal(by_state, alone.update(grads, alone.init(params), params)[0]["x"])
    assert (together[0] - together[1]).abs().max() > 1e-3


MAKERS = {
    "landing": lambda geometry: sm.Landing(geometry, 0.1),
    "POGO": lambda geometry: sm.POGO(geometry, 0.1),
    "RSDM": lambda geometry: sm.RSDM(geometry, 0.1, size=2),
    "SPEL": lambda geometry: sm.SPEL(geometry, 0.1),
    "manifold Muon": lambda geometry: sm.ManifoldMuon(geometry, 0.1),
}


@pytest.mark.parametrize("method", MAKERS)
@pytest.mark.parametrize("manifold", [sm.Euclidean(), sm.SPD(), sm.Oblique(), sm.Sphere()], ids=str)
def test_other_manifolds_are_refused(method, manifold):
    geometry, _ = start({"x": (6, 2), "y": (3, 3)}, {"x": sm.Stiefel(), "y": manifold})
    message = f"{method} is defined on Stiefel, .*; parameter 'y' is on {manifold.name}: give it to another optimizer"
    with pytest.raises(ValueError, match=message):
        MAKERS[method](geometry)


def test_grassmann_is_for_rsdm_only():
    geometry, params = start({"x": (6, 2)}, {"x": sm.Grassmann()})
    optimizer = sm.RSDM(geometry, 0.1, size=2)
    moved, _ = optimizer.update({"x": normal(6, 2)}, optimizer.init(params), params)
    assert geometry.violation(moved)["x"] < 1e-14
    with pytest.raises(ValueError, match="parameter 'x' is on Grassmann"):
        sm.Landing(geometry, 0.1)


def test_settings_that_cannot_be():
    geometry, _ = start({"x": (4, 2)}, {"x": sm.Stiefel()})
    with pytest.raises(ValueError, match="attraction must be positive"):
        sm.Landing(geometry, 0.1, attraction=0.0)
    for kind in (sm.Landing, sm.POGO):
        with pytest.raises(ValueError, match=r"epsilon must be in \(0, 1\), got 1.0"):
            kind(geometry, 0.1, epsilon=1.0)
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got -0.1"):
        sm.POGO(geometry, 0.1, momentum=-0.1)
    for size in (1, 5):
        with pytest.raises(ValueError, match=f"size must be from 2 to 4, the rows of 'x', got {size}"):
            sm.RSDM(geometry, 0.1, size=size)
    with pytest.raises(ValueError, match="sampling must be 'permutation' or 'orthogonal', got 'uniform'"):
        sm.RSDM(geometry, 0.1, size=2, sampling="uniform")
    with pytest.raises(ValueError, match="the learning rate of SPEL must be below 1"):
        sm.SPEL(geometry, 1.0)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        sm.SPEL(geometry, 0.1, steps=0)
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got 1.0"):
        sm.SPEL(geometry, 0.1, momentum=1.0)
