"""``subspace-meta memory``: what optimizers remember about a model's matrices, counted, and for some of them measured.

State is what an optimizer keeps between steps beside parameters and gradients; here the bytes of the tensors that its
``init`` returns. The matrix LSTM (Gao et al., TPAMI 2022) needs ``34 d^2 + 1024 d p + 2049`` meta-parameters and
``4 d p`` numbers of state for a d x p matrix: what does not fit is counted from that. Measured is the largest resident
memory during three steps in a process of its own, above what parameters and gradients take: state and all buffers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from subspace_meta.benchmarks.geometry import resnet50_convolutions
from subspace_meta.benchmarks.step import transformer_shapes
from subspace_meta.geometry import Geometry
from subspace_meta.manifolds import Stiefel
from subspace_meta.optimizers import MatrixLSTM, RAdam, SubspaceOptimizer
from subspace_meta.optimizers.base import Optimizer
from subspace_meta.optimizers.subspace import PRESETS

# All shapes ``(out, in)``, and how many other parameters (biases, normalisations, embeddings, the head) there are.
MODELS: dict[str, tuple[Callable[[], list[tuple[int, int]]], int]] = {
    "resnet50": (lambda: [(out, fan_in * h * w) for out, fan_in, h, w in resnet50_convolutions()], 2_102_120),
    "transformer": (transformer_shapes, 12 * 9984 + 2 * 768),
}
STEPS = 3


def matrices(model: str, constrained_as_published: bool = False) -> list[tuple[int, int]]:
    """Return the model's matrices as tall ones (d, p); of the publication's choice only those with out <= in."""
    chosen = [(out, fan_in) for out, fan_in in MODELS[model][0]() if out <= fan_in or not constrained_as_published]
    return [(max(shape), min(shape)) for shape in chosen]


def matrix_lstm_parameters(d: int, p: int) -> int:
    """Return the number of meta-parameters of the matrix LSTM for one shape."""
    geometry = Geometry.from_rules({"x": torch.empty(d, p, device="meta")}, {"x": Stiefel()})
    return sum(math.prod(shape) for shape in MatrixLSTM.weight_shapes(geometry).values())


def _optimizer(name: str, geometry: Geometry) -> Optimizer:
    if name == "RAdam":
        return RAdam(geometry, 1e-2)
    return SubspaceOptimizer(geometry, PRESETS[name].init_weights(torch.Generator().manual_seed(0)), name)


def _points(shapes: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
    return {f"{i}": torch.eye(d, p) for i, (d, p) in enumerate(shapes)}


def state_bytes(name: str, shapes: Sequence[tuple[int, int]]) -> int:
    """Return the bytes of an optimizer's state."""
    points = _points(shapes)
    state = _optimizer(name, Geometry.from_rules(points, {"*": Stiefel()})).init(points)
    return sum(leaf.numel() * leaf.element_size() for leaf in pytree.tree_leaves(state))


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _peak(name: str, shapes: Sequence[tuple[int, int]]) -> int:
    """Return the largest resident memory of some steps above that of parameters and gradients; runs in a process."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    points = _points(shapes)
    grads = {key: torch.randn(value.shape, generator=generator) for key, value in points.items()}
    small = [torch.eye(4, 2)]  # what the first step of all loads is not the optimizer's memory
    _run("Adam", {"0": small[0]}, {"0": torch.ones(4, 2)})
    _run("RAdam" if name == "Adam" else name, {"0": torch.eye(4, 2)}, {"0": torch.ones(4, 2)})
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
    before = _resident("VmRSS")
    _run(name, points, grads)
    return _resident("VmHWM") - before


@torch.no_grad()
def _run(name: str, points: dict[str, torch.Tensor], grads: dict[str, torch.Tensor]) -> None:
    if name == "Adam":
        parameters = [torch.nn.Parameter(value) for value in points.values()]
        for parameter, grad in zip(parameters, grads.values(), strict=True):
            parameter.grad = grad
        adam = torch.optim.Adam(parameters)
        for _ in range(STEPS):
            adam.step()
        return
    optimizer = _optimizer(name, Geometry.from_rules(points, {"*": Stiefel()}))
    state = optimizer.init(points)
    for _ in range(STEPS):
        if isinstance(optimizer, SubspaceOptimizer):
            state = optimizer.update_(grads, state, points)
        else:
            points, state = optimizer.update(grads, state, points)


def measured_peak(name: str, shapes: Sequence[tuple[int, int]]) -> int | None:
    """Return the peak of an optimizer's steps in bytes; ``None`` where the system does not tell (it is Linux)."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak, name, tuple(shapes)).result()


def memory(model: str, measure: bool = True) -> list[dict[str, Any]]:
    """Return a record for every optimizer: meta-parameters, state and measured peak in bytes, and state by layer.

    Raises:
        ValueError: the model is unknown.
    """
    if model not in MODELS:
        raise ValueError(f"model {model!r} is unknown; there are {', '.join(MODELS)}")
    shapes, published = matrices(model), matrices(model, constrained_as_published=True)
    numbers = sum(d * p for d, p in shapes)
    records = []
    for name in ("light", "base", "paper", "RAdam"):
        weights = 0 if name == "RAdam" else sum(math.prod(s) for s in PRESETS[name].weight_shapes().values())
        records.append(
            {
                "optimizer": name if name == "RAdam" else f"Subspace {name}",
                "matrices": len(shapes),
                "meta_parameters": weights,
                "state_bytes": state_bytes(name, shapes),
                "peak_bytes": measured_peak(name, shapes) if measure else None,
                "layers": [{"d": d, "p": p, "state_bytes": state_bytes(name, [(d, p)])} for d, p in shapes],
            }
        )
    adam = [{"d": d, "p": p, "state_bytes": 8 * d * p} for d, p in shapes]
    records.append(
        {
            "optimizer": "Adam, unconstrained",
            "matrices": len(shapes),
            "meta_parameters": 0,
            "state_bytes": 8 * numbers,
            "peak_bytes": measured_peak("Adam", shapes) if measure else None,
            "layers": adam,
        }
    )
    for title, counted in (("one network a matrix", published), ("one a shape", sorted(set(published)))):
        records.append(
            {
                "optimizer": f"matrix LSTM, {title}",
                "matrices": len(published),
                "meta_parameters": sum(matrix_lstm_parameters(d, p) for d, p in counted),
                "state_bytes": sum(16 * d * p for d, p in published),
                "peak_bytes": None,
                "layers": [{"d": d, "p": p, "state_bytes": 16 * d * p} for d, p in published],
            }
        )
    return records


def others(model: str) -> int:
    """Return how many of the model's parameters are in none of the matrices."""
    return MODELS[model][1]
