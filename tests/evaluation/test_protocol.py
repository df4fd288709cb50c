"""The protocol on a task whose answers are known: minimise a |x|^2 from fixed starts."""

import functools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import subspace_meta as sm
from subspace_meta.evaluation.protocol import (
    GRID,
    Baseline,
    Curves,
    EvaluationTask,
    cosine,
    evaluate_rates,
    measured_steps,
    run_baseline,
    run_untuned,
    tune,
)
from subspace_meta.evaluation.report import LEARNED, Results
from subspace_meta.tasks import Problem, TaskFamily


def bowl(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    return batch["curvature"] * params["x"].square().sum()


@functools.cache
def bowl_problem() -> Problem:
    return Problem(sm.Geometry.from_rules({"x": torch.empty(3)}), bowl, bowl)


@dataclass(frozen=True)
class Bowl(TaskFamily):
    curvature: float = 0.5
    name = "bowl"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        return bowl_problem()

    def draw(self, generator: torch.Generator, count: int) -> dict[str, Tensor]:
        return {"curvature": torch.full((count,), self.curvature), "reference": torch.zeros(count)}

    def sample(self, data: dict[str, Tensor], generator: torch.Generator, steps: int) -> dict[str, Tensor]:
        return {"curvature": data["curvature"].expand(steps, -1)}


GRADIENT_DESCENT = Baseline("gradient descent", lambda geometry, lr: sm.RSGD(geometry, lr))


def test_the_known_best_rate_is_found() -> None:
    # x <- (1 - lr) x: rate 1 solves it in one step, and every other half-decade is slower.
    curves = tune(EvaluationTask("bowl", Bowl()), GRADIENT_DESCENT, seeds=2, horizon=10)
    assert curves.rates[curves.best(10)] == pytest.approx(1.0)
    index = GRID.index(10**-0.5)
    expected = 2 * 10 * math.log(1 - 10**-0.5)
    assert curves.at(10)[index].tolist() == pytest.approx([expected] * 2, rel=1e-4)


def test_a_grid_whose_edge_wins_is_extended() -> None:
    # Curvature 5e-5: the best rate is 1e4, above the grid's 1e3.
    curves = tune(EvaluationTask("bowl", Bowl(0.5e-4)), GRADIENT_DESCENT, seeds=1, horizon=10)
    assert curves.rates[-1] > GRID[-1]
    assert curves.rates[curves.best(10)] == pytest.approx(1e4)
    assert list(curves.rates) == sorted(curves.rates)
    assert curves.log_excess.shape[0] == len(curves.rates)


def test_a_diverging_rate_is_the_worst_not_an_error() -> None:
    curves = tune(EvaluationTask("bowl", Bowl(1e6)), GRADIENT_DESCENT, seeds=1, horizon=20)
    assert curves.at(20)[len(GRID) // 2 :].isinf().any()
    assert math.isfinite(float(curves.at(20)[curves.best(20)].mean()))


def test_same_starts_and_batches_for_every_optimizer() -> None:
    family = sm_family()
    task = EvaluationTask("pca", family)
    first = run_untuned(task, lambda geometry: sm.RSGD(geometry, 1e-2), seeds=2, horizon=10)
    second = run_untuned(task, lambda geometry: sm.RSGD(geometry, 1e-2), seeds=2, horizon=10)
    assert torch.equal(first.log_excess, second.log_excess)
    tuned = tune(task, GRADIENT_DESCENT, seeds=2, horizon=10)
    assert torch.allclose(tuned.at(10)[tuned.rates.index(1e-2)], first.at(10)[0], atol=1e-5)


def sm_family() -> TaskFamily:
    from subspace_meta.tasks import SyntheticPCA

    return SyntheticPCA(10, 2, batch_size=8, log10_scale=(0.0, 0.0))


def made_up(value: float) -> Curves:
    steps = measured_steps(50)
    excess, ends = torch.full((1, 2, len(steps)), value), torch.zeros(1, 2)
    return Curves(steps, excess, ends[..., None], ends, (0.1,), torch.ones(2), 0.0, 1.0)


@pytest.mark.parametrize(("learned", "verdict"), [(-3.1, "better"), (-3.01, "tie"), (-2.9, "worse")])
def test_the_verdict_is_against_the_best_baseline(learned: float, verdict: str) -> None:
    results = Results(50, 2)
    results.curves["row"] = {"A": [made_up(-3.0)], "B": [made_up(-1.0)], LEARNED: [made_up(learned)]}
    assert results.verdict("row", 20) == verdict
    header, rows = results.table()
    assert header == ["problem", "step", "A", "B", LEARNED, "against the best"]
    assert rows[0] == ["row", "10", "-3.00 @1e-01", "-1.00 @1e-01", f"{learned:.2f}", verdict]
    assert ("**" in results.markdown()) == (verdict == "better")
    assert results.to_json()["problems"][0]["verdict"]["20"] == verdict


def test_a_schedule_ends_at_each_checkpoint() -> None:
    """x <- (1 - lr c(t, T)) x, so the product of the factors is what is measured at T, for every T."""
    told = Baseline("cosine", lambda geometry, lr: sm.RSGD(geometry, lr), schedule=cosine)
    curves = run_baseline(EvaluationTask("bowl", Bowl()), told, (0.1, 0.3), seeds=2, horizon=20)
    assert curves.steps == (0, *curves.checkpoints) == (0, 5, 10, 20)
    for index, rate in enumerate(curves.rates):
        for steps in curves.checkpoints:
            expected = sum(2 * math.log(1 - rate * cosine(t, steps)) for t in range(1, steps + 1))
            assert curves.at(steps)[index].tolist() == pytest.approx([expected] * 2, rel=1e-4)
    assert curves.metric.shape == (2, 2, 3)
    best = tune(EvaluationTask("bowl", Bowl()), told, seeds=1, horizon=10)
    products = [math.prod(abs(1 - rate * cosine(t, 10)) for t in range(1, 11)) for rate in best.rates]
    assert best.best(10) == min(range(len(products)), key=products.__getitem__)


def test_the_cosine_goes_from_one_towards_zero() -> None:
    factors = [cosine(t, 50) for t in range(1, 51)]
    assert factors[0] == 1.0
    assert factors == sorted(factors, reverse=True)
    assert 0.0 < factors[-1] < 2e-3
    assert sum(factors) / 50 == pytest.approx(0.5, abs=0.011)


def test_what_is_measured_is_the_average_where_one_is_handed_out() -> None:
    """x_t = (1 - lr)^t from 1; the mean of the first T of them."""
    task = EvaluationTask("bowl", Bowl())
    curves = evaluate_rates(task, lambda g, lr: sm.Averaging(sm.RSGD(g, lr), power=0.0), (0.3,), seeds=1, horizon=10)
    mean = sum(0.7**t for t in range(1, 11)) / 10
    assert float(curves.at(10)) == pytest.approx(2 * math.log(mean), rel=1e-4)


def test_measured_steps_hold_the_checkpoints_and_the_ends() -> None:
    steps = measured_steps(200)
    assert {0, 10, 20, 50, 100, 200} <= set(steps)
    assert list(steps) == sorted(set(steps))
    assert measured_steps(13)[-1] == 13
