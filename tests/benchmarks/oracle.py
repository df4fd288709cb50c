"""What is missing where the learned optimizer loses: length, lateness or direction of its steps.

``python tests/benchmarks/oracle.py`` runs the shipped weights on the development suite with the help of an oracle, and
prints for every task on which they lose the mean log excess at the checkpoints of (a) the weights as they are, (b) the
best of nine constant factors of their steps, chosen anew for each checkpoint, (c) the same with a cosine schedule that
ends at the checkpoint, (d) the averages of their iterates (:class:`subspace_meta.optimizers.Averaging`), and (e) the
best tuned baseline. Where (b) is enough, lengths are wrong; where (c) or (d), only late ones; where none is, the
directions are.
"""

from __future__ import annotations

import argparse
import fnmatch
from collections import Counter
from pathlib import Path

import torch

import subspace_meta as sm
from subspace_meta.checkpoint import load_weights
from subspace_meta.evaluation import archive
from subspace_meta.evaluation.protocol import BASELINES, TIE, Baseline, EvaluationTask, cosine, run_baseline
from subspace_meta.tasks.suite import SuiteTask, evaluation_suite

FACTORS = tuple(10 ** (exponent / 4) for exponent in range(-4, 5))
STEPS = (20, 50, 100, 200, 400)
AS_IT_IS, FACTOR, SCHEDULE, AVERAGE, PEER = "as it is", "factor", "schedule", "average", "best tuned"


def helped(task: SuiteTask, weights: dict[str, torch.Tensor], preset: str) -> dict[str, dict[int, float]]:
    """Return the mean log excess at each checkpoint, for each kind of help."""

    def make(geometry: sm.Geometry, lr: torch.Tensor) -> sm.Optimizer:
        return sm.SubspaceOptimizer(geometry, weights, preset, lr=lr)

    def averaged(geometry: sm.Geometry, lr: torch.Tensor) -> sm.Optimizer:
        return sm.Averaging(make(geometry, lr))

    kinds = {
        AS_IT_IS: (Baseline(AS_IT_IS, make), (1.0,)),
        FACTOR: (Baseline(FACTOR, make), FACTORS),
        SCHEDULE: (Baseline(SCHEDULE, make, schedule=cosine), FACTORS),
        AVERAGE: (Baseline(AVERAGE, averaged), (1.0,)),
    }
    steps = [step for step in STEPS if step <= task.horizon]
    drawn = EvaluationTask(task.row, task.family)
    found = {}
    for name, (baseline, rates) in kinds.items():
        curves = run_baseline(drawn, baseline, rates, archive.SEEDS, min(task.horizon, STEPS[-1]))
        found[name] = {step: float(curves.at(step).mean(dim=-1).amin()) for step in steps}
    cells = archive.load(task.row)
    tuned = [cells[baseline.name] for baseline in BASELINES if baseline.name in cells]
    found[PEER] = {step: min(cell.score(step) for cell in tuned) for step in steps}
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--weights", type=Path)
    options.add_argument("--preset", default="base")
    options.add_argument("--tasks", default="*")
    options.add_argument("--all", action="store_true", help="the tasks that are won, too")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    weights = load_weights(chosen.weights)[0] if chosen.weights else sm.pretrained(chosen.preset)
    enough: Counter[str] = Counter()
    kinds = (AS_IT_IS, FACTOR, SCHEDULE, AVERAGE, PEER)
    print("| task | step | " + " | ".join(kinds) + " |\n|---|---|" + "---|" * len(kinds))
    for task in evaluation_suite():
        if not task.available or not fnmatch.fnmatch(task.row, chosen.tasks):
            continue
        found = helped(task, weights, chosen.preset)
        for step in found[PEER]:
            bound = found[PEER][step] + TIE
            lost = found[AS_IT_IS][step] > bound
            if lost:
                for kind in (FACTOR, SCHEDULE, AVERAGE):
                    enough[kind] += found[kind][step] <= bound
                enough["lost"] += 1
                enough["none of them"] += all(found[kind][step] > bound for kind in (FACTOR, SCHEDULE, AVERAGE))
            if lost or chosen.all:
                cells = (f"{found[kind][step]:.2f}" for kind in kinds)
                print(f"| {task.row} | {step} | " + " | ".join(cells) + " |", flush=True)
    print("\n" + ", ".join(f"{kind}: {count}" for kind, count in enough.items()))


if __name__ == "__main__":
    main()
