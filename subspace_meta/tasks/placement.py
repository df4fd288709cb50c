"""Task families on a device.

Whatever is drawn is drawn on the device of the generator, from data sets that were moved there once, and the result is
moved to the device of the family. The meta-trainer gives a generator of the CPU for tasks and starting points: they are
drawn once an inner loop, their references in float64 by many small factorisations, and so a task is the same on every
device. For mini-batches, which are drawn at every step, it gives a generator of the device, and nothing is moved.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from subspace_meta.geometry import Params
from subspace_meta.tasks.base import Batch, Data, Problem, TaskFamily


def moved(tree: Any, device: torch.device) -> Any:
    """Return a tree of tensors on a device; what is there is not copied."""
    return pytree.tree_map_only(Tensor, lambda value: value.to(device), tree)


@functools.cache
def _loaded(load: Callable[[], Any], device: torch.device) -> Any:
    return moved(load(), device)


@functools.cache
def _loading_on(family: TaskFamily, device: torch.device) -> TaskFamily:
    """Return the family with its data sets, the fields whose names begin with ``load``, on a device."""
    if device.type == "cpu" or not dataclasses.is_dataclass(family):
        return family
    loaders = {name: value for name, value in vars(family).items() if name.startswith("load") and callable(value)}
    replaced = {name: functools.partial(_loaded, load, device) for name, load in loaders.items()}
    return dataclasses.replace(family, **replaced) if replaced else family


@dataclasses.dataclass(frozen=True)
class OnDevice(TaskFamily):
    """A family whose tasks, starting points and mini-batches lie on a device, wherever they are drawn.

    Attributes:
        family: what is drawn.
        device: where the results lie.
    """

    family: TaskFamily
    device: torch.device

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of the family."""
        return self.family.name

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The family's problem, which has no device."""
        return self.family.problem

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw tasks on the generator's device and move them."""
        return moved(_loading_on(self.family, generator.device).draw(generator, count), self.device)

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Draw mini-batches on the generator's device and move them."""
        there = _loading_on(self.family, generator.device)
        return moved(there.sample(moved(data, generator.device), generator, steps), self.device)

    def init(self, data: Data, generator: torch.Generator) -> Params:
        """Draw starting points on the generator's device and move them."""
        return moved(self.family.init(moved(data, generator.device), generator), self.device)

    def measured(self, data: Data) -> Data:
        """Return what the family says."""
        return self.family.measured(data)


def on_device(family: TaskFamily, device: torch.device) -> TaskFamily:
    """Return the family on a device; on the CPU it is there already."""
    return family if device.type == "cpu" else OnDevice(family, device)
