"""The inner loop: many steps of an optimizer on many tasks, and the derivative of its losses to the meta-parameters.

One *block* of a few steps, vmapped over tasks, is compiled twice: forward, and backward by ``torch.func.vjp`` of the
same block, which recomputes it. The loop over blocks is plain Python: it keeps the carry at the borders (segment
recomputation, also known as checkpointing: Griewank 1992; Chen et al. 2016) and walks back through them. So the time to
compile does not depend on the number of steps, and memory is the carries plus one block.

``autograd`` through an already compiled loss is impossible, which is why the inner gradient (``torch.func.grad``) is
traced inside of the block. ``torch.utils.checkpoint`` fails over torch.func; the recomputation here does not need it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from subspace_meta.adapter.network import Weights
from subspace_meta.geometry import Geometry, Params
from subspace_meta.optimizers.base import Optimizer
from subspace_meta.tasks.base import Batch, Data, Problem


class Carry(NamedTuple):
    """Where the inner loops stand; every tensor has the tasks as its first dimension."""

    params: Params
    state: Any


@dataclass(frozen=True)
class InnerLoop:
    """An optimizer, given meta-parameters, at work on a problem. Equal loops share compiled code.

    Attributes:
        problem: what is optimized.
        make_optimizer: ``(geometry, theta) -> optimizer``; a module-level function or a hashable object.
        block: steps in one compiled block.
        compiled: compile the blocks, or run them eagerly.
        first_order: treat inner gradients as constants in the meta-gradient (Andrychowicz et al. 2016).
    """

    problem: Problem
    make_optimizer: Callable[[Geometry, Weights], Optimizer]
    block: int = 1
    compiled: bool = True
    first_order: bool = False

    def start(self, theta: Weights, params: Params) -> Carry:
        """Return the carry at stacked starting points."""
        optimizer = self.make_optimizer(self.problem.geometry, theta)
        carry = Carry(params, torch.func.vmap(optimizer.init)(params))
        return _contiguous(carry)

    def step(self, theta: Weights, carry: Carry, batch: Batch, data: Data) -> tuple[Carry, Tensor]:
        """Take one step on one task; return the carry and the objective after it."""
        optimizer = self.make_optimizer(self.problem.geometry, theta)
        grads, value = torch.func.grad_and_value(self.problem.loss)(carry.params, batch)
        if self.first_order:
            grads = {name: grad.detach() for name, grad in grads.items()}
        params, state = optimizer.update(grads, carry.state, carry.params, value)
        return Carry(params, state), self.problem.objective(params, data)

    def objective(self, params: Params, data: Data) -> Tensor:
        """Return the objective of each task, ``(tasks,)``."""
        return torch.func.vmap(self.problem.objective)(params, data)


class Trace(NamedTuple):
    """What a forward pass leaves: the last carry, objectives ``(steps, tasks)`` and the carries at block borders."""

    carry: Carry
    objectives: Tensor
    borders: list[Carry]


def _contiguous(tree: Any) -> Any:
    """Make all tensors contiguous: a block that saw other strides would be compiled a second time."""
    return pytree.tree_map(torch.Tensor.contiguous, tree)


def _steps(batches: Batch) -> int:
    return next(iter(batches.values())).shape[0]


@functools.cache
def _blocks(loop: InnerLoop) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the forward and the backward function of a block, compiled if the loop says so."""
    step = torch.func.vmap(loop.step, in_dims=(None, 0, 0, 0))

    def forward(theta: Weights, carry: Carry, batches: Batch, data: Data) -> tuple[Carry, Tensor]:
        objectives = []
        for t in range(_steps(batches)):
            carry, objective = step(theta, carry, {name: value[t] for name, value in batches.items()}, data)
            objectives.append(objective)
        return _contiguous(carry), torch.stack(objectives)

    def backward(
        theta: Weights, carry: Carry, batches: Batch, data: Data, cotangents: tuple[Carry, Tensor]
    ) -> tuple[Weights, Carry]:
        pullback: Any = torch.func.vjp(lambda t, c: forward(t, c, batches, data), theta, carry)[1]
        return _contiguous(pullback(cotangents))

    if not loop.compiled:
        return forward, backward
    return torch.compile(forward, fullgraph=True, dynamic=False), torch.compile(backward, fullgraph=True, dynamic=False)


def run(loop: InnerLoop, theta: Weights, carry: Carry, batches: Batch, data: Data) -> Trace:
    """Take as many steps as there are batches.

    Args:
        loop: the inner loop.
        theta: meta-parameters.
        carry: where to start; see :meth:`InnerLoop.start`.
        batches: leading dimensions ``(steps, tasks)``; the number of steps is a multiple of ``loop.block``.
        data: leading dimension ``(tasks,)``.

    Raises:
        ValueError: the number of steps is not a multiple of the block.
    """
    steps = _steps(batches)
    if steps % loop.block:
        raise ValueError(f"{steps} steps are not a multiple of the block length {loop.block}")
    forward, _ = _blocks(loop)
    borders, objectives = [], []
    for t in range(0, steps, loop.block):
        borders.append(carry)
        carry, values = forward(theta, carry, {k: v[t : t + loop.block] for k, v in batches.items()}, data)
        objectives.append(values)
    return Trace(carry, torch.cat(objectives), borders)


def pull_back(
    loop: InnerLoop, theta: Weights, trace: Trace, batches: Batch, data: Data, objective_cotangents: Tensor
) -> Weights:
    """Return the gradient to ``theta`` of sum(objectives * objective_cotangents), through all steps of the trace.

    The carry at the first border is a constant: the derivative stops there (truncation).
    """
    _, backward = _blocks(loop)
    carry_cotangent = _contiguous(pytree.tree_map(torch.zeros_like, trace.carry))
    total = {name: torch.zeros_like(value) for name, value in theta.items()}
    for index in reversed(range(len(trace.borders))):
        window = slice(index * loop.block, (index + 1) * loop.block)
        part, carry_cotangent = backward(
            theta,
            trace.borders[index],
            {name: value[window] for name, value in batches.items()},
            data,
            (carry_cotangent, objective_cotangents[window]),
        )
        total = {name: total[name] + part[name] for name in total}
    return total
