"""A task that is not finite spoils its own contribution only, going forward or back."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from making import lively_weights, normal
from torch import Tensor

import subspace_meta as sm
from subspace_meta.meta.isolation import segment_gradient
from subspace_meta.meta.trainer import PresetOptimizer, StreamSettings, Trainer, TrainSettings
from subspace_meta.meta.unroll import InnerLoop
from subspace_meta.tasks import Problem, SyntheticPCA
from subspace_meta.tasks import data as data_sets
from subspace_meta.tasks.classification import LogisticRegression
from subspace_meta.tasks.pca import pca_problem

TASKS, STEPS, D, P = 6, 4, 5, 2
LOOP = InnerLoop(pca_problem(D, P), PresetOptimizer(), compiled=False)


def setting() -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    params = {"x": sm.Stiefel().random_point((TASKS, D, P), torch.Generator().manual_seed(0), torch.float64)}
    z = normal(TASKS, 20, D, seed=2)
    return lively_weights(), params, {"z": normal(STEPS, TASKS, 7, D, seed=1)}, {"covariance": z.mT @ z}


def mean_loss(objectives: Tensor) -> Tensor:
    return objectives.mean(dim=0)


def gradient_of(loop: InnerLoop, batches: dict[str, Tensor], places: list[int]) -> dict[str, Tensor]:
    theta, params, _, data = setting()
    carry = loop.start(theta, {name: value[places] for name, value in params.items()})
    window = {name: value[:, places] for name, value in batches.items()}
    return segment_gradient(loop, theta, carry, window, {k: v[places] for k, v in data.items()}, mean_loss).theta


@pytest.mark.parametrize("spoiled", [[0], [3], [0, 5], [1, 2, 3, 4]])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_gradient_is_that_of_the_other_tasks(spoiled: list[int], value: float) -> None:
    theta, params, batches, data = setting()
    batches["z"][2, spoiled] = value
    found = segment_gradient(LOOP, theta, LOOP.start(theta, params), batches, data, mean_loss)
    assert found.spoiled.nonzero().flatten().tolist() == spoiled
    good = [i for i in range(TASKS) if i not in spoiled]
    assert found.source.tolist() == [i if i in good else good[0] for i in range(TASKS)]
    for name, expected in gradient_of(LOOP, setting()[2], good).items():
        torch.testing.assert_close(found.theta[name], expected, rtol=1e-10, atol=1e-12)
    assert found.loss == pytest.approx(float(found.objectives[:, good].mean()))
    assert all(torch.isfinite(x).all() for x in found.carry.params.values())


def test_averages_of_a_spoiled_task_go_with_its_parameters() -> None:
    """What is handed out of the copy is a copy, too: the old average belongs to another task."""
    loop = replace(LOOP, make_optimizer=PresetOptimizer(averaging=True))
    theta, params, batches, data = setting()
    carry = segment_gradient(loop, theta, loop.start(theta, params), batches, data, mean_loss).carry
    batches["z"][2, 3] = math.nan
    found = segment_gradient(loop, theta, carry, batches, data, mean_loss)
    assert found.source.tolist() == [0, 1, 2, 0, 4, 5]
    averages = found.carry.state.average[0]
    copied, other = ((averages[3] - averages[i]).norm() for i in (0, 1))
    # The statistics are its own, so the two do not move alike; but they are of one place.
    assert copied < 0.2 * other


def kinked_loss(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    """Finite with a finite gradient, but at z = 0 the root's second derivative is not."""
    return ((batch["z"] @ params["x"]).square().sum()).pow(1.25)


def test_a_task_that_is_spoiled_on_the_way_back_only() -> None:
    loop = replace(LOOP, problem=Problem(LOOP.problem.geometry, kinked_loss, LOOP.problem.objective))
    theta, params, batches, data = setting()
    batches["z"][1, 2] = 0.0
    found = segment_gradient(loop, theta, loop.start(theta, params), batches, data, mean_loss)
    assert found.spoiled.tolist() == [i == 2 for i in range(TASKS)]
    good = [0, 1, 3, 4, 5]
    for name, expected in gradient_of(loop, setting()[2], good).items():
        torch.testing.assert_close(found.theta[name], expected, rtol=1e-10, atol=1e-12)


def test_nothing_is_left_when_all_are_spoiled() -> None:
    theta, params, batches, data = setting()
    batches["z"][:] = math.nan
    found = segment_gradient(LOOP, theta, LOOP.start(theta, params), batches, data, mean_loss)
    assert found.spoiled.all()
    assert all(value.isnan().all() for value in found.theta.values())


def test_a_gradient_that_no_task_explains_is_not_handed_out() -> None:
    theta, params, batches, data = setting()
    carry = LOOP.start(theta, params)
    carry.state.momentum[0][2, 1, 0] = math.nan
    found = segment_gradient(LOOP, theta, carry, batches, data, mean_loss)
    assert found.spoiled.all()
    assert all(value.isnan().all() for value in found.theta.values())


@dataclass(frozen=True)
class OneSpoiled(SyntheticPCA):
    """A family whose first task now and then has a NaN in its batches."""

    def sample(self, data: dict[str, Tensor], generator: torch.Generator, steps: int) -> dict[str, Tensor]:
        batch = super().sample(data, generator, steps)
        if float(torch.rand((), generator=generator)) < 0.5:
            batch["z"][0, 0] = math.nan
        return batch


def test_the_trainer_counts_them_and_goes_on() -> None:
    stream = StreamSettings((OneSpoiled(6, 2, 8),), tasks=4, compiled=False)
    trainer = Trainer(TrainSettings((stream,), outer_steps=12, segment=4, horizon=(4, 16)))
    figures = list(trainer.run())
    assert trainer.skipped == 0
    assert trainer.updates == 12
    assert 0 < trainer.spoiled_tasks < 12
    assert figures[-1]["spoiled_tasks"] == trainer.spoiled_tasks
    assert all(math.isfinite(f["outer_loss"]) and math.isfinite(f["final_log_excess"]) for f in figures)


def test_parameters_without_dimensions() -> None:
    """A bias that is one number a task is a parameter like any other."""
    family = LogisticRegression("wine", data_sets.wine, batch_size=8)
    stream = StreamSettings((family,), tasks=2, compiled=False)
    (figures,) = Trainer(TrainSettings((stream,), outer_steps=1, segment=2, horizon=(2, 2))).run()
    assert math.isfinite(figures["gradient_norm"])
