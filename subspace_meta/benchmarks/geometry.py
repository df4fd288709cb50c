"""``subspace-meta bench geometry``: one optimizer step on real sets of shapes, side by side with geoopt if installed.

Three questions: the 53 convolution weights of ResNet-50 as tall matrices (He et al. 2016; 23.5 million entries), 256
separate 16 x 16 matrices, and one step on 4608 x 512 with the canonical metric against the n x n solve that the
textbook Cayley transform needs. On the first two the whole step of the learned optimizer stands beside RAdam's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from subspace_meta.evaluation.timing import interleaved
from subspace_meta.geometry import Geometry
from subspace_meta.manifolds import Stiefel, StiefelCanonical
from subspace_meta.optimizers import RSGD, RAdam
from subspace_meta.optimizers.base import Optimizer
from subspace_meta.optimizers.subspace import SubspaceOptimizer
from subspace_meta.weights import RELEASES, pretrained


def resnet50_convolutions() -> list[tuple[int, int, int, int]]:
    """Return the shapes ``(out, in, height, width)`` of the 53 convolutions of ResNet-50."""
    shapes = [(64, 3, 7, 7)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                shapes.append((4 * width, channels, 1, 1))
            channels = 4 * width
    return shapes


def resnet50_matrices() -> list[tuple[int, int]]:
    """Return the same weights as matrices ``(out, in height width)``."""
    return [(out, fan_in * height * width) for out, fan_in, height, width in resnet50_convolutions()]


def tall(shapes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return matrices as tall ones ``(d, p)``, d >= p."""
    return [(max(shape), min(shape)) for shape in shapes]


def tall_shapes() -> list[tuple[int, int]]:
    """Return the weights of ResNet-50 as tall matrices."""
    return tall(resnet50_matrices())


def _stepper(make: Callable[[Geometry], Optimizer], points: dict[str, Tensor], grads: dict[str, Tensor]) -> Any:
    """Return a function that takes one more step of one of our optimizers."""
    geometry = Geometry.from_rules(points, {"*": Stiefel()})
    optimizer = make(geometry)
    held: list[Any] = [points, optimizer.init(points)]

    @torch.no_grad()
    def step() -> None:
        held[0], held[1] = optimizer.update(grads, held[1], held[0])

    return step


def _geoopt_stepper(name: str, points: dict[str, Tensor], grads: dict[str, Tensor], **options: float) -> Any:
    """Return a function that takes one more step of geoopt's optimizer of that name, or ``None`` without geoopt."""
    try:
        import geoopt
    except ImportError:
        return None
    manifold = geoopt.EuclideanStiefel()
    parameters = [geoopt.ManifoldParameter(x.clone(), manifold=manifold) for x in points.values()]
    for parameter, grad in zip(parameters, grads.values(), strict=True):
        parameter.grad = grad.clone()
    return getattr(geoopt.optim, name)(parameters, **options).step


def _compare(shapes: list[tuple[int, int]], rounds: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    points = {f"w{i}": Stiefel().random_point(shape, generator) for i, shape in enumerate(shapes)}
    grads = {name: torch.randn(x.shape, generator=generator) / x.shape[0] ** 0.5 for name, x in points.items()}
    contestants = {
        "RSGD": _stepper(lambda geometry: RSGD(geometry, 1e-2), points, grads),
        "geoopt RSGD": _geoopt_stepper("RiemannianSGD", points, grads, lr=1e-2),
        "RAdam": _stepper(lambda geometry: RAdam(geometry, 1e-2), points, grads),
        "geoopt RAdam": _geoopt_stepper("RiemannianAdam", points, grads, lr=1e-2),
        **{
            preset: _stepper(partial(SubspaceOptimizer, weights=pretrained(preset), preset=preset), points, grads)
            for preset in RELEASES
        },
    }
    return interleaved({name: step for name, step in contestants.items() if step is not None}, rounds)


def _canonical(d: int, p: int, rounds: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    manifold = StiefelCanonical()
    x = manifold.random_point((d, p), generator)
    gradient = torch.randn(d, p, generator=generator)
    a, b = torch.randn(d, d, generator=generator) + d * torch.eye(d), torch.randn(d, p, generator=generator)

    @torch.no_grad()
    def step() -> None:
        manifold.retract(x, -1e-2 * manifold.riemannian_gradient(x, gradient))

    return interleaved({"canonical step": step, "n x n solve": lambda: torch.linalg.solve(a, b)}, rounds)


def bench_geometry(rounds: int = 9) -> list[dict[str, Any]]:
    """Run all comparisons.

    Returns:
        One record a line of the table: what, seconds of ours, seconds of the peer (``None`` if it is not installed),
        their ratio.
    """
    records = []
    for title, shapes, repeats in (
        ("ResNet-50, 53 convolutions", tall_shapes(), rounds),
        ("256 separate 16 x 16", [(16, 16)] * 256, 10 * rounds),
    ):
        seconds = _compare(shapes, repeats)
        for name in ("RSGD", "RAdam"):
            peer = seconds.get(f"geoopt {name}")
            records.append(_record(f"{title}: {name}", seconds[name], f"geoopt {name}", peer))
        for preset in RELEASES:
            records.append(_record(f"{title}: learned, {preset}", seconds[preset], "this RAdam", seconds["RAdam"]))
    seconds = _canonical(4608, 512, max(2, rounds // 2))
    records.append(
        _record(
            "4608 x 512 canonical metric: step", seconds["canonical step"], "4608 x 4608 solve", seconds["n x n solve"]
        )
    )
    return records


def _record(what: str, ours: float, peer: str, theirs: float | None) -> dict[str, Any]:
    return {
        "what": what,
        "seconds": ours,
        "peer": peer,
        "peer_seconds": theirs,
        "ratio": None if theirs is None else ours / theirs,
    }
