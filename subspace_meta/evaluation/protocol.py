"""The protocol: tuned baselines against an untuned optimizer, same starts, same batches.

A hand-made optimizer gets a grid of half-decade learning rates, all run side by side under ``vmap`` with the seeds; at
every checkpoint it may choose its best one (lowest mean over seeds; a non-finite run counts as the worst). If the best
rate lies at the edge of the grid, the grid is extended. The learned optimizer gets one run per seed and no rate. The
measure is the log of the excess objective relative to the start, log((f - f*)/(f_0 - f*)); where f* is not known it
is 0. Follows the practice of Metz et al., "VeLO", 2022, and Dahl et al., "Benchmarking neural network training
algorithms", 2023.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subspace_meta.geometry import Geometry, Params
from subspace_meta.optimizers import (
    POGO,
    RASA,
    RSDM,
    RSGD,
    SPEL,
    Averaging,
    CRMSProp,
    IntrinsicMuon,
    Landing,
    ManifoldMuon,
    RAdaGD,
    RAdam,
    RAdGD,
    RDoG,
)
from subspace_meta.optimizers.averaging import hands_out_averages
from subspace_meta.optimizers.base import Optimizer
from subspace_meta.tasks.base import TaskFamily
from subspace_meta.tasks.placement import on_device

CHECKPOINTS = (5, 10, 20, 50, 100, 200, 400, 1000, 2000, 4000)
GRID = tuple(10 ** (exponent / 2) for exponent in range(-8, 7))  # 15 half-decades, 1e-4 to 1e3
EXTENSION = 4  # half-decades added at an edge that wins
MAX_EXTENSIONS = 3
FEASIBLE = 1e-3  # largest violation of a constraint at which iterates are measured as they are
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


def placed(task: EvaluationTask, device: torch.device | str) -> EvaluationTask:
    """Return a task whose runs are on a device: the same draw, starts and mini-batches, which are made on the CPU."""
    return dataclasses.replace(task, family=on_device(task.family, torch.device(device)))


@dataclass(frozen=True)
class Baseline:
    """A hand-made optimizer with a learning rate to be tuned, its other settings at the published defaults.

    Attributes:
        name: in tables.
        make: ``(geometry, learning rate) -> optimizer``; raises ``ValueError`` where the method is not defined.
        feasible: whether its iterates lie on the manifold. Those of another method are measured at the nearest point
            of it; the violation that is reported is that of the iterate itself.
        schedule: ``(step, steps) -> factor`` of the learning rate, for steps 1 to ``steps``; ``None``: it stays. A
            scheduled method is told how many steps it has: each checkpoint is the end of a run of its own.
        default: the learning rate that a user has who gives none; ``None`` where nobody has published one.
        source: of the default.
    """

    name: str
    make: Callable[[Geometry, Tensor], Optimizer]
    feasible: bool = True
    schedule: Callable[[int, int], float] | None = None
    default: float | None = None
    source: str = ""

    def defined_on(self, geometry: Geometry) -> bool:
        """Return whether the method is defined on every parameter of ``geometry``."""
        try:
            self.make(geometry, torch.tensor(1e-2))
        except ValueError:
            return False
        return True


def cosine(step: int, steps: int) -> float:
    """Return the factor of a cosine schedule in step 1 to ``steps``: from 1 towards 0 (Loshchilov and Hutter, 2017)."""
    return 0.5 * (1.0 + math.cos(math.pi * (step - 1) / steps))


def half_of_the_rows(geometry: Geometry, lr: Tensor) -> Optimizer:
    """Return RSDM that turns half of the rows (of the smallest matrix) in each step."""
    return RSDM(geometry, lr, max(2, min(group.shape[-2] for group in geometry.groups) // 2))


SGD, ADAM = "torch.optim.SGD", "Kingma and Ba, 2015; geoopt"

BASELINES = (
    Baseline("RSGD", lambda geometry, lr: RSGD(geometry, lr), default=1e-3, source=SGD),
    Baseline("RSGD-momentum", lambda geometry, lr: RSGD(geometry, lr, momentum=0.9), default=1e-3, source=SGD),
    Baseline(
        "RSGD-Nesterov", lambda geometry, lr: RSGD(geometry, lr, momentum=0.9, nesterov=True), default=1e-3, source=SGD
    ),
    Baseline("RAdam", lambda geometry, lr: RAdam(geometry, lr), default=1e-3, source=ADAM),
    Baseline("RAMSGrad", lambda geometry, lr: RAdam(geometry, lr, amsgrad=True), default=1e-3, source=ADAM),
    Baseline("RASA-L", lambda geometry, lr: RASA(geometry, lr, variant="L")),
    Baseline("RASA-R", lambda geometry, lr: RASA(geometry, lr, variant="R")),
    Baseline("RASA-LR", lambda geometry, lr: RASA(geometry, lr)),
    Baseline("RASA-LR decaying", lambda geometry, lr: RASA(geometry, lr, decay=True)),
    Baseline("cRMSProp", lambda geometry, lr: CRMSProp(geometry, lr), default=1e-2, source="torch.optim.RMSprop"),
    Baseline("landing", lambda geometry, lr: Landing(geometry, lr), feasible=False),
    Baseline("POGO", lambda geometry, lr: POGO(geometry, lr), feasible=False),
    Baseline("POGO, VectorAdam", lambda geometry, lr: POGO(geometry, lr, base="vector_adam"), feasible=False),
    Baseline("POGO, Muon", lambda geometry, lr: POGO(geometry, lr, momentum=0.9, base="muon"), feasible=False),
    Baseline("RSDM", half_of_the_rows),
    Baseline("SPEL", lambda geometry, lr: SPEL(geometry, lr)),
    Baseline("manifold Muon", lambda geometry, lr: ManifoldMuon(geometry, lr, momentum=0.9, iterations=10)),
    Baseline("intrinsic Muon", lambda geometry, lr: IntrinsicMuon(geometry, lr, momentum=0.9)),
    # Averages of the iterates of the strongest of each kind.
    Baseline("RSGD-momentum averaged", lambda geometry, lr: Averaging(RSGD(geometry, lr, momentum=0.9))),
    Baseline("RAdam averaged", lambda geometry, lr: Averaging(RAdam(geometry, lr))),
    Baseline("RASA-LR averaged", lambda geometry, lr: Averaging(RASA(geometry, lr))),
)
# Told the number of steps: the peak rate is tuned for each number.
SCHEDULED = (
    Baseline("RSGD-momentum cosine", lambda geometry, lr: RSGD(geometry, lr, momentum=0.9), schedule=cosine),
    Baseline("RAdam cosine", lambda geometry, lr: RAdam(geometry, lr), schedule=cosine),
    Baseline("RASA-LR cosine", lambda geometry, lr: RASA(geometry, lr), schedule=cosine),
    Baseline("SPEL cosine", lambda geometry, lr: SPEL(geometry, lr), schedule=cosine),
)
# Methods that need no tuning, as they were published: run at their default alone.
UNTUNED = (
    Baseline("RDoG", lambda geometry, lr: RDoG(geometry, lr), default=1.0, source="Dodd et al., 2024"),
    Baseline("RDoWG", lambda geometry, lr: RDoG(geometry, lr, "RDoWG"), default=1.0, source="Dodd et al., 2024"),
    Baseline("NRDoG", lambda geometry, lr: RDoG(geometry, lr, "NRDoG"), default=1.0, source="Dodd et al., 2024"),
    Baseline("RAdaGD", lambda geometry, lr: RAdaGD(geometry, lr), default=1.0, source="ICLR 2026"),
    Baseline("RAdGD", lambda geometry, lr: RAdGD(geometry, lr), default=1.0, source="arXiv 2504.16724"),
)
# What a run of a few minutes is compared with: the best of the plain, the adaptive and the row and column methods.
QUICK_BASELINES = tuple(b for b in BASELINES if b.name in ("RSGD-momentum", "RAdam", "RASA-LR"))


@dataclass(frozen=True)
class Curves:
    """What one optimizer did on one task.

    Attributes:
        steps: the measured steps, ascending, starting with 0.
        log_excess: ``(rates, seeds, len(steps))``; +inf where not finite.
        metric: the task's own figure at ``checkpoints``, ``(rates, seeds, len(checkpoints))``.
        violation: largest constraint violation at the last step, ``(rates, seeds)``.
        rates: the learning rates; one 0 for the learned optimizer.
        initial: the objective at the start, ``(seeds,)``.
        reference: the lowest value, f*.
        seconds: CPU seconds of the run.
    """

    steps: tuple[int, ...]
    log_excess: Tensor
    metric: Tensor
    violation: Tensor
    rates: tuple[float, ...]
    initial: Tensor
    reference: float
    seconds: float

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """The steps at which optimizers are compared, and the last step."""
        return checkpoints_within(self.steps[-1])

    def objective(self, step: int) -> Tensor:
        """Return the objective at a step, ``(rates, seeds)``."""
        return self.reference + torch.exp(self.at(step)) * (self.initial - self.reference)

    def at(self, step: int) -> Tensor:
        """Return the log excess at a step, ``(rates, seeds)``."""
        return self.log_excess[..., self.steps.index(step)]

    def best(self, step: int) -> int:
        """Return the index of the best rate at a step: lowest mean over seeds."""
        return int(self.at(step).mean(dim=-1).argmin())

    def on_cpu(self) -> Curves:
        """Return the curves of a run on a device as tensors of the CPU."""
        tensors = ("log_excess", "metric", "violation", "initial")
        return dataclasses.replace(self, **{name: getattr(self, name).cpu() for name in tensors})


def checkpoints_within(horizon: int) -> tuple[int, ...]:
    """Return the checkpoints up to the horizon, and the horizon."""
    return tuple(sorted({horizon, *(step for step in CHECKPOINTS if step <= horizon)}))


def measured_steps(horizon: int) -> tuple[int, ...]:
    """Return the steps at which the objective is computed: about 60, denser at the start, and the checkpoints."""
    steps = {0, 1, 2, 3, 5, 7, *range(10, 50, 5), *range(50, 400, 10), *range(400, horizon + 1, 100)}
    return tuple(sorted({step for step in steps if step <= horizon} | set(checkpoints_within(horizon))))


def evaluate_rates(
    task: EvaluationTask,
    make: Callable[[Geometry, Tensor], Optimizer],
    rates: Sequence[float],
    seeds: int = 5,
    horizon: int = 200,
    feasible: bool = True,
    schedule: Callable[[int, int], float] | None = None,
) -> Curves:
    """Run an optimizer with several learning rates and seeds side by side on one task.

    What is measured are its iterates, or the averages that it hands out.

    Args:
        task: the task.
        make: ``(geometry, learning rate) -> optimizer``.
        rates: learning rates.
        seeds: random starts and batch orders; the same for every optimizer.
        horizon: number of steps.
        feasible: whether the iterates are points of the manifolds; if not, the nearest points are measured.
        schedule: of the learning rate; see :class:`Baseline`.
    """
    family, problem = task.family, task.family.problem
    geometry = problem.geometry
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
        return make(geometry, lr).init(params)

    def step(lr: Tensor, params: Any, state: Any, batch: Any) -> Any:
        grads, value = torch.func.grad_and_value(problem.loss)(params, batch)
        return make(geometry, lr).update(grads, state, params, value)

    def handed_out(lr: Tensor, params: Params, state: Any) -> Params:
        optimizer = make(geometry, lr)
        if hands_out_averages(optimizer):
            return optimizer.averaged(state)
        if feasible:
            return params
        points = zip(geometry.groups, geometry.gather(params), strict=True)
        return geometry.scatter([group.manifold.nearest(x) for group, x in points])

    def objective(lr: Tensor, params: Any, state: Any, one: Any) -> Tensor:
        return problem.objective(handed_out(lr, params, state), one)

    metric_function = problem.metric or problem.objective

    def metric(lr: Tensor, params: Any, state: Any, one: Any) -> Tensor:
        return metric_function(handed_out(lr, params, state), one)

    lr = torch.tensor(rates, device=data["reference"].device)
    params = {name: value.expand(len(rates), *value.shape) for name, value in start.items()}
    began = time.process_time()
    state = per_run(first, (0, 0))(lr, params)
    steps, checkpoints = measured_steps(horizon), checkpoints_within(horizon)
    advance = per_run(step, (0, 0, 0, None))
    measure, figure = (per_run(function, (0, 0, 0, None)) for function in (objective, metric))
    objectives, figures = [measure(lr, params, state, measured)], []
    chunk = 20
    batches: Any = {}
    for t in range(1, horizon + 1):
        if (t - 1) % chunk == 0:
            batches = family.sample(data, generator, chunk)
        batch = {name: value[(t - 1) % chunk] for name, value in batches.items()}
        rate = lr if schedule is None else lr * schedule(t, horizon)
        params, state = advance(rate, params, state, batch)
        if t in steps:
            objectives.append(measure(lr, params, state, measured))
        if t in checkpoints:
            figures.append(figure(lr, params, state, measured))
    seconds = time.process_time() - began
    values = torch.stack(objectives, dim=-1)  # (rates, seeds, steps)
    reference = data["reference"][None, :, None]
    excess = (values - reference) / (values[..., :1] - reference)
    log_excess = torch.log(excess.clamp(min=FLOOR))
    log_excess = torch.where(torch.isfinite(values), log_excess, WORST)
    violations = torch.stack(
        [
            group.manifold.violation(x).reshape(len(rates), seeds, -1).amax(dim=-1)
            for group, x in zip(geometry.groups, _gather(geometry, params), strict=True)
        ]
    ).amax(dim=0)
    metrics = torch.stack(figures, dim=-1).float()
    base = float(data["reference"][0])
    return Curves(steps, log_excess, metrics, violations, tuple(rates), values[0, :, 0], base, seconds)


def _gather(geometry: Geometry, params: Any) -> list[Tensor]:
    """Gather groups of parameters that have two leading dimensions, rates and seeds."""
    return list(torch.func.vmap(torch.func.vmap(geometry.gather))(params))


def run_baseline(
    task: EvaluationTask, baseline: Baseline, rates: Sequence[float], seeds: int = 5, horizon: int = 200
) -> Curves:
    """Run a baseline with several learning rates; one that is scheduled once for every checkpoint."""

    def run(steps: int) -> Curves:
        return evaluate_rates(task, baseline.make, rates, seeds, steps, baseline.feasible, baseline.schedule)

    return run(horizon) if baseline.schedule is None else at_budgets(run, horizon)


def at_budgets(run: Callable[[int], Curves], horizon: int) -> Curves:
    """Return the ends of runs that are told how many steps they have, one run for every checkpoint.

    The curves are measured at the start and at the checkpoints alone.
    """
    ends = [run(steps) for steps in checkpoints_within(horizon)]
    log_excess = [ends[0].log_excess[..., :1], *(end.log_excess[..., -1:] for end in ends)]
    return dataclasses.replace(
        ends[-1],
        steps=(0, *(end.steps[-1] for end in ends)),
        log_excess=torch.cat(log_excess, dim=-1),
        metric=torch.cat([end.metric[..., -1:] for end in ends], dim=-1),
        violation=torch.stack([end.violation for end in ends]).amax(dim=0),
        seconds=sum(end.seconds for end in ends),
    )


def tune(task: EvaluationTask, baseline: Baseline, seeds: int = 5, horizon: int = 200) -> Curves:
    """Run a baseline on the grid, extended while a best rate lies at its edge."""

    def run(rates: Sequence[float]) -> Curves:
        return run_baseline(task, baseline, rates, seeds, horizon)

    curves = run(GRID)
    for _ in range(MAX_EXTENSIONS):
        best = {curves.best(step) for step in curves.checkpoints}
        exponents = range(1, EXTENSION + 1)
        below = [curves.rates[0] / 10 ** (e / 2) for e in reversed(exponents)] if 0 in best else []
        above = [curves.rates[-1] * 10 ** (e / 2) for e in exponents] if len(curves.rates) - 1 in best else []
        if not below and not above:
            break
        curves = _merge(curves, run(below + above), len(below))
    return curves


def _merge(curves: Curves, more: Curves, below: int) -> Curves:
    """Put the first ``below`` rates of ``more`` in front of ``curves`` and the others behind."""

    def join(old: Tensor, new: Tensor) -> Tensor:
        return torch.cat([new[:below], old, new[below:]])

    return dataclasses.replace(
        curves,
        log_excess=join(curves.log_excess, more.log_excess),
        metric=join(curves.metric, more.metric),
        violation=join(curves.violation, more.violation),
        rates=(*more.rates[:below], *curves.rates, *more.rates[below:]),
        seconds=curves.seconds + more.seconds,
    )


def run_untuned(
    task: EvaluationTask, make: Callable[[Geometry], Optimizer], seeds: int = 5, horizon: int = 200
) -> Curves:
    """Run an optimizer that has no learning rate.

    If it leaves the manifold by more than ``FEASIBLE`` it is run again and measured at the nearest points of the
    manifold, as the infeasible baselines are; the violation is that of its own iterates.
    """

    def run(feasible: bool) -> Curves:
        return evaluate_rates(task, lambda geometry, lr: make(geometry), (0.0,), seeds, horizon, feasible)

    curves = run(True)
    violated = bool((curves.violation > FEASIBLE).any())
    return dataclasses.replace(run(False), violation=curves.violation) if violated else curves
