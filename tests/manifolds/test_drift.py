"""Many float32 steps without going back to the manifold: the violation does not grow."""

from __future__ import annotations

import pytest
import torch
from manifold_cases import CASES, label, seeded, spectral

from subspace_meta.manifolds import SPD, Stiefel

every_case = pytest.mark.parametrize("case", CASES, ids=label)


def walk(manifold, shape, steps: int, length: float) -> torch.Tensor:
    """Take random steps of spectral norm ``length``, on SPD with a pull back to the identity; return the last point."""
    generator = seeded()
    x = manifold.random_point(shape, generator, torch.float32)
    for _ in range(steps):
        noise = torch.randn(shape, generator=generator)
        if isinstance(manifold, SPD):
            root = torch.linalg.cholesky(x)
            pull = torch.linalg.inv(root) @ torch.linalg.inv(root).mT
            v = root @ (length * spectral(noise + noise.mT)) @ root.mT + 0.05 * (x @ (pull - torch.eye(shape[-1])) @ x)
        else:
            v = length * spectral(manifold.project(x, noise))
        x = manifold.retract(x, v)
    return x


def bound(manifold) -> float:
    return 5e-7 if isinstance(manifold, Stiefel) else 1e-6


@every_case
def test_five_hundred_steps(case):
    manifold, shape = case
    x = walk(manifold, shape, 500, 0.1)
    assert manifold.violation(x.double()).max() <= bound(manifold)


@pytest.mark.slow
@every_case
def test_twenty_thousand_steps(case):
    manifold, shape = case
    x = walk(manifold, shape, 20_000, 0.1)
    assert manifold.violation(x.double()).max() <= bound(manifold)


@every_case
def test_a_hundred_steps_that_are_all_too_long(case):
    manifold, shape = case
    x = walk(manifold, shape, 100, 100.0)
    assert manifold.violation(x.double()).max() <= 8e-6


@pytest.mark.slow
@every_case
@pytest.mark.parametrize("length", [3.0, 30.0, 1e6])
def test_two_thousand_steps_that_are_all_too_long(case, length):
    manifold, shape = case
    x = walk(manifold, shape, 2_000, length)
    assert manifold.violation(x.double()).max() <= 8e-6


def test_spd_survives_steps_that_are_all_too_long():
    """However far one steps, the next point is positive definite: eigenvalues keep a floor relative to the largest."""
    for retraction in {type(c[0].retraction): c[0] for c in CASES if isinstance(c[0], SPD)}.values():
        x = walk(retraction, (5, 5), 300, 1e3)
        values = torch.linalg.eigvalsh(x.double())
        assert x.isfinite().all()
        assert values[0] > 0
