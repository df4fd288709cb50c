"""How several sets of weights do on the development suite, in two CPU minutes each.

``python tests/benchmarks/compare_weights.py base runs/one/weights.safetensors ...`` runs each on every task, untuned,
and prints for every task and checkpoint the gap to the best tuned baseline in mean log excess (negative: better); at
the end on how many tasks it is no worse, and the mean gap, each gap counted as 2 at most. No times are measured and
nothing is told: this is for choosing among trainings, ``subspace-meta evaluate`` is what is quoted.
"""

from __future__ import annotations

import argparse
import fnmatch
from pathlib import Path

import torch

import subspace_meta as sm
from subspace_meta.checkpoint import load_weights
from subspace_meta.evaluation import archive
from subspace_meta.evaluation.protocol import BASELINES, TIE, Baseline, EvaluationTask, run_baseline
from subspace_meta.tasks.suite import SuiteTask, evaluation_suite
from subspace_meta.weights import FOLDER, RELEASES

STEPS = (20, 50, 100, 200, 400)
LOWEST = -15.6  # log excess below which float32 tells nothing apart
MOST = 2.0


def gaps(task: SuiteTask, weights: dict[str, torch.Tensor], adapter: sm.Adapter) -> dict[int, float]:
    """Return at each checkpoint the mean log excess less that of the best tuned baseline."""

    def make(geometry: sm.Geometry, lr: torch.Tensor) -> sm.Optimizer:
        return sm.SubspaceOptimizer(geometry, weights, adapter, lr=lr)

    drawn = EvaluationTask(task.row, task.family)
    curves = run_baseline(drawn, Baseline("learned", make), (1.0,), archive.SEEDS, min(task.horizon, STEPS[-1]))
    cells = archive.load(task.row)
    tuned = [cells[baseline.name] for baseline in BASELINES if baseline.name in cells]
    best = {step: min(cell.score(step) for cell in tuned) for step in STEPS if step <= task.horizon}
    return {step: max(float(curves.at(step).mean()), LOWEST) - max(peer, LOWEST) for step, peer in best.items()}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("weights", nargs="+", help=f"files, or {', '.join(RELEASES)}")
    options.add_argument("--tasks", default="*")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    for name in chosen.weights:
        weights, adapter = load_weights(FOLDER / RELEASES[name] if name in RELEASES else Path(name))
        found: dict[int, list[float]] = {step: [] for step in STEPS}
        print(f"\n{name}\n| task | " + " | ".join(map(str, STEPS)) + " |\n|---|" + "---|" * len(STEPS))
        for task in evaluation_suite():
            if not task.available or not fnmatch.fnmatch(task.row, chosen.tasks):
                continue
            gap = gaps(task, weights, adapter)
            for step, value in gap.items():
                found[step].append(value)
            cells = (f"{gap[step]:+.2f}" if step in gap else "" for step in STEPS)
            print(f"| {task.row} | " + " | ".join(cells) + " |", flush=True)
        won = (f"{sum(value <= TIE for value in values)} of {len(values)}" for values in found.values())
        mean = (f"{sum(min(max(v, -MOST), MOST) for v in vs) / max(1, len(vs)):+.2f}" for vs in found.values())
        print("| no worse | " + " | ".join(won) + " |\n| mean gap | " + " | ".join(mean) + " |")


if __name__ == "__main__":
    main()
