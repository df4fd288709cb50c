"""How several sets of weights do on the development suite, in two CPU minutes each.

``python tests/benchmarks/compare_weights.py base runs/one/weights.safetensors ...`` runs each on every task, untuned,
and prints for every task and checkpoint the gap to the best tuned baseline in mean log excess (negative: better); at
the end on how many tasks it is no worse, and the mean gap, each gap counted as 2 at most. No times are measured and
nothing is told: this is for choosing among trainings, ``subspace-meta evaluate`` is what is quoted.
"""

from __future__ import annotations

import argparse
import fnmatch
import math

import torch

import subspace_meta as sm
from subspace_meta.checkpoint import load_weights
from subspace_meta.evaluation import archive
from subspace_meta.evaluation.comparison import COMPARED, Comparison, TaskResult
from subspace_meta.evaluation.protocol import FLOOR, Baseline, EvaluationTask, run_baseline
from subspace_meta.tasks.suite import SuiteTask, evaluation_suite
from subspace_meta.weights import RELEASES, located

LOWEST = math.log(FLOOR) + 0.5  # log excess below which a verdict tells nothing apart
MOST = 2.0


def judged(task: SuiteTask, weights: dict[str, torch.Tensor], adapter: sm.Adapter, averages: bool) -> TaskResult:
    """Return what the weights do on a task, without times."""

    def make(geometry: sm.Geometry, lr: torch.Tensor) -> sm.Optimizer:
        return sm.SubspaceOptimizer(geometry, weights, adapter, lr=lr, averaging=averages)

    drawn = EvaluationTask(task.row, task.family)
    curves = run_baseline(drawn, Baseline("learned", make), (1.0,), archive.SEEDS, min(task.horizon, COMPARED[-1]))
    return TaskResult(task, curves, archive.load(task.row), (math.nan, math.nan))


def gap(result: TaskResult, step: int) -> float:
    """Return the mean log excess less that of the best tuned baseline."""
    return max(result.score(step), LOWEST) - max(result.best(step)[1], LOWEST)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("weights", nargs="+", help=f"files, or {', '.join(RELEASES)}")
    options.add_argument("--tasks", default="*")
    options.add_argument("--averages", action="store_true", help="judge the averages that they hand out")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    tasks = [t for t in evaluation_suite() if t.available and fnmatch.fnmatch(t.row, chosen.tasks)]
    for name in chosen.weights:
        weights, adapter = load_weights(located(name))
        results = []
        print(f"\n{name}\n| task | " + " | ".join(map(str, COMPARED)) + " |\n|---|" + "---|" * len(COMPARED))
        for task in tasks:
            results.append(result := judged(task, weights, adapter, chosen.averages))
            cells = (f"{gap(result, step):+.2f}" if step in result.compared else "" for step in COMPARED)
            print(f"| {task.row} | " + " | ".join(cells) + " |", flush=True)
        won = ("{} of {}".format(*Comparison(name, tuple(results)).no_worse(step)) for step in COMPARED)
        gaps = ([gap(result, step) for result in results if step in result.compared] for step in COMPARED)
        mean = (f"{sum(min(max(g, -MOST), MOST) for g in some) / max(1, len(some)):+.2f}" for some in gaps)
        print("| no worse | " + " | ".join(won) + " |\n| mean gap | " + " | ".join(mean) + " |")


if __name__ == "__main__":
    main()
