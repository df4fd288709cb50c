"""Predicted costs: against what one can count by hand, and against the allocator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from subspace_meta.benchmarks.meta import live_bytes, pca_setting
from subspace_meta.meta.cost import available_bytes, predict
from subspace_meta.meta.unroll import run


def predicted(tasks: int, d: int, p: int, steps: int, interval: int | None):
    setting = pca_setting(tasks, d, p, 2)
    loop = replace(setting.loop, interval=interval, compiled=False)
    carry = loop.start(setting.theta, setting.params)
    batch = {name: value[:1] for name, value in setting.batches.items()}
    return predict(loop, setting.theta, carry, batch, setting.data, steps)


def test_the_carry_is_what_the_state_holds():
    cost = predicted(3, 12, 2, 100, None)
    # x and momentum; two LSTM states and two running means a coordinate; eight numbers a matrix; the step, and
    # the number of steps.
    assert cost.carry_bytes == 4 * 3 * (2 * 24 + 14 * (2 * 20 + 2) + 8) + 8
    assert cost.batch_bytes == 4 * 100 * 3 * 64 * 12
    assert (cost.tasks, cost.steps, cost.interval) == (3, 100, 10)
    assert cost.peak_bytes == 10 * cost.carry_bytes + 10 * cost.residual_bytes + cost.batch_bytes


def test_costs_grow_as_they_should():
    one, two = predicted(2, 16, 2, 50, 50), predicted(4, 16, 2, 50, 50)
    assert two.residual_bytes == pytest.approx(2 * one.residual_bytes, rel=0.02)
    assert two.flops == pytest.approx(one.flops, rel=0.02)
    # The network's products alone: 80 x 34 a coordinate, once forward and twice back.
    assert one.flops > 2 * 3 * 80 * 34 * 18


def test_residuals_are_what_the_allocator_holds():
    steps, held, expected = 20, [], []
    # Differences, because each eager operation also costs a node of the graph, whatever the size.
    for tasks in (16, 64):
        setting = pca_setting(tasks, 32, 4, steps)
        loop = replace(setting.loop, compiled=False)
        carry = loop.start(setting.theta, setting.params)
        run(loop, setting.theta, carry, setting.batches, setting.data)
        before = live_bytes()
        trace = run(loop, setting.theta, carry, setting.batches, setting.data)
        held.append((live_bytes() - before) / steps)
        del trace
        batch = {name: value[:1] for name, value in setting.batches.items()}
        expected.append(predict(loop, setting.theta, carry, batch, setting.data, steps).residual_bytes)
    # The allocator also rounds up, and autograd holds a few copies that are no operation's result.
    assert 0.75 < (expected[1] - expected[0]) / (held[1] - held[0]) < 1.05


def test_free_memory_is_known_here():
    free = available_bytes()
    assert free is None or free > 2**20


def test_predicting_changes_nothing():
    setting = pca_setting(2, 8, 2, 2)
    before = torch.get_rng_state()
    predicted(2, 8, 2, 4, None)
    assert torch.equal(before, torch.get_rng_state())
    assert all(not value.requires_grad for value in setting.theta.values())
