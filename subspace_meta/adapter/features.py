"""From packed statistics to network inputs that do not depend on scale or size.

Every statistic enters as the logarithm of a ratio, so multiplying the loss by a constant changes nothing, and as a
mean, so the number of rows and columns does not matter. ``FLOOR`` bounds a ratio from below: an energy a million times
smaller than its matrix's mean tells the network no more than that. ``TINY`` only keeps 0/0 finite.
"""

from __future__ import annotations

import torch
from subspace_kernels.reference import FLOOR, TINY, log_ratio
from torch import Tensor

__all__ = ["FLOOR", "TINY", "clock", "cosine", "log_ratio", "unbounded_log_ratio"]


def cosine(product: Tensor, energy_a: Tensor, energy_b: Tensor) -> Tensor:
    """Return the cosine of two vectors from their mean product and mean energies; 0 where one of them vanishes."""
    return product / ((energy_a + TINY).sqrt() * (energy_b + TINY).sqrt())


def clock(step: Tensor) -> Tensor:
    """Return the time features tanh(t/10 - 1), tanh(t/100 - 1), tanh(t/1000 - 1), of shape ``(3,)``."""
    scales = torch.tensor([10.0, 100.0, 1000.0], dtype=step.dtype, device=step.device)
    return torch.tanh(step / scales - 1.0)


def unbounded_log_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return log(sqrt(numerator / denominator)) of two energies; 0 where both vanish."""
    return 0.5 * torch.log((numerator + TINY) / (denominator + TINY))
