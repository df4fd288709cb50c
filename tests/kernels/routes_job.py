"""Where the Triton kernels run, in the interpreter: counted launches, and right values everywhere.

    TRITON_INTERPRET=1 SUBSPACE_KERNELS_INTERPRET=1 python tests/kernels/routes_job.py

Run by ``test_routes.py`` in a process of its own. CPU tensors then take the way of CUDA tensors.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
os.environ["SUBSPACE_KERNELS_INTERPRET"] = "1"
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
os.environ["CI"] = "1"  # operators whose results share memory raise, as they will everywhere; read by torch's import
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from making import lively_weights, normal, start
from subspace_kernels import launch, operations, reference
from torch.utils import _pytree as pytree
from transform_matrix import LAYOUT, OPERATIONS, TRANSFORMS, check, lstm_parts

import subspace_meta as sm

torch.set_num_threads(1)
TILES = {"cross": "cross_tiles", "rank2": "rank_tiles", "statistics": "cross_tiles", "directions": "rank_tiles"}
RUNS = {("none", False), ("none", True), ("autograd", False), ("double", False)}


def launched(function, *arguments, **settings):
    """Return how often each kernel was launched by a call of ``function``, and what it returned."""
    launch.launches.clear()
    returned = function(*arguments, **settings)
    return dict(launch.launches), returned


def operations_under_transforms() -> None:
    """Kernels run without derivative and in eager autograd; under every transform the values are right without them."""
    for operation in OPERATIONS:
        for transform in TRANSFORMS:
            for compiled in (False, True):
                if compiled and transform not in ("none", "grad", "vmap", "jvp", "hessian product", "autograd"):
                    continue
                with torch.set_grad_enabled(transform != "none"):
                    counts, _ = launched(check, operation, transform, compiled, torch.float32, tolerance=1e-5)
                expected = (transform, compiled) in RUNS
                if operation == "lstm_cell" and transform == "double":
                    continue  # its second derivative recomputes the reference
                kernel = TILES.get(operation, "lstm_cell")
                assert (counts.get(kernel, 0) > 0) == expected, (operation, transform, compiled, counts)
                assert expected or not counts, (operation, transform, compiled, counts)


def transforms_without_grad_mode() -> None:
    """With gradients off there is no second look: vmap and jvp must still not meet a kernel."""
    function, _, size = OPERATIONS["cross"]
    x = normal(size, dtype=torch.float32)
    for transform in (
        lambda: torch.func.vmap(lambda y: torch.cat(function(y)))(x[None]),
        lambda: torch.func.jvp(lambda y: torch.cat(function(y)), (x,), (x,)),
    ):
        for run in (transform, torch.compile(transform, backend="aot_eager", fullgraph=True)):
            with torch.no_grad():
                assert not launched(run)[0]


def backward_uses_the_other_kernel() -> None:
    """The derivative of cross is rank2 and cross, that of rank2 is cross and rank2."""
    a, b = (normal(5, 3, seed=i, dtype=torch.float32).requires_grad_() for i in range(2))
    counts, _ = launched(lambda: torch.cat(operations.cross([a], [b])).sum().backward())
    assert counts["rank_tiles"] == 2, counts
    u, v = (normal(n, seed=n, dtype=torch.float32).requires_grad_() for n in (5, 3))
    counts, _ = launched(lambda: operations.rank2([a], u, v)[0].square().sum().backward())
    assert counts["cross_tiles"] == 1, counts
    assert counts["rank_tiles"] == 2, counts


def inputs_that_depend_on_one_another() -> None:
    """A derivative of the network counts the way through it only, also where one input is a function of another."""
    network, inputs, _, cell = lstm_parts(normal(OPERATIONS["lstm_cell"][2], dtype=torch.float32))
    cell = cell.detach().requires_grad_()

    def twice(function):
        outputs = function(network, inputs, torch.tanh(cell), cell, LAYOUT)
        loss = torch.cat([part.reshape(-1) for part in outputs]).square().sum()
        (first,) = torch.autograd.grad(loss, cell, create_graph=True)
        return first, torch.autograd.grad(first.square().sum(), cell)[0]

    counts, found = launched(twice, operations.lstm_cell)
    assert counts["lstm_cell"] == 1, counts
    for mine, theirs in zip(found, twice(reference.lstm_cell), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def same_tensors_only() -> None:
    """A matrix and its transposed view share an address, and are two."""
    x = normal(4, 4, dtype=torch.float32)
    with torch.no_grad():
        rows, columns = torch.ops.subspace_kernels.cross_sums([x], [x.mT], None, None).split(4)
    torch.testing.assert_close(rows, (x * x.mT).sum(dim=1))
    torch.testing.assert_close(columns, (x * x.mT).sum(dim=0))


def optimizer_steps() -> None:
    """The whole step, eager, in place and compiled, against float64; and which kernels it took."""
    shapes = {"a": (30, 5), "b": (6, 2), "c": (6, 2), "bias": (4,)}
    geometry, exact = start(shapes, {"a": sm.Stiefel(), "[bc]": sm.Grassmann()}, seed=1)
    for decay in (0.9, 0.0):
        adapter = type(sm.PRESETS["base"])(hidden=4, momentum_decay=decay)
        double = {k: v.double() for k, v in adapter.init_weights(torch.Generator().manual_seed(0)).items()}
        single = {k: v.float() for k, v in double.items()}
        reference = sm.SubspaceOptimizer(geometry, double, adapter)
        optimizer = sm.SubspaceOptimizer(geometry, single, adapter)
        params = {k: v.float() for k, v in exact.items()}
        own = {k: v.clone() for k, v in params.items()}
        state, own_state, exact_state = optimizer.init(params), optimizer.init(own), reference.init(exact)
        compiled = torch.compile(optimizer.update, backend="aot_eager", fullgraph=True)
        compiled_params, compiled_state = params, state
        exact_params = exact
        for t in range(2):
            grads = {k: normal(*v.shape, seed=t) for k, v in params.items()}
            exact_params, exact_state = reference.update(grads, exact_state, exact_params)
            low = {k: v.float() for k, v in grads.items()}
            with torch.no_grad():
                eager, (params, state) = launched(optimizer.update, low, state, params)
                inside, (compiled_params, compiled_state) = launched(compiled, low, compiled_state, compiled_params)
                in_place, own_state = launched(optimizer.update_, low, own_state, own)
            for counts in (eager, inside, in_place):
                assert counts["cross_tiles"] >= 1, counts
                assert counts["rank_tiles"] >= 1, counts
                assert counts["lstm_cell"] == 1, counts
            for found in (params, compiled_params, own):
                for name, value in found.items():
                    torch.testing.assert_close(value.double(), exact_params[name], rtol=0, atol=3e-6)
        for mine, theirs in zip(pytree.tree_leaves(own_state), pytree.tree_leaves(state), strict=True):
            torch.testing.assert_close(mine, theirs)


def meta_gradient(optimizer, weights, params, dtype):
    """Return the derivative of a loss after two steps with respect to the meta-parameters."""
    state = optimizer.init(params)
    for t in range(2):
        params, state = optimizer.update({"a": normal(8, 3, seed=t, dtype=dtype)}, state, params)
    loss = (params["a"] * normal(8, 3, seed=9, dtype=dtype)).sum()
    return torch.autograd.grad(loss, list(weights.values()))


def first_order_meta_gradient() -> None:
    """Eager autograd through a step, with respect to the meta-parameters: kernels forward, right values."""
    geometry, exact = start({"a": (8, 3)}, {"a": sm.Stiefel()}, seed=2)
    gradients = []
    for dtype in (torch.float64, torch.float32):
        weights = {k: v.requires_grad_() for k, v in lively_weights(dtype=dtype).items()}
        optimizer = sm.SubspaceOptimizer(geometry, weights)
        params = {k: v.to(dtype) for k, v in exact.items()}

        counts, gradient = launched(meta_gradient, optimizer, weights, params, dtype)
        gradients.append(gradient)
        kernels = {"cross_tiles", "rank_tiles", "lstm_cell"}
        assert kernels <= counts.keys() if dtype == torch.float32 else not counts, counts
    for double, single in zip(*gradients, strict=True):
        torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-5 * max(1.0, float(double.abs().max())))


if __name__ == "__main__":
    for job in (
        operations_under_transforms,
        transforms_without_grad_mode,
        backward_uses_the_other_kernel,
        inputs_that_depend_on_one_another,
        same_tensors_only,
        optimizer_steps,
        first_order_meta_gradient,
    ):
        job()
        print(f"{job.__name__}: right", flush=True)
