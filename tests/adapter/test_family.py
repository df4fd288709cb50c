"""The family of ``base`` contains its peers: meta-parameters set by hand, no training, follow tuned optimizers."""

import math

import pytest
import torch

import subspace_meta as sm
from subspace_meta.adapter.base import BaseAdapter
from subspace_meta.evaluation import archive
from subspace_meta.evaluation.protocol import EvaluationTask, run_untuned
from subspace_meta.tasks.suite import evaluation_suite

TASKS = {task.row: task for task in evaluation_suite()}
CLOSE = 0.1  # in log excess


def by_hand(gauges, momentum, spectral=0.0, rows_and_columns=0.0):
    """Return meta-parameters of a silent network: powers of the gauges, share of the momentum, RASA's exponents."""
    weights = {name: torch.zeros(shape) for name, shape in BaseAdapter().weight_shapes().items()}
    weights["length.gauge"] = torch.tensor([*gauges, 0.0, 0.0])  # the last ones need the number of steps, and noise
    weights["mix.bias"] += math.log(momentum / (1 - momentum)) if 0 < momentum < 1 else 40.0 * (2 * momentum - 1)
    weights["spectral.bias"] += 40.0 * (2 * spectral - 1)
    weights["scale.skip"][:, 2] = rows_and_columns
    weights["decay.bias"] += math.log(9.0)
    return weights


def best_of(row, weights, rates, horizon):
    """Return the best mean log excess at the checkpoints over a grid of rates, as the peers have."""
    found = []
    for rate in rates:
        tuned = {**weights, "length.bias": torch.tensor(math.log(rate))}
        curves = run_untuned(
            EvaluationTask(row, TASKS[row].family),
            lambda geometry, tuned=tuned: sm.SubspaceOptimizer(geometry, tuned),
            archive.SEEDS,
            horizon,
        )
        found.append({step: float(curves.at(step).mean()) for step in curves.checkpoints})
    return {step: min(scores[step] for scores in found) for step in found[0]}


def follows(row, baseline, weights, rates, horizon):
    """Assert that at every checkpoint the family is no more than 0.1 behind a tuned peer."""
    cell, ours = archive.load(row)[baseline], best_of(row, weights, rates, horizon)
    behind = {step: ours[step] - cell.score(step) for step in ours if step in cell.checkpoints}
    assert len(behind) >= 4
    assert max(behind.values()) <= CLOSE, behind


RASA_DECAYING = by_hand([1.0, 0.0, -0.5, 0.0, -1.0], momentum=0.0, rows_and_columns=-0.5)


def test_rasa_with_a_decaying_rate():
    follows("synthetic PCA 64x8", "RASA-LR decaying", RASA_DECAYING, (0.06, 0.1, 0.18, 0.3, 0.56, 1.0), 400)


@pytest.mark.slow
def test_rasa_with_a_decaying_rate_for_4000_steps():
    rates = (0.03, 0.06, 0.1, 0.18, 0.3, 0.56, 1.0)
    follows("synthetic PCA 64x8, 4000 steps", "RASA-LR decaying", RASA_DECAYING, rates, 4000)


def test_gradient_descent_with_momentum_to_the_floor():
    weights = by_hand([1.0, 1.0, 0.0, 1.0, 0.0], momentum=1.0)
    follows("Rayleigh quotient 200", "RSGD-momentum", weights, (0.03, 0.1, 0.18, 0.3, 0.56, 1.0), 200)


def test_nesterov_to_the_floor():
    """r + 0.9 m of the sum m is 0.1 r + 0.9 M of the mean M, ten times; in the first step 1.9 times: 10 (0.1)^0.72."""
    weights = by_hand([1.0, 1.0, 0.0, 0.72, 0.0], momentum=0.9)
    rates = (0.1, 0.18, 0.24, 0.3, 0.42, 0.56, 0.75, 1.0, 1.8)
    follows("Rayleigh quotient 200", "RSGD-Nesterov", weights, rates, 200)


@pytest.mark.slow
@pytest.mark.skipif(
    not TASKS["orthonormal classification of YaleB 1024x38"].available, reason="the faces are read from a folder"
)
def test_spectral_descent():
    weights = by_hand([0.0] * 5, momentum=1.0, spectral=1.0)
    rates = (0.003, 0.0056, 0.0075, 0.01, 0.013, 0.018)
    follows("orthonormal classification of YaleB 1024x38", "SPEL", weights, rates, 50)
