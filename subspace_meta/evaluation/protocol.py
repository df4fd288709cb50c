"""The protocol: tuned baselines against an untuned optimizer, same starts, same batches.

A hand-made optimizer gets a grid of half-decade learning rates, all run side by side under ``vmap`` with the seeds; at
every checkpoint it may choose its best one (lowest mean over seeds; a non-finite run counts as the worst). If the best
rate lies at the edge of the grid, the grid is extended. The learned optimizer gets one run per seed and no rate. The
measure is the log of the excess objective relative to the start, log((f - f*)/(f_0 - f*)); where f* is not known it
is 0. Follows the practice of Metz et al., "VeLO", 2022, and Dahl et al., "Benchmarking neural network training
algorithms", 2023.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subspace_meta.geometry import Geometry
from subspace_meta.optimizers import RASA, RSGD, RAdam
from subspace_meta.optimizers.base import Optimizer
from subspace_meta.tasks.base import TaskFamily

CHECKPOINTS = (10, 20, 50, 100, 200)
GRID = tuple(10 ** (exponent / 2) for exponent in range(-8, 7))  # 15 half-decades, 1e-4 to 1e3
EXTENSION = 4  # half-decades added at an edge that wins
MAX_EXTENSIONS = 3
TIE = 0.02  # difference in log excess that counts as a tie
WORST = math.inf
FLOOR = 1e-7  # relative excess below which float32 objectives say nothing


@dataclass(frozen=True)
class EvaluationTask:
    """A task of the evaluation: one draw of a family, several seeds.

    Attributes:
        row: the row of the table that the task counts for; several draws may share one.
        family: what is drawn.
        instance: seed of the draw.
    """

    row: str
    family: TaskFamily
    instance: int = 0


@dataclass(frozen=True)
class Baseline:
    """A hand-made optimizer with a learning rate to be tuned."""

    name: str
    make: Callable[[Geometry, Tensor], Optimizer]


BASELINES = (
    Baseline("RSGD-momentum", lambda geometry, lr: RSGD(geometry, lr, momentum=0.9)),
    Baseline("RAdam", lambda geometry, lr: RAdam(geometry, lr)),
    Baseline("RASA-LR", lambda geometry, lr: RASA(geometry, lr)),
)


@dataclass(frozen=True)
class Curves:
    """What one optimizer did on one task.

    Attributes:
        steps: the measured steps, ascending, starting with 0.
        log_excess: ``(rates, seeds, len(steps))``; +inf where not finite.
        metric: the task's own figure at the last step, ``(rates, seeds)``.
        violation: largest constraint violation at the last step, ``(rates, seeds)``.
        rates: the learning rates; one 0 for the learned optimizer.
        seconds: CPU seconds of the run.
    """

    steps: tuple[int, ...]
    log_excess: Tensor
    metric: Tensor
    violation: Tensor
    rates: tuple[float, ...]
    seconds: float

    def at(self, step: int) -> Tensor:
        """Return the log excess at a step, ``(rates, seeds)``."""
        return self.log_excess[..., self.steps.index(step)]

    def best(self, step: int) -> int:
        """Return the index of the best rate at a step: lowest mean over seeds."""
        return int(self.at(step).mean(dim=-1).argmin())


def measured_steps(horizon: int) -> tuple[int, ...]:
    """Return the steps at which the objective is computed: about 40, denser at the start, and the checkpoints."""
    steps = {0, 1, 2, 3, 5, 7, horizon, *range(10, min(50, horizon) + 1, 5), *range(50, horizon + 1, 10)}
    return tuple(sorted(steps | {c for c in CHECKPOINTS if c <= horizon}))


def evaluate_rates(
    task: EvaluationTask,
    make: Callable[[Geometry, Tensor], Optimizer],
    rates: Sequence[float],
    seeds: int = 5,
    horizon: int = 200,
) -> Curves:
    """Run an optimizer with several learning rates and seeds side by side on one task.

    Args:
        task: the task.
        make: ``(geometry, learning rate) -> optimizer``.
        rates: learning rates.
        seeds: random starts and batch orders; the same for every optimizer.
        horizon: number of steps.
    """
    family, problem = task.family, task.family.problem
    data = family.draw(torch.Generator().manual_seed(1_000_003 + task.instance), 1)
    data = {name: value.expand(seeds, *value.shape[1:]) for name, value in data.items()}
    generator = torch.Generator().manual_seed(7_000_003 + task.instance)
    start = family.init(data, generator)
    measured = family.measured(data)

    def per_run(function: Callable[..., Any], over: tuple[int | None, ...]) -> Callable[..., Any]:
        """Vmap over rates (outer, the arguments that ``over`` names), then over seeds (all but the rate)."""
        seeds_in = tuple(None if i == 0 else 0 for i in range(len(over)))
        return torch.func.vmap(torch.func.vmap(function, in_dims=seeds_in), in_dims=over)

    def first(lr: Tensor, params: Any) -> Any:
        return make(problem.geometry, lr).init(params)

    def step(lr: Tensor, params: Any, state: Any, batch: Any) -> Any:
        grads, value = torch.func.grad_and_value(problem.loss)(params, batch)
        return make(problem.geometry, lr).update(grads, state, params, value)

    def objective(lr: Tensor, params: Any, one: Any) -> Tensor:
        return problem.objective(params, one)

    metric_function = problem.metric or problem.objective

    def metric(lr: Tensor, params: Any, one: Any) -> Tensor:
        return metric_function(params, one)

    lr = torch.tensor(rates)
    params = {name: value.expand(len(rates), *value.shape) for name, value in start.items()}
    began = time.process_time()
    state = per_run(first, (0, 0))(lr, params)
    steps = measured_steps(horizon)
    measure, advance = per_run(objective, (0, 0, None)), per_run(step, (0, 0, 0, None))
    objectives = [measure(lr, params, measured)]
    chunk = 20
    batches: Any = {}
    for t in range(1, horizon + 1):
        if (t - 1) % chunk == 0:
            batches = family.sample(data, generator, chunk)
        batch = {name: value[(t - 1) % chunk] for name, value in batches.items()}
        params, state = advance(lr, params, state, batch)
        if t in steps:
            objectives.append(measure(lr, params, measured))
    seconds = time.process_time() - began
    values = torch.stack(objectives, dim=-1)  # (rates, seeds, steps)
    reference = data["reference"][None, :, None]
    excess = (values - reference) / (values[..., :1] - reference)
    log_excess = torch.log(excess.clamp(min=FLOOR))
    log_excess = torch.where(torch.isfinite(values), log_excess, WORST)
    violations = torch.stack(
        [
            group.manifold.violation(x).reshape(len(rates), seeds, -1).amax(dim=-1)
            for group, x in zip(problem.geometry.groups, _gather(problem.geometry, params), strict=True)
        ]
    ).amax(dim=0)
    figure = per_run(metric, (0, 0, None))(lr, params, measured)
    return Curves(steps, log_excess, figure, violations, tuple(rates), seconds)


def _gather(geometry: Geometry, params: Any) -> list[Tensor]:
    """Gather groups of parameters that have two leading dimensions, rates and seeds."""
    return list(torch.func.vmap(torch.func.vmap(geometry.gather))(params))


def tune(task: EvaluationTask, baseline: Baseline, seeds: int = 5, horizon: int = 200) -> Curves:
    """Run a baseline on the grid, extended while a best rate lies at its edge."""
    curves = evaluate_rates(task, baseline.make, GRID, seeds, horizon)
    for _ in range(MAX_EXTENSIONS):
        best = {curves.best(step) for step in CHECKPOINTS if step <= horizon}
        exponents = range(1, EXTENSION + 1)
        below = [curves.rates[0] / 10 ** (e / 2) for e in reversed(exponents)] if 0 in best else []
        above = [curves.rates[-1] * 10 ** (e / 2) for e in exponents] if len(curves.rates) - 1 in best else []
        if not below and not above:
            break
        curves = _merge(curves, evaluate_rates(task, baseline.make, below + above, seeds, horizon), len(below))
    return curves


def _merge(curves: Curves, more: Curves, below: int) -> Curves:
    """Put the first ``below`` rates of ``more`` in front of ``curves`` and the others behind."""

    def join(old: Tensor, new: Tensor) -> Tensor:
        return torch.cat([new[:below], old, new[below:]])

    return Curves(
        curves.steps,
        join(curves.log_excess, more.log_excess),
        join(curves.metric, more.metric),
        join(curves.violation, more.violation),
        (*more.rates[:below], *curves.rates, *more.rates[below:]),
        curves.seconds + more.seconds,
    )


def run_untuned(
    task: EvaluationTask, make: Callable[[Geometry], Optimizer], seeds: int = 5, horizon: int = 200
) -> Curves:
    """Run an optimizer that has no learning rate."""
    return evaluate_rates(task, lambda geometry, lr: make(geometry), (0.0,), seeds, horizon)
