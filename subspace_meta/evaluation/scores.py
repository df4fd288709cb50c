"""Scores that outsiders accept: speed-up over a tuned peer, interquartile means with intervals, performance profiles.

Sources: normalised speed-up, Metz et al., "VeLO: training versatile learned optimizers by scaling up", 2022; aggregates
and intervals, Agarwal et al., "Deep reinforcement learning at the edge of the statistical precipice", NeurIPS 2021;
performance profiles, Dolan and More, "Benchmarking optimization software with performance profiles", 2002.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import torch
from torch import Tensor


def steps_to_reach(steps: Sequence[int], curve: Tensor, value: float) -> float:
    """Return the step at which a falling curve first reaches ``value``, between measured steps by interpolation.

    Args:
        steps: the measured steps, ascending, starting with 0.
        curve: ``(len(steps),)``, not rising.
        value: what is to be reached.

    Returns:
        ``inf`` if it never is; 0 if the curve starts there.
    """
    reached = (curve <= value).nonzero()
    if not len(reached):
        return math.inf
    index = int(reached[0])
    if index == 0:
        return 0.0
    above, below = float(curve[index - 1]), float(curve[index])
    share = (above - value) / (above - below) if math.isfinite(above) and above > below else 1.0
    return steps[index - 1] + share * (steps[index] - steps[index - 1])


def speed_up(
    steps: Sequence[int], curve: Tensor, peer_steps: Sequence[int], peer: Tensor, at: Sequence[int]
) -> tuple[float, bool]:
    """Return how many times more steps a peer needs to reach what ``curve`` has reached, averaged over steps ``at``.

    The mean is geometric. Where the peer never gets there within its run, the length of the run counts: the speed-up is
    then at least that.

    Args:
        steps, curve: of the optimizer that is judged; the curve is a running minimum.
        peer_steps, peer: of the peer: the lower envelope over its learning rates.
        at: steps of the optimizer, among ``steps``.

    Returns:
        The speed-up, and whether it is only a lower bound.
    """
    logs, censored = [], False
    for step in at:
        needed = steps_to_reach(peer_steps, peer, float(curve[list(steps).index(step)]))
        censored |= not math.isfinite(needed)
        logs.append(math.log(min(max(needed, 1.0), peer_steps[-1]) / step))
    return math.exp(sum(logs) / len(logs)), censored


def interquartile_mean(scores: Tensor) -> Tensor:
    """Return the mean of the middle half of ``scores`` along the last dimension.

    A quarter of the scores is cut at each end; a score at the border of the quarter counts with its part.
    """
    ordered = scores.sort(dim=-1).values
    count = scores.shape[-1]
    position = torch.arange(count, dtype=torch.float64)
    weight = (torch.minimum(position + 1, torch.tensor(0.75 * count)) - position.clamp(min=0.25 * count)).clamp(min=0)
    return (ordered.double() * weight).sum(dim=-1) / weight.sum()


def bootstrap_interval(
    groups: Sequence[Tensor],
    statistic: Callable[[Tensor], Tensor] = interquartile_mean,
    level: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return an interval of a statistic by stratified bootstrap: runs are drawn anew within each task.

    n runs drawn from n vary by (n-1)/n of what new runs would, so each draw is stretched about its task's mean by the
    root of n/(n-1) (Rao and Wu, "Resampling inference with complex survey data", 1988); of five runs a plain
    bootstrap's interval would be a tenth too short. The interval is the normal one with the bootstrap's standard error,
    which covers at its rate where percentiles of few runs do not (``tests/evaluation/test_scores.py``).

    Args:
        groups: scores of the runs of each task. A single run says nothing of its spread.
        statistic: of scores ``(samples, n)``, along the last dimension.
        level: of confidence.
        samples: bootstrap samples.
        seed: of their draw.

    Raises:
        ValueError: there are no scores.
    """
    if not groups or any(len(group) == 0 for group in groups):
        raise ValueError("an interval needs at least one score for each task")
    generator = torch.Generator().manual_seed(seed)

    def drawn(group: Tensor) -> Tensor:
        n = len(group)
        stretch = math.sqrt(n / (n - 1)) if n > 1 else 1.0
        mean = group.double().mean()
        return mean + stretch * (group.double()[torch.randint(n, (samples, n), generator=generator)] - mean)

    error = float(statistic(torch.cat([drawn(group) for group in groups], dim=-1)).std())
    middle = float(statistic(torch.cat(list(groups)).double()))
    width = NormalDist().inv_cdf(0.5 + 0.5 * level) * error
    return middle - width, middle + width


def performance_profile(scores: Tensor, thresholds: Tensor) -> Tensor:
    """Return the share of ``scores`` ``(n,)`` that are at least each threshold ``(m,)``."""
    return (scores[None] >= thresholds[:, None]).double().mean(dim=-1)
