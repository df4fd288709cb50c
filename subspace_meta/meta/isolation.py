"""One segment's meta-gradient, from which tasks that are not finite are left out.

Tasks run side by side and share the meta-parameters, so one NaN among them would spoil the sum; and a cotangent of zero
does not help, since zero times NaN is NaN. Where a task is spoiled, going forward or back, the segment is run again
with the parameters and data of a good task in its place, which count for nothing. That costs a second run, and only
then. The optimizer's state stays, since it was finite (but for averages of parameters, which go with these); one that
overflowed within the segment shows in the next. What cannot be told apart by task is never handed out: then the whole
segment is lost, and the gradient is NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from subspace_meta.adapter.network import Weights
from subspace_meta.meta.distributed import alone
from subspace_meta.meta.unroll import Carry, InnerLoop, Trace, pull_back, run
from subspace_meta.tasks.base import Batch, Data


class SegmentGradient(NamedTuple):
    """What one segment gives.

    Attributes:
        theta: the gradient of the mean loss over the tasks that are not spoiled.
        carry: after the segment; its parameters are finite, unless all tasks are spoiled.
        objectives: ``(steps, tasks)``; those of spoiled tasks belong to the copies that replaced them.
        loss: the mean loss over the tasks that are not spoiled; NaN if all are.
        spoiled: ``(tasks,)``, which tasks were left out.
        source: ``(tasks,)``, whose parameters and data are at each place: its own, or those of the copied one.
    """

    theta: Weights
    carry: Carry
    objectives: Tensor
    loss: Tensor
    spoiled: Tensor
    source: Tensor


def segment_gradient(
    loop: InnerLoop,
    theta: Weights,
    carry: Carry,
    batches: Batch,
    data: Data,
    outer_loss: Callable[[Tensor], Tensor],
    total: Callable[[Tensor], Tensor] = alone,
) -> SegmentGradient:
    """Run a segment and return the gradient of its mean outer loss.

    Args:
        loop, theta, carry, batches, data: as in :func:`~subspace_meta.meta.unroll.run`.
        outer_loss: from objectives ``(steps, tasks)`` to one loss a task ``(tasks,)``.
        total: the sum over all processes, where each has other tasks. ``theta`` and ``loss`` are then about all tasks,
            the rest about this process's; a copy is one of its own tasks, and where it has no good one all is lost.
    """
    one = next(iter(carry.params.values()))
    own = torch.arange(len(one), device=one.device)
    spoiled = torch.zeros_like(own, dtype=torch.bool)
    source = own

    def everywhere(flags: Tensor) -> bool:
        """Return whether all flags are true, in all processes: they have to go the same way."""
        return not bool(total((~flags).sum()))

    while True:
        start, window, measured = carry, batches, data
        if spoiled.any():
            source = torch.where(spoiled, own[~spoiled][0], own)
            start = _taken_from(loop, carry, source)
            window = {name: value[:, source] for name, value in batches.items()}
            measured = {name: value[source] for name, value in data.items()}
        trace = run(loop, theta, start, window, measured)
        objectives = trace.objectives.detach().requires_grad_()
        losses = outer_loss(objectives)
        good = torch.isfinite(losses.detach()) & torch.isfinite(trace.objectives).all(dim=0)
        good &= _finite(trace.carry.params)
        if everywhere(good | spoiled):
            loss = torch.where(spoiled, 0.0, losses).sum() / total((~spoiled).sum())
            (cotangents,) = torch.autograd.grad(loss, objectives)
            cotangents = torch.where(spoiled, 0.0, cotangents)
            gradient = pull_back(loop, theta, trace, window, measured, cotangents, total)
            # A task that is spoiled on the way back shows in its own derivative to the start.
            good &= _finite(gradient.carry.params)
            if everywhere(good | spoiled):
                sums = {name: total(value) for name, value in gradient.theta.items()}
                if not all(bool(torch.isfinite(value).all()) for value in sums.values()):
                    break  # through the state, which belongs to no task alone
                return SegmentGradient(sums, trace.carry, trace.objectives, total(loss.detach()), spoiled, source)
        if not everywhere(good[spoiled]):
            break  # a copy of a good task is spoiled, too: something else is wrong
        spoiled = spoiled | ~good
        if not everywhere((~spoiled).any()):
            break
    return _lost(theta, trace, own)


def _taken_from(loop: InnerLoop, carry: Carry, source: Tensor) -> Carry:
    """Return the carry with the parameters of the tasks ``source``, ``(tasks,)``, and what is an average of them."""
    geometry, state = loop.problem.geometry.stacked(len(source)), carry.state
    if getattr(state, "average", ()):
        averages = geometry.scatter(state.average)
        taken = geometry.gather({name: value[source] for name, value in averages.items()})
        state = state._replace(average=tuple(taken))
    return Carry({name: value[source] for name, value in carry.params.items()}, state)


def _finite(tree: dict[str, Tensor]) -> Tensor:
    """Return for each task whether all its numbers are finite."""
    return torch.stack([torch.isfinite(value).reshape(len(value), -1).all(dim=1) for value in tree.values()]).all(dim=0)


def _lost(theta: Weights, trace: Trace, own: Tensor) -> SegmentGradient:
    """Return the result where no task is left."""
    nothing = {name: torch.full_like(value, torch.nan) for name, value in theta.items()}
    everything = torch.ones_like(own, dtype=torch.bool)
    loss = torch.full((), torch.nan, device=own.device)
    return SegmentGradient(nothing, trace.carry, trace.objectives, loss, everything, own)
