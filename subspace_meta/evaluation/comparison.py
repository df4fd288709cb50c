"""An untuned optimizer against the archive of tuned baselines, task by task, and over the whole suite."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subspace_meta.adapter.base import BaseAdapter
from subspace_meta.evaluation import archive
from subspace_meta.evaluation.archive import Cell, smoothed_minimum
from subspace_meta.evaluation.protocol import (
    BASELINES,
    FLOOR,
    SCHEDULED,
    TIE,
    UNTUNED,
    Baseline,
    Curves,
    EvaluationTask,
    at_budgets,
    placed,
    run_untuned,
)
from subspace_meta.evaluation.report import environment
from subspace_meta.evaluation.scores import bootstrap_interval, interquartile_mean, performance_profile, speed_up
from subspace_meta.evaluation.timing import interleaved
from subspace_meta.geometry import Geometry
from subspace_meta.optimizers import RAdam, SubspaceOptimizer
from subspace_meta.optimizers.base import Optimizer
from subspace_meta.tasks.placement import on_device
from subspace_meta.tasks.suite import SuiteTask

Factory = Callable[[Geometry], Optimizer]

PEER = "RAdam"  # what speed-ups are over
COMPARED = (20, 50, 100, 200, 400)  # steps at which losses are compared
TIMED = (20, 50, 100, 200)  # steps at which the speed-up is taken: before the peer's run ends
MOST_DOUBTS = 3  # tasks that are named one by one
LONG = (1000, 2000, 4000)  # further steps of both, where the run is that long
QUICK = (
    "PCA of digits 64x8",
    "orthonormal classification of digits 64x10",
    "synthetic PCA 64x8",
    "joint diagonalisation 32x8",
    "ordered eigenvectors 100x8",
    "Karcher means of MNIST 10x5x5",
    "Wahba's problem SO(3)",
    "Rayleigh quotient 200",
    "max-cut relaxation 15x100",
    "logistic regression of digits 64",
)


@dataclass(frozen=True)
class TaskResult:
    """What the optimizer did on one task, beside the archive's cells.

    Attributes:
        task: the task.
        curves: of the optimizer, one rate.
        cells: of the baselines that are defined there.
        seconds: of one step, gradient included, on one CPU thread or a device: the optimizer's, and the peer's.
        told: of the optimizer, told how many steps it has, one run for every checkpoint; ``None`` if it takes none.
    """

    task: SuiteTask
    curves: Curves
    cells: dict[str, Cell]
    seconds: tuple[float, float]
    told: Curves | None = None

    @property
    def compared(self) -> tuple[int, ...]:
        """The steps at which losses are compared."""
        return tuple(step for step in (*COMPARED, *LONG) if step <= self.task.horizon)

    def score(self, step: int) -> float:
        """Return the optimizer's mean log excess over seeds."""
        return float(self.curves.at(step).mean())

    def best(self, step: int) -> tuple[str, float]:
        """Return the best tuned baseline at a step, at its best rate there, and its mean log excess."""
        name = min(sorted(self.tuned), key=lambda name: self.tuned[name].score(step))
        return name, self.tuned[name].score(step)

    @property
    def tuned(self) -> dict[str, Cell]:
        """The cells of the baselines that are tuned at every step, and are not told how many there will be."""
        return {b.name: self.cells[b.name] for b in BASELINES if b.name in self.cells}

    def untuned(self, step: int) -> dict[str, float]:
        """Return the mean log excess of every method with a published default, at that default."""
        return {
            baseline.name: self.cells[baseline.name].score_at(baseline.default, step)
            for baseline in BASELINES + UNTUNED
            if baseline.default is not None and baseline.name in self.cells
        }

    def scheduled(self, step: int) -> dict[str, float]:
        """Return the mean log excess of every method that is told the number of steps, at its best peak rate."""
        return {b.name: self.cells[b.name].score(step) for b in SCHEDULED if b.name in self.cells}

    def score_told(self, step: int) -> float:
        """Return the optimizer's mean log excess where it was told that ``step`` is the last; as it is otherwise."""
        return float((self.told or self.curves).at(step).mean())

    def verdict(self, step: int, best: float | None = None, ours: float | None = None) -> str:
        """Return ``"better"``, ``"tie"`` (within 0.02, or both at the floor of float32) or ``"worse"``.

        Beside the best tuned baseline, or the mean log excess ``best``; ``ours`` is the optimizer's, told nothing.
        """
        ours = self.score(step) if ours is None else ours
        best = self.best(step)[1] if best is None else best
        floor = math.log(FLOOR) + 0.5
        if abs(ours - best) <= TIE or (ours <= floor and best <= floor):
            return "tie"
        return "better" if ours < best else "worse"

    def speed_ups(self) -> tuple[Tensor, bool]:
        """Return the speed-up over the tuned peer in steps, one a seed, and whether one is only a lower bound."""
        curves = smoothed_minimum(self.curves.log_excess[0])
        peer = self.cells[PEER]
        at = [step for step in (*TIMED, *LONG[:-1]) if step < self.task.horizon] or [self.compared[0]]
        found = [speed_up(self.curves.steps, curve, peer.steps, peer.envelope, at) for curve in curves]
        return torch.tensor([value for value, _ in found]), any(censored for _, censored in found)

    def time_ratio(self) -> float:
        """Return the optimizer's seconds a step over the peer's."""
        return self.seconds[0] / self.seconds[1]

    @property
    def violation(self) -> float:
        """The largest constraint violation at the end."""
        return float(self.curves.violation.max())

    @property
    def finite(self) -> float:
        """The share of runs without a non-finite objective."""
        return float(torch.isfinite(self.curves.log_excess).all(dim=-1).double().mean())

    def to_json(self) -> dict[str, Any]:
        """Return everything that the report shows of this task."""
        speed, censored = self.speed_ups()
        return {
            "task": self.task.row,
            "manifolds": list(self.task.manifolds),
            "axis": self.task.axis,
            "reference": self.task.reference,
            "metric_name": self.task.metric,
            "metric": [float(value) for value in self.curves.metric[0].mean(dim=0)],
            "objective": [float(self.curves.objective(step).mean()) for step in self.curves.checkpoints],
            "minimum": self.curves.reference,
            "checkpoints": list(self.curves.checkpoints),
            "compared": list(self.compared),
            "log_excess": [self.score(step) for step in self.compared],
            "log_excess_told": [self.score_told(step) for step in self.compared] if self.told else None,
            "best": [
                {"baseline": name, "rate": self.cells[name].rates[self.cells[name].best(step)], "log_excess": value}
                for step in self.compared
                for name, value in [self.best(step)]
            ],
            "baselines": {name: [cell.score(step) for step in self.compared] for name, cell in self.cells.items()},
            "verdict": [self.verdict(step) for step in self.compared],
            "untuned": [self.untuned(step) for step in self.compared],
            "scheduled": [self.scheduled(step) for step in self.compared],
            "speed_up": speed.tolist(),
            "speed_up_is_lower_bound": censored,
            "seconds_per_step": {"optimizer": self.seconds[0], PEER: self.seconds[1]},
            "violation": self.violation,
            "finite": self.finite,
        }


@dataclass(frozen=True)
class Comparison:
    """The results on several tasks, and what they say together.

    Attributes:
        name: of the optimizer.
        results: one a task.
        notes: sentences that a reader of the figures must know.
    """

    name: str
    results: tuple[TaskResult, ...]
    notes: tuple[str, ...] = ()

    @property
    def tuned(self) -> tuple[str, ...]:
        """The tuned baselines that are there on every task on which they are defined."""

        def complete(baseline: Baseline) -> bool:
            lacking = [r for r in self.results if baseline.name not in r.cells]
            return len(lacking) < len(self.results) and not any(
                baseline.defined_on(r.task.family.problem.geometry) for r in lacking
            )

        return tuple(baseline.name for baseline in BASELINES if complete(baseline))

    def no_worse(self, step: int, results: Sequence[TaskResult] | None = None, told: bool = False) -> tuple[int, int]:
        """Return on how many tasks the optimizer is no worse than the best baseline at a step, and of how many.

        Where it is ``told`` it knows that the step is the last; the baselines do not.
        """
        chosen = [r for r in (self.results if results is None else results) if step in r.compared]
        verdicts = [r.verdict(step, ours=r.score_told(step) if told else None) for r in chosen]
        return sum(verdict != "worse" for verdict in verdicts), len(chosen)

    def beside_untuned(self, name: str, step: int) -> tuple[int, int]:
        """Return on how many tasks the optimizer is no worse at a step than an untuned method, and of how many.

        Named ``""`` it is the best of them on each task.
        """
        return self._beside(name, step, TaskResult.untuned, TaskResult.score)

    def beside_scheduled(self, name: str, step: int) -> tuple[int, int]:
        """Return the same beside a method with a schedule that ends at that step, at its best peak rate.

        The optimizer is told the number of steps as well, if it takes it.
        """
        return self._beside(name, step, TaskResult.scheduled, TaskResult.score_told)

    def _beside(
        self,
        name: str,
        step: int,
        rivals: Callable[[TaskResult, int], dict[str, float]],
        ours: Callable[[TaskResult, int], float],
    ) -> tuple[int, int]:
        verdicts = []
        for result in self.results:
            if step in result.compared and (found := rivals(result, step)) and (not name or name in found):
                best = found[name] if name else min(found.values())
                verdicts.append(result.verdict(step, best, ours(result, step)))
        return sum(verdict != "worse" for verdict in verdicts), len(verdicts)

    def speed(
        self, in_seconds: bool = False, results: Sequence[TaskResult] | None = None
    ) -> tuple[float, float, float]:
        """Return the interquartile mean of the speed-up over all runs, and its 95 % interval."""
        chosen = self.results if results is None else results
        groups = [r.speed_ups()[0] / (r.time_ratio() if in_seconds else 1.0) for r in chosen]
        return float(interquartile_mean(torch.cat(groups))), *bootstrap_interval(groups)

    @property
    def largest_violation(self) -> float:
        """The largest constraint violation at the end of a run."""
        return max(r.violation for r in self.results)

    @property
    def share_finite(self) -> float:
        """The share of runs without a non-finite objective."""
        return sum(r.finite for r in self.results) / len(self.results)

    def profile(self, thresholds: Tensor) -> Tensor:
        """Return the share of runs whose speed-up in steps is at least each threshold."""
        return performance_profile(torch.cat([r.speed_ups()[0] for r in self.results]), thresholds)

    def by_axis(self) -> dict[str, list[TaskResult]]:
        """Return the results by axis of generalisation."""
        found: dict[str, list[TaskResult]] = {}
        for result in self.results:
            found.setdefault(result.task.axis, []).append(result)
        return found

    def to_json(self) -> dict[str, Any]:
        """Return everything that the report shows."""

        def summary(results: Sequence[TaskResult]) -> dict[str, Any]:
            steps = sorted({step for r in results for step in r.compared})
            return {
                "tasks": len(results),
                "no_worse": {str(step): list(self.no_worse(step, results)) for step in steps},
                "no_worse_told": {str(step): list(self.no_worse(step, results, told=True)) for step in steps},
                "no_worse_than_untuned": {
                    str(step): list(Comparison(self.name, tuple(results)).beside_untuned("", step)) for step in steps
                },
                "no_worse_than_scheduled": {
                    str(step): list(Comparison(self.name, tuple(results)).beside_scheduled("", step)) for step in steps
                },
                "speed_up_steps": list(self.speed(results=results)),
                "speed_up_cpu_seconds": list(self.speed(True, results)),
            }

        return {
            "optimizer": self.name,
            "environment": environment(),
            "tuned": list(self.tuned),
            "archive": sorted({cell.code for r in self.results for cell in r.cells.values()}),
            "measure": "mean log((f - f*)/(f0 - f*)) over seeds; baselines at their best learning rate per step",
            "all": summary(self.results),
            "axes": {axis: summary(results) for axis, results in self.by_axis().items()},
            "largest_violation": self.largest_violation,
            "share_finite": self.share_finite,
            "notes": list(self.notes),
            "tasks": [r.to_json() for r in self.results],
        }


def seconds_of_a_step(
    task: SuiteTask, makes: Sequence[Factory], steps: int = 5, rounds: int = 3, device: torch.device | str = "cpu"
) -> list[float]:
    """Return seconds of one step, loss and gradient included, of single runs in turn; see :func:`interleaved`."""
    family, problem = on_device(task.family, torch.device(device)), task.family.problem
    data = family.draw(torch.Generator().manual_seed(0), 1)
    params = {name: value[0] for name, value in family.init(data, torch.Generator().manual_seed(0)).items()}
    batches = family.sample(data, torch.Generator().manual_seed(0), steps)

    def runner(make: Factory) -> Callable[[], None]:
        optimizer = make(problem.geometry)
        state = optimizer.init(params)

        def run() -> None:
            moved, kept = params, state
            for t in range(steps):
                batch = {name: value[t, 0] for name, value in batches.items()}
                grads, value = torch.func.grad_and_value(problem.loss)(moved, batch)
                moved, kept = optimizer.update(grads, kept, moved, value)

        return run

    found = interleaved({str(i): runner(make) for i, make in enumerate(makes)}, rounds, device)
    return [seconds / steps for seconds in found.values()]


def compare(
    name: str,
    make: Factory,
    tasks: Sequence[SuiteTask],
    folder: Path = archive.FOLDER,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[SuiteTask, TaskResult | str]]:
    """Run an untuned optimizer on tasks; yield each result, or why there is none.

    What the optimizer or the task raises stops that task alone.

    Args:
        name: of the optimizer, for messages.
        make: ``geometry -> optimizer``.
        tasks: available ones.
        folder: where the archive lies.
        device: where it runs, and the tensors of ``make`` lie; the archive was made on a CPU.
    """
    for task in tasks:
        try:
            cells = archive.load(task.row, folder)
            if PEER not in cells:
                yield task, f"{PEER} is not tuned on it in {folder}; subspace-meta archive does that"
                continue
            drawn = placed(EvaluationTask(task.row, task.family, task.instance), device)
            curves = run_untuned(drawn, make, archive.SEEDS, task.horizon).on_cpu()
            told = _told(drawn, make, task.horizon)
            ours, peers = seconds_of_a_step(task, (make, lambda geometry: RAdam(geometry, 1e-2)), device=device)
        except Exception as error:  # a user's code may raise anything
            yield task, f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        else:
            yield task, TaskResult(task, curves, cells, (ours, peers), told)


def _told(task: EvaluationTask, make: Factory, horizon: int) -> Curves | None:
    """Run an optimizer that takes the number of steps once for every checkpoint, the end of which it knows."""
    optimizer = make(task.family.problem.geometry)
    if not isinstance(optimizer, SubspaceOptimizer) or not isinstance(optimizer.adapter, BaseAdapter):
        return None

    def run(steps: int) -> Curves:
        told = dataclasses.replace(optimizer, steps=steps)
        return run_untuned(task, lambda _: told, archive.SEEDS, steps).on_cpu()

    return at_budgets(run, horizon)


def doubts(results: Sequence[TaskResult]) -> list[str]:
    """Return a sentence for each task whose baselines are not all there, or were made by other code; for many, one."""
    lacking = {r.task.row: count for r in results if (count := len(archive.lacking(r.task, r.cells)))}
    how = "are missing or were made by other code (archive --dry-run lists them)"
    if len(lacking) > MOST_DOUBTS:
        return [f"on {len(lacking)} tasks up to {max(lacking.values())} of the baselines {how}"]
    return [f"{row}: {count} of the baselines {how}" for row, count in lacking.items()]
