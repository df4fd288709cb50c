"""Evolution strategies: against what they are unbiased for, by quadrature; and what they are biased for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from estimator_problems import ES_KINDS, ES_LOOP, ES_STEPS, SIGMA, cut, flat, generator, relative, smooth_setting, whole
from torch import Tensor

from subspace_meta.meta.estimators import Backpropagation, EvolutionStrategies, PersistentES, SinglePerturbationES


def recursion(x: Tensor, log_lr: Tensor, shift: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Iterates ``(nodes, tasks, 2)`` after so many steps, and the mean of their objectives, ``(nodes,)``."""
    h = torch.diagonal(smooth_setting()[2].data["h"], dim1=-2, dim2=-1)
    total = torch.zeros(len(log_lr), dtype=torch.float64)
    for _ in range(steps):
        x = x - log_lr.exp()[:, None, None] * (h * x + shift[:, None, None])
        total = total + 0.5 * (h * x.square()).sum(-1).mean(-1)
    return x, total / steps


def smoothed_gradient(kind: type, pieces: int, nodes: int = 12) -> Tensor:
    """The gradient of what an estimator is said to be unbiased for, by Gauss-Hermite quadrature over perturbations.

    The derivative is taken inside of the mean, by autograd: no formula is shared with the estimators.
    """
    theta, params, _ = smooth_setting()
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    points, weights = torch.tensor(points), torch.tensor(weights / weights.sum())
    dimensions = 2 * pieces if kind is PersistentES else 2
    grid = SIGMA * torch.cartesian_prod(*[points] * dimensions)
    weight = torch.cartesian_prod(*[weights] * dimensions).prod(1)
    mean = torch.stack([theta["log_lr"], theta["shift"]]).requires_grad_()
    total, length, plain = torch.tensor(0.0), ES_STEPS // pieces, params["x"]
    x = plain.expand(len(grid), -1, -1)
    for t in range(pieces):
        own = grid[:, 2 * t : 2 * t + 2] if kind is PersistentES else grid
        used = mean + own
        if kind is EvolutionStrategies:
            x = plain.expand(len(grid), -1, -1)
            plain = recursion(plain[None], *mean.detach()[None].T, length)[0][0]
        x, losses = recursion(x, used[:, 0], used[:, 1], length)
        total = total + (weight * losses).sum()
    return torch.autograd.grad(total, mean)[0]


def sample(kind: type, pieces: int, calls: int, pairs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Mean and standard error of independent estimates of a whole inner problem."""
    theta, params, tasks = smooth_setting()
    random, segments = generator(seed), cut(tasks, pieces)
    found = [flat(whole(kind(ES_LOOP, SIGMA, pairs), theta, params, segments, random)) for _ in range(calls)]
    return torch.stack(found).mean(0), torch.stack(found).std(0) / calls**0.5


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("kind", ES_KINDS)
def test_evolution_strategies_are_unbiased_for_what_they_say(kind: type, pieces: int) -> None:
    expected = smoothed_gradient(kind, pieces)
    torch.testing.assert_close(expected, smoothed_gradient(kind, pieces, nodes=9), rtol=1e-5, atol=1e-7)
    mean, error = sample(kind, pieces, calls=60, pairs=400)
    deviations = [f"{value:+.2f}" for value in (mean - expected) / error]
    share = float(error.norm() / expected.norm())
    print(f"{kind.__name__}, {pieces} segments: off by {deviations} standard errors, each {share:.4f} of the gradient")
    assert float(error.norm()) <= 0.05 * float(expected.norm())
    assert ((mean - expected).abs() <= 3 * error).all()


def test_truncated_evolution_strategies_miss_the_full_horizon() -> None:
    mean, error = sample(EvolutionStrategies, 2, calls=60, pairs=400)
    for kind in (PersistentES, SinglePerturbationES):
        expected = smoothed_gradient(kind, 2)
        print(f"bias of truncated evolution strategies: {relative(mean, expected):.3f} of {kind.__name__}'s target")
        assert ((mean - expected).abs() > 5 * error).any()


def test_truncated_evolution_strategies_go_on_unperturbed() -> None:
    theta, params, tasks = smooth_setting()
    found, expected = (
        estimator(theta, tasks, estimator.start(theta, params, generator()), generator())
        for estimator in (EvolutionStrategies(ES_LOOP, SIGMA, 2), Backpropagation(ES_LOOP))
    )
    assert relative(found.carry.params, expected.carry.params) < 1e-14
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-14)


@pytest.mark.parametrize("kind", [PersistentES, SinglePerturbationES])
def test_particles_keep_their_states_and_sums(kind: type) -> None:
    theta, params, tasks = smooth_setting()
    estimator, random = kind(ES_LOOP, SIGMA, 2), generator()
    carry, sums = estimator.start(theta, params, random), []
    for segment in cut(tasks, 2):
        carry = estimator(theta, segment, carry, random).carry
        sums.append(flat(carry.weights))
    assert carry.carry.params["x"].shape == (4, 2, 2)
    assert torch.equal(*sums) == (kind is SinglePerturbationES)
