"""Things that tests make: normal tensors from a seed, meta-parameters that use every input, optimizers by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import subspace_meta as sm
from subspace_meta.optimizers.subspace import PRESETS, Adapter
from subspace_meta.tasks.base import TaskFamily

MANIFOLDS = {
    "Stiefel, Cholesky QR": sm.Stiefel(),
    "Stiefel, Newton-Schulz": sm.Stiefel(retraction=sm.PolarNewtonSchulz()),
    "Grassmann": sm.Grassmann(),
}
OPTIMIZERS = (
    "base",
    "paper",
    "RSGD",
    "RSGD momentum",
    "RSGD Nesterov",
    "RAdam",
    "RAMSGrad",
    "RASA-L",
    "RASA-R",
    "RASA-LR",
    "RASA decay",
    "CRMSProp",
    "MatrixLSTM",
)
# One step size for all parameters of a run.
PARAMETER_FREE_OPTIMIZERS = ("RDoG", "RDoWG", "NRDoG", "RAdaGD", "RAdGD")
# Defined on matrices with orthonormal columns only; the first five leave them by a bounded distance.
INFEASIBLE_OPTIMIZERS = ("Landing", "POGO", "POGO momentum", "POGO VectorAdam", "POGO Muon")
ORTHONORMAL_OPTIMIZERS = (
    *INFEASIBLE_OPTIMIZERS,
    "RSDM permutation",
    "RSDM orthogonal",
    "SPEL",
    "manifold Muon",
    "manifold Muon momentum",
    "intrinsic Muon",
    "intrinsic Muon momentum",
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def drawn(family: TaskFamily, count: int, steps: int, seed: int = 0) -> tuple[dict, dict, dict]:
    """Return ``count`` tasks of a family, their starts, and batches for so many steps."""
    generator = torch.Generator().manual_seed(seed)
    tasks = family.draw(generator, count)
    return tasks, family.init(tasks, generator), family.sample(tasks, generator, steps)


def pick(tree: Mapping[str, Tensor], *index: int) -> dict[str, Tensor]:
    """Return one entry of every tensor, of one task for instance."""
    return {name: value[index] for name, value in tree.items()}


def lively_weights(
    preset: str | Adapter = "base", seed: int = 0, dtype: torch.dtype = torch.float64, size: float = 0.3
) -> dict:
    """Return meta-parameters in which no entry is zero, so that every feature and every head matters; short steps."""
    generator = torch.Generator().manual_seed(seed)
    weights = (PRESETS[preset] if isinstance(preset, str) else preset).init_weights(generator)
    if "length.bias" in weights:
        weights["length.bias"] -= 3.0  # with these a run of long steps is chaotic, and retractions shorten them
    sizes = {"length.gauge": 0.1 * size}  # powers of what spans decades
    return {
        name: value.to(dtype)
        + sizes.get(name, size) * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, value in weights.items()
    }


def leaves_of(tree) -> list:
    """Return the leaves of a tree; the oldest torch has no name for it."""
    return pytree.tree_flatten(tree)[0]


def adapt_step(adapter, weights, state, layout, gradients):
    """Return the updates of an adapter, direction times factor, and its new state."""
    directions, factors, state = adapter(weights, state, layout, gradients)
    return [factor * direction for direction, factor in zip(directions, factors, strict=True)], state


def lively_matrix_weights(geometry: sm.Geometry, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict:
    """Return meta-parameters of the matrix LSTM in which no matrix is zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = sm.MatrixLSTM.init_weights(geometry, generator)
    noise = {
        name: 0.3 * torch.randn(value.shape, generator=generator) / (value.shape or (1,))[-1] ** 0.5
        for name, value in weights.items()
    }
    return {name: (value + noise[name]).to(dtype) for name, value in weights.items()}


def make_optimizer(
    name: str, geometry: sm.Geometry, dtype: torch.dtype = torch.float64, lr: float = 1e-2, seed: int = 0
) -> sm.Optimizer:
    """Return one of ``OPTIMIZERS``, ``PARAMETER_FREE_OPTIMIZERS`` or ``ORTHONORMAL_OPTIMIZERS``."""
    if name in ("base", "paper"):
        return sm.SubspaceOptimizer(geometry, lively_weights(name, seed, dtype), name)
    return {
        "RSGD": lambda: sm.RSGD(geometry, lr),
        "RSGD momentum": lambda: sm.RSGD(geometry, lr, momentum=0.9),
        "RSGD Nesterov": lambda: sm.RSGD(geometry, lr, momentum=0.9, nesterov=True),
        "RAdam": lambda: sm.RAdam(geometry, lr),
        "RAMSGrad": lambda: sm.RAdam(geometry, lr, amsgrad=True),
        "CRMSProp": lambda: sm.CRMSProp(geometry, lr),
        "MatrixLSTM": lambda: sm.MatrixLSTM(geometry, lively_matrix_weights(geometry, seed, dtype), lr),
        "Landing": lambda: sm.Landing(geometry, lr),
        "POGO": lambda: sm.POGO(geometry, lr),
        "POGO momentum": lambda: sm.POGO(geometry, lr, momentum=0.9),
        "POGO VectorAdam": lambda: sm.POGO(geometry, lr, base="vector_adam"),
        "POGO Muon": lambda: sm.POGO(geometry, lr, momentum=0.5, base="muon"),
        "manifold Muon": lambda: sm.ManifoldMuon(geometry, lr, iterations=3),
        "manifold Muon momentum": lambda: sm.ManifoldMuon(geometry, lr, momentum=0.9, iterations=3),
        "intrinsic Muon": lambda: sm.IntrinsicMuon(geometry, lr),
        "intrinsic Muon momentum": lambda: sm.IntrinsicMuon(geometry, lr, momentum=0.9),
        # Far from where they start, so that a few steps are seen.
        "RDoG": lambda: sm.RDoG(geometry, lr, "RDoG", initial=1.0),
        "RDoWG": lambda: sm.RDoG(geometry, lr, "RDoWG", initial=1.0),
        "NRDoG": lambda: sm.RDoG(geometry, lr, "NRDoG", initial=1.0),
        "RAdaGD": lambda: sm.RAdaGD(geometry, lr),
        "RAdGD": lambda: sm.RAdGD(geometry, lr),
        "RSDM permutation": lambda: sm.RSDM(geometry, lr, size=3),
        "RSDM orthogonal": lambda: sm.RSDM(geometry, lr, size=3, sampling="orthogonal"),
        "SPEL": lambda: sm.SPEL(geometry, lr),
        "RASA-L": lambda: sm.RASA(geometry, lr, variant="L"),
        "RASA-R": lambda: sm.RASA(geometry, lr, variant="R"),
        "RASA-LR": lambda: sm.RASA(geometry, lr),
        "RASA decay": lambda: sm.RASA(geometry, lr, decay=True),
    }[name]()


def start(
    shapes: Mapping[str, Sequence[int]],
    rules: Mapping[str, sm.Manifold],
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[sm.Geometry, dict[str, Tensor]]:
    """Return a geometry and a random feasible start."""
    geometry = sm.Geometry.from_rules({k: torch.empty(*s, device="meta") for k, s in shapes.items()}, rules)
    params = geometry.initialize(torch.Generator().manual_seed(seed), torch.float64)
    return geometry, {name: value.to(dtype) for name, value in params.items()}


def largest_difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Return the largest absolute difference of two dicts of tensors."""
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)
