"""``subspace-meta memory``: what optimizers remember about a model's matrices, counted, and for some of them measured.

State is what an optimizer keeps between steps beside parameters and gradients; here the bytes of the tensors that its
``init`` returns. The matrix LSTM (Gao et al., TPAMI 2022) needs ``34 d^2 + 1024 d p + 2049`` meta-parameters and
``4 d p`` numbers of state for a d x p matrix: what does not fit is counted from that. Measured is the largest resident
memory during three steps in a process of its own, above what parameters and gradients take: state and all buffers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from subspace_meta.benchmarks.geometry import resnet50_matrices, tall
from subspace_meta.benchmarks.step import transformer_shapes
from subspace_meta.geometry import Geometry
from subspace_meta.manifolds import Stiefel
from subspace_meta.optimizers import MatrixLSTM, RAdam, SubspaceOptimizer
from subspace_meta.optimizers.base import Optimizer
from subspace_meta.optimizers.subspace import PRESETS


@dataclass(frozen=True)
class Model:
    """A model: its matrices ``(out, in)``, and how many other parameters (biases, norms, head) there are."""

    matrices: tuple[tuple[int, int], ...]
    others: int


MODELS = {
    "resnet50": Model(tuple(resnet50_matrices()), 2_102_120),
    "transformer": Model(tuple(transformer_shapes()), 12 * 9984 + 2 * 768),
}
STEPS = 3


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
    return sum(leaf.numel() * leaf.element_size() for leaf in pytree.tree_flatten(state)[0])


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _peak(name: str, shapes: Sequence[tuple[int, int]]) -> int:
    """Return the largest resident memory of some steps above that of parameters and gradients; runs in a process."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    points = _points(shapes)
    grads = {key: torch.randn(value.shape, generator=generator) for key, value in points.items()}
    _run(name, {"0": torch.eye(4, 2)}, {"0": torch.ones(4, 2)})  # what the first step loads is not its memory
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
    chosen = MODELS[model].matrices
    shapes = tall(chosen)
    published = tall([(out, fan_in) for out, fan_in in chosen if out <= fan_in])  # what the predecessor constrains

    def record(
        name: str,
        weights: int,
        of_layer: Callable[[int, int], int],
        constrained: Sequence[tuple[int, int]] = shapes,
        **figures: Any,
    ) -> dict[str, Any]:
        layers = [{"d": d, "p": p, "state_bytes": of_layer(d, p)} for d, p in constrained]
        total = sum(layer["state_bytes"] for layer in layers)
        counted = {"matrices": len(layers), "meta_parameters": weights, "state_bytes": total, "peak_bytes": None}
        return {"optimizer": name, **counted, **figures, "layers": layers}

    def peak(name: str) -> int | None:
        return measured_peak(name, shapes) if measure else None

    def own(name: str, title: str, weights: int) -> dict[str, Any]:
        one = functools.cache(lambda d, p: state_bytes(name, [(d, p)]))
        return record(title, weights, one, state_bytes=state_bytes(name, shapes), peak_bytes=peak(name))

    records = [
        own(name, f"Subspace {name}", sum(math.prod(shape) for shape in PRESETS[name].weight_shapes().values()))
        for name in ("light", "base", "paper")
    ]
    records.append(own("RAdam", "RAdam", 0))
    records.append(record("Adam, unconstrained", 0, lambda d, p: 8 * d * p, peak_bytes=peak("Adam")))
    for title, networks in (("one network a matrix", published), ("one a shape", sorted(set(published)))):
        weights = sum(matrix_lstm_parameters(d, p) for d, p in networks)
        records.append(record(f"matrix LSTM, {title}", weights, lambda d, p: 16 * d * p, constrained=published))
    return records
