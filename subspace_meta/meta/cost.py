"""What a meta-gradient will cost, before it is computed.

One step of each inner loop is run eagerly, once forward and once back, with counters: bytes of the carry, bytes that
autograd saves for the way back (residuals), flops of the matrix products. With T
steps, a checkpoint interval of k, and the last m intervals kept

    peak bytes = ceil(T/k) carries + m k residuals + the mini-batches,
    forward passes = 2T - (steps of the last m intervals),   backward passes = T.

Compiled code keeps other residuals than eager code, but about as many bytes (16 tasks on St(64, 8): 1.14 MB a step
predicted, 1.22 MB measured). The time to compile depends on none of T, k and tasks: see docs/meta_gradients.md.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from subspace_meta.adapter.network import Weights
from subspace_meta.meta.unroll import InnerLoop, Trace, pull_back, run
from subspace_meta.tasks.base import Batch, Data, Problem


@dataclass(frozen=True)
class Cost:
    """Predicted cost of one meta-gradient.

    Attributes:
        tasks, steps, interval, kept: of the inner loops.
        carry_bytes: of one carry.
        residual_bytes: of one step, eager.
        batch_bytes: of all mini-batches.
        flops: of the matrix products in one step of one task, forward and back.
    """

    tasks: int
    steps: int
    interval: int
    kept: int
    carry_bytes: int
    residual_bytes: int
    batch_bytes: int
    flops: float

    @property
    def peak_bytes(self) -> int:
        """The most that is alive at once."""
        borders = math.ceil(self.steps / self.interval)
        alive = min(self.interval * self.kept, self.steps)
        return borders * self.carry_bytes + alive * self.residual_bytes + self.batch_bytes


def predict(loop: InnerLoop, theta: Weights, carry: Any, batch: Batch, data: Data, steps: int) -> Cost:
    """Predict the cost of ``steps`` steps from one of them.

    Args:
        loop, theta, carry, data: as in :func:`~subspace_meta.meta.unroll.run`.
        batch: one mini-batch for each task, leading dimensions ``(1, tasks)``.
        steps: of the inner loop.
    """
    # Imports triton, where that is installed; importing this package should not.
    from torch.utils.flop_counter import FlopCounterMode

    once = replace(loop, compiled=False, block=1, interval=1)
    created = CreatedStorages()
    with FlopCounterMode(display=False) as forward, created:
        trace: Trace = run(once, theta, carry, batch, data)
    # What still lives are residuals, and the few tensors of the trace itself.
    residuals = created.alive() - _bytes((trace.carry, trace.objectives))
    with FlopCounterMode(display=False) as backward:
        pull_back(once, theta, trace, batch, data, torch.ones_like(trace.objectives))
    tasks = trace.objectives.shape[1]
    return Cost(
        tasks=tasks,
        steps=steps,
        interval=min(loop.interval_of(steps), steps),
        kept=loop.kept,
        carry_bytes=_bytes(carry),
        residual_bytes=residuals,
        batch_bytes=_bytes(batch) * steps,
        flops=(forward.get_total_flops() + backward.get_total_flops()) / tasks,
    )


class CreatedStorages(TorchDispatchMode):
    """Remembers the storages that operations make, and tells how many bytes of them still live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        inputs = {x.untyped_storage()._cdata for x in pytree.tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)}
        for leaf in pytree.tree_flatten(result)[0]:
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in inputs:
                storage = leaf.untyped_storage()
                reference: Any = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self.storages[reference.cdata] = (reference, storage.nbytes())
        return result

    def alive(self) -> int:
        """Return the bytes of those that still live, and forget the others."""
        self.storages = {key: held for key, held in self.storages.items() if not held[0].expired()}
        return sum(size for _, size in self.storages.values())


def entries(problem: Problem) -> int:
    """Return the number of entries of a problem's parameters."""
    return sum(math.prod(group.shape) for group in problem.geometry.groups)


def _bytes(tree: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in pytree.tree_flatten(tree)[0])


def available_bytes(device: torch.device | str = "cpu") -> int | None:
    """Return the bytes of memory that are free on a device, or ``None`` where the machine does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
