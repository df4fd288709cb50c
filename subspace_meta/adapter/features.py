"""From packed statistics to network inputs that do not depend on scale or size.

Every statistic enters as the logarithm of a ratio, so multiplying the loss by a constant changes nothing, and as a
mean, so the number of rows and columns does not matter. ``FLOOR`` bounds a ratio from below: an energy a million times
smaller than its matrix's mean tells the network no more than that. ``TINY`` only keeps 0/0 finite.
"""

from __future__ import annotations

import torch
from subspace_kernels.reference import FLOOR, TINY, log_ratio
from torch import Tensor

__all__ = ["FLOOR", "TINY", "budget", "clock", "cosine", "log_ratio", "unbounded_log_ratio"]


def cosine(product: Tensor, energy_a: Tensor, energy_b: Tensor) -> Tensor:
    """Return the cosine of two vectors from their mean product and mean energies; 0 where one of them vanishes."""
    return product / ((energy_a + TINY).sqrt() * (energy_b + TINY).sqrt())


def clock(step: Tensor) -> Tensor:
    """Return the time features tanh(t/10 - 1), tanh(t/100 - 1), tanh(t/1000 - 1), of shape ``(3,)``."""
    scales = torch.tensor([10.0, 100.0, 1000.0], dtype=step.dtype, device=step.device)
    return torch.tanh(step / scales - 1.0)


def budget(step: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features of a run that is to have so many steps, ``(4,)``, and the logarithm of the share left.

    The features are 1, the share that is done, log(share left) / 4 and log10(steps / 100) / 2. Where ``steps`` is 0 the
    budget is unknown, and all are 0. The share left is 1 at first; in the last step, and after it, that of one step.

    Args:
        step: how many steps were taken before this one, a scalar.
        steps: how many there will be, a scalar.
    """
    known = steps > 0
    whole = torch.where(known, steps, 1.0)
    left = torch.where(known, torch.maximum(whole - step, torch.ones_like(whole)) / whole, 1.0)
    span = torch.where(known, 0.5 * torch.log10(whole / 100.0), 0.0)
    return torch.stack([known.to(step.dtype), 1.0 - left, 0.25 * torch.log(left), span]), torch.log(left)


def unbounded_log_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return log(sqrt(numerator / denominator)) of two energies; 0 where both vanish."""
    return 0.5 * torch.log((numerator + TINY) / (denominator + TINY))
