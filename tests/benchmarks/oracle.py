"""What is missing where the learned optimizer loses: length, lateness or direction of its steps.

``python tests/benchmarks/oracle.py`` runs the shipped weights on the development suite with the help of an oracle, and
prints for every task on which they lose the mean log excess at the checkpoints of (a) the weights as they are, (b) the
best of nine constant factors of their steps, chosen anew for each checkpoint, (c) the same with a cosine schedule that
ends at the checkpoint, (d) the averages of their iterates (:class:`subspace_meta.optimizers.Averaging`), and (e) the
best tuned baseline. Where (b) is enough, lengths are wrong; where (c) or (d), only late ones; where none is, the
directions are.

With ``--training`` it takes tasks of the training distribution instead, three families of each stream, six tasks each,
and prints what five constant factors of all steps would give: where one of them is better than 1, what is missing is
not generalisation.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
from collections import Counter
from pathlib import Path

import torch

import subspace_meta as sm
from subspace_meta.checkpoint import load_weights
from subspace_meta.evaluation import archive
from subspace_meta.evaluation.protocol import BASELINES, TIE, Baseline, EvaluationTask, cosine, run_baseline
from subspace_meta.meta.distribution import training_streams
from subspace_meta.meta.trainer import relative_log_loss
from subspace_meta.meta.unroll import InnerLoop, run
from subspace_meta.tasks.suite import SuiteTask, evaluation_suite

FACTORS = tuple(10 ** (exponent / 4) for exponent in range(-4, 5))
COARSE = (0.1, 0.3, 1.0, 3.0, 10.0)
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


def on_training(weights: dict[str, torch.Tensor], preset: str) -> None:
    """Print the mean log excess of tasks that the weights were trained on, with each factor of all steps."""
    tasks, steps = 6, STEPS[-1]
    generator = torch.Generator().manual_seed(99)
    header = " | ".join(str(step) for step in STEPS)
    print(f"mean log excess after so many steps, all steps times {' / '.join(f'{f:g}' for f in COARSE)}")
    print(f"| family | {header} |\n|---|" + "---|" * len(STEPS))
    for stream in training_streams():
        families = stream.families
        for index in sorted({0, len(families) // 2, len(families) - 1}):
            family = families[index]
            data = family.draw(generator, tasks)
            start = family.init(data, generator)
            batches = family.sample(data, generator, steps)
            loop = InnerLoop(family.problem, functools.partial(scaled, preset=preset), compiled=False)
            initial = loop.objective(start, family.measured(data))
            found = []
            for factor in COARSE:
                theta = {**weights, "factor": torch.tensor(factor)}
                objectives = run(loop, theta, loop.start(theta, start), batches, family.measured(data)).objectives
                found.append(relative_log_loss(objectives, initial, data["reference"]).mean(dim=1))
            cells = (" / ".join(f"{curve[step - 1]:.2f}" for curve in found) for step in STEPS)
            print(f"| {family.name} | " + " | ".join(cells) + " |", flush=True)


def scaled(geometry: sm.Geometry, theta: dict[str, torch.Tensor], preset: str) -> sm.Optimizer:
    """Return the learned optimizer with all its steps times ``theta["factor"]``."""
    rest = {name: value for name, value in theta.items() if name != "factor"}
    return sm.SubspaceOptimizer(geometry, rest, preset, lr=theta["factor"])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--weights", type=Path)
    options.add_argument("--preset", default="base")
    options.add_argument("--tasks", default="*")
    options.add_argument("--all", action="store_true", help="the tasks that are won, too")
    options.add_argument("--training", action="store_true", help="tasks of the training distribution instead")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    weights = load_weights(chosen.weights)[0] if chosen.weights else sm.pretrained(chosen.preset)
    if chosen.training:
        on_training(weights, chosen.preset)
        return
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
