"""``subspace-meta bench step``: the learned step against the traffic that it cannot avoid, and against Adam.

Measured is the whole learned step without projection and retraction: statistics, network, scaling, with the state
updated in place, for the 53 convolution weights of ResNet-50 (He et al. 2016) and for the matrices of a transformer of
12 layers and width 768 (Devlin et al. 2019). The least that a step without momentum can do is read the gradients
(statistics), read them again and write the directions (scaling), and read and write the network's state; with momentum
also read it twice and write it. How long that takes is told by the measured speed of copying the same tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from subspace_kernels import Layout, launch
from torch import Tensor

from subspace_meta.adapter.base import BaseAdapter
from subspace_meta.benchmarks.geometry import tall_shapes
from subspace_meta.evaluation.timing import interleaved


def transformer_shapes(layers: int = 12, width: int = 768) -> list[tuple[int, int]]:
    """Return the matrices of a transformer: four projections and two layers of a perceptron in each block."""
    block = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    return block * layers


SETS = {"ResNet-50": tall_shapes, "transformer": transformer_shapes}


def learned_step(adapter: BaseAdapter, gradients: Sequence[Tensor]) -> Callable[[], None]:
    """Return a function that takes one more step, in place, with directions in buffers of their own."""
    layout = Layout(tuple(tuple(gradient.shape) for gradient in gradients))
    weights = adapter.init_weights(torch.Generator().manual_seed(0))
    held = [adapter.init(layout, gradients)]
    directions = [torch.zeros_like(gradient) for gradient in gradients]

    @torch.no_grad()
    def step() -> None:
        held[0] = adapter(weights, held[0], layout, gradients, in_place=True, out=directions)[-1]

    return step


def _adam(gradients: Sequence[Tensor], foreach: bool) -> Callable[[], object]:
    """Return the step of torch's Adam, the ``foreach`` or the fused one."""
    parameters = [torch.zeros_like(gradient).requires_grad_() for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return torch.optim.Adam(parameters, foreach=foreach, fused=not foreach).step


def kernel_traffic(adapter: BaseAdapter) -> list[dict[str, Any]]:
    """Return what the Triton kernels move in a step, counted from their plans, and their launches.

    Returns:
        One record a set: bytes, their ratio to the least, buckets, launches of a step; what each kernel reads, writes.
    """
    records = []
    for title, shapes in SETS.items():
        layout = Layout(tuple(shapes()))
        for name, momentum in (("without momentum", False), ("with momentum", True)):
            parts = launch.traffic(layout, momentum, hidden=adapter.hidden)
            moved = sum(part.read + part.written for part in parts)
            buckets = sum(part.kernel == "cross_tiles" for part in parts)
            records.append(
                {
                    "what": f"{title}, {name}",
                    "bytes": moved,
                    "ratio": moved / launch.minimum_bytes(layout, momentum, hidden=adapter.hidden),
                    "buckets": buckets,
                    "launches": sum(part.launches for part in parts),
                    "by_kernel": [
                        {"kernel": part.kernel, "tile": part.tile, "read": part.read, "written": part.written}
                        for part in parts
                    ],
                }
            )
    return records


def bench_step(adapter: BaseAdapter, rounds: int = 20) -> list[dict[str, Any]]:
    """Time one step on every set of shapes.

    Args:
        adapter: with momentum; the step without it is timed beside.
        rounds: the least time of these counts.

    Returns:
        One record a line of the table: what, CPU seconds of one thread, what they are compared with, its seconds, their
        ratio.
    """
    light = dataclasses.replace(adapter, momentum_decay=0.0)
    records = []
    for title, shapes in SETS.items():
        generator = torch.Generator().manual_seed(0)
        gradients = [torch.randn(shape, generator=generator) for shape in shapes()]
        copies = [torch.zeros_like(gradient) for gradient in gradients]
        layout = Layout(tuple(shapes()))

        def copy(copies: list[Tensor] = copies, gradients: list[Tensor] = gradients) -> None:
            for to, gradient in zip(copies, gradients, strict=True):
                to.copy_(gradient)

        seconds = interleaved(
            {
                "copy": copy,
                "without momentum": learned_step(light, gradients),
                "with momentum": learned_step(adapter, gradients),
                "Adam foreach": _adam(gradients, foreach=True),
                "Adam fused": _adam(gradients, foreach=False),
            },
            rounds,
        )
        bandwidth = 8 * layout.entries / seconds["copy"]
        for name, chosen in (("without momentum", light), ("with momentum", adapter)):
            least = launch.minimum_bytes(layout, bool(chosen.momentum_decay), hidden=adapter.hidden)
            peers = {
                f"{least / 1e6:.0f} MB at {bandwidth / 1e9:.0f} GB/s": least / bandwidth,
                "torch Adam, foreach": seconds["Adam foreach"],
                "torch Adam, fused": seconds["Adam fused"],
            }
            for peer, theirs in peers.items():
                ours = seconds[name]
                records.append(
                    {
                        "what": f"{title}, {name}",
                        "seconds": ours,
                        "peer": peer,
                        "peer_seconds": theirs,
                        "ratio": ours / theirs,
                    }
                )
    return records
