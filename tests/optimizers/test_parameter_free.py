"""RDoG, RDoWG, NRDoG, RAdaGD and Riemannian AdGD: the formulas by the textbook, and problems solved without tuning.

The references are written parameter by parameter, with scalars in Python and decompositions where the library has none.
"""

import dataclasses
import math

import pytest
import torch
from making import PARAMETER_FREE_OPTIMIZERS, largest_difference, normal, start
from torch.func import grad, grad_and_value, vmap

import subspace_meta as sm
from subspace_meta.optimizers.runs import curvature_bound, distance, exponential, inner, squared_distance

VARIANTS = ("RDoG", "RDoWG", "NRDoG")


def make(name, geometry, **settings):
    kinds = {"RAdaGD": sm.RAdaGD, "RAdGD": sm.RAdGD}
    return kinds[name](geometry, **settings) if name in kinds else sm.RDoG(geometry, variant=name, **settings)


# The geometry of each manifold, by the textbook.


def function_of(a, function):
    values, vectors = torch.linalg.eigh((a + a.T) / 2)
    return vectors @ torch.diag(function(values)) @ vectors.T


class Sphere:
    manifold, shape = sm.Sphere(), (5, 1)

    def gradient(self, x, g):
        return g - x * (x * g).sum()

    def norm(self, x, v):
        return math.sqrt(float((v * v).sum()))

    def exp(self, x, v):
        size = self.norm(x, v)
        return math.cos(size) * x + math.sin(size) / size * v

    def distance(self, x, y):
        return math.acos(max(-1.0, min(1.0, float((x * y).sum()))))

    def transport(self, x, y, v):
        direction = y - x * (x * y).sum()
        direction = direction / direction.norm()
        angle, along = self.distance(x, y), float((direction * v).sum())
        return v + along * ((math.cos(angle) - 1) * direction - math.sin(angle) * x)


class Positive:
    manifold, shape = sm.SPD(), (3, 3)

    def gradient(self, x, g):
        return x @ (g + g.T) @ x / 2

    def whitened(self, x, v):
        root = function_of(x, lambda values: values**-0.5)
        return root @ v @ root

    def norm(self, x, v):
        return float(self.whitened(x, v).norm())

    def exp(self, x, v):
        root = function_of(x, torch.sqrt)
        return root @ function_of(self.whitened(x, v), torch.exp) @ root

    def distance(self, x, y):
        return float(function_of(self.whitened(x, y), torch.log).norm())

    def transport(self, x, y, v):
        root, inverse = function_of(x, torch.sqrt), function_of(x, lambda values: values**-0.5)
        carrier = root @ function_of(self.whitened(x, y), torch.sqrt) @ inverse
        return carrier @ v @ carrier.T


class Subspace:
    manifold, shape = sm.Grassmann(), (6, 2)

    def gradient(self, x, g):
        return g - x @ (x.T @ g)

    norm = Sphere.norm

    def exp(self, x, v):
        u, s, vh = torch.linalg.svd(v, full_matrices=False)
        return (x @ vh.T @ torch.diag(s.cos()) + u @ torch.diag(s.sin())) @ vh

    def distance(self, x, y):
        return float(torch.linalg.svdvals(x.T @ y).clamp(max=1).acos().norm())

    def transport(self, x, y, v):
        return v - y @ (y.T @ v)


class Flat:
    manifold, shape = sm.Euclidean(), (3, 2)

    def gradient(self, x, g):
        return g

    norm = Sphere.norm

    def exp(self, x, v):
        return x + v

    def distance(self, x, y):
        return self.norm(x, x - y)

    def transport(self, x, y, v):
        return v


SPACES = {"curved up": {"s": Sphere(), "g": Subspace(), "w": Flat()}, "curved down": {"s": Sphere(), "p": Positive()}}


def length(spaces, x, v):
    """The norm of a tangent of the product manifold."""
    return math.sqrt(sum(space.norm(x[key], v[key]) ** 2 for key, space in spaces.items()))


def minus(a, b):
    return {key: a[key] - b[key] for key in a}


def dog(variant, spaces, x, history, initial, eps=1e-8, bound=0.0, lr=1.0):
    begin, far, total = dict(x), initial, 0.0
    for t, grads in enumerate(history):
        g = {key: space.gradient(x[key], grads[key]) for key, space in spaces.items()}
        size = length(spaces, x, g)
        far = max(far, math.sqrt(sum(s.distance(begin[key], x[key]) ** 2 for key, s in spaces.items())))
        scaled = math.sqrt(-bound) * far
        weight = far**2 / (scaled / math.tanh(scaled) if bound < 0 else 1.0)
        total += size**2 * (weight if variant == "RDoWG" else 1.0)
        eta = {
            "RDoG": math.sqrt(weight) / (math.sqrt(total) + eps),
            "RDoWG": weight / (math.sqrt(total) + eps),
            "NRDoG": math.sqrt(weight) / (math.sqrt(t + 1) * size + eps),
        }[variant]
        x = {key: space.exp(x[key], -lr * eta * g[key]) for key, space in spaces.items()}
    return x


def descent(spaces, x, history):
    """Return the points and gradients that a rule for the step asks for, one pair a step."""
    for grads in history:
        g = {key: space.gradient(x[key], grads[key]) for key, space in spaces.items()}
        step = yield x, g
        x = {key: space.exp(x[key], -step * g[key]) for key, space in spaces.items()}
    yield x, None


def carried(spaces, x, y, v):
    return {key: space.transport(x[key], y[key], v[key]) for key, space in spaces.items()}


def radagd(spaces, x, history, values, smoothness=1.0):
    run = descent(spaces, x, history)
    x, g = next(run)
    size, curvature, old = 1.0 / smoothness, smoothness, None
    for value in values:
        if old is not None:
            (y, h, before) = old
            back = carried(spaces, x, y, g)  # as published, to the old point
            numerator = length(spaces, y, minus(back, h)) ** 2
            both = {key: back[key] + h[key] for key in h}
            product = (length(spaces, y, both) ** 2 - length(spaces, y, minus(back, h)) ** 2) / 4
            denominator = -2 * (value - before + size * product)
            curvature = numerator / denominator if denominator > 0 else 0.0
        a, b, zeta = 3.0, 5 / 4, 1.0
        grown = min((a + 1) / a, a / (b + zeta)) * size
        if curvature > 0:
            factor = a * b / (a**2 + b * (b + zeta)) if size >= 1 / curvature else a / (b + zeta)
            grown = min(grown, factor / curvature)
        size, old = grown, (x, g, value)
        x, g = run.send(size)
    return x


def radgd(spaces, x, history, initial=1.0):
    run = descent(spaces, x, history)
    x, g = next(run)
    size, theta, old = initial, 0.0, None
    for _ in history:
        if old is not None:
            y, h = old
            change = length(spaces, x, minus(g, carried(spaces, y, x, h)))
            new = min(math.sqrt(1 + theta) * size, size * length(spaces, y, h) / (math.sqrt(2) * change))
            size, theta = new, new / size
        old = (x, g)
        x, g = run.send(size)
    return x


def problem(spaces, seed=100):
    shapes = {key: space.shape for key, space in spaces.items()}
    return start(shapes, {key: space.manifold for key, space in spaces.items()}, seed)


def gradients(begin, steps, scale=1.0):
    return [
        {k: scale * normal(*x.shape, seed=10 * t + i) for i, (k, x) in enumerate(begin.items())} for t in range(steps)
    ]


def end(optimizer, begin, history, values=None):
    params, state = begin, optimizer.init(begin)
    for t, grads in enumerate(history):
        value = None if values is None else torch.tensor(values[t], dtype=torch.float64)
        params, state = optimizer.update(grads, state, params, value)
    return params


def assert_same_point(found, expected):
    """Compare the points: on Grassmann, the spans."""
    for key, x in expected.items():
        a, b = (found[key], x) if key != "g" else (found[key] @ found[key].T, x @ x.T)
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("where", SPACES)
def test_distance_over_gradients(variant, where):
    spaces = SPACES[where]
    bound = -0.5 if where == "curved down" else 0.0
    geometry, begin = problem(spaces)
    history = gradients(begin, 6)
    expected = dog(variant, spaces, begin, history, initial=0.3, bound=bound)
    assert_same_point(end(sm.RDoG(geometry, variant=variant, initial=0.3), begin, history), expected)
    # Every setting matters.
    settings = {"initial": 0.4, "eps": 0.5, "lr": 0.7, "curvature": -2.0}
    expected = dog(variant, spaces, begin, history, initial=0.4, eps=0.5, bound=-2.0, lr=0.7)
    assert_same_point(end(sm.RDoG(geometry, variant=variant, **settings), begin, history), expected)
    flat = dog(variant, spaces, begin, history, initial=0.3)
    assert_same_point(end(sm.RDoG(geometry, variant=variant, initial=0.3, curvature=0.0), begin, history), flat)


@pytest.mark.parametrize("where", SPACES)
def test_adaptive_gradient_descent(where):
    """Random gradients take the first method through all its cases: L negative, small and large."""
    spaces = SPACES[where]
    geometry, begin = problem(spaces)
    history = gradients(begin, 8, 0.2)
    values = [0.0, -0.3, -0.31, 0.2, 0.1, 0.1, -0.4, -0.8]
    # A projection is not isometric: carried backward and forward differ in the square of the change.
    if where == "curved down":
        expected = radagd(spaces, begin, history, values, smoothness=2.0)
        assert_same_point(end(sm.RAdaGD(geometry, smoothness=2.0), begin, history, values), expected)
    assert_same_point(end(sm.RAdGD(geometry, initial=0.4), begin, history), radgd(spaces, begin, history, 0.4))


@pytest.mark.parametrize("smoothness", [0.1, 3.0])
def test_the_steps_of_radagd(smoothness):
    """On flat space with a quadratic loss L is its curvature where that is one number, and the steps follow."""
    geometry = sm.Geometry.from_rules({"w": torch.empty(3, 1)})
    optimizer, curvature = sm.RAdaGD(geometry, smoothness=smoothness), 5.0
    params = {"w": normal(3, 1)}
    state, expected = optimizer.init(params), 20 / 63 / smoothness
    for _ in range(12):
        value = curvature / 2 * params["w"].square().sum()
        params, state = optimizer.update({"w": curvature * params["w"]}, state, params, value)
        assert float(state.size) == pytest.approx(expected, rel=1e-6)
        expected = 20 / 63 / curvature if expected * curvature >= 1 else 4 / 3 * expected
    assert float(params["w"].norm()) < 1e-3


def test_published_settings():
    geometry, _ = start({"x": (5, 1)}, {"x": sm.Sphere()})
    dog, adaptive, plain = sm.RDoG(geometry), sm.RAdaGD(geometry), sm.RAdGD(geometry)
    assert (dog.lr, dog.variant, dog.initial, dog.eps, dog.geodesic) == (1.0, "RDoG", 1e-6, 1e-8, True)
    assert (adaptive.lr, adaptive.smoothness, adaptive.geodesic) == (1.0, 1.0, True)
    assert (plain.lr, plain.initial, plain.geodesic) == (1.0, 1.0, True)
    state = dog.init({"x": torch.eye(5, 1)})
    assert (float(state.step), float(state.travelled), float(state.energy)) == (0.0, pytest.approx(1e-6), 0.0)


def test_the_bounds_of_curvature():
    bounds = {sm.SPD(): -0.5, sm.Stiefel(): -0.5, sm.StiefelCanonical(): 0, sm.Grassmann(): 0, sm.Rotations(): 0}
    bounds |= {sm.Orthogonal(): 0, sm.Sphere(): 0, sm.Oblique(): 0, sm.Euclidean(): 0}
    bounds[sm.Product((sm.Sphere(), sm.Stiefel()), (2, 3))] = -0.5
    assert all(curvature_bound(manifold) == bound for manifold, bound in bounds.items())
    # Attained on SPD: a small triangle at the identity is thinner than a flat one by the curvature.
    spd, eye, h = sm.SPD(), torch.eye(2, dtype=torch.float64), 0.02
    u = torch.tensor([[1.0, 0.0], [0.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    v = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64) / math.sqrt(2)
    squared = float(spd.distance(spd.exp(eye, h * u), spd.exp(eye, h * v))) ** 2
    # |exp(hu), exp(hv)|^2 = |u - v|^2 h^2 - K h^4 / 3 + ...
    assert (2 * h**2 - squared) * 3 / h**4 == pytest.approx(-0.5, rel=0.01)
    # And on Stiefel, by the equation of Gauss: II(u, v) = -X sym(u^T v).
    e = torch.eye(4, dtype=torch.float64)
    u, v = e[:, 2:3] @ e[0:1, :2], e[:, 2:3] @ e[1:2, :2]

    def second(a, b):
        return (a.T @ b + b.T @ a) / 2

    assert float((second(u, u) * second(v, v)).sum() - second(u, v).square().sum()) == pytest.approx(-0.5)


@pytest.mark.parametrize("manifold", [sm.Stiefel(), sm.StiefelCanonical()], ids=str)
def test_the_chord_is_no_longer_than_the_geodesic(manifold):
    generator = torch.Generator().manual_seed(0)
    x = manifold.random_point((50, 7, 3), generator, torch.float64)
    v = manifold.random_tangent(x, generator)
    v = v / manifold.inner(x, v, v).sqrt()[:, None, None]
    for size in (1e-3, 0.3, 1.0, 2.0):
        ratio = squared_distance(manifold, x, manifold.exp(x, size * v)).sqrt() / size
        assert (ratio <= 1 + 1e-12).all()
    # No less than 1/sqrt(2) in the canonical metric, and exact in the embedded one, for near points.
    near = squared_distance(manifold, x, manifold.exp(x, 1e-3 * v)).sqrt() / 1e-3
    assert near.min() > (1 - 1e-6 if manifold == sm.Stiefel() else math.sqrt(0.5))


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


def everywhere(seed=100, dtype=torch.float64):
    rules = {key: manifold for key, (_, manifold) in EVERYWHERE.items()}
    return start({key: shape for key, (shape, _) in EVERYWHERE.items()}, rules, seed, dtype)


def test_distances_and_exponentials_everywhere():
    geometry, x = everywhere()
    _, tangents = everywhere(7)
    points = geometry.gather(x)
    generator = torch.Generator().manual_seed(2)
    tangents = [0.05 * g.manifold.random_tangent(p, generator) for g, p in zip(geometry.groups, points, strict=True)]
    moved = [exponential(g.manifold, p, v) for g, p, v in zip(geometry.groups, points, tangents, strict=True)]
    for group, p, v, q in zip(geometry.groups, points, tangents, moved, strict=True):
        torch.testing.assert_close(q, group.manifold.exp(p, v), atol=1e-12, rtol=0)
    size = float(inner(geometry, points, tangents, tangents).sqrt())
    assert float(distance(geometry, points, moved)) == pytest.approx(size, rel=0.02)
    assert float(distance(geometry, points, points)) < 1e-7
    moved[4] = moved[4] * math.nan
    assert distance(geometry, points, moved).isnan()


@pytest.mark.parametrize("geodesic", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PARAMETER_FREE_OPTIMIZERS)
def test_every_manifold_at_once(name, dtype, geodesic):
    """The distance to a feasible point falls; violations stay at rounding (measured: 3.6e-7 and 6.7e-16)."""
    geometry, params = everywhere(dtype=dtype)
    target = everywhere(101, dtype)[1]
    optimizer = make(name, geometry, geodesic=geodesic, **({"initial": 1e-2} if name in VARIANTS else {}))

    def loss(params):
        return sum((x - target[key]).square().sum() for key, x in params.items())

    first, state = float(loss(params)), optimizer.init(params)
    for _ in range(100):
        grads, value = grad_and_value(loss)(params)
        params, state = optimizer.update(grads, state, params, value)
    assert max(geometry.violation(params).values()) < (1e-6 if dtype == torch.float32 else 2e-15)
    assert float(loss(params)) < 0.6 * first


def rayleigh(d=50):
    root = normal(d, d + 10) / math.sqrt(d)
    matrix = root @ root.T
    best = -torch.linalg.eigvalsh(matrix)[-1] / 2
    return (d, 1), sm.Sphere(), lambda x: -(x * (matrix @ x)).sum() / 2, best


def pca(d=20):
    basis, _ = torch.linalg.qr(normal(d, d, seed=3))
    spectrum = torch.tensor([3.0, 2.5, 2.0] + [1.0] * (d - 3), dtype=torch.float64)
    covariance = basis @ torch.diag(spectrum) @ basis.T
    return (d, 3), sm.Grassmann(), lambda x: -(x * (covariance @ x)).sum(), -spectrum[:3].sum()


def karcher(n=4, count=10):
    """The mean of matrices that commute is the exponential of the mean of their logarithms."""
    basis, _ = torch.linalg.qr(normal(n, n, seed=3))
    logs = normal(count, n, seed=4)
    points = basis @ torch.diag_embed(logs.exp()) @ basis.T

    def loss(x):
        return sm.SPD().distance(x.expand(count, n, n), points).square().mean()

    return (n, n), sm.SPD(), loss, loss(basis @ torch.diag(logs.mean(0).exp()) @ basis.T)


@pytest.mark.parametrize("name", PARAMETER_FREE_OPTIMIZERS)
@pytest.mark.parametrize("task", [rayleigh, pca, karcher])
def test_without_tuning(task, name):
    """Excess over the start's: 1e-9 after 300 steps, of NRDoG, whose steps fall as 1/sqrt(t), 1e-2."""
    shape, manifold, loss, best = task()
    geometry, params = start({"x": shape}, {"x": manifold}, seed=1)
    optimizer = make(name, geometry)
    first, state = float(loss(params["x"]) - best), optimizer.init(params)
    for _ in range(300):
        grads, value = grad_and_value(lambda p: loss(p["x"]))(params)
        params, state = optimizer.update(grads, state, params, value)
    assert first > 0.1
    assert float(loss(params["x"]) - best) / first < (1e-2 if name == "NRDoG" else 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "regret"), [("RDoG", 1e-10), ("RDoWG", 1e-12), ("NRDoG", 2e-3)])
def test_the_published_problem(name, regret):
    """Rayleigh quotient on the sphere in R^1000, 5000 full-batch steps, as in the paper's experiments."""
    root = normal(1000, 1100) / math.sqrt(1000)
    matrix = root @ root.T
    best = -torch.linalg.eigvalsh(matrix)[-1] / 2
    geometry, params = start({"x": (1000, 1)}, {"x": sm.Sphere()}, seed=1)
    optimizer = make(name, geometry)
    state = optimizer.init(params)
    for _ in range(5000):
        params, state = optimizer.update({"x": -matrix @ params["x"]}, state, params)
    x = params["x"]
    assert float(-(x * (matrix @ x)).sum() / 2 - best) < regret


@pytest.mark.parametrize("name", PARAMETER_FREE_OPTIMIZERS)
def test_at_the_solution_it_stays(name):
    """A gradient of exactly zero for hundreds of steps overflows nothing, and the next step is taken."""
    geometry, params = start({"x": (4, 1)}, {"x": sm.Sphere()})
    optimizer = make(name, geometry)
    state, value = optimizer.init(params), torch.tensor(0.0)
    grads = {"x": torch.zeros(4, 1)}
    for _ in range(500):
        moved, state = optimizer.update(grads, state, params, value)
    assert largest_difference(moved, params) < 1e-15
    assert not hasattr(state, "size") or float(state.size) <= 4 / 3, "it does not grow"
    moved, state = optimizer.update({"x": normal(4, 1, seed=5)}, state, params, value)
    assert 1e-9 < largest_difference(moved, params) < 2


@pytest.mark.parametrize("name", PARAMETER_FREE_OPTIMIZERS)
def test_a_schedule_may_start_at_zero(name):
    shape, manifold, loss, best = pca()
    geometry, params = start({"x": shape}, {"x": manifold}, seed=1)
    optimizer = make(name, geometry)
    state = optimizer.init(params)
    first = float(loss(params["x"]) - best)
    for t in range(300):
        grads, value = grad_and_value(lambda p: loss(p["x"]))(params)
        scaled = dataclasses.replace(optimizer, lr=min(1.0, t / 20))
        params, state = scaled.update(grads, state, params, value)
    assert float(loss(params["x"]) - best) < 0.02 * first


@pytest.mark.parametrize("name", ["RAdaGD", "RAdGD"])
def test_a_step_of_length_zero_says_nothing_of_smoothness(name):
    """Where nothing moved, what changed between two gradients and two losses is noise."""
    geometry, params = start({"x": (4, 1)}, {"x": sm.Sphere()})
    optimizer = make(name, geometry)
    still = dataclasses.replace(optimizer, lr=0.0)
    params, state = still.update({"x": normal(4, 1, seed=5)}, optimizer.init(params), params, torch.tensor(1.0))
    before = float(state.size)
    for value in (0.999, 2.0):
        short = {"x": 0.3 * normal(4, 1, seed=6)}  # below a quarter turn, beyond which sizes are shortened
        _, after = optimizer.update(short, state, params, torch.tensor(value))
        assert float(after.size) == pytest.approx({"RAdaGD": 4 / 3, "RAdGD": 1.0}[name] * before)


@pytest.mark.parametrize("name", VARIANTS)
def test_without_eps_a_factor_of_the_loss_changes_nothing(name):
    geometry, begin = everywhere()
    history = gradients(begin, 4)
    ends = []
    for factor in (1.0, 1e-6, 1e6):
        optimizer = make(name, geometry, initial=0.1, eps=0.0)
        ends.append(end(optimizer, begin, [{k: factor * g for k, g in grads.items()} for grads in history]))
    assert max(largest_difference(ends[0], other) for other in ends[1:]) < 1e-9


def test_the_scale_of_the_loss_is_that_of_the_guess():
    geometry, begin = start({"x": (6, 1)}, {"x": sm.Sphere()}, seed=100)
    history, values = gradients(begin, 5), [0.0, -0.5, 0.3, 0.1, -0.2]
    first = end(sm.RAdaGD(geometry, smoothness=2.0), begin, history, values)
    scaled = [{"x": 1e4 * grads["x"]} for grads in history]
    same = end(sm.RAdaGD(geometry, smoothness=2e4), begin, scaled, [1e4 * value for value in values])
    assert largest_difference(first, same) < 1e-9
    other = end(sm.RAdGD(geometry, initial=1e-4), begin, scaled)
    assert largest_difference(other, end(sm.RAdGD(geometry), begin, history)) < 1e-9


@pytest.mark.parametrize("name", PARAMETER_FREE_OPTIMIZERS)
def test_how_the_run_is_cut_into_parameters_does_not_matter(name):
    """Two columns on Oblique, two spheres, and a product of two in one matrix are one manifold."""
    shapes = {"oblique": {"x": (5, 2)}, "spheres": {"a": (5, 1), "b": (5, 1)}, "product": {"x": (5, 2)}}
    rules = {
        "oblique": sm.Oblique(),
        "spheres": sm.Sphere(),
        "product": sm.Product((sm.Sphere(), sm.Sphere()), (1, 1), axis=-1),
    }
    begin = start(shapes["oblique"], {"x": sm.Oblique()}, seed=1)[1]["x"]
    ends = []
    for cut, its_shapes in shapes.items():
        geometry, _ = start(its_shapes, {"*": rules[cut]})

        def split(x, its_shapes=its_shapes):
            return {"x": x} if "x" in its_shapes else {"a": x[:, :1], "b": x[:, 1:]}

        history = [split(normal(5, 2, seed=t)) for t in range(5)]
        settings = {"initial": 0.2} if name in VARIANTS else {}
        moved = end(make(name, geometry, **settings), split(begin), history, [0.0, -0.5, 0.3, 0.1, -0.2])
        ends.append(torch.cat(list(moved.values()), dim=1))
    torch.testing.assert_close(ends[1], ends[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(ends[2], ends[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_derivatives_at_a_known_distance(name):
    """Exact in the gradients of the same step, and finite through several."""
    geometry, params = start({"g": (5, 2), "r": (3, 3)}, {"g": sm.Grassmann(), "r": sm.Rotations()}, seed=1)
    optimizer = make(name, geometry, initial=0.5)
    state = optimizer.init(params)
    grads, direction = gradients(params, 2)

    def function(grads, steps=1):
        p, s = params, state
        for _ in range(steps):
            p, s = optimizer.update(grads, s, p)
        return sum((torch.cos(v) * normal(*v.shape, seed=7)).sum() for v in p.values())

    slope = sum((v * direction[k]).sum() for k, v in grad(function)(grads).items())
    h = 1e-6
    ends = [float(function({k: v + s * h * direction[k] for k, v in grads.items()})) for s in (1, -1)]
    assert float(slope) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6)
    assert all(torch.isfinite(v).all() for v in grad(lambda g: function(g, 3))(grads).values())


def test_a_lost_run_raises_nothing_and_spoils_no_other():
    """Decompositions refuse NaN; a distance from one does not. Runs side by side are a vmap."""
    geometry, params = everywhere()
    optimizer = sm.RDoG(geometry, initial=0.1)
    runs = {key: torch.stack([x, x]) for key, x in params.items()}
    grads = {key: normal(*x.shape, seed=5) for key, x in runs.items()}
    grads["subspace"][0] = math.nan

    def three(params, grads):
        state = optimizer.init(params)
        for _ in range(3):
            params, state = optimizer.update(grads, state, params)
        return params

    together = vmap(three)(runs, grads)
    assert all(x[0].isnan().any() for x in together.values())
    alone = three(params, {key: g[1] for key, g in grads.items()})
    assert largest_difference({key: x[1] for key, x in together.items()}, alone) < 1e-12


def test_settings_that_cannot_be():
    geometry, params = start({"x": (4, 1)}, {"x": sm.Sphere()})
    with pytest.raises(ValueError, match="variant must be 'RDoG', 'RDoWG' or 'NRDoG', got 'DoG'"):
        sm.RDoG(geometry, variant="DoG")
    for initial in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"initial must be positive and finite, got {initial}"):
            sm.RDoG(geometry, initial=initial)
        with pytest.raises(ValueError, match=f"initial must be positive and finite, got {initial}"):
            sm.RAdGD(geometry, initial=initial)
        with pytest.raises(ValueError, match=f"smoothness must be positive and finite, got {initial}"):
            sm.RAdaGD(geometry, smoothness=initial)
    optimizer = sm.RAdaGD(geometry)
    with pytest.raises(ValueError, match=r"RAdaGD takes its step from the loss: give it, update\(.*value=loss\)"):
        optimizer.update({"x": normal(4, 1)}, optimizer.init(params), params)


def test_a_manifold_without_a_distance_is_refused():
    methods = {key: value for key, value in vars(sm.Euclidean).items() if callable(value) and "distance" not in key}
    other = type("Other", (sm.Manifold,), {key: value for key, value in methods.items() if not key.startswith("_")})
    geometry = sm.Geometry.from_rules({"x": torch.empty(3, 1)}, {"x": other()})
    with pytest.raises(ValueError, match="RDoG needs the distance from the start; parameter 'x' is on Other"):
        sm.RDoG(geometry)
    optimizer = sm.RAdGD(geometry)  # needs none, and goes by the manifold's own retraction
    params = {"x": torch.zeros(3, 1)}
    moved, _ = optimizer.update({"x": torch.ones(3, 1)}, optimizer.init(params), params)
    assert torch.equal(moved["x"], -torch.ones(3, 1))


def test_the_shell_gives_the_loss_on():
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 2, bias=False).double()
    torch.nn.init.orthogonal_(model.weight)
    inputs = normal(20, 5)
    optimizer = sm.optim.Riemannian(model, {"weight": sm.Stiefel()}, sm.RAdaGD, lr=1.0)

    def closure():
        optimizer.zero_grad()
        loss = -model(inputs).square().mean()
        loss.backward()
        return loss

    closure()
    with pytest.raises(ValueError, match="RAdaGD takes its step from the loss"):
        optimizer.step()
    losses = [float(optimizer.step(closure).detach()) for _ in range(50)]
    best = -torch.linalg.eigvalsh(inputs.T @ inputs)[-2:].sum() / 40
    assert losses[0] - best > 0.1
    assert losses[-1] - best < 1e-9


@pytest.mark.parametrize("kind", [sm.RAdGD, sm.RAdaGD])
@pytest.mark.parametrize("manifold", [sm.Sphere(), sm.Oblique(), sm.Grassmann(), sm.Rotations()], ids=lambda m: m.name)
@pytest.mark.parametrize("first", [1.0, 100.0])
def test_a_first_step_that_is_too_long_teaches_nothing_wrong(kind, manifold, first):
    """Half a turn away the gradient of an even loss is the same: a curvature of zero, and no progress ever after."""
    generator = torch.Generator().manual_seed(0)
    shape = (10, 1) if manifold == sm.Sphere() else (6, 6) if manifold == sm.Rotations() else (12, 3)
    a = torch.randn(shape[0], shape[0], generator=generator, dtype=torch.float64)
    a = a @ a.mT
    weights = torch.arange(shape[1], 0, -1, dtype=torch.float64)
    params = {"x": manifold.random_point(shape, generator, torch.float64)}
    geometry = sm.Geometry.from_rules(params, {"x": manifold})
    optimizer = kind(geometry, **({"initial": first} if kind is sm.RAdGD else {"smoothness": 1.0 / first}))

    def loss(p):
        return (
            -(weights * p["x"] * (a @ p["x"])).sum() if manifold == sm.Rotations() else -(p["x"] * (a @ p["x"])).sum()
        )

    state, losses = optimizer.init(params), []
    for _ in range(400):
        grads, value = torch.func.grad_and_value(loss)(params)
        losses.append(float(value))
        params, state = optimizer.update(grads, state, params, value)
    riemannian = manifold.riemannian_gradient(params["x"], torch.func.grad(loss)(params)["x"])
    assert float(riemannian.norm()) < 1e-5 * float(a.norm())
    assert losses[-1] < losses[0]
