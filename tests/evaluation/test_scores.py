"""Scores on synthetic data with known answers: does the interval cover, can luck win?"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making import normal

from subspace_meta.evaluation.scores import (
    bootstrap_interval,
    interquartile_mean,
    performance_profile,
    speed_up,
    steps_to_reach,
)

STEPS = (0, 1, 10, 20, 40)
CURVE = torch.tensor([0.0, -1.0, -2.0, -3.0, -3.0])


def test_steps_to_reach_a_value():
    assert steps_to_reach(STEPS, CURVE, 0.0) == 0.0
    assert steps_to_reach(STEPS, CURVE, -1.0) == 1.0
    assert steps_to_reach(STEPS, CURVE, -2.5) == pytest.approx(15.0)
    assert steps_to_reach(STEPS, CURVE, -3.0) == 20.0
    assert steps_to_reach(STEPS, CURVE, -3.1) == math.inf
    assert steps_to_reach((0, 5), torch.tensor([math.inf, -1.0]), -0.5) == 5.0


def test_speed_up_of_a_curve_that_is_three_times_as_fast():
    steps = tuple(range(101))
    peer = -torch.arange(101.0) / 30
    curve = -torch.arange(101.0) / 10
    value, censored = speed_up(steps, curve, steps, peer, (10, 20, 30))
    assert value == pytest.approx(3.0, rel=1e-5)
    assert not censored
    value, censored = speed_up(steps, curve, steps, peer, (10, 50))  # 150 steps are needed, the run has 100
    assert value == pytest.approx((3.0 * 2.0) ** 0.5, rel=1e-5)
    assert censored
    assert speed_up(steps, peer, steps, peer, (10, 20))[0] == pytest.approx(1.0, rel=1e-4)
    assert speed_up(steps, peer, steps, curve, (30,))[0] == pytest.approx(1 / 3, rel=1e-4)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=40))
def test_interquartile_mean_is_between_the_quartiles(values):
    scores = torch.tensor(values, dtype=torch.float64)
    ordered = scores.sort().values
    n = len(values)
    # By its meaning: every score as four neighbours of equal weight, the outer quarters cut off.
    fine = ordered.repeat_interleave(4)
    assert float(interquartile_mean(scores)) == pytest.approx(float(fine[n : 3 * n].mean()), abs=1e-9)


def test_one_lucky_run_does_not_win():
    """Twice as fast everywhere, against usual speed with one run of a thousand times: the mean is fooled, not we."""
    steady = torch.full((50,), 2.0)
    lucky = torch.ones(50)
    lucky[7] = 1000.0
    assert lucky.mean() > steady.mean()
    assert interquartile_mean(lucky) < interquartile_mean(steady)
    thresholds = torch.tensor([0.5, 1.5, 2.0, 500.0])
    assert performance_profile(lucky, thresholds).tolist() == [1.0, 0.02, 0.02, 0.02]
    assert performance_profile(steady, thresholds).tolist() == [1.0, 1.0, 1.0, 0.0]
    intervals = [bootstrap_interval(list(scores.reshape(10, 5))) for scores in (lucky, steady)]
    assert intervals[0][1] < intervals[1][0]


def test_a_task_with_lucky_seeds_only_does_not_win():
    steady = [torch.full((5,), 1.5) for _ in range(10)]
    lucky = [torch.full((5,), 1.0) for _ in range(9)] + [torch.full((5,), 1e6)]
    assert interquartile_mean(torch.cat(lucky)) < interquartile_mean(torch.cat(steady))


@pytest.mark.parametrize(("runs", "tasks"), [(5, 20), (20, 35)])
@pytest.mark.parametrize("statistic", ["interquartile mean", "mean"])
def test_the_interval_covers_at_its_nominal_rate(statistic, runs, tasks):
    """Tasks of their own level and spread, as many runs as the suite has or more: how often is the truth inside?"""
    repeats = 400
    function = interquartile_mean if statistic == "interquartile mean" else lambda scores: scores.mean(dim=-1)
    levels = torch.exp(0.5 * normal(tasks, seed=1))
    spread = 0.2 + 0.3 * torch.rand(tasks, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def draw(seed, count):
        return levels[:, None] + spread[:, None] * normal(tasks, count, seed=seed)

    truth = float(function(draw(3, 20_000).reshape(-1)))
    inside = 0
    for repeat in range(repeats):
        low, high = bootstrap_interval(list(draw(100 + repeat, runs)), function, level=0.9, samples=200, seed=repeat)
        inside += low <= truth <= high
    # Binomial with 0.9 and 400 draws: two and a half standard deviations are 0.0375. Percentiles of five runs: 0.84.
    assert 0.8625 <= inside / repeats <= 0.9375


def test_the_interval_is_stratified():
    """Scores that differ between tasks only leave nothing to chance."""
    groups = [torch.full((5,), float(level)) for level in range(8)]
    low, high = bootstrap_interval(groups)
    assert low == high == pytest.approx(float(interquartile_mean(torch.cat(groups))), rel=1e-12)
    with pytest.raises(ValueError, match="at least one score"):
        bootstrap_interval([])
