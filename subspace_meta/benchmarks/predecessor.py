"""``subspace-meta bench predecessor``: the matrix LSTM and the subspace optimizer, meta-trained for the same CPU time.

Both are meta-trained by truncated back-propagation through this library's engine *on the task that they are then judged
on*, as the published comparisons do (Gao et al., TPAMI 2022; arXiv 2501.15235): classification of the YaleB faces with
St(1024, 38), and the Karcher means of the Kylberg textures on 20 x SPD(5). So this says how far each gets in a given
time, not how it generalises; what ships was trained on neither. The matrix LSTM starts as gradient descent at the
learning rate that is best for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from subspace_meta.adapter.network import Weights
from subspace_meta.evaluation.protocol import Curves, EvaluationTask, run_untuned
from subspace_meta.geometry import Geometry
from subspace_meta.meta.estimators import Backpropagation, Segment
from subspace_meta.meta.trainer import PresetOptimizer, relative_log_loss
from subspace_meta.meta.unroll import InnerLoop
from subspace_meta.optimizers import MatrixLSTM
from subspace_meta.optimizers.base import Optimizer
from subspace_meta.optimizers.subspace import PRESETS
from subspace_meta.tasks.base import TaskFamily
from subspace_meta.tasks.suite import evaluation_suite

# Row of the suite, and the learning rate of gradient descent that is best at step 50 there (the archive).
TASKS = {"orthonormal classification of YaleB 1024x38": 1e-3, "Karcher means of Kylberg 20x5x5": 1.0}
SEGMENT = 10
HORIZON = 50
SEEDS = 3
JUDGED = 100


@dataclass(frozen=True)
class MatrixLSTMOptimizer:
    """Makes the matrix LSTM; equal ones share compiled inner loops."""

    lr: float

    def __call__(self, geometry: Geometry, theta: Weights) -> MatrixLSTM:
        """Return the optimizer with the meta-parameters ``theta``."""
        return MatrixLSTM(geometry, theta, self.lr)


def meta_train(
    make: Callable[[Geometry, Weights], Optimizer], theta: Weights, family: TaskFamily, seconds: float, lr: float
) -> tuple[Weights, int]:
    """Meta-train for so many CPU seconds: Adam on truncated back-propagation, one task at a time, horizon 50.

    Returns:
        The meta-parameters, and how many outer steps they took.
    """
    generator = torch.Generator().manual_seed(0)
    loop = InnerLoop(family.problem, make, interval=SEGMENT, compiled=False)
    estimator = Backpropagation(loop)
    theta = {name: value.clone().requires_grad_() for name, value in theta.items()}
    adam = torch.optim.Adam(theta.values(), lr=lr)
    began, steps, age = time.process_time(), 0, HORIZON
    while time.process_time() - began < seconds:
        fixed = {name: value.detach() for name, value in theta.items()}
        if age >= HORIZON:
            data = family.draw(generator, 1)
            params = family.init(data, generator)
            measured, reference = family.measured(data), data["reference"]
            initial = loop.objective(params, measured)
            carry, age = estimator.start(fixed, params, generator), 0

        def outer_loss(objectives: torch.Tensor, initial: Any = initial, reference: Any = reference) -> torch.Tensor:
            return relative_log_loss(objectives, initial, reference).mean(dim=0)

        segment = Segment(family.sample(data, generator, SEGMENT), measured, outer_loss)
        estimate = estimator(fixed, segment, carry, generator)
        carry, age, steps = estimate.carry, age + SEGMENT, steps + 1
        norm = torch.stack([g.square().sum() for g in estimate.gradient.values()]).sum().sqrt()
        if not torch.isfinite(norm):
            age = HORIZON  # start over; nothing is learned from it
            continue
        for name, gradient in estimate.gradient.items():
            theta[name].grad = gradient / norm.clamp(min=1.0)
        adam.step()
    return {name: value.detach() for name, value in theta.items()}, steps


def bench_predecessor(minutes: float = 4.0) -> list[dict[str, Any]]:
    """Meta-train both optimizers on both tasks for ``minutes`` of CPU time each, and judge them on evaluation seeds.

    Raises:
        ValueError: the data of the tasks are not there.
    """
    rows = {task.row: task for task in evaluation_suite()}
    records = []
    for row, rate in TASKS.items():
        task = rows[row]
        if not task.available:
            raise ValueError(f"{row}: its data are not there; set SUBSPACE_META_DATA to their folder")
        geometry = task.family.problem.geometry
        generator = torch.Generator().manual_seed(0)
        contestants: dict[str, tuple[Any, Weights, float]] = {
            "MatrixLSTM": (MatrixLSTMOptimizer(rate), MatrixLSTM.init_weights(geometry, generator), 1e-4),
            "Subspace": (PresetOptimizer("base"), PRESETS["base"].init_weights(generator), 3e-3),
        }
        for name, (make, start, lr) in contestants.items():
            theta, steps = meta_train(make, start, task.family, 60.0 * minutes, lr)
            for label, weights in (("before", start), ("after", theta)):
                curves = judge(row, task.family, make, weights)
                records.append(
                    {
                        "task": row,
                        "optimizer": name,
                        "training": label,
                        "meta_parameters": sum(value.numel() for value in weights.values()),
                        "outer_steps": steps,
                        "minutes": minutes,
                        "steps": list(curves.steps),
                        "log_excess": curves.log_excess[0].mean(dim=0).tolist(),
                        "checkpoints": list(curves.checkpoints),
                        "objective": [float(curves.objective(step).mean()) for step in curves.checkpoints],
                        "metric": curves.metric[0].mean(dim=0).tolist(),
                        "cpu_seconds_a_step": curves.seconds / (SEEDS * JUDGED),
                    }
                )
    return records


def judge(row: str, family: TaskFamily, make: Callable[[Geometry, Weights], Optimizer], weights: Weights) -> Curves:
    """Run a trained optimizer from evaluation seeds."""
    return run_untuned(EvaluationTask(row, family), lambda geometry: make(geometry, weights), SEEDS, JUDGED)
