"""Every manifold with every kind of optimizer: compiled equals eager, on the manifold, without recompilation.

Elsewhere optimizers take Euclidean steps under torch.compile without a word; so the compiled run is compared with
the eager one *and* its feasibility is measured. A few cells run always, the others behind the marker ``slow``.
"""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import subspace_meta as sm
from subspace_meta.manifolds import Manifold

MANIFOLDS: dict[str, tuple[Manifold, tuple[int, ...]]] = {
    "Euclidean": (sm.Euclidean(), (6, 3)),
    "Sphere": (sm.Sphere(), (6, 1)),
    "Oblique": (sm.Oblique(), (6, 3)),
    "Stiefel-CholeskyQR": (sm.Stiefel(), (6, 3)),
    "Stiefel-Polar": (sm.Stiefel(sm.PolarNewtonSchulz()), (6, 3)),
    "StiefelCanonical": (sm.StiefelCanonical(), (6, 3)),
    "Grassmann": (sm.Grassmann(), (6, 3)),
    "SPD": (sm.SPD(), (4, 4)),
    "Rotations": (sm.Rotations(), (4, 4)),
    "Orthogonal": (sm.Orthogonal(), (4, 4)),
    "Product": (sm.Product((sm.Stiefel(), sm.Oblique()), (2, 1), axis=-1), (6, 3)),
}
THETA = {name: value.double() for name, value in sm.pretrained().items()}
OPTIMIZERS: dict[str, Callable[[sm.Geometry, Tensor], sm.Optimizer]] = {
    "RSGD": lambda geometry, lr: sm.RSGD(geometry, lr, momentum=0.9),
    "RAdam": lambda geometry, lr: sm.RAdam(geometry, lr),
    "RASA": lambda geometry, lr: sm.RASA(geometry, lr),
    "Subspace": lambda geometry, lr: sm.SubspaceOptimizer(geometry, THETA),
}
ALWAYS = {("Stiefel-CholeskyQR", "RSGD"), ("SPD", "Subspace")}
CELLS = [
    pytest.param(manifold, optimizer, marks=[] if (manifold, optimizer) in ALWAYS else pytest.mark.slow)
    for manifold in MANIFOLDS
    for optimizer in OPTIMIZERS
]


@functools.cache
def start(name: str, dtype: torch.dtype = torch.float32) -> tuple[sm.Geometry, dict[str, Tensor], Tensor]:
    """A feasible start, and a target that makes a smooth loss with a minimum."""
    manifold, shape = MANIFOLDS[name]
    generator = torch.Generator().manual_seed(3)
    geometry = sm.Geometry.from_rules({"x": torch.empty(shape)}, {"x": manifold})
    x = manifold.random_point(shape, generator, dtype)
    target = manifold.random_point(shape, generator, dtype)
    return geometry, {"x": x}, target


@pytest.mark.parametrize(("manifold", "optimizer"), CELLS)
def test_compiled_equals_eager_and_stays_feasible(manifold: str, optimizer: str) -> None:
    # The learned optimizer carries roundings on in its own state: in float32 they grow to 2e-4 in a hundred steps.
    dtype, tolerance = (torch.float64, 1e-10) if optimizer == "Subspace" else (torch.float32, 1e-5)
    geometry, params, target = start(manifold, dtype)

    def step(params, state, lr, noise):
        # Noise keeps the gradient away from zero: a scale-invariant step would follow the rounding errors of a zero.
        grads = torch.func.grad(lambda p: 0.5 * (p["x"] - target - noise).square().sum())(params)
        return OPTIMIZERS[optimizer](geometry, lr).update(grads, state, params)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    runs = []
    for function in (step, compiled):
        current, state = params, OPTIMIZERS[optimizer](geometry, torch.tensor(0.0, dtype=dtype)).init(params)
        generator = torch.Generator().manual_seed(4)
        for t in range(100):
            noise = 0.3 * torch.randn(target.shape, generator=generator, dtype=dtype)
            rate = torch.tensor(0.02 / (1 + t / 20), dtype=dtype)
            current, state = function(current, state, rate, noise)
        runs.append(current["x"])
    eager, fast = runs
    assert counter.frame_count <= 2
    scale = max(1.0, float(eager.abs().max()))
    assert (eager - fast).abs().max() <= tolerance * scale
    assert geometry.violation({"x": fast})["x"] <= 1e-5
    assert (eager - params["x"]).abs().max() > 1e-3, "nothing moved: the comparison would show nothing"
