"""The inner loop: many steps of an optimizer on many tasks side by side, and the derivative of its losses.

One *block* of a few steps is a pure function of meta-parameters, carry and mini-batches. It is compiled once forward
and once backward (the compiler keeps what the backward pass needs: its residuals), and the loop over blocks is Python.
So the time to compile does not depend on the number of steps.

Residuals of all T steps may not fit. With a *checkpoint interval* of k steps only the carries at the borders of the
intervals are kept; the backward pass runs each interval again to have its residuals (Griewank 1992; Chen et al. 2016).
Memory is then T/k carries and k residuals, least at k = sqrt(T), and the price is one more forward pass. Block length
and interval are separate: the first is about compilation, the second about memory.

Tasks are not vmapped through the optimizer. They are one more batch dimension of every parameter
(:meth:`~subspace_meta.geometry.Geometry.stacked`), so that the coordinates of all tasks lie end to end in one long
vector: under ``vmap`` the adapter's products would need a transposition before and after. Only losses are vmapped.

The inner gradient (``torch.func.grad``) is traced inside of the block; autograd through a loss that is already compiled
is impossible, and ``torch.utils.checkpoint`` fails over ``torch.func``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from subspace_meta.adapter.network import Weights
from subspace_meta.geometry import Geometry, Params
from subspace_meta.meta.compiling import compile_block
from subspace_meta.meta.distributed import alone
from subspace_meta.optimizers.averaging import hands_out_averages
from subspace_meta.optimizers.base import Optimizer
from subspace_meta.tasks.base import Batch, Data, Problem


class Carry(NamedTuple):
    """Where the inner loops stand: parameters with leading dimension ``(tasks,)``, and the optimizer's state."""

    params: Params
    state: Any


@dataclass(frozen=True)
class InnerLoop:
    """An optimizer, given meta-parameters, at work on a problem. Equal loops share compiled code.

    Attributes:
        problem: what is optimized.
        make_optimizer: ``(geometry, theta) -> optimizer``; a module-level function or a hashable object.
        block: steps in one compiled block.
        interval: steps between two kept carries, a multiple of ``block``; ``None`` is about the square root of the
            number of steps, and a number at least as large as that keeps all residuals.
        kept: number of intervals, the last ones, whose residuals are kept instead of made again.
        compiled: compile the blocks, or run them eagerly.
        first_order: treat inner gradients as constants in the meta-gradient (Andrychowicz et al. 2016).
        bounded: what the meta-gradient passes back over the border of an interval grows at most linearly with the
            number of intervals, as it does where steps neither amplify nor damp; more is scaled down to that. In
            chaotic runs the derivative grows exponentially and says nothing (Metz et al., "Understanding and correcting
            pathologies in the training of learned optimizers", ICML 2019): then this is close to truncation.

    Raises:
        ValueError: ``block`` or ``kept`` is not positive, or ``interval`` no multiple of ``block``.
    """

    problem: Problem
    make_optimizer: Callable[[Geometry, Weights], Optimizer]
    block: int = 1
    interval: int | None = None
    kept: int = 1
    compiled: bool = True
    first_order: bool = False
    bounded: bool = False

    def __post_init__(self) -> None:
        if self.kept < 1:
            raise ValueError(f"at least the last interval's residuals are kept, got kept={self.kept}")
        if self.block < 1:
            raise ValueError(f"a block needs at least one step, got {self.block}")
        if self.interval is not None and (self.interval < 1 or self.interval % self.block):
            raise ValueError(f"the interval {self.interval} is not a multiple of the block length {self.block}")

    def start(self, theta: Weights, params: Params) -> Carry:
        """Return the carry at starting points with leading dimension ``(tasks,)``."""
        optimizer = self.make_optimizer(self.problem.geometry.stacked(_leading(params)), theta)
        return _contiguous(Carry(dict(params), optimizer.init(params)))

    def step(self, theta: Weights, carry: Carry, batch: Batch, data: Data) -> tuple[Carry, Tensor]:
        """Take one step on all tasks; return the carry and the objectives after it, ``(tasks,)``.

        They are those of what the optimizer hands out: its iterates, or averages of them.
        """
        return _step(self, self.problem.geometry.stacked(_leading(carry.params)), theta, carry, batch, data)

    def objective(self, params: Params, data: Data) -> Tensor:
        """Return the objective of each task, ``(tasks,)``."""
        return torch.func.vmap(self.problem.objective)(params, data)

    def interval_of(self, steps: int) -> int:
        """Return the checkpoint interval for so many steps."""
        return self.interval or self.block * math.ceil(math.sqrt(steps / self.block))


class Trace(NamedTuple):
    """What a forward pass leaves.

    Attributes:
        carry: after the last step.
        objectives: after each step, ``(steps, tasks)``.
        borders: the carries at the start of each interval.
        last: the last intervals, in order, with their residuals: they are not run again.
    """

    carry: Carry
    objectives: Tensor
    borders: list[Carry]
    last: list[_Interval]


class _Interval(NamedTuple):
    """An interval of steps whose residuals are alive: its leaves, and what came out of them."""

    theta: Weights
    start: Carry
    carry: Carry
    objectives: Tensor


class MetaGradient(NamedTuple):
    """The derivative of a weighted sum of objectives, to the meta-parameters and to the first carry."""

    theta: Weights
    carry: Carry


def _leading(tree: dict[str, Tensor]) -> int:
    return next(iter(tree.values())).shape[0]


def steps_of(loop: InnerLoop, batches: Batch) -> int:
    """Return the number of steps for which there are mini-batches.

    Raises:
        ValueError: there are none, their number differs between entries, or is not a multiple of the loop's block.
    """
    lengths = {name: value.shape[0] for name, value in batches.items()}
    steps = next(iter(lengths.values()), 0)
    if not steps:
        raise ValueError("there are no steps: batches need at least one entry of shape (steps, tasks, ...)")
    if any(length != steps for length in lengths.values()):
        raise ValueError(f"the entries of batches have different numbers of steps: {lengths}")
    if steps % loop.block:
        raise ValueError(f"{steps} steps are not a multiple of the block length {loop.block}")
    return steps


def windows(loop: InnerLoop, batches: Batch, steps: range) -> Iterator[Batch]:
    """Yield the mini-batches of each block within ``steps``."""
    for t in steps[:: loop.block]:
        yield {name: value[t : t + loop.block] for name, value in batches.items()}


def _contiguous(tree: Any) -> Any:
    """Make all tensors contiguous: a block that saw other strides would be compiled a second time."""
    return pytree.tree_map(torch.Tensor.contiguous, tree)


def _detached(tree: Any) -> Any:
    return pytree.tree_map(torch.Tensor.detach, tree)


def _leaves(tree: Any) -> Any:
    return pytree.tree_map(lambda x: x.detach().requires_grad_(), tree)


def _step(
    loop: InnerLoop, geometry: Geometry, theta: Weights, carry: Carry, batch: Batch, data: Data
) -> tuple[Carry, Tensor]:
    """Take one step on all tasks; ``geometry`` is that of the stacked parameters."""
    grads, values = torch.func.vmap(torch.func.grad_and_value(loop.problem.loss))(carry.params, batch)
    if loop.first_order:
        grads = {name: grad.detach() for name, grad in grads.items()}
    optimizer = loop.make_optimizer(geometry, theta)
    params, state = optimizer.update(grads, carry.state, carry.params, values)
    handed_out = optimizer.averaged(state) if hands_out_averages(optimizer) else params
    return Carry(params, state), loop.objective(handed_out, data)


@functools.cache
def block_of(loop: InnerLoop, tasks: int) -> Callable[[Weights, Carry, Batch, Data], tuple[Carry, Tensor]]:
    """Return the function that takes ``loop.block`` steps, compiled if the loop says so."""
    geometry = loop.problem.geometry.stacked(tasks)

    def block(theta: Weights, carry: Carry, batches: Batch, data: Data) -> tuple[Carry, Tensor]:
        objectives = []
        for t in range(loop.block):
            batch = {name: value[t] for name, value in batches.items()}
            carry, objective = _step(loop, geometry, theta, carry, batch, data)
            objectives.append(objective)
        return _contiguous(carry), torch.stack(objectives)

    return compile_block(block) if loop.compiled else block


def _interval(
    loop: InnerLoop, theta: Weights, start: Carry, batches: Batch, data: Data, steps: range, keep: bool
) -> _Interval:
    """Take the steps of ``steps``; with their residuals if ``keep``."""
    block = block_of(loop, _leading(start.params))
    start = _leaves(start)
    carry, objectives = start, []
    with torch.enable_grad():
        for window in windows(loop, batches, steps):
            carry, values = block(theta, carry, window, data)
            if not keep:
                # The same compiled code whether residuals are wanted or not: without them it would be compiled again.
                carry, values = _leaves(carry), values.detach()
            objectives.append(values)
    return _Interval(theta, start, carry, torch.cat(objectives))


def run(loop: InnerLoop, theta: Weights, carry: Carry, batches: Batch, data: Data) -> Trace:
    """Take as many steps as there are batches.

    Args:
        loop: the inner loop.
        theta: meta-parameters.
        carry: where to start; see :meth:`InnerLoop.start`.
        batches: leading dimensions ``(steps, tasks)``; the number of steps is a multiple of ``loop.block``.
        data: leading dimension ``(tasks,)``.

    Raises:
        ValueError: see :func:`steps_of`.
    """
    steps = steps_of(loop, batches)
    interval = loop.interval_of(steps)
    theta = _leaves(theta)
    borders, objectives, last = [], [], []
    for t in range(0, steps, interval):
        borders.append(_detached(carry))
        end = min(t + interval, steps)
        keep = end + (loop.kept - 1) * interval >= steps
        part = _interval(loop, theta, carry, batches, data, range(t, end), keep)
        carry = part.carry
        objectives.append(part.objectives.detach())
        if keep:
            last.append(part)
    return Trace(_detached(carry), torch.cat(objectives), borders, last)


def pull_back(
    loop: InnerLoop,
    theta: Weights,
    trace: Trace,
    batches: Batch,
    data: Data,
    objective_cotangents: Tensor,
    total: Callable[[Tensor], Tensor] = alone,
) -> MetaGradient:
    """Return the derivative of sum(objectives * objective_cotangents), through all steps of the trace.

    The carry at the start is a constant: the derivative stops there (truncation). A trace can be pulled back once.
    ``total`` adds up what other processes find for their tasks: only the bound of ``loop.bounded`` is about all tasks.

    Raises:
        ValueError: ``objective_cotangents`` has not the shape of the objectives, ``(steps, tasks)``.
    """
    steps = steps_of(loop, batches)
    if objective_cotangents.shape != trace.objectives.shape:
        raise ValueError(
            f"the cotangents have shape {tuple(objective_cotangents.shape)}, the objectives "
            f"{tuple(trace.objectives.shape)}"
        )
    interval = loop.interval_of(steps)
    leaves = _leaves(theta)
    gradient = {name: torch.zeros_like(value) for name, value in theta.items()}
    cotangent, bound = pytree.tree_map(torch.zeros_like, trace.carry), torch.inf
    count = len(trace.borders)
    for index in reversed(range(count)):
        t = index * interval
        if index >= count - len(trace.last):
            part = trace.last[index - count]
        else:
            steps_of_it = range(t, min(t + interval, steps))
            part = _interval(loop, leaves, trace.borders[index], batches, data, steps_of_it, keep=True)
        outputs = [*pytree.tree_flatten(part.carry)[0], part.objectives]
        given = [*pytree.tree_flatten(cotangent)[0], objective_cotangents[t : t + interval]]
        names = list(theta)
        starts, structure = pytree.tree_flatten(part.start)
        found = torch.autograd.grad(
            outputs, [*(part.theta[name] for name in names), *starts], given, materialize_grads=True
        )
        gradient = {name: gradient[name] + value for name, value in zip(names, found, strict=False)}
        passed = list(found[len(names) :])
        if loop.bounded and index:  # what leaves the first interval is passed to none
            done = count - index
            # A scalar is a counter of steps, which all tasks share: nothing came before it that could be passed back.
            norm = float(total(torch.stack([value.square().sum() for value in passed if value.dim()]).sum()).sqrt())
            if norm > bound:
                passed = [value * (bound / norm) for value in passed]
            bound = min(norm, bound) * (done + 1) / done
        cotangent = pytree.tree_unflatten(passed, structure)
    return MetaGradient(gradient, cotangent)
