"""What an optimization problem is, to a meta-trainer and to an evaluation.

A :class:`Problem` says what an inner loop computes: geometry, mini-batch loss, objective. It holds no tensors and is
hashable, so compiled inner loops are shared between all families of the same problem. A :class:`TaskFamily` draws many
tasks of one problem at once, stacked along a leading dimension for ``vmap``; a single task is a family drawn once.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from subspace_meta.geometry import Geometry, Params

Data = dict[str, Tensor]
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """The pure functions of one task; equal problems share compiled code.

    Attributes:
        geometry: where the parameters live.
        loss: ``(params, batch) -> scalar``; what the optimizer sees.
        objective: ``(params, data) -> scalar``; what is measured: the loss over all data, without noise.
        metric: ``(params, data) -> scalar``; the task's own figure of merit (accuracy, subspace error), or ``None``.
    """

    geometry: Geometry
    loss: Callable[[Params, Batch], Tensor]
    objective: Callable[[Params, Data], Tensor]
    metric: Callable[[Params, Data], Tensor] | None = None


class TaskFamily(abc.ABC):
    """Many tasks of one problem. Subclasses are frozen dataclasses; randomness comes from the given generator.

    What is drawn lies on the generator's device, and so does ``data`` where it is given. Functions that load data sets,
    on the CPU, are fields whose names begin with ``load``: ``subspace_meta.tasks.placement`` replaces them on a device.
    """

    name: str
    problem: Problem

    @abc.abstractmethod
    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw ``count`` tasks: a dict of tensors with leading dimension ``count``.

        ``"reference"`` ``(count,)`` is the lowest value that the objective can take (0 if unknown and the loss is
        positive). All other entries are what ``sample`` and ``objective`` need.
        """

    @abc.abstractmethod
    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Draw mini-batches: a dict of tensors with leading dimensions ``(steps, count)``."""

    def init(self, data: Data, generator: torch.Generator) -> Params:
        """Draw starting points with leading dimension ``count``: random feasible ones unless overridden."""
        count = len(data["reference"])
        starts = [self.problem.geometry.initialize(generator, device=generator.device) for _ in range(count)]
        return {name: torch.stack([start[name] for start in starts]) for name in starts[0]}

    def measured(self, data: Data) -> Data:
        """Return the part of ``data`` that ``objective`` and ``metric`` need (not the samples)."""
        return data


def describe(family: TaskFamily) -> str:
    """Return a family's class and settings; functions by their names, without addresses."""
    fields = {name: getattr(value, "__name__", value) for name, value in vars(family).items()}
    return f"{type(family).__name__}({', '.join(f'{name}={value!r}' for name, value in fields.items())})"


def draw_indices(size: int, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Draw uniform indices below ``size``, with replacement."""
    return torch.randint(size, shape, generator=generator, device=generator.device)


def draw_epochs(size: int, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Draw indices below ``size``, ``(steps, count, batch)``, each once an epoch; every call starts a new epoch."""
    steps, count, batch = shape
    epochs = -(-steps * batch // size)
    order = torch.rand(count, epochs, size, generator=generator, device=generator.device).argsort(dim=-1).flatten(1)
    return order[:, : steps * batch].reshape(count, steps, batch).movedim(1, 0)


def draw_rows(
    data: Data,
    names: Iterable[str],
    batch_size: int,
    generator: torch.Generator,
    steps: int,
    draw: Callable[[int, tuple[int, int, int], torch.Generator], Tensor] = draw_indices,
) -> Batch:
    """Draw mini-batches, by default with replacement: the same rows of every named ``(count, n, ...)`` entry."""
    entries = {name: data[name] for name in names}
    count, n = next(iter(entries.values())).shape[:2]
    indices = draw(n, (steps, count, batch_size), generator)
    tasks = torch.arange(count, device=indices.device)[:, None]
    return {name: value[tasks, indices] for name, value in entries.items()}


def repeat(data: Data, names: Iterable[str], steps: int) -> Batch:
    """Return the same batch at every step, for a loss without noise; nothing is copied."""
    return {name: data[name].expand(steps, *data[name].shape) for name in names}


def once_per_task(values: Data, count: int) -> Data:
    """Return ``count`` equal tasks from the entries of one, for a data set that is one task; nothing is copied."""
    return {name: value.expand(count, *value.shape) for name, value in values.items()}


def symmetric_matrix(spectrum: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return symmetric matrices with eigenvalues ``(count, n)`` in random bases, and the bases, in float64."""
    count, n = spectrum.shape
    basis = torch.linalg.qr(
        torch.randn(count, n, n, generator=generator, dtype=torch.float64, device=generator.device)
    )[0]
    matrix = (basis * spectrum.double()[:, None, :]) @ basis.mT
    return 0.5 * (matrix + matrix.mT), basis
